"""
compiler.py: runs a compiler for the classroom's programs, and says what it said in other words.
"""
import os
import re
import resource
import shlex
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)), ".."))
from command import Error

COMPILER_SECONDS = 120      # of CPU time
NO_OPENMP = ("{} has no OpenMP. On a Mac: brew install gcc, then add CC=gcc-14 to the make "
             "command; on Linux: apt install gcc")


def command(text):
    """The words of a command, of which there must be one: argparse tells where there is none."""
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
    """The compiler's messages on the submission, without those on what is given."""
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
            f"{changed[1]}: give them back what the hand-out had" if changed else error)
