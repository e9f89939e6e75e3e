#!/usr/bin/env python3
"""
Trains what dev/tools/experiments.tsv lists, then draws what the logs show.

    make figures                                # everything; needs matplotlib
    python3 dev/tools/figures.py --run-only     # trains, draws nothing
    python3 dev/tools/figures.py --draw-only    # draws from the logs that are there

Each line of the table is one experiment, trained once for each seed into OUT/NAME/seed-S. An
interrupted run is resumed from its last checkpoint, and a complete one is not repeated, so the
figures of a finished set can be drawn again at once. The figures go to docs/figures as SVG, the
numbers to docs/figures/numbers.md. The figures find an experiment by its name, which is
SCHEME.KIND.DATA.LR, as in pre.gpas.toy.1e-3.
"""
import io
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)), ".."))
from command import Error, Interrupted, Parser, main, new_file, say
from runs import LOG, Run, checkpoints, read_table


# ---------------------------------------------------------------------------
# The table and its runs

class Experiment:
    """One configuration: its name, the options of ./train_gpas, its folders."""

    def __init__(self, name, options, out):
        self.name, self.options, self.out = name, options, out
        parts = name.split(".")
        if len(parts) != 4 or not re.fullmatch(r"[A-Za-z0-9_.+-]+", name):
            raise Error(f"{name!r} is not named SCHEME.KIND.DATA.LR")
        self.scheme, self.kind, self.data, self.lr = parts
        if "--steps" not in options[:-1] or not re.fullmatch(r"[0-9]{1,9}", self.steps()):
            raise Error(f"{name} has no whole number --steps")

    def folder(self, seed):
        return os.path.join(self.out, self.name, f"seed-{seed}")

    def steps(self):
        return self.options[self.options.index("--steps") + 1]


def read_experiments(path, out):
    """The experiments and seeds. A run's own options override those of the line `common`."""
    experiments, common, seeds = [], [], []
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().split("\n")
    except ValueError:
        raise Error(f"{path} is not UTF-8")
    for at, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, tab, options = line.partition("\t")
        if not tab:
            raise Error(f"{path}, line {at}: expected a name, a tab, options")
        try:
            if name == "common":
                common = shlex.split(options)
            elif name == "seeds":
                seeds = [int(seed) for seed in options.split()]
            else:
                own = shlex.split(options)
                merged = {**dict(zip(common[::2], common[1::2])), **dict(zip(own[::2], own[1::2]))}
                experiments.append(Experiment(name, [x for p in merged.items() for x in p], out))
        except ValueError as error:
            raise Error(f"{path}, line {at}: {error}")
    if not experiments or not seeds:
        raise Error(f"{path} names no experiments or no seeds")
    names = [e.name for e in experiments]
    if len(set(names)) != len(names):
        raise Error(f"{path} has a name twice")
    return experiments, seeds


def final_loss(experiment, seed):
    """The validation loss at the last step, or None if the run is not complete."""
    path = os.path.join(experiment.folder(seed), "log.csv")
    rows = read_table(path, LOG, ["step"]) if os.path.exists(path) else []
    done = rows and str(rows[-1]["step"]) == experiment.steps()
    return rows[-1]["val_loss"] if done else None


def train(experiment, seed, program, folders):
    """Starts a run, or resumes it; ends the program if ./train_gpas fails."""
    folder = experiment.folder(seed)
    output_path = os.path.join(folder, "output.txt")
    os.makedirs(folder, exist_ok=True)
    if os.listdir(folder) and not os.path.exists(output_path):
        raise Error(f"{folder} holds what figures.py did not write; name another --out")
    if checkpoints(folder):
        command = [program, "--resume", folder]
    else:
        command = [program, *experiment.options, "--seed", str(seed), "--out", folder,
                   "--data", folders[experiment.data], "--overwrite", "on"]
    with open(output_path, "a", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            status = process.wait()
        except Interrupted as stop:
            say("waiting for the run to save; a second signal stops at once. Call again to resume")
            # It may have had the same signal already, and stops at once at the second of a kind.
            interrupted = stop.args[0] == signal.SIGINT
            process.send_signal(signal.SIGTERM if interrupted else signal.SIGINT)
            process.wait()
            raise
    if status:
        raise Error(f"{' '.join(command)} ended with status {status}; see {output_path}")
    for name in checkpoints(folder):
        os.unlink(os.path.join(folder, name))  # the logs are what the figures need


def run_all(experiments, seeds, program, folders):
    jobs = [(e, s) for s in seeds for e in experiments if final_loss(e, s) is None]
    total, begin, seconds = len(experiments) * len(seeds), time.time(), []
    print(f"{total - len(jobs)} of {total} runs are there, {len(jobs)} to go", flush=True)
    for number, (experiment, seed) in enumerate(jobs):
        start = time.time()
        train(experiment, seed, program, folders)
        seconds.append(time.time() - start)
        left = statistics.mean(seconds) * (len(jobs) - number - 1)
        loss = final_loss(experiment, seed)
        print(f"{number + 1}/{len(jobs)}  {experiment.name} seed {seed}: validation loss {loss}, "
              f"{seconds[-1]:.0f} s, {left / 60:.0f} min left", flush=True)
    if jobs:
        print(f"all runs took {(time.time() - begin) / 60:.0f} min")


# ---------------------------------------------------------------------------
# What the logs say

RATE = "1e-3"  # the paper's learning rate for its 71M network, and ours unless told otherwise
SCHEMES = ("pre", "lns", "sandwich", "post", "deepnorm", "mix")
SHOWN = ("pre", "sandwich", "deepnorm")


class Result:
    """The runs of one experiment, one for each seed."""

    def __init__(self, experiment, seeds):
        self.experiment = experiment
        self.runs = [Run(experiment.folder(seed)) for seed in seeds]
        self.steps = sorted(self.runs[0].val)
        self.layer_steps = sorted(self.runs[0].layers)
        if any((sorted(run.val), sorted(run.layers), run.L) !=
               (self.steps, self.layer_steps, self.runs[0].L) for run in self.runs):
            raise Error(f"{experiment.name}: the logs of its seeds differ in their steps or layers")

    def losses(self, step):
        """The validation loss of each seed."""
        return [run.val[step] for run in self.runs]

    def mean(self, step):
        return statistics.mean(self.losses(step))

    def final(self):
        return self.mean(self.steps[-1])

    def second_half(self):
        """The steps of layers.csv in the second half of the training."""
        return [step for step in self.layer_steps if step > self.steps[-1] / 2]

    def column(self, name, steps):
        """A column of layers.csv by layer: the mean over the seeds and these steps."""
        values = [[run.layers[step][layer][name] for run in self.runs for step in steps]
                  for layer in range(1, self.runs[0].L + 1)]
        if any(None in row for row in values):
            raise Error(f"{self.experiment.name}: a {name} is missing in its layers.csv")
        return [statistics.mean(row) for row in values]


def find(results, scheme, kind, data, lr=None):
    """The result at a learning rate, or without one that with the lowest mean final loss."""
    found = [r for r in results if (r.experiment.scheme, r.experiment.kind, r.experiment.data) ==
             (scheme, kind, data) and lr in (None, r.experiment.lr)]
    return min(found, key=Result.final) if found else None


def pairs(results, data, lr, schemes=None):
    """(scheme, baseline, GPAS) for every scheme that has both, at a rate or each at its best."""
    names = schemes or dict.fromkeys(r.experiment.scheme for r in results)
    both = [(s, find(results, s, "base", data, lr), find(results, s, "gpas", data, lr))
            for s in names]
    return [(s, base, gpas) for s, base, gpas in both if base and gpas]


def has_rates(results, scheme, data):
    """Was there a choice of learning rates?"""
    return len({r.experiment.lr for r in results
                if (r.experiment.scheme, r.experiment.data) == (scheme, data)}) > 1


def steps_saved(base, gpas):
    """The step at which the mean curve of `gpas` first reaches base's final loss, between two
    validations by a straight line, and the share of the steps that saves; None, None: never."""
    target, before = base.final(), None
    for step in gpas.steps:
        loss = gpas.mean(step)
        if loss <= target and before:
            at = before[0] + (before[1] - target) / (before[1] - loss) * (step - before[0])
            return at, 1 - at / base.steps[-1]
        before = step, loss
    return None, None


def spread(result):
    losses = result.losses(result.steps[-1])
    return f"{statistics.mean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})"


def numbers_by_layer(results):
    """Variance and gate at the end, gradient's norm over the second half; toy stories at RATE."""
    lines = []
    for scheme in SHOWN:
        for kind in ("base", "gpas", "plain"):
            r = find(results, scheme, kind, "toy", RATE)
            if not r:
                continue
            rows = [("variance", r.column("mlp_variance", r.steps[-1:])),
                    ("gradient", r.column("grad_norm", r.second_half()))]
            if kind == "gpas":
                rows.append(("gate", r.column("gate", r.steps[-1:])))
            layers = range(1, len(rows[0][1]) + 1)
            if not lines:
                lines = ["", f"By layer, toy stories, lr {RATE}: the variance of the stream and "
                         "the gate at the end; the gradient's norm, mean over the second half.", "",
                         "| layer | " + " | ".join(map(str, layers)) + " |",
                         "|---" * (len(layers) + 1) + "|"]
            lines += [f"| {scheme}, {kind}: {name} | " + " | ".join(f"{x:.3g}" for x in values)
                      + " |" for name, values in rows]
    return lines


def write_numbers(results, path):
    """The numbers that the text quotes: final validation losses and the steps that GPAS saved."""
    lines = ["# Numbers of the experiments", "",
             "Final validation loss, nats a token: mean over the seeds (smallest to largest). "
             "Written by `make figures` from the logs in out/figures/SCHEME.KIND.DATA.LR/seed-S.",
             "", "| scheme, data | lr | baseline | GPAS | GPAS is there at | steps saved |",
             "|---|---|---|---|---|---|"]
    rates = list(dict.fromkeys(r.experiment.lr for r in results))
    for data in dict.fromkeys(r.experiment.data for r in results):
        for lr in rates + [None]:
            for scheme, base, gpas in pairs(results, data, lr):
                if not lr and not has_rates(results, scheme, data):
                    continue
                at, saved = steps_saved(base, gpas)
                rate = lr or f"best of each: {base.experiment.lr}, {gpas.experiment.lr}"
                lines.append(f"| {scheme}, {data} | {rate} | {spread(base)} | {spread(gpas)} | "
                             + (f"step {at:.0f} of {base.steps[-1]} | {saved:.0%} |" if at else
                                "never | none |"))
    others = [r for r in results if r.experiment.kind not in ("base", "gpas")]
    lines += ["", "| others | final validation loss |", "|---|---|"]
    lines += [f"| {r.experiment.name} | {spread(r)} |" for r in others]
    lines += numbers_by_layer(results)
    with new_file(path) as name, open(name, "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")


# ---------------------------------------------------------------------------
# Drawing. The panels are opaque and light, so they look the same on a light and on a dark page. The
# colours are those of report.py.

BASE, GPAS, PLAIN, INK, FAINT = "#6b7280", "#0063b2", "#c2410c", "#1f2937", "#e5e7eb"


def new_figure(plt, rows, columns, height, **shared):
    figure, axes = plt.subplots(rows, columns, figsize=(9, height), squeeze=False,
                                layout="constrained", **shared)
    for axis in axes.flat:
        axis.grid(True, color=FAINT, linewidth=0.7)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_curve(axis, result, color, label):
    """Mean loss by step, and a band from the lowest to the highest of the seeds."""
    steps = [step for step in result.steps if step >= result.steps[-1] / 4]
    losses = [result.losses(step) for step in steps]
    axis.plot(steps, [statistics.mean(v) for v in losses], color=color, label=label)
    axis.fill_between(steps, [min(v) for v in losses], [max(v) for v in losses], color=color,
                      alpha=0.2, linewidth=0)


def draw_difference(axis, base, gpas, dashed, label):
    steps = [step for step in base.steps if step >= base.steps[-1] / 4]
    axis.plot(steps, [gpas.mean(step) - base.mean(step) for step in steps], color=GPAS,
              linestyle="--" if dashed else "-", label=label)


def draw_losses(plt, results, data):
    """Validation loss by step with both sides at one rate, and GPAS minus the baseline."""
    at_rate = pairs(results, data, RATE, SHOWN)
    if not at_rate:
        return None
    at_best = {scheme: (base, gpas) for scheme, base, gpas in pairs(results, data, None, SHOWN)}
    rows, columns = (2, len(at_rate)) if len(at_rate) > 1 else (1, 2)
    figure, axes = new_figure(plt, rows, columns, 2.7 * rows)
    if rows == 2:
        axes[1][0].sharey(axes[1][1])
        axes[1][2].sharey(axes[1][1])
    for (scheme, base, gpas), (above, below) in zip(at_rate, axes.T if rows == 2 else axes):
        draw_curve(above, base, BASE, "baseline")
        draw_curve(above, gpas, GPAS, "GPAS")
        at, saved = steps_saved(base, gpas)
        if at and saved > 0.005:
            above.annotate("", (at, base.final()), (base.steps[-1], base.final()),
                           arrowprops={"arrowstyle": "->", "color": INK})
            above.text(at, base.final(), f"{saved:.0%} fewer steps ", ha="right", va="top",
                       color=INK)
        above.set_title(f"{scheme}, lr {RATE}")
        draw_difference(below, base, gpas, False, f"both at lr {RATE}")
        draw_difference(below, *at_best[scheme], True, "each at its best lr")
        below.axhline(0, color=BASE)
        below.set_title(f"{scheme}: GPAS minus baseline")
    axes[0][0].set_ylabel("validation loss")
    axes[-1][0 if rows == 2 else 1].set_ylabel("difference")
    for axis in (axes[0][0], axes[-1][-1]):
        axis.legend(frameon=False, loc="upper right" if axis is axes[0][0] else "best")
    for axis in axes[-1]:
        axis.set_xlabel("step")
    return figure


def draw_variance(plt, results, data):
    """Variance of the residual stream after each layer: at the start, the middle, the end."""
    found = pairs(results, data, RATE, ["pre"])
    if not found:
        return None
    _, base, gpas = found[0]
    figure, axes = new_figure(plt, 1, 3, 2.8, sharey=True)
    for axis, step in zip(axes[0], (base.steps[0], base.steps[len(base.steps) // 2],
                                    base.steps[-1])):
        for result, color, label in ((base, BASE, "baseline"), (gpas, GPAS, "GPAS")):
            values = result.column("mlp_variance", [step])
            axis.plot(range(1, len(values) + 1), values, "o-", markersize=3, color=color,
                      label=label)
        axis.set_title(f"step {step}")
        axis.set_xlabel("layer")
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0][0].set_ylim(bottom=0)
    axes[0][0].set_ylabel("variance of the residual stream")
    axes[0][0].legend(frameon=False)
    return figure


def draw_gates(plt, results, data):
    """The gates of all layers by step."""
    found = pairs(results, data, RATE, SHOWN)
    if not found:
        return None
    figure, axes = new_figure(plt, 1, len(found), 3, sharey=True)
    for axis, (scheme, _, result) in zip(axes[0], found):
        gates = [result.column("gate", [step]) for step in result.layer_steps]
        colors = plt.cm.ScalarMappable(plt.Normalize(1, len(gates[0])), "viridis")
        for layer in range(len(gates[0])):
            axis.plot(result.layer_steps, [g[layer] for g in gates], linewidth=1.2,
                      color=colors.to_rgba(layer + 1))
        axis.axhline(0, color=INK, linewidth=1)
        axis.set_title(scheme)
        axis.set_xlabel("step")
    axes[0][0].set_ylabel("gate g")
    figure.colorbar(colors, ax=axes[0][-1], label="layer")
    return figure


def draw_gradients(plt, results, data):
    """Norm of each layer's gradient, mean over the second half of the training."""
    found = [find(results, "pre", kind, data, RATE) for kind in ("base", "gpas", "plain")]
    if None in found:
        return None
    figure, axes = new_figure(plt, 1, 1, 3.2)
    for result, color, label in zip(found, (BASE, GPAS, PLAIN), (
            "baseline", "GPAS", "the same scale without stop-gradient")):
        values = result.column("grad_norm", result.second_half())
        axes[0][0].plot(range(1, len(values) + 1), values, "o-", markersize=3, color=color,
                        label=label)
    axes[0][0].set_xlabel("layer")
    axes[0][0].set_ylabel("norm of the layer's gradient")
    axes[0][0].set_ylim(bottom=0)
    axes[0][0].legend(frameon=False)
    return figure


def draw_schemes(plt, results, data):
    """Final losses of all schemes: mean and range over the seeds."""
    found = pairs(results, data, RATE, SCHEMES)
    if len(found) < 2:
        return None
    figure, axes = new_figure(plt, 1, 1, 3.2)
    for side, color, label in ((1, BASE, "baseline"), (2, GPAS, "GPAS")):
        losses = [pair[side].losses(pair[side].steps[-1]) for pair in found]
        means = [statistics.mean(v) for v in losses]
        axes[0][0].errorbar(
            [x + 0.24 * (side - 1.5) for x in range(len(found))], means, color=color, fmt="o",
            capsize=4, label=label, yerr=[[m - min(v) for m, v in zip(means, losses)],
                                          [max(v) - m for m, v in zip(means, losses)]])
    axes[0][0].set_xticks(range(len(found)), [pair[0] for pair in found])
    axes[0][0].set_ylabel(f"final validation loss, lr {RATE}")
    axes[0][0].legend(frameon=False)
    return figure


def load_matplotlib():
    try:
        import matplotlib
        matplotlib.use("svg")
        import matplotlib.pyplot
        return matplotlib
    except ImportError:
        raise Error("matplotlib draws the figures: pip install matplotlib (or --run-only)")


def draw_all(matplotlib, results, folder):
    plt = matplotlib.pyplot
    matplotlib.rcParams.update({
        "font.size": 9, "font.family": "sans-serif", "svg.fonttype": "none",
        "axes.edgecolor": BASE, "svg.hashsalt": "gpas", "figure.facecolor": "#ffffff"})
    for data in sorted({r.experiment.data for r in results}):
        for draw in (draw_losses, draw_variance, draw_gates, draw_gradients, draw_schemes):
            name = draw.__name__.replace("draw_", "") + ("" if data == "toy" else "-" + data)
            figure = draw(plt, results, data)
            if figure is None:
                continue  # the table has no experiments for it with this data
            text = io.StringIO()
            figure.savefig(text, format="svg", metadata={"Date": None})
            # Two decimals of a coordinate are enough, and make the files a third smaller.
            short = re.sub(r'="[^"]*"', lambda attribute: re.sub(
                r"\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}", attribute[0]), text.getvalue())
            with new_file(f"{folder}/{name}.svg") as path:
                with open(path, "w", encoding="utf-8") as file:
                    file.write(short)
            plt.close(figure)
            print(f"{folder}/{name}.svg")
    write_numbers(results, os.path.join(folder, "numbers.md"))


def run():
    parser = Parser(description="Runs experiments.tsv and draws figures.")
    parser.add_argument("--table", default="dev/tools/experiments.tsv")
    parser.add_argument("--out", default="out/figures", help="folder of the runs")
    parser.add_argument("--figures", default="docs/figures", help="folder of the figures")
    parser.add_argument("--program", default="./train_gpas")
    parser.add_argument("--toy", default="data/toy", help="folder of toy stories")
    parser.add_argument("--real", default="data/real", help="folder of real stories")
    parser.add_argument("--only", default=".", help="only experiments whose name matches this")
    parser.add_argument("--run-only", action="store_true")
    parser.add_argument("--draw-only", action="store_true")
    o = parser.parse_args()
    experiments, seeds = read_experiments(o.table, o.out)
    folders = {"toy": o.toy, "real": o.real}
    for e in experiments:
        if e.data not in folders:
            raise Error(f"{o.table}: {e.name} is on {e.data!r}, not on one of {', '.join(folders)}")
    try:
        experiments = [e for e in experiments if re.search(o.only, e.name)]
    except re.error as error:
        raise Error(f"--only: {error}")
    if not os.path.exists(os.path.join(o.real, "tokenizer.bin")):
        print(f"{o.real} has no tokenizer.bin: the experiments on real stories are left out")
        experiments = [e for e in experiments if e.data != "real"]
    if not (o.run_only or o.draw_only):
        load_matplotlib()  # is it there? before two hours are spent
    if not o.draw_only:
        run_all(experiments, seeds, o.program, folders)
    if o.run_only:
        return
    missing = [e.name for e in experiments for s in seeds if final_loss(e, s) is None]
    if missing:
        raise Error(f"{len(missing)} runs are missing, {missing[0]} among them; leave out "
                    "--draw-only")
    results = [Result(e, seeds) for e in experiments]
    draw_all(load_matplotlib(), results, o.figures)


if __name__ == "__main__":
    main(run)
