#!/usr/bin/env python3
"""
The experiments of dev/experiments.tsv: runs what is missing, then draws what they show.

    python3 dev/figures.py                # everything; needs matplotlib
    python3 dev/figures.py --run-only     # train, draw nothing
    python3 dev/figures.py --draw-only    # draw from the logs that are there

A line of the table is one configuration, trained once for each seed into OUT/NAME/seed-S. A run
that was interrupted goes on from its last checkpoint; one that is complete is not repeated, so that
the logs of a finished set can be drawn again at once. Progress and an estimate of the time left are
printed. The figures go to docs/figures as SVG, the numbers to docs/figures/numbers.md.

Configurations are named SCHEME.KIND.DATA.LR, as in pre.gpas.toy.1e-3; the figures find them by it.
"""
import argparse
import csv
import glob
import os
import re
import shlex
import statistics
import subprocess
import sys
import time


def fail(message):
    sys.exit("figures.py: " + message)


# ---------------------------------------------------------------------------
# The table and its runs

class Experiment:
    """One configuration: its name, the options of ./train_gpas, its folders."""

    def __init__(self, name, options, out):
        self.name, self.options, self.out = name, options, out
        parts = name.split(".")
        if len(parts) != 4 or not re.fullmatch(r"[\w.+-]+", name):
            fail(f"{name!r} is not named SCHEME.KIND.DATA.LR")
        self.scheme, self.kind, self.data, self.lr = parts
        if "--steps" not in options[:-1] or not re.fullmatch(r"[0-9]{1,9}", self.steps()):
            fail(f"{name} has no whole number --steps")

    def folder(self, seed):
        return os.path.join(self.out, self.name, f"seed-{seed}")

    def steps(self):
        return self.options[self.options.index("--steps") + 1]


def read_table(path, out):
    """The experiments and seeds. `common` and `seeds` are lines of their own."""
    experiments, common, seeds = [], [], []
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().split("\n")
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}")
    except ValueError:
        fail(f"{path} is not UTF-8")
    for at, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, tab, options = line.partition("\t")
        if not tab:
            fail(f"{path}, line {at}: expected a name, a tab, options")
        try:
            if name == "common":
                common = shlex.split(options)
            elif name == "seeds":
                seeds = [int(seed) for seed in options.split()]
            else:
                experiments.append(Experiment(name, common + shlex.split(options), out))
        except ValueError as error:
            fail(f"{path}, line {at}: {error}")
    if not experiments or not seeds:
        fail(f"{path} names no experiments or no seeds")
    names = [e.name for e in experiments]
    if len(set(names)) != len(names):
        fail(f"{path} has a name twice")
    return experiments, seeds


def read_rows(path, numbers):
    """The rows of a log; none where there is no file. These columns are numbers or empty, `step` is
    a whole number. A last line that a kill cut off is left out."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            text = file.read()
    except OSError:
        return []
    name, at = "its header", 1
    try:
        rows = list(csv.DictReader(text[:text.rfind("\n") + 1].splitlines()))
        for at, row in enumerate(rows, 2):
            for name in numbers:
                float(row[name] or 0)
            name = "step"
            if not re.fullmatch(r"[0-9]{1,9}", row[name]):
                raise ValueError
        return rows
    except (csv.Error, KeyError, TypeError, ValueError):
        fail(f"{path}, line {at}: {name} is not what it should be")


def read_log(folder):
    return read_rows(os.path.join(folder, "log.csv"), ["val_loss"])


def complete(experiment, seed):
    rows = read_log(experiment.folder(seed))
    return bool(rows) and rows[-1]["step"] == experiment.steps() and rows[-1]["val_loss"]


def train(experiment, seed, program, folders):
    """Trains or goes on; ends the program when ./train_gpas fails."""
    folder = experiment.folder(seed)
    checkpoints = sorted(glob.glob(os.path.join(folder, "ckpt_*.safetensors")))
    if checkpoints:
        command = [program, "--resume", checkpoints[-1]]
    else:
        command = [program, *experiment.options, "--seed", str(seed), "--out", folder,
                   "--data", folders[experiment.data]]
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "output.txt"), "a", encoding="utf-8") as output:
        status = subprocess.call(command, stdout=output, stderr=subprocess.STDOUT)
    if status < 0 or status > 128:
        sys.exit(130)  # interrupted: the next call goes on
    if status:
        fail(f"{' '.join(command)} ended with status {status}; see {folder}/output.txt")
    for path in glob.glob(os.path.join(folder, "ckpt_*.safetensors")):
        os.unlink(path)  # the logs are what the figures need


def run_all(experiments, seeds, program, folders):
    jobs = [(e, s) for s in seeds for e in experiments if not complete(e, s)]
    total, begin, seconds = len(experiments) * len(seeds), time.time(), []
    print(f"{total - len(jobs)} of {total} runs are there, {len(jobs)} to go", flush=True)
    for number, (experiment, seed) in enumerate(jobs):
        if experiment.data not in folders:
            fail(f"{experiment.name}: no folder for data {experiment.data!r}")
        start = time.time()
        train(experiment, seed, program, folders)
        seconds.append(time.time() - start)
        left = statistics.mean(seconds) * (len(jobs) - number - 1)
        loss = read_log(experiment.folder(seed))[-1]["val_loss"]
        print(f"{number + 1}/{len(jobs)}  {experiment.name} seed {seed}: validation loss {loss}, "
              f"{seconds[-1]:.0f} s, {left / 60:.0f} min left", flush=True)
    if jobs:
        print(f"all runs took {(time.time() - begin) / 60:.0f} min")


# ---------------------------------------------------------------------------
# What the logs say

class Result:
    """The logs of one configuration over its seeds."""

    def __init__(self, experiment, seeds):
        self.experiment = experiment
        self.curves = []      # for each seed {step: validation loss}
        self.layers = []      # for each seed {step: [row of layers.csv for layer 1, 2, ...]}
        for seed in seeds:
            folder = experiment.folder(seed)
            self.curves.append({int(r["step"]): float(r["val_loss"]) for r in read_log(folder)
                                if r["val_loss"]})
            steps = {}
            for row in read_rows(os.path.join(folder, "layers.csv"),
                                 ["mlp_variance", "gate", "grad_norm"]):
                steps.setdefault(int(row["step"]), []).append(row)
            self.layers.append(steps)
        self.steps = sorted(self.curves[0])
        shapes = [[(step, len(rows)) for step, rows in steps.items()] for steps in self.layers]
        if any(sorted(curve) != self.steps for curve in self.curves) or not shapes[0] or any(
                shape != shapes[0] for shape in shapes):
            fail(f"{experiment.name}: its seeds' logs are not of the same steps and layers")

    def losses(self, step):
        return [curve[step] for curve in self.curves]

    def final(self):
        return statistics.mean(self.losses(self.steps[-1]))

    def column(self, name, step):
        """Mean over the seeds of a column of layers.csv, by layer."""
        rows = zip(*(layers[step] for layers in self.layers))
        return [statistics.mean(float(r[name]) for r in layer) for layer in rows]


def best(results, scheme, kind, data):
    """The result with the lowest mean final loss among the learning rates tried."""
    found = [r for r in results if (r.experiment.scheme, r.experiment.kind, r.experiment.data) ==
             (scheme, kind, data)]
    return min(found, key=Result.final) if found else None


def steps_saved(base, gpas):
    """The step at which the mean curve of `gpas` reaches base's final loss, and the share of the
    steps that saves; (None, negative share not known) when it never does."""
    target, before = base.final(), None
    for step in gpas.steps:
        loss = statistics.mean(gpas.losses(step))
        if loss <= target and before:
            share = (before[1] - target) / (before[1] - loss) if before[1] > loss else 1
            at = before[0] + share * (step - before[0])
            return at, 1 - at / base.steps[-1]
        before = step, loss
    return None, None


def spread(values):
    return f"{statistics.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"


def write_numbers(results, path):
    """Every number that the text quotes, and the logs it is from."""
    lines = ["Numbers of the experiments: mean over the seeds (smallest to largest).", "",
             "| configuration | final validation loss |", "|---|---|"]
    for r in results:
        lines.append(f"| {r.experiment.name} | {spread(r.losses(r.steps[-1]))} |")
    lines += ["", "At the best learning rate of each side:", "",
              "| scheme, data | baseline | GPAS | GPAS reaches the baseline's end at | saved |",
              "|---|---|---|---|---|"]
    for scheme, data in sorted({(r.experiment.scheme, r.experiment.data) for r in results}):
        base, gpas = best(results, scheme, "base", data), best(results, scheme, "gpas", data)
        if not base or not gpas:
            continue
        at, saved = steps_saved(base, gpas)
        lines.append(f"| {scheme}, {data} | {base.final():.4f} at lr {base.experiment.lr} | "
                     f"{gpas.final():.4f} at lr {gpas.experiment.lr} | "
                     + (f"step {at:.0f} of {base.steps[-1]} | {saved:.0%} |" if at else
                        "never | none |"))
    with open(path, "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")


# ---------------------------------------------------------------------------
# Drawing. Opaque light panels: they read the same on a light and on a dark page.

BASE, GPAS, PLAIN = "#c2410c", "#1d4ed8", "#15803d"


def new_figure(plt, columns, height=3.0):
    figure, axes = plt.subplots(1, columns, figsize=(9, height), squeeze=False,
                                layout="constrained")
    for axis in axes[0]:
        axis.grid(True, color="#e5e7eb", linewidth=0.7)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


def draw_curve(axis, result, color, label):
    mean = [statistics.mean(result.losses(s)) for s in result.steps]
    axis.plot(result.steps, mean, color=color, label=f"{label}, lr {result.experiment.lr}")
    axis.fill_between(result.steps, [min(result.losses(s)) for s in result.steps],
                      [max(result.losses(s)) for s in result.steps], color=color, alpha=0.2,
                      linewidth=0)


def draw_losses(plt, results, data):
    schemes = [s for s in ("pre", "sandwich", "deepnorm") if best(results, s, "gpas", data)]
    figure, axes = new_figure(plt, len(schemes))
    for axis, scheme in zip(axes, schemes):
        base, gpas = best(results, scheme, "base", data), best(results, scheme, "gpas", data)
        draw_curve(axis, base, BASE, "baseline")
        draw_curve(axis, gpas, GPAS, "GPAS")
        late = [statistics.mean(r.losses(s)) for r in (base, gpas) for s in r.steps
                if s >= base.steps[-1] / 5]
        axis.set_ylim(min(late) - 0.05 * (max(late) - min(late)), max(late))
        axis.set_xlim(base.steps[-1] / 5, base.steps[-1])
        at, saved = steps_saved(base, gpas)
        if at and saved > 0.005:
            axis.annotate("", (at, base.final()), (base.steps[-1], base.final()),
                          arrowprops={"arrowstyle": "->", "color": "#374151"})
            axis.text(at, base.final(), f"{saved:.0%} fewer\nsteps ", ha="right", va="top",
                      color="#374151")
        axis.set_title(scheme)
        axis.set_xlabel("step")
        axis.legend(frameon=False, loc="upper right")
    axes[0].set_ylabel("validation loss (nats a token)")
    return figure


def draw_variance(plt, results, data):
    figure, axes = new_figure(plt, 2)
    for axis, kind, title in zip(axes, ("base", "gpas"), ("pre, baseline", "pre, GPAS")):
        r = best(results, "pre", kind, data)
        for step, color in zip((r.steps[0], r.steps[len(r.steps) // 2], r.steps[-1]),
                               ("#9ca3af", "#60a5fa", "#1e3a8a")):
            values = r.column("mlp_variance", step)
            axis.plot(range(1, len(values) + 1), values, "o-", markersize=3, color=color,
                      label=f"step {step}")
        axis.set_title(title)
        axis.set_xlabel("layer")
        axis.legend(frameon=False)
    axes[0].set_ylabel("variance of the residual stream")
    top = max(axis.get_ylim()[1] for axis in axes)
    for axis in axes:
        axis.set_ylim(0, top)
    return figure


def draw_gates(plt, results, data):
    figure, axes = new_figure(plt, 3)
    for axis, scheme in zip(axes, ("pre", "sandwich", "deepnorm")):
        r = best(results, scheme, "gpas", data)
        steps = sorted(r.layers[0])
        columns = [r.column("gate", s) for s in steps]
        colors = plt.get_cmap("viridis")
        for layer in range(len(columns[0])):
            axis.plot(steps, [c[layer] for c in columns], linewidth=1.2,
                      color=colors(layer / max(1, len(columns[0]) - 1)))
        axis.set_title(scheme)
        axis.set_xlabel("step")
    axes[0].set_ylabel("gate g, dark: layer 1, light: last")
    return figure


def draw_gradients(plt, results, data):
    figure, axes = new_figure(plt, 1, 3.4)
    for kind, color, label in (("base", BASE, "baseline"), ("gpas", GPAS, "GPAS"),
                               ("plain", PLAIN, "without stop-gradient: a plain scale")):
        r = best(results, "pre", kind, data)
        steps = [s for s in sorted(r.layers[0]) if r.layers[0][s][0]["grad_norm"]]
        values = r.column("grad_norm", steps[-1])
        axes[0].plot(range(1, len(values) + 1), values, "o-", markersize=3, color=color,
                     label=f"{label}, step {steps[-1]}")
    axes[0].set_xlabel("layer")
    axes[0].set_ylabel("norm of the layer's gradient")
    axes[0].set_yscale("log")
    axes[0].legend(frameon=False)
    return figure


def draw_schemes(plt, results, data):
    figure, axes = new_figure(plt, 1, 3.2)
    schemes = [s for s in ("pre", "lns", "sandwich", "post", "deepnorm", "mix")
               if best(results, s, "gpas", data) and best(results, s, "base", data)]
    for shift, kind, color, label in ((-0.12, "base", BASE, "baseline"),
                                      (0.12, "gpas", GPAS, "GPAS")):
        for x, scheme in enumerate(schemes):
            r = best(results, scheme, kind, data)
            values = r.losses(r.steps[-1])
            axes[0].errorbar(x + shift, statistics.mean(values), color=color, fmt="o", capsize=4,
                             yerr=[[statistics.mean(values) - min(values)],
                                   [max(values) - statistics.mean(values)]],
                             label=label if x == 0 else None)
    axes[0].set_xticks(range(len(schemes)), schemes)
    axes[0].set_ylabel("final validation loss")
    axes[0].legend(frameon=False)
    return figure


def draw_all(results, folder):
    try:
        import matplotlib
        matplotlib.use("svg")
        import matplotlib.pyplot as plt
    except ImportError:
        fail("matplotlib draws the figures: pip install matplotlib (or --run-only)")
    matplotlib.rcParams.update({"font.size": 9, "svg.fonttype": "path", "axes.edgecolor": "#6b7280",
                                "svg.hashsalt": "gpas", "figure.facecolor": "#ffffff"})
    os.makedirs(folder, exist_ok=True)
    for data in sorted({r.experiment.data for r in results}):
        for draw in (draw_losses, draw_variance, draw_gates, draw_gradients, draw_schemes):
            name = draw.__name__.replace("draw_", "") + ("" if data == "toy" else "-" + data)
            try:
                figure = draw(plt, results, data)
            except AttributeError:
                continue  # the table has no experiment for this figure with this data
            figure.savefig(os.path.join(folder, name + ".svg"), metadata={"Date": None})
            plt.close(figure)
            print(f"{folder}/{name}.svg")
    write_numbers(results, os.path.join(folder, "numbers.md"))


def main():
    parser = argparse.ArgumentParser(description="Runs dev/experiments.tsv and draws the figures.")
    parser.add_argument("--table", default="dev/experiments.tsv")
    parser.add_argument("--out", default="out/figures", help="folder of the runs")
    parser.add_argument("--figures", default="docs/figures", help="folder of the figures")
    parser.add_argument("--program", default="./train_gpas")
    parser.add_argument("--real", default="data/real", help="folder of real stories")
    parser.add_argument("--only", default="", help="only experiments whose name matches this")
    parser.add_argument("--run-only", action="store_true")
    parser.add_argument("--draw-only", action="store_true")
    o = parser.parse_args()
    experiments, seeds = read_table(o.table, o.out)
    try:
        experiments = [e for e in experiments if re.search(o.only, e.name)]
    except re.error as error:
        fail(f"--only: {error}")
    if not o.draw_only:
        run_all(experiments, seeds, o.program, {"toy": "data/toy", "real": o.real})
    if o.run_only:
        return
    missing = [e.name for e in experiments for s in seeds if not complete(e, s)]
    if missing:
        fail(f"{len(missing)} runs are missing, {missing[0]} among them; draw without --draw-only")
    draw_all([Result(e, seeds) for e in experiments], o.figures)


if __name__ == "__main__":
    main()
