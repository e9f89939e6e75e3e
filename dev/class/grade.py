#!/usr/bin/env python3
"""
grade.py: compiles train_gpas.c (and train_gpas.cu where there is one), has grade.c check each
layer's forward and backward pass in a process of its own, and prints a table, or JSON.

    make grade               make grade JSON=1               make grade SEED=7

Limits of CPU time and memory see to it that an endless loop, a crash or a wild write costs the
points of its own pass and nothing else. The numbers are new in each run, unless SEED is given.
"""
import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)), ".."))
from command import Error, Parser, main
from compiler import command, compiler, first_error, limit_cpu, warnings_of
from feedback import passes, print_table

LAYERS = "gpas residual embedding rmsnorm rope swiglu matmul attention crossentropy adamw".split()
FUSED = "residual_gpas_rmsnorm"     # in train_gpas.cu three of the layers in one kernel, too
POINTS = {"forward": 4, "backward": 6, "update": 10}
PASS_SECONDS = 60   # of CPU time, of which the submission has a limit of its own: grade.c


def compile_grader(options):
    """grade.c as an object file, which is kept."""
    grader, made = "build/grade.o", "build/grade.o.made"
    words = [*options.cc, "-std=gnu11", "-O2", "-c", "dev/class/grade.c", "-o", grader]
    stamp = repr([words] + [os.stat("dev/class/grade." + end).st_mtime_ns for end in "ch"])
    if not os.path.exists(made) or pathlib.Path(made).read_text(encoding="utf-8") != stamp:
        good, text = compiler(words)
        if not good:
            raise Error("dev/class/grade.c does not compile: " + first_error(text))
        pathlib.Path(made).write_text(stamp, encoding="utf-8")
    return grader


def compile_submission(file, options, folder):
    """Returns the program that checks the file, or None and the first error."""
    grader, layers = compile_grader(options), os.path.join(folder, file + ".o")
    program = os.path.join(folder, file + ".grade")
    if file.endswith(".c"):
        words = options.cc + (
            "-std=c11 -O1 -g -march=native -fno-math-errno -fopenmp -Wall -Wextra -Wpedantic "
            "-Wshadow -I.").split() + [f'-DSUBMISSION="{file}"']
    else:
        words = options.on_cpu + ["-DCUDA=1", f'-DSUBMISSION="build/{file}"']
    link = options.cc if file.endswith(".c") else options.cxx
    good, text = compiler(words + ["-c", "dev/class/submission.c", "-o", layers])
    said = warnings_of(text, file)
    if said and not options.json:
        print(said + "\n", file=sys.stderr)
    if good:
        good, text = compiler(link + ["-fopenmp", grader, layers, "-lm", "-o", program])
    if good and run_program([program])[0] != 2:
        good, text = False, "the program does not even start: what is done before main()?"
    return (program, None) if good else (None, first_error(text))


def run_program(words):
    """Runs the grader. Returns its status, what it printed, and the last line of errors."""
    threads = "2" if ".cu." in words[0] else os.environ.get("OMP_NUM_THREADS", "4")
    environment = dict(os.environ, OMP_NUM_THREADS=threads, OMP_WAIT_POLICY="passive")
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = subprocess.Popen(words, stdout=out, stderr=err, stdin=subprocess.DEVNULL,
                                 preexec_fn=limit_cpu(PASS_SECONDS if words[1:] else 5),
                                 env=environment, start_new_session=True)
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=10 * PASS_SECONDS)
        finally:
            with contextlib.suppress(OSError):
                os.killpg(child.pid, signal.SIGKILL)    # and whatever it has started
            child.wait()
        out.seek(0)
        err.seek(0)
        said = err.read(100000).decode(errors="replace").strip().split("\n")[-1]
        return child.returncode, out.read().decode(errors="replace"), said


ENDINGS = {
    signal.SIGXCPU: "stopped after {} seconds of computing: an endless loop? Does its variable "
                    "grow, and is its end right?",
    signal.SIGALRM: "stopped after two minutes ({} s of computing): does it wait for something?",
    signal.SIGSEGV: "crashed (segmentation fault): an index far outside of an array, a NULL "
                    "pointer (of an allocation too large?), or recursion without an end",
    signal.SIGFPE: "crashed: a whole number divided by 0",
    signal.SIGABRT: "crashed (abort): memory was overwritten, or abort() was called",
    signal.SIGXFSZ: "stopped after printing a megabyte: an endless loop?"}
ENDINGS[signal.SIGKILL], ENDINGS[signal.SIGBUS] = ENDINGS[signal.SIGXCPU], ENDINGS[signal.SIGSEGV]


def ending(status, cpu, case, said):
    """What to say of a process that did not return from all calls. status: as of waitpid()."""
    if status & 127 in (signal.SIGSEGV, signal.SIGBUS) and "dgate is NULL" in case:
        return "crashed (segmentation fault): dgate is NULL in this case, and may be"
    if re.search("out of memory|not enough memory|bad_alloc|allocate memory", said):
        return "not enough memory: it asks for far more than a layer needs"
    if status & 127 in ENDINGS:
        return ENDINGS[status & 127].format(cpu)
    if re.search("(race|nothing has written).* shared memory", said):
        said += "; is there a __syncthreads() between writing and reading?"
    return f"ended by itself with status {status >> 8}: " + (said or "it must return, not exit()")


def check(program, layer, which, options):
    """Runs one pass's checks: {"points", "max", "ok", "checks": [{name, points, max}], "hints"}."""
    status, text, said = run_program([program, layer, which, str(options.seed),
                                      str(options.variant)])
    result = {"points": 0, "max": POINTS[which], "ok": False, "checks": [], "hints": []}
    hints, stopped = result["hints"], False
    for word in [line.split("\t") for line in text.split("\n")]:
        if word[0] == "result" and len(word) == 5:
            name, most, points, hint = word[1], int(word[2]), int(word[3]), word[4]
            result["checks"].append({"name": name, "points": points, "max": most})
            if hint:
                hints.append(f"{name}: {hint}")
        elif word[0] == "memory":
            hints.append(word[1])
        elif word[0] == "ended":
            stopped = True
            hints.append(f"{ending(int(word[1]), *word[2:], said)} (in the case {word[3]})")
    if hints and len(hints) == len(result["checks"]) and all(
            hint.endswith(": nothing is written") for hint in hints):
        result["hints"] = ["nothing is written yet"]
    if status != 0 or "done" not in text.split("\n"):
        stopped = True
        hints.append(f"the check ended with status {status}; {said}")
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
        for row in rows:
            row["error"] = f"{file} does not compile, so nothing in it is checked: {error}"
        return rows
    with ThreadPoolExecutor(max(2, os.cpu_count() or 1)) as pool:
        jobs = [(row, which, pool.submit(check, program, row["layer"], which, options))
                for row in rows for which in passes(row["layer"])]
        try:
            for row, which, job in jobs:
                row[which] = job.result()
                row["points"] += row[which]["points"]
        finally:                        # a signal ends it without the checks that are left
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
    os.makedirs("build", exist_ok=True)     # TMPDIR may be full, or allow no programs
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
