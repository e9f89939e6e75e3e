"""
Reads what ./train_gpas writes to its --out folder, for compare.py and report.py. A run that is
still training is read up to its last whole line.
"""
import math
import os
import re
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)), ".."))
from command import Error, check_file

LOG = "step,train_loss,val_loss,lr,grad_norm,ms,tokens_per_s"
LAYERS = "step,layer,attention_variance,mlp_variance,gate,grad_norm"


def gate_value(g, activation):
    """a(g), as gate_value() in dev/gate.h."""
    if activation == "silu":
        return g / (1 + math.exp(-g)) if g > -700 else 0.0
    if activation == "tanh":
        return math.tanh(g)
    if activation == "relu":
        return max(g, 0.0)
    if activation == "leaky_relu":
        return g if g > 0 else 0.01 * g
    if activation == "identity":
        return g
    raise Error(f"unknown gate activation {activation!r}")


def checkpoints(folder):
    """The names of a folder's checkpoints, oldest first; other files may have similar names."""
    found = [name for name in os.listdir(folder)
             if re.fullmatch(r"ckpt_[0-9]{6,}\.safetensors", name)]
    return sorted(found, key=lambda name: int(name[5:-12]))


def read_text(path):
    with open(check_file(path), encoding="utf-8", errors="replace") as file:
        return file.read()


def read_table(path, header, required):
    """One dict a row: a number for each column, None where the field is empty."""
    lines = read_text(path).split("\n")
    names, rows = header.split(","), []
    lines.pop()                             # "", or the part of a line that is being written
    if lines[:1] != [header]:
        raise Error(f"{path}, line 1: expected the header {header}")
    for at, line in enumerate(lines[1:], 2):
        fields, row = line.split(","), {}
        if len(fields) != len(names):
            raise Error(f"{path}, line {at}: expected {len(names)} fields, found {len(fields)}")
        for name, field in zip(names, fields):
            count = name in ("step", "layer")
            try:
                if count and not re.fullmatch("[0-9]{1,18}", field):
                    raise ValueError
                row[name] = None if not field and name not in required else \
                    int(field) if count else float(field)
            except ValueError:
                raise Error(f"{path}, line {at}: {name} is {field!r}, expected a number")
        rows.append(row)
    return rows


class Run:
    """One training.
    options   the text of each option, by name; empty if it is not known
    rows      log.csv by step; val: the validation losses in it
    layers    layers.csv by step and layer, 1 to L; only the steps that are complete
    scaled    are there gates? gpas: with the stop-gradient?
    stories   {step: text}"""

    def __init__(self, folder):
        self.folder = folder.rstrip("/") or folder
        if not os.path.isdir(folder):
            raise Error(f"{folder} is not a folder: train first")
        rows = read_table(f"{folder}/log.csv", LOG, ["step"])
        if not rows:
            raise Error(f"{folder}/log.csv has no step yet")
        self.rows = {row["step"]: row for row in sorted(rows, key=lambda row: row["step"])}
        self.last = max(self.rows)
        self.val = {step: row["val_loss"] for step, row in self.rows.items()
                    if row["val_loss"] is not None}
        self.read_layers(f"{folder}/layers.csv")
        self.options, self.stories = {}, {}
        if os.path.exists(f"{folder}/options.txt"):
            lines = read_text(f"{folder}/options.txt").split("\n")
            self.options = dict(line.partition(" ")[::2] for line in lines if line)
        self.gpas = self.scaled and self.options.get("stop-grad") != "off"
        if os.path.exists(f"{folder}/samples.txt"):
            text = read_text(f"{folder}/samples.txt")
            parts = re.split(r"^--- step (\d+) ---$", text, flags=re.M)
            self.stories = {int(step): text.strip() for step, text in zip(parts[1::2], parts[2::2])}

    def read_layers(self, path):
        rows = read_table(path, LAYERS, LAYERS.split(",")[:4])
        self.L, self.layers = max((row["layer"] for row in rows), default=0), {}
        for row in sorted(rows, key=lambda row: (row["step"], row["layer"])):
            self.layers.setdefault(row["step"], {})[row["layer"]] = row
        for step in [step for step, layers in self.layers.items()
                     if len(layers) != self.L or min(layers) != 1]:
            if step != max(self.layers):
                raise Error(f"{path}: step {step} lacks some of the layers 1 to {self.L}")
            del self.layers[step]
        gates = {row["gate"] is None for layers in self.layers.values() for row in layers.values()}
        if len(gates) > 1:
            raise Error(f"{path}: some layers have a gate and some have none")
        self.scaled = gates == {False}

    def kind(self):
        """What was trained, in words: "pre", "pre + GPAS", "pre + plain scale, gate-act tanh"."""
        known, words = self.options, self.options.get("norm", "")
        if not self.scaled:
            return words or "no GPAS"
        words += " + " * bool(words) + ("GPAS" if self.gpas else "plain scale")
        for name, usual in (("gate-act", "silu"), ("gate-train", "on"), ("gate-init", "0")):
            if known.get(name, usual) != usual:
                words += f", {name} {known[name]}"
        return words

    def state(self):
        steps = self.options.get("steps", "")
        done = not steps.isdecimal() or self.last >= int(steps[:10])
        return f"{self.last} steps" if done else f"step {self.last} of {steps}"

    def factor(self, gate):
        """1 - a(g); None where a() is not known."""
        activation = self.options.get("gate-act")
        return None if gate is None or not activation else 1 - gate_value(gate, activation)

    def reached(self, loss, last=math.inf):
        """About which step the validation loss was first as low as this one, or None."""
        before, high = 0, math.inf
        for step, value in self.val.items():
            if step <= last and value <= loss:
                if not math.isfinite(high):
                    return step
                return before + (step - before) * (high - loss) / (high - value)
            before, high = step, value
        return None


def printable(text):
    """A byte model may write anything, even what a terminal takes for a command."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)
