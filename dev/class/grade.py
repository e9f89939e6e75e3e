#!/usr/bin/env python3
"""
grade.py: compiles train_gpas.c (and train_gpas.cu where there is one), has grade.c check each
layer's forward and backward pass in a process of its own, and prints a table, or JSON.

    make grade               make grade JSON=1               make grade SEED=7

A process has limits of time and memory, so that an endless loop, a crash or a wild write costs the
points of its own pass and nothing else. The numbers are new in each run, unless SEED is given.
"""
import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
import textwrap
from concurrent.futures import ThreadPoolExecutor

sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)), ".."))
from command import Error, Parser, main

LAYERS = ("gpas residual embedding rmsnorm rope swiglu matmul attention crossentropy "
          "adamw").split()
FUSED = "residual_gpas_rmsnorm"  # in train_gpas.cu three of the layers in one kernel, too
FUSED_LAYERS = set(FUSED.split("_"))
POINTS = {"forward": 4, "backward": 6, "update": 10}
CPU_SECONDS = {"train_gpas.c": 2, "train_gpas.cu": 4}  # right ones take a tenth of it
COMPILER_SECONDS = 40
# How little a hint says: first the words of those that say no more than that numbers are wrong.
VAGUE = {"wrong values": 3, "are NaN or infinite": 3, "; element ": 1, "all zeros": 0.2,
         "wrong sign, and:": 1, "off by a factor that differs": 0.8, "constant factor": 0.6,
         "and it is off by": 0.9, "(wrong ": 0.1, "nothing is": 0.2}
SMALL = re.compile(r"^(T = 1|one \w+|.*large.*|1 number\b.*|OC = 1|C = 1|H = 1|.*, 1 number)$")


def layers_of(file):
    return LAYERS + [FUSED] * file.endswith(".cu")


def passes(layer):
    return ["update"] if layer == "adamw" else ["forward", "backward"]


def command(text):
    """The words of a command, of which there must be one: argparse tells where there is none."""
    words = shlex.split(text)
    if not words:
        raise ValueError
    return words


def compiler(command):
    """Runs a compiler, which speaks English. Returns whether it succeeded, and what it said."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, errors="replace", check=False,
                              env={**os.environ, "LC_ALL": "C", "TMPDIR": tempfile.tempdir},
                              timeout=COMPILER_SECONDS)
    except subprocess.TimeoutExpired:
        return False, "error: the compiler is not done after %d seconds" % COMPILER_SECONDS
    except OSError as error:
        raise Error("cannot run %s: %s" % (command[0], error.strerror))
    return done.returncode == 0, done.stdout


def about_submission(text, file):
    """The compiler's messages on the submission, without those on what is given."""
    lines, keep = [], False
    for line in text.split("\n"):
        if ": warning:" in line or ": error:" in line or ": note:" in line:
            keep = os.path.basename(line.split(":")[0]) == file and ": note:" not in line
        elif re.search("In (member )?function|In instantiation|At top level|^In file", line):
            keep = False
        if keep:
            lines.append(line)
    return "\n".join(lines)


def first_error(text):
    lines = text.strip().split("\n")
    return next((line for line in lines if "error:" in line), lines[-1])


def compile_submission(file, options, folder):
    """Returns the program that checks the file, or None and the first error."""
    grader, layers = os.path.join(folder, "grade.o"), os.path.join(folder, file + ".o")
    program = os.path.join(folder, file + ".grade")
    if not os.path.exists(grader):
        good, text = compiler(
            [*options.cc, "-std=gnu11", "-O2", "-c", "dev/class/grade.c", "-o", grader])
        if not good:
            raise Error("dev/class/grade.c does not compile: " + first_error(text))
    if file.endswith(".c"):
        command = options.cc + (
            "-std=c11 -O1 -g -march=native -fno-math-errno -fopenmp -Wall -Wextra -Wpedantic "
            "-Wshadow -I.").split() + ["-DSUBMISSION=\"%s\"" % file]
        link = options.cc
    else:
        command = options.on_cpu + ["-DCUDA=1", "-DSUBMISSION=\"build/%s\"" % file]
        link = options.cxx
    good, text = compiler(command + ["-c", "dev/class/submission.c", "-o", layers])
    said = about_submission(text, file)
    if said and not options.json:
        print(said + "\n", file=sys.stderr)
    if not good:
        error = first_error(text)
        missing = re.search(r"submission.c.*\W(\w+)\W* (undeclared|was not declared)", error)
        return None, "it has no function %s" % missing.group(1) if missing else error
    good, text = compiler(link + ["-fopenmp", grader, layers, "-lm", "-o", program])
    if not good:
        return None, text.strip().split("\n")[-1]
    return program, None


def limits(seconds):
    """That of memory sets grade.c."""
    def set_them():
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    return set_them


def check(program, file, layer, which, seed):
    """Runs one pass's checks. Returns the cases [(name, [(what, hint)])] and how it ended."""
    seconds = CPU_SECONDS[file]
    environment = dict(os.environ, OMP_NUM_THREADS="2", OMP_WAIT_POLICY="passive")
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = subprocess.Popen([program, layer, which, str(seed)], stdout=out, stderr=err,
                                 stdin=subprocess.DEVNULL, preexec_fn=limits(seconds),
                                 env=environment, start_new_session=True)
        try:
            status = child.wait(timeout=3 * seconds)
        except subprocess.TimeoutExpired:
            status = "time"
        try:
            os.killpg(child.pid, signal.SIGKILL)  # and whatever it has started
        except OSError:
            pass
        child.wait()
        out.seek(0)
        err.seek(0)
        text = out.read().decode(errors="replace")
        said = err.read(100000).decode(errors="replace").strip().split("\n")[-1]
    cases, done = [], False
    for line in text.split("\n"):
        word = line.split("\t")
        if word[0] == "case" and len(word) == 2:
            cases.append((word[1], []))
        elif word[0] == "wrong" and len(word) == 3 and cases:
            cases[-1][1].append((word[1], word[2]))
        done = done or line == "done"
    return cases, "" if done and status == 0 else ending(status, seconds, said)


def ending(status, seconds, said):
    if status == "time" or status in (-signal.SIGXCPU, -signal.SIGKILL):
        return ("stopped after %d seconds: an endless loop? Does its variable grow, is its end "
                "right?" % seconds)
    if status == 9 or re.search("out of memory|not enough memory|bad_alloc|allocate memory", said):
        return "not enough memory: it asks for far more than a layer needs"
    if status in (-signal.SIGSEGV, -signal.SIGBUS):
        return ("crashed (segmentation fault): an index far outside of an array, a NULL pointer "
                "(of an allocation too large?), or recursion without an end")
    if status == -signal.SIGFPE:
        return "crashed: a whole number divided by 0"
    if status == -signal.SIGABRT:
        return "crashed (abort): " + (said or "memory was overwritten, or abort() was called")
    if status == -signal.SIGXFSZ:
        return "stopped after printing a megabyte: an endless loop?"
    if status == 0:
        return "ended before the check was over: it must return, not call exit()"
    if re.search("(race|nothing has written).* shared memory", said):
        said += "; is there a __syncthreads() between writing and reading?"
    return "ended by itself with status %s%s" % (status, ": " + said if said else "")


def hint_for(cases, end):
    """What to say of a pass: for each result the clearest hint, and where it is right and wrong."""
    bad = [name for name, wrongs in cases if wrongs]
    good = [name for name, wrongs in cases if not wrongs]
    if end and good and cases[-1][0] == good[-1]:
        good.pop()
    best = {}
    for name, wrongs in cases:
        for what, text in wrongs:
            rank = sum(VAGUE[v] for v in VAGUE if v in text)
            rank += bool(SMALL.match(name)) * (0.5 + 0.5 * ("factor" in text))  # these show least
            if what not in best or rank < best[what][0]:
                best[what] = (rank, name, text)
    said = ["%s (%s): %s" % (what, name, text) for what, (_, name, text) in best.items()][:3]
    if end:
        said.append("%s%s" % (end, " (in the case: %s)" % cases[-1][0] if cases else ""))
    if bad and good:
        said.append("right in: %s; wrong in: %s" % (", ".join(good[:4]) + ", ..." * (len(good) > 4),
                                                   ", ".join(bad[:4]) + ", ..." * (len(bad) > 4)))
    return said


def grade_file(file, options, folder):
    """A dictionary for each layer."""
    program, error = compile_submission(file, options, folder)
    assigned = set(options.layers or LAYERS)
    if assigned & FUSED_LAYERS:
        assigned.add(FUSED)
    jobs = [(layer, which) for layer in layers_of(file) for which in passes(layer)]
    found = {}
    if program:
        with ThreadPoolExecutor(2) as pool:
            results = [pool.submit(check, program, file, *job, options.seed) for job in jobs]
            try:
                for job, result in zip(jobs, results):
                    cases, end = result.result()
                    good = not end and cases and not any(wrongs for _, wrongs in cases)
                    found[job] = {"ok": bool(good), "hints": [] if good else hint_for(cases, end)}
            finally:                        # a signal ends it without the checks that are left
                for result in results:
                    result.cancel()
    rows = []
    for layer in layers_of(file):
        row = {"file": file, "layer": layer, "assigned": layer in assigned, "points": 0, "max": 10}
        if error:
            row["error"] = "%s does not compile, so nothing in it is checked: %s" % (file, error)
        for which in passes(layer):
            row[which] = found.get((layer, which),
                                   {"ok": False, "hints": [row.get("error")]})
            row["points"] += POINTS[which] * row[which]["ok"]
        rows.append(row)
    return rows


def print_table(rows, result):
    words = {True: "right", False: "WRONG", None: "-"}
    print("%-14s %-22s %-9s %-9s %s" % ("", "layer", "forward", "backward", "points"))
    for row in rows:
        both = [row[w]["ok"] if w in row else None for w in ("forward", "backward")]
        if "update" in row:
            both[0] = row["update"]["ok"]
        if "error" in row:
            both = [None, None]
        print("%-14s %-22s %-9s %-9s %2d of %d%s" % (
            row["file"], row["layer"], words[both[0]], words[both[1]], row["points"], row["max"],
            "" if row["assigned"] else "   (given, not counted)"))
    for error in dict.fromkeys(row["error"] for row in rows if "error" in row):
        print("\n" + textwrap.fill(error, 96, subsequent_indent="  "))
    for row in rows:
        for which in passes(row["layer"]):
            if row[which]["hints"] and "error" not in row:
                print("\n%s, %s_%s:" % (row["file"], row["layer"], which))
                for hint in row[which]["hints"]:
                    print(textwrap.fill(hint, 96, initial_indent="    ",
                                        subsequent_indent="      "))
    print("\n%d of %d points; make grade SEED=%d repeats these numbers" % (
        result["points"], result["max"], result["seed"]))


def run():
    parser = Parser(description="Grades the layers of train_gpas.c.")
    parser.add_argument("--cc", type=command, default="gcc")
    parser.add_argument("--cxx", type=command, default="g++")
    parser.add_argument("--on-cpu", type=command, help="the compiler's command for train_gpas.cu")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3), "little"))
    parser.add_argument("layers", nargs="*", help="those that count; default: all")
    options = parser.parse_args()
    os.chdir(os.path.join(os.path.dirname(os.path.abspath(__file__)), "../.."))
    for layer in options.layers:
        if layer not in LAYERS:
            raise Error("there is no layer %s; choose from: %s" % (layer, " ".join(LAYERS)))
    if not os.path.exists("train_gpas.c"):
        raise Error("there is no train_gpas.c in %s" % os.getcwd())
    files = [f for f in CPU_SECONDS if os.path.exists(f) and (f.endswith(".c") or options.on_cpu)]
    os.makedirs("build", exist_ok=True)     # TMPDIR may be full, or allow no programs
    with tempfile.TemporaryDirectory(dir="build") as folder:
        tempfile.tempdir = os.path.abspath(folder)
        rows = [row for file in files for row in grade_file(file, options, folder)]
    counted = [row for row in rows if row["assigned"]]
    result = {"points": sum(row["points"] for row in counted),
              "max": sum(row["max"] for row in counted), "seed": options.seed, "layers": rows}
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        print_table(rows, result)


if __name__ == "__main__":
    main(run)
