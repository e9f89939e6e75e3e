#!/usr/bin/env python3
"""
grade.py: compiles train_gpas.c (and train_gpas.cu where there is one), has grade.c check each
layer's forward and backward pass in a process of its own, and prints a table, or JSON.

    make grade               make grade JSON=1               make grade SEED=7

These processes and their limits of CPU time and memory ensure that an endless loop, a crash or a
wild write costs the points of its own pass alone. Numbers are new in each run unless SEED is given.
"""
import json
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)), ".."))
from command import Error, Parser, main
from compiler import command, compile_submission, run_program
from feedback import Facts, passes, print_table

LAYERS = "gpas residual embedding rmsnorm rope swiglu matmul attention crossentropy adamw".split()
FUSED = "residual_gpas_rmsnorm"     # in train_gpas.cu three of the layers in one kernel, too
POINTS = {"forward": 4, "backward": 6, "update": 10}


def check(program, layer, which, options):
    """Runs one pass's checks: {"points", "max", "ok", "checks": [{name, points, max}], "hints"}."""
    status, text, said = run_program([program, layer, which, str(options.seed),
                                      str(options.variant)])
    result = {"points": 0, "max": POINTS[which], "ok": False, "checks": [], "hints": []}
    hints, stopped, facts = result["hints"], False, Facts()
    for row in [line.split("\t") for line in text.split("\n")[:-1]]:   # complete lines
        if row[0] == "result":
            result["checks"].append({"name": row[1], "points": int(row[3]), "max": int(row[2])})
        stopped |= row[0] == "ended"
        hint = facts.read(row[0], row[1:], said)
        hints += [hint] if hint else []
    if hints and len(hints) == len(result["checks"]) and all(
            hint.endswith(": nothing is written") for hint in hints):
        result["hints"] = ["nothing is written yet"]
    if status != 0 or "done" not in text.split("\n"):
        stopped = True
        hints.append(f"the check ended with status {status}" + (f"; {said}" if said else ""))
    for one in result["checks"]:
        one["points"] *= not stopped
        result["points"] += one["points"]
    result["ok"] = result["points"] == result["max"]
    return result


def grade_file(file, options, folder):
    """A dictionary for each assigned layer."""
    layers = [layer for layer in LAYERS if layer in options.layers]
    if file.endswith(".cu") and set(layers) & set(FUSED.split("_")):
        layers.append(FUSED)
    program, error = compile_submission(file, options, folder)
    rows = [{"file": file, "layer": layer, "points": 0, "max": 10} for layer in layers]
    if error:
        said = f"{file} does not compile, so nothing in it is checked: {error}"
        return [{**row, "error": said} for row in rows]
    with ThreadPoolExecutor(max(2, os.cpu_count() or 1)) as pool:
        jobs = [(row, which, pool.submit(check, program, row["layer"], which, options))
                for row in rows for which in passes(row["layer"])]
        try:
            for row, which, job in jobs:
                row[which] = job.result()
                row["points"] += row[which]["points"]
        finally:                        # if a signal ends it, skip the remaining checks
            for _, _, job in jobs:
                job.cancel()
    return rows


def run():
    parser = Parser(description="Grades the layers of train_gpas.c.")
    parser.add_argument("--cc", type=command, default="gcc")
    parser.add_argument("--cxx", type=command, default="g++")
    parser.add_argument("--on-cpu", type=command, help="the compiler's command for train_gpas.cu")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3), "little"))
    parser.add_argument("--variant", type=int, choices=(0, 1), default=0)
    parser.add_argument("layers", nargs="*", help="those that are graded; default: all")
    options = parser.parse_args()
    os.chdir(os.path.join(os.path.dirname(os.path.abspath(__file__)), "../.."))
    for layer in options.layers:
        if layer not in LAYERS:
            raise Error(f"there is no layer {layer}; choose from: {' '.join(LAYERS)}")
    options.layers = options.layers or LAYERS
    if not os.path.exists("train_gpas.c"):
        raise Error(f"there is no train_gpas.c in {os.getcwd()}")
    files = ["train_gpas.c"] + ["train_gpas.cu"] * (bool(options.on_cpu) and
                                                    os.path.exists("train_gpas.cu"))
    os.makedirs("build", exist_ok=True)     # TMPDIR may be full, or be mounted noexec
    with tempfile.TemporaryDirectory(dir="build") as folder:
        tempfile.tempdir = os.path.abspath(folder)
        rows = [row for file in files for row in grade_file(file, options, folder)]
    result = {"points": sum(row["points"] for row in rows), "max": sum(row["max"] for row in rows),
              "seed": options.seed, "layers": rows}
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        print_table(rows, result)


if __name__ == "__main__":
    main(run)
