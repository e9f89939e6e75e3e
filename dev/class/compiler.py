"""
compiler.py: compiles the classroom's programs, rephrases what the compiler said, and runs
what was compiled.
"""
import contextlib
import os
import pathlib
import re
import resource
import shlex
import signal
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)), ".."))
from command import Error

COMPILER_SECONDS = 120      # of CPU time
PASS_SECONDS = 60           # the submission itself has a lower limit: see grade.c
NO_OPENMP = ("{} has no OpenMP. On a Mac: brew install gcc, then add CC=gcc-14 to the make "
             "command; on Linux: apt install gcc")


def command(text):
    """The words of a command. ValueError if there are none, which argparse reports."""
    words = shlex.split(text)
    if not words:
        raise ValueError
    return words


def limit_cpu(seconds):
    return lambda: resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))


def compiler(words):
    """Runs a compiler, which speaks English. Returns whether it succeeded, and what it said."""
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, errors="replace", check=False,
                              env={**os.environ, "LC_ALL": "C", "TMPDIR": tempfile.tempdir},
                              preexec_fn=limit_cpu(COMPILER_SECONDS))
    except OSError as error:
        raise Error(f"cannot run {words[0]}: {error.strerror}")
    if done.returncode and re.search(r"option '?-fopenmp|-l\S*omp\b|library '?(lib)?omp|"
                                     r"omp\.h'? file not|omp\.h: No such", done.stdout):
        raise Error(NO_OPENMP.format(words[0]))
    return done.returncode == 0, done.stdout


def warnings_of(text, file):
    """The compiler's messages on the submission, without those on other files."""
    lines, keep = [], False
    for line in text.split("\n"):
        if re.search(": (warning|error|note):", line):
            keep = os.path.basename(line.split(":")[0]) == file and ": note:" not in line
        elif re.search("In (member )?function|In instantiation|At top level|^In file", line):
            keep = False
        lines += [line] * keep
    return "\n".join(lines)


def first_error(text):
    """The first error, in words that name the function if the grader's own file finds it."""
    lines = text.strip().split("\n")
    error = next((line for line in lines if "error:" in line), lines[-1])
    missing = re.search(r"submission.c.*\W(\w+)\W* (undeclared|was not declared)", error)
    changed = re.search(r'assertion failed.*"(the parameters of .*)"', error)
    return (f"it has no function {missing[1]}" if missing else
            f"{changed[1]}: restore them from the hand-out" if changed else error)


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
        good, text = False, "the program does not even start: what runs before main()?"
    return (program, None) if good else (None, first_error(text))


def run_program(words):
    """Runs the grader. Returns its status, what it printed, and the last line of stderr."""
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
