#!/usr/bin/env python3
"""
Two trainings of the same network, compared on one page, most often without GPAS and with it:

    python3 dev/tools/compare.py out/pre out/pre_gpas

The page shows losses, the steps that one needed to reach the other's loss, variances, gates and a
story from each. report.py draws the same and more for any number of runs.
"""
import math
import os
import shlex
import sys
from textwrap import wrap

from runs import Error, Run, checkpoints, printable
from command import Parser, main

WIDTH, STORY_LINES = 80, 12
UTF = (sys.stdout.encoding or "").lower().startswith("utf")
FULL, LEFT, RIGHT, AXIS, RULE = "█▐▌│─" if UTF else ("#", "", "", "|", "-")
COLOR = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
BOLD, FAINT, CYAN = "1", "2", "36"


def paint(text, code):
    return f"\033[{code}m{text}\033[0m" if COLOR else text


def bar(value, largest, width, left=False):
    """A bar in half characters, empty for nan; it grows to the right, or to the left."""
    share = 0 if math.isnan(value) or largest == 0 else min(abs(value) / largest, 1)
    whole, half = divmod(round(2 * width * share), 2)
    if left:
        return (LEFT * half + FULL * whole).rjust(width)
    return (FULL * whole + RIGHT * half).ljust(width)


def largest_of(values):
    return max((abs(value) for value in values if math.isfinite(value)), default=0)


def short(value):
    plain = value == 0 or 0.01 <= abs(value) < 1000 or not math.isfinite(value)
    return f"{value:.3f}" if plain else f"{value:.2e}"


# ---------------------------------------------------------------------------
# The page, section by section; each returns its lines. a and b are the runs.

def names_of(a, b):
    """How the page calls the runs: at the head of a column, and in a sentence."""
    if b.gpas and not a.scaled:
        return ("baseline", "GPAS"), ("the baseline", "GPAS")
    return ("first", "second"), ("the first run", "the second run")


def title(a, b, last):
    heads, _ = names_of(a, b)
    lines = [paint(f"Two networks of {a.L} layers after {last} steps", BOLD), RULE * WIDTH]
    for head, run in zip(heads, (a, b)):
        lines += wrap(f"{head}: {run.folder} ({run.kind()}, {run.state()})", WIDTH)
    notes = []
    if not a.last == b.last == last:
        notes.append(f"Compared up to step {last}, the last one validated in both.")
    if a.rows[last]["lr"] != b.rows[last]["lr"]:
        notes.append(f"At step {last} their learning rates differ, which alone changes the "
                     "losses.")
    if not math.isclose(a.val.get(0, math.inf), b.val.get(0, math.inf), rel_tol=1e-3):
        notes.append("They do not start from the same loss, as two networks of one seed would "
                     "with all gates at 0.")
    return lines + [paint(line, BOLD) for note in notes for line in wrap("Note: " + note, WIDTH)]


def losses(a, b, steps):
    shown = steps[::min(-1, -math.ceil((len(steps) - 1) / 10))][::-1]     # the last in any case
    change = [b.val[step] - a.val[step] for step in shown]
    largest, half = largest_of(change), (WIDTH - 44) // 2
    (first, second), _ = names_of(a, b)
    lines = ["", paint("Validation loss", BOLD),
             paint(f"{'step':>7}{first:>11}{second:>11}{'difference':>12}  "
                   f"{second + ' lower':>{half}}{AXIS}{second} higher", FAINT)]
    for step, diff in zip(shown, change):
        below, above = (diff, 0) if diff < 0 else (0, diff)
        lines.append(f"{step:7}{a.val[step]:11.4f}" + paint(f"{b.val[step]:11.4f}", CYAN)
                     + f"{diff:+12.4f}  " + bar(below, largest, half, left=True) + AXIS
                     + bar(above, largest, half))
    return lines


def verdict(a, b, last):
    goal, end = a.val[last], b.val[last]
    _, (first, second) = names_of(a, b)
    if last == 0 or not math.isfinite(goal):
        return f"Nothing to reach: the loss of {first} is {goal:.4f} at step {last}."
    final = "final loss" if last == a.last else f"step-{last} loss"
    step, own = b.reached(goal, last), a.reached(goal, last)
    if step is None:
        back = a.reached(end, last)
        text = (f"{second} did not reach {first}'s {final} {goal:.4f} in {last} steps: it ended at "
                f"{end:.4f}" + ("." if back is None else
                                f", which {first} reached after about {back:.0f} steps."))
    else:
        # The first may have had its final loss earlier. Then the steps saved are not those of its
        # whole run, and no percentage is printed.
        text = (f"{second} reached {first}'s {final} {goal:.4f} after about {step:.0f} of {last} "
                + ("steps" if own < last else f"steps ({100 * (1 - step / last):.0f}% fewer)")
                + (" and" if end <= goal else ", but") + f" ended at {end:.4f}."
                + (f" {first} was that low before its end, too: after about {own:.0f} steps."
                   if own < last else ""))
    return text[0].upper() + text[1:]


def steps_needed(a, b, last):
    paper = ("The paper reports about 18% fewer steps with GPAS, for models from 71M to 1B "
             "parameters. One seed at this size is an illustration, not a proof.")
    return ["", *(paint(line, BOLD) for line in wrap(verdict(a, b, last), WIDTH)),
            *(paint(line, FAINT) for line in wrap(paper, WIDTH))]


def by_layer(a, b):
    step = max(set(a.layers) & set(b.layers), default=None)
    if step is None:
        raise Error(f"{a.folder} and {b.folder}: their layers.csv have no step in common")
    pairs = [(a.layers[step][i]["mlp_variance"], b.layers[step][i]["mlp_variance"])
             for i in range(1, a.L + 1)]
    largest, size = largest_of(sum(pairs, ())), (WIDTH - 48) // 2
    (first, second), (the_first, the_second) = names_of(a, b)
    known = b.scaled and b.factor(0.0) is not None
    lines = ["", paint(f"Variance of the activation that leaves each layer at step {step}"
                       + (", and the gates" if b.scaled else ""), BOLD),
             paint(f"{'layer':>5}{first:>11} {'':{size}}{second:>11} {'':{size}}"
                   + (f"{'gate g':>8}" if b.scaled else "") + (f"{'1-a(g)':>11}" if known else ""),
                   FAINT)]
    for i, (old, new) in enumerate(pairs, 1):
        gate = b.layers[step][i]["gate"]
        lines.append(f"{i:5}{short(old):>11} {bar(old, largest, size)}"
                     + paint(f"{short(new):>11} {bar(new, largest, size)}", CYAN)
                     + (f"{gate:+8.3f}" if b.scaled else "")
                     + (f"{b.factor(gate):11.3f}" if known else ""))
    ratio = [end / start if start else math.nan for start, end in zip(pairs[0], pairs[-1])]
    text = f"Last layer over first: {ratio[0]:.3g} in {the_first}, {ratio[1]:.3g} in {the_second}."
    if known:
        text += " Each of a layer's two sites multiplies the activation by 1-a(g)."
    return lines + wrap(text, WIDTH)


def story(run, name):
    step = max(run.stories, default=None)
    lines = [line for paragraph in printable(run.stories.get(step, "")).split("\n")
             for line in wrap(paragraph, WIDTH - 2)]
    if len(lines) > STORY_LINES:
        lines[STORY_LINES - 1:] = ["[...]"]
    head = f"writes at step {step}" if step else "has written no story yet"
    return ["", paint(f"{name[0].upper()}{name[1:]} {head}", BOLD)] + ["  " + x for x in lines]


def hints(a, b):
    lines = ["", *wrap(f"Logs and checkpoints: {a.folder} and {b.folder}.", WIDTH)]
    if checkpoints(b.folder):
        lines += ["Another story:", f"  ./train_gpas --load {shlex.quote(b.folder)} "
                  '--prompt "Once upon a time"']
    return lines


def compare(a, b):
    if a.L != b.L:
        raise Error(f"{a.folder} has {a.L} layers, {b.folder} {b.L}: not the same network")
    steps = [step for step in a.val if step in b.val]
    if not steps:
        raise Error(f"{a.folder} and {b.folder}: their log.csv have no validated step in common")
    _, (first, second) = names_of(a, b)
    return (title(a, b, steps[-1]) + losses(a, b, steps) + steps_needed(a, b, steps[-1])
            + by_layer(a, b) + story(a, first) + story(b, second) + hints(a, b))


def run():
    parser = Parser(description="Compares two trainings, most often without GPAS and with it.")
    parser.add_argument("first", help="folder of the one, the baseline")
    parser.add_argument("second", help="folder of the other, with GPAS")
    options = parser.parse_args()
    page = compare(Run(options.first), Run(options.second))
    print("\n".join(line.rstrip() for line in page))


if __name__ == "__main__":
    main(run)
