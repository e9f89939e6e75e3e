#!/usr/bin/env python3
"""
What did GPAS do? Two trainings of the same network, compared on one page:

    python3 dev/tools/compare.py out/pre out/pre_gpas

The first folder is the training without GPAS (the baseline), the second the one with it. Three
files of each are read: log.csv (losses), layers.csv (variances and gates) and samples.txt
(stories written along the way). The page shows what they say, whoever won.
"""
import glob
import math
import os
import re
import shlex
import sys
from textwrap import wrap

sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)), ".."))
from command import Error, Parser, main

LOG = "step,train_loss,val_loss,lr,grad_norm,ms,tokens_per_s"
LAYERS = "step,layer,attention_variance,mlp_variance,gate,grad_norm"
WIDTH, STORY_LINES = 80, 12


# ---------------------------------------------------------------------------
# Reading. Every line is checked; the first wrong one is named and ends the program.

def read_text(path):
    if os.path.exists(path) and not os.path.isfile(path):
        raise Error(f"{path} is not a file")
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


def read_table(path, header, required):
    """One dict a row: a number for each column, None where the field is empty."""
    lines = read_text(path).split("\n")
    names, rows = header.split(","), []
    if lines[0] != header:
        raise Error(f"{path}, line 1: expected the header {header}")
    if lines.pop() != "":
        raise Error(f"{path}, line {len(lines) + 1}: cut off before its end (still training?)")
    for at, line in enumerate(lines[1:], 2):
        fields, row = line.split(","), {}
        if len(fields) != len(names):
            raise Error(f"{path}, line {at}: expected {len(names)} fields, found {len(fields)}")
        for name, field in zip(names, fields):
            number = int if name in ("step", "layer") else float
            try:
                row[name] = number(field) if field or name in required else None
            except ValueError:
                raise Error(f"{path}, line {at}: {name} is {field!r}, expected a number")
        rows.append(row)
    return rows


class Run:
    """One training: its rows, validation losses and layers by step, and its last story."""

    def __init__(self, folder):
        self.folder = folder.rstrip("/") or folder
        if not os.path.isdir(folder):
            raise Error(f"{folder} is not a folder: train first")
        rows = read_table(os.path.join(folder, "log.csv"), LOG, ["step"])
        self.rows = {row["step"]: row for row in sorted(rows, key=lambda row: row["step"])}
        self.val = {step: row["val_loss"] for step, row in self.rows.items()
                    if row["val_loss"] is not None}
        self.read_layers(os.path.join(folder, "layers.csv"))
        text = read_text(os.path.join(folder, "samples.txt"))
        blocks = re.split(r"^--- step (\d+) ---$", text, flags=re.MULTILINE)
        self.story_step, self.story = blocks[-2:] if len(blocks) > 1 else (None, "")

    def read_layers(self, path):
        rows = read_table(path, LAYERS, LAYERS.split(",")[:4])
        rows.sort(key=lambda row: (row["step"], row["layer"]))
        self.layers, self.L = {}, max((row["layer"] for row in rows), default=0)
        for row in rows:
            self.layers.setdefault(row["step"], {})[row["layer"]] = row
        for step, layers in self.layers.items():
            if len(layers) != self.L or list(layers) != list(range(1, self.L + 1)):
                raise Error(f"{path}: step {step} lacks some of the layers 1 to {self.L}")
            if len({row["gate"] is None for row in layers.values()}) != 1:
                raise Error(f"{path}: at step {step} some layers have a gate and some have none")
        if not rows:
            raise Error(f"{path} holds no layers yet")
        self.gated = {row["gate"] is not None for row in rows}


# ---------------------------------------------------------------------------
# Drawing

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
# The page, section by section; each returns its lines

def title(base, gpas, last):
    text = f"What GPAS did: a network of {base.L} layers, {last} steps, trained without and with it"
    lines = [paint(text, BOLD), RULE * WIDTH]
    lines += wrap(f"baseline: {base.folder}   GPAS: {gpas.folder}", WIDTH)
    notes, ends = [], [max(run.rows) for run in (base, gpas)]
    if ends != [last, last]:
        notes.append(f"The baseline's log ends at step {ends[0]}, that of GPAS at step {ends[1]}: "
                     f"compared up to step {last}, the last one evaluated in both.")
    if base.rows[last]["lr"] != gpas.rows[last]["lr"]:
        notes.append(f"At step {last} their learning rates differ, which alone changes the "
                     "losses.")
    first = [run.val.get(0, math.inf) for run in (base, gpas)]
    if not math.isclose(*first, rel_tol=1e-3):
        notes.append("They do not start from the same loss, as two networks of one seed would "
                     "with all gates at 0.")
    return lines + [paint(line, BOLD) for note in notes for line in wrap("Note: " + note, WIDTH)]


def losses(base, gpas, steps):
    shown = steps[::min(-1, -math.ceil((len(steps) - 1) / 10))][::-1]     # the last in any case
    change = [gpas.val[step] - base.val[step] for step in shown]
    largest, half = largest_of(change), (WIDTH - 44) // 2
    lines = ["", paint("Validation loss", BOLD),
             paint(f"{'step':>7}{'baseline':>11}{'GPAS':>11}{'difference':>12}  "
                   f"{'GPAS lower':>{half}}{AXIS}GPAS higher", FAINT)]
    for step, diff in zip(shown, change):
        below, above = (diff, 0) if diff < 0 else (0, diff)
        lines.append(f"{step:7}{base.val[step]:11.4f}" + paint(f"{gpas.val[step]:11.4f}", CYAN)
                     + f"{diff:+12.4f}  " + bar(below, largest, half, left=True) + AXIS
                     + bar(above, largest, half))
    return lines


def reached(run, loss, last):
    """About which step the run's validation loss was first as low as this one (or None)."""
    before, high = 0, math.inf
    for step, value in run.val.items():
        if step <= last and value <= loss:
            if not math.isfinite(high):
                return step
            return before + (step - before) * (high - loss) / (high - value)
        before, high = step, value


def verdict(base, gpas, last):
    goal, end = base.val[last], gpas.val[last]
    if last == 0 or not math.isfinite(goal):
        return f"Nothing to reach: the baseline's loss is {goal:.4f} at step {last}."
    final = "final loss" if last == max(base.rows) else f"step-{last} loss"
    step, own = reached(gpas, goal, last), reached(base, goal, last)
    if step is None:
        back = reached(base, end, last)
        return (f"GPAS did not reach the baseline's {final} {goal:.4f} in {last} steps: it "
                f"ended at {end:.4f}" + ("." if back is None else
                f", which the baseline reached after about {back:.0f} steps."))
    # If the baseline was that low before its end, the whole run is no measure of what it needed.
    return (f"GPAS reached the baseline's {final} {goal:.4f} after about {step:.0f} of {last} "
            + ("steps" if own < last else f"steps ({100 * (1 - step / last):.0f}% fewer)")
            + (" and" if end <= goal else ", but") + f" ended at {end:.4f}."
            + (f" The baseline, too, was that low before its end: after about {own:.0f} steps."
               if own < last else ""))


def steps_needed(base, gpas, last):
    paper = ("The paper's own figure is about 18% fewer steps, for models from 71M to 1B "
             "parameters. One seed at this size is an illustration, not a proof.")
    return ["", *(paint(line, BOLD) for line in wrap(verdict(base, gpas, last), WIDTH)),
            *(paint(line, FAINT) for line in wrap(paper, WIDTH))]


def one_minus_silu(gate):
    return 1 - gate * 0.5 * (1 + math.tanh(gate / 2))      # in this form no gate overflows


def by_layer(base, gpas, silu):
    step = max(set(base.layers) & set(gpas.layers), default=None)
    if step is None:
        raise Error(f"{base.folder} and {gpas.folder}: their layers.csv have no step in common")
    pairs = [(base.layers[step][i]["mlp_variance"], gpas.layers[step][i]["mlp_variance"])
             for i in range(1, base.L + 1)]
    largest, size = largest_of(sum(pairs, ())), (WIDTH - 48) // 2
    lines = ["", paint(f"Variance of the activation leaving each layer at step {step}, and the "
                       "gates", BOLD),
             paint(f"{'layer':>5}{'baseline':>11} {'':{size}}{'GPAS':>11} {'':{size}}"
                   f"{'gate g':>8}" + ("  1-SiLU(g)" if silu else ""), FAINT)]
    for i, (old, new) in enumerate(pairs, 1):
        gate = gpas.layers[step][i]["gate"]
        lines.append(f"{i:5}{short(old):>11} {bar(old, largest, size)}"
                     + paint(f"{short(new):>11} {bar(new, largest, size)}", CYAN)
                     + f"{gate:+8.3f}" + (f"{one_minus_silu(gate):11.3f}" if silu else ""))
    ratio = [end / start if start else math.nan for start, end in zip(pairs[0], pairs[-1])]
    text = f"Last layer over first: {ratio[0]:.3g} without GPAS, {ratio[1]:.3g} with it."
    if silu:
        text += " Each of a layer's two sites multiplies the activation by 1-SiLU(g)."
    return lines + wrap(text, WIDTH)


def story(run, name):
    lines = []
    for paragraph in run.story.split("\n"):
        # A byte model may write anything, even what a terminal takes for a command.
        lines += wrap("".join(c if c.isprintable() else " " for c in paragraph), WIDTH - 2)
    if len(lines) > STORY_LINES:
        lines[STORY_LINES - 1:] = ["[...]"]
    head = f"writes at step {run.story_step}" if run.story_step else "wrote no story yet"
    return ["", paint(f"{name} {head}", BOLD)] + ["  " + line for line in lines]


def hints(base, gpas):
    lines = ["", *wrap(f"Logs and checkpoints: {base.folder} and {gpas.folder}.", WIDTH)]
    found = glob.glob(os.path.join(glob.escape(gpas.folder), "ckpt_*.safetensors"))
    if not found:
        return lines + wrap(f"No ckpt_*.safetensors in {gpas.folder} to write from.", WIDTH)
    return lines + ["Another story:", f"  ./train_gpas --load {shlex.quote(gpas.folder)} --prompt "
                    '"Once upon a time"']


def compare(base, gpas, silu):
    if base.L != gpas.L:
        raise Error(f"{base.folder} has {base.L} layers, {gpas.folder} {gpas.L}: not the same "
                    "network")
    if True in base.gated or False in gpas.gated:
        raise Error(f"{base.folder} must be a training without GPAS and {gpas.folder} one with it; "
                    "by the gates in layers.csv they are not")
    steps = [step for step in base.val if step in gpas.val]
    if not steps:
        raise Error(f"{base.folder} and {gpas.folder}: their log.csv have no evaluated step in "
                    "common")
    last = steps[-1]
    return (title(base, gpas, last) + losses(base, gpas, steps)
            + steps_needed(base, gpas, last) + by_layer(base, gpas, silu)
            + story(base, "The baseline") + story(gpas, "GPAS")
            + hints(base, gpas))


def run():
    parser = Parser(description="Compare a training without GPAS to one with it.")
    parser.add_argument("baseline", help="folder of the training without GPAS")
    parser.add_argument("gpas", help="folder of the training with GPAS")
    parser.add_argument("--gate-act", default="silu", help="the gates' activation (default silu)",
                        choices=["silu", "identity", "relu", "leaky_relu", "tanh"])
    options = parser.parse_args()
    page = compare(Run(options.baseline), Run(options.gpas), options.gate_act == "silu")
    print("\n".join(line.rstrip() for line in page))


if __name__ == "__main__":
    main(run)
