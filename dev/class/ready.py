#!/usr/bin/env python3
"""
ready.py: what a hand-out's Makefile asks before it compiles, and before make run.

    python3 dev/class/ready.py openmp|written CC

Has the compiler OpenMP? If not, says in one line what to do. Which functions of train_gpas.c are
still empty? Says so, and with `written` that is an error.
"""
import os
import re
import sys
import tempfile

sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)), ".."))
from command import Error, Parser, main
from compiler import command, compiler, first_error

UNWRITTEN = "// Your code, in place of these lines."
PROBE = "#include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }\n"


def run():
    parser = Parser(description="Checks the compiler, and what is not yet written.")
    parser.add_argument("what", choices=("openmp", "written"))
    parser.add_argument("cc", type=command)
    options = parser.parse_args()
    os.makedirs("build", exist_ok=True)     # TMPDIR may be full
    with tempfile.TemporaryDirectory(dir="build") as folder:
        tempfile.tempdir = os.path.abspath(folder)
        probe = os.path.join(folder, "probe")
        with open(probe + ".c", "w", encoding="utf-8") as file:
            file.write(PROBE)
        good, text = compiler([*options.cc, "-fopenmp", probe + ".c", "-o", probe])
    if not good:
        raise Error(first_error(text))
    with open("train_gpas.c", encoding="utf-8", errors="replace") as file:
        text = file.read()
    empty = [re.findall(r"(\w+)\([^()]*\) \{$", part, re.M)[-1]
             for part in text.split(UNWRITTEN)[:-1]]
    if empty:
        print(f"still to write: {', '.join(empty)} (make grade checks them)", file=sys.stderr)
    return 1 if empty and options.what == "written" else 0


if __name__ == "__main__":
    main(run)
