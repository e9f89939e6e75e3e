#!/usr/bin/env python3
"""
gradescope.py: makes an autograder for Gradescope, and is what runs in it.

    make gradescope LAYERS="gpas rope" ZIP=autograder.zip

writes the zip file to upload: setup.sh, run_autograder and the hand-out, into which the student's
train_gpas.c is put. In it, `gradescope.py --grade /autograder` writes results/results.json in the
format of https://gradescope-autograders.readthedocs.io/en/latest/specs/ : a test for each result.
"""
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile

sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)), ".."))
from command import Error, Parser, main, new_file

HERE = os.path.dirname(os.path.abspath(__file__))
SETUP = "#!/bin/sh\napt-get update && apt-get install -y gcc g++ make python3\n"
RUN = """#!/bin/sh
cd /autograder/source/assignment && python3 dev/class/gradescope.py --grade /autograder
"""


def tests_of(result):
    """Gradescope's tests: one for each result of each pass."""
    tests = []
    for row in result["layers"]:
        where = f"{row['file']}, {row['layer']}"
        if "error" in row:
            tests.append({"name": where, "score": 0, "max_score": row["max"], "status": "failed",
                          "output": row["error"]})
        for which in ("forward", "backward", "update"):
            part = row.get(which, {"checks": [], "hints": []})
            checks = part["checks"] or [{"name": "", "points": 0, "max": part.get("max", 0)}]
            for check in checks if which in row else []:
                hints = [hint for hint in part["hints"] if hint.startswith(check["name"] + ": ")]
                others = [hint for hint in part["hints"]
                          if not any(hint.startswith(one["name"] + ": ") for one in checks)]
                passed = check["points"] == check["max"]
                tests.append({"name": f"{where}_{which}: {check['name']}".rstrip(": "),
                              "score": check["points"], "max_score": check["max"],
                              "status": "passed" if passed else "failed",
                              "output": "" if passed else "\n".join(others + hints)})
    return tests


def grade(root):
    """Grades root/submission in this hand-out and writes root/results/results.json."""
    os.chdir(os.path.join(HERE, "../.."))
    begin, missing = time.monotonic(), []
    for file in ("train_gpas.c", "train_gpas.cu"):
        if os.path.exists(file):
            submitted = os.path.join(root, "submission", file)
            if os.path.isfile(submitted):
                shutil.copyfile(submitted, file)
            else:
                missing.append(file)
    report = {"output_format": "text", "stdout_visibility": "hidden", "tests": []}
    if missing:
        report.update(score=0, output=f"Submit {' and '.join(missing)}, under this name.")
    else:
        done = subprocess.run(["make", "-s", "grade", "JSON=1"], stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                              errors="replace", check=False)
        try:
            result = json.loads(done.stdout)
            report["tests"] = tests_of(result)
            report["output"] = f"make grade SEED={result['seed']} repeats these numbers."
        except ValueError:
            report.update(score=0, output=f"The grader failed: {done.stderr.strip()}")
    report["execution_time"] = round(time.monotonic() - begin)
    with new_file(os.path.join(root, "results/results.json")) as name:
        with open(name, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)


def write_handout(folder, options):
    words = [sys.executable, os.path.join(HERE, "assignment.py"), "--out", folder]
    words += ["--cuda"] * options.cuda + ["--variant"] * options.variant + options.layers
    done = subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                          check=False)
    if done.returncode:
        raise Error(done.stderr.strip().split(": ", 1)[-1])


def make_zip(path, options):
    """The hand-out and the two scripts, in one file."""
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "assignment")
        write_handout(out, options)
        shutil.copy(os.path.join(HERE, "gradescope.py"), os.path.join(out, "dev/class"))
        for name, text in (("setup.sh", SETUP), ("run_autograder", RUN)):
            with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(os.path.join(folder, name), 0o755)
        with new_file(path) as name, zipfile.ZipFile(name, "w", zipfile.ZIP_DEFLATED) as archive:
            for place, _, names in os.walk(folder):
                for file in sorted(names):
                    full = os.path.join(place, file)
                    archive.write(full, os.path.relpath(full, folder))
    print(f"{path}: upload it as the autograder of a programming assignment")


def run():
    parser = Parser(description="Makes an autograder for Gradescope.")
    parser.add_argument("--grade", metavar="FOLDER", help="grade FOLDER/submission, on Gradescope")
    parser.add_argument("--out", default="autograder.zip", help="the zip file to write")
    parser.add_argument("--cuda", action="store_true", help="train_gpas.cu too")
    parser.add_argument("--variant", action="store_true", help="as of make assignment VARIANT=1")
    parser.add_argument("layers", nargs="*")
    options = parser.parse_args()
    if options.grade:
        grade(options.grade)
    else:
        make_zip(options.out, options)


if __name__ == "__main__":
    main(run)
