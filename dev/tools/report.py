#!/usr/bin/env python3
"""
Draws any number of runs, finished or still training, into one HTML file that needs nothing else:

    python3 dev/tools/report.py out/pre out/pre_gpas ...      writes out/report.html (--out FILE)

The first run is the one that the others are compared with.
"""
import html
import math
import os
from statistics import mean, median

from runs import Error, Run, printable
from command import Parser, check_file, main, new_file

HEAD = "<!DOCTYPE html><!-- written by dev/tools/report.py -->"
COLORS = 7                              # of the runs, --c0 to --c6 below; then they begin again
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 440, 260, 56, 38, 10     # of a chart; the margins in it
POINTS, PANELS = 200, 3                 # of a line; of a quantity by layer
STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1f2937; --faint: #6b7280; --line: #e5e7eb;
  --c0: #6b7280; --c1: #0063b2; --c2: #c2410c; --c3: #15803d; --c4: #a21caf; --c5: #a16207;
  --c6: #0e7490; }
@media (prefers-color-scheme: dark) { :root { --back: #111418; --text: #e5e7eb; --faint: #9ca3af;
  --line: #374151; --c0: #9ca3af; --c1: #60a5fa; --c2: #fb923c; --c3: #4ade80; --c4: #e879f9;
  --c5: #facc15; --c6: #22d3ee; } }
@media print { :root { color-scheme: light; } section, figure { break-inside: avoid; } }
body { margin: 0 auto; padding: 1rem; max-width: 1120px; background: var(--back);
  color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p, figcaption, th { color: var(--faint); }
.wide { overflow-x: auto; } table { border-collapse: collapse; }
td, th { padding: .2rem .8rem .2rem 0; text-align: left; white-space: nowrap;
  border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums; }
th { font-weight: normal; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr));
  gap: 1rem; } figure { margin: 0; } svg { width: 100%; height: auto; }
svg text { font: 12px system-ui, sans-serif; fill: var(--faint); }
svg .grid { stroke: var(--line); } svg .zero { stroke: var(--faint); }
svg .run { fill: none; stroke-width: 2; stroke-linejoin: round; }
.key { display: inline-block; width: 1.2em; height: .25em; margin-right: .5em;
  vertical-align: middle; }
.run-name { white-space: nowrap; margin-right: .7em; }
pre { white-space: pre-wrap; font: inherit; margin: .3rem 0 1rem; padding-left: 1rem;
  border-left: 3px solid; }
"""


def color(number):
    return f"var(--c{number % COLORS})"


# ------------------------------------------------------------------------------------------------
# Charts: a line for each run, as SVG.

def ticks(low, high):
    """About four round numbers from low to high."""
    step = 10 ** math.floor(math.log10((high - low) / 3))
    step *= max(m for m in (1, 2, 5) if m * step <= (high - low) / 3)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def decades(low, high):
    """Round numbers on a logarithmic axis, as logarithms."""
    factors = (1,) if high - low > 2 else (1, 2, 5) if high - low > 0.5 else (1, 1.5, 2, 3, 5, 7)
    return [math.log10(m) + e for e in range(math.floor(low), math.ceil(high) + 1) for m in factors
            if low <= math.log10(m) + e <= high]


def extent(values):
    low, high = min(values), max(values)
    pad = (high - low) * 0.04 or abs(high) * 0.1 or 1
    return low - pad, high + pad


def chart(caption, lines, across, log=False, zero=False, like=None):
    """lines: [(number of the run, [(x, y)])]. across: the label of the x axis. like: the lines of
    all charts that share the axes. zero: draw a line at 0."""
    def finite(lines):
        return [(n, [(x, math.log10(y) if log else y) for x, y in points
                     if y is not None and math.isfinite(y) and (y > 0 or not log)])
                for n, points in lines]
    lines = finite(lines)
    all_points = [p for _, points in finite(like) if points for p in points] if like else \
        [p for _, points in lines for p in points]
    if not all_points:
        return ""
    x0, x1 = extent([x for x, _ in all_points])
    y0, y1 = extent([y for _, y in all_points] + [0] * zero)

    def at_x(x):
        return LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - 8)

    def at_y(y):
        return HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - BOTTOM - TOP)
    parts = []
    for y in (decades if log else ticks)(y0, y1):
        name = f"{10 ** y:.3g}" if log else f"{0 if abs(y) < 1e-12 else y:.6g}"
        kind = "zero" if zero and abs(y) < 1e-12 else "grid"
        parts.append(f'<path class="{kind}" d="M{LEFT} {at_y(y):.1f}H{WIDTH - 8}"/><text '
                     f'x="{LEFT - 6}" y="{at_y(y) + 4:.1f}" text-anchor="end">{name}</text>')
    for x in filter(float.is_integer, map(float, ticks(x0, x1))):
        parts.append(f'<text x="{at_x(x):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">'
                     f'{x:.6g}</text>')
    for number, points in lines:
        path = "L".join(f"{at_x(x):.1f} {at_y(y):.1f}" for x, y in points)
        dot = len(points) == 1 and f'<circle cx="{at_x(points[0][0]):.1f}" r="3" ' \
            f'cy="{at_y(points[0][1]):.1f}" fill="{color(number)}"/>'
        if points:
            parts.append(dot or f'<path class="run" stroke="{color(number)}" d="M{path}"/>')
    parts.append(f'<text x="{WIDTH - 8}" y="{HEIGHT - 6}" text-anchor="end">{across}</text>')
    return (f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{caption}">'
            + "".join(parts) + f"</svg><figcaption>{caption}</figcaption></figure>")


def thin(points):
    """At most POINTS points: means of neighbours."""
    size = -(-len(points) // POINTS)
    groups = [points[at:at + size] for at in range(0, len(points), size)]
    return [(mean(x for x, _ in group), mean(y for _, y in group)) for group in groups]


# ------------------------------------------------------------------------------------------------
# The sections of the page.

def table(head, rows):
    def row(cells, tag):
        return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"
    return ('<div class="wide"><table>' + row(head, "th")
            + "".join(row(cells, "td") for cells in rows) + "</table></div>")


def key(number, run):
    return (f'<span class="run-name"><span class="key" style="background: {color(number)}"></span>'
            + html.escape(run.folder) + "</span>")


def overview(runs):
    """A row for each run. The steps that it needed to reach the loss of the first run are compared
    with those that the first run itself needed."""
    first, rows = runs[0], []
    goal_step = max(first.val, default=None)
    for number, run in enumerate(runs):
        at = max(run.val, default=None)
        common = [step for step in run.val if step in first.val]
        change = f"{run.val[common[-1]] - first.val[common[-1]]:+.4f} at step {common[-1]}" \
            if number and common else ""
        needed = ""
        if number and goal_step:
            step = run.reached(first.val[goal_step])
            own = first.reached(first.val[goal_step])
            needed = "not reached" if step is None else f"{step:.0f}"
            if step is not None and own:
                needed += f" of {own:.0f} ({100 * (step / own - 1):+.0f}%)"
        speed = [row["tokens_per_s"] for row in run.rows.values() if row["tokens_per_s"]]
        rows.append([key(number, run), html.escape(run.kind()), run.state(),
                     f"{run.val[at]:.4f}" if at is not None else "", change, needed,
                     f"{median(speed):,.0f}" if speed else ""])
    return table(["run", "network", "training", "validation loss", "difference from the first",
                  "steps to reach the first's loss", "tokens/s"], rows)


def configuration(runs):
    names = list(dict.fromkeys(name for run in runs for name in run.options if name != "out"))
    rows = {name: [html.escape(run.options.get(name, "?")) for run in runs] for name in names}
    differ = [[name, *row] for name, row in rows.items() if len(set(row)) > 1]
    same = [[name, row[0]] for name, row in rows.items() if len(set(row)) == 1]
    head = ["option", *(key(number, run) for number, run in enumerate(runs))]
    return ((table(head, differ) if differ else "<p>The runs have the same options.</p>")
            + "<details><summary>Options that all runs share</summary>"
            + table(["option", "value"], same) + "</details>")


def losses(runs):
    val = [(n, sorted(run.val.items())) for n, run in enumerate(runs)]
    train = [(n, thin([(step, row["train_loss"]) for step, row in run.rows.items()
                       if row["train_loss"] is not None])) for n, run in enumerate(runs)]
    change = [(n, [(step, loss - runs[0].val[step]) for step, loss in sorted(run.val.items())
                   if step in runs[0].val]) for n, run in enumerate(runs) if n]
    return [chart("Validation loss, nats per token", val, "step"),
            chart("Validation loss minus that of the first run", change, "step", zero=True),
            chart("Training loss, nats per token", train, "step")]


def by_layer(runs, quantity, name, log):
    """A chart for each of a few steps, with the same axes."""
    steps = sorted({step for run in runs for step, layers in run.layers.items()
                    if layers[1][quantity] is not None})
    if not steps:
        return []
    steps = sorted({steps[round(i * (len(steps) - 1) / (PANELS - 1))] for i in range(PANELS)})
    panels = [[(n, [(layer, row[quantity]) for layer, row in run.layers[step].items()])
               for n, run in enumerate(runs) if step in run.layers] for step in steps]
    every = sum(panels, [])
    return [chart(f"{name}, step {step}", lines, "layer", log=log, zero=not log, like=every)
            for step, lines in zip(steps, panels)]


def stories(runs):
    parts = []
    for number, run in enumerate(runs):
        step = max(run.stories, default=None)
        text = html.escape(printable(run.stories[step])) if step else "No story yet."
        parts.append(f"<p>{key(number, run)}" + (f", step {step}" if step else "")
                     + f'</p><pre style="border-color: {color(number)}">{text}</pre>')
    return "".join(parts)


def page(runs):
    parts = [HEAD, '<html lang="en"><meta charset="utf-8"><title>GPAS: runs compared</title>',
             '<meta name="viewport" content="width=device-width, initial-scale=1">',
             f"<style>{STYLE}</style>", "<h1>Runs compared</h1>", overview(runs),
             "<h2>Configuration</h2>", configuration(runs)]
    legend = " ".join(key(number, run) for number, run in enumerate(runs))
    for head, text, charts in (
            ("Losses", "In nats (natural logarithm) per token.", losses(runs)),
            ("Variance of the activation that leaves each layer",
             "In Pre-LN without GPAS it grows with depth. The axis is logarithmic.",
             by_layer(runs, "mlp_variance", "Variance", True)),
            ("Gates", "At each of its two sites a layer scales the activation by 1 - a(g).",
             by_layer(runs, "gate", "Gate g", False)),
            ("Gradient norm by layer", "Of the layer's parameters, before clipping. The axis is "
             "logarithmic, and step 0 has no gradient yet.",
             by_layer(runs, "grad_norm", "Gradient norm", True))):
        if any(charts):
            parts.append(f"<section><h2>{head}</h2><p>{text}</p><p>{legend}</p>"
                         f'<div class="charts">{"".join(charts)}</div></section>')
    return "\n".join(parts + ["<h2>Stories</h2>", stories(runs)]) + "\n"


def run():
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the --out folder of a training")
    parser.add_argument("--out", metavar="FILE", default="out/report.html")
    options = parser.parse_args()
    if os.path.exists(options.out):
        with open(check_file(options.out), "rb") as file:
            if file.read(len(HEAD)) != HEAD.encode():
                raise Error(f"{options.out} is not a report; give another --out")
    text = page([Run(folder) for folder in options.runs])
    with new_file(options.out) as name, open(name, "w", encoding="utf-8", errors="replace") as file:
        file.write(text)
    print(f"{options.out} shows {len(options.runs)} runs; open it in a browser")


if __name__ == "__main__":
    main(run)
