#!/usr/bin/env python3
"""
grades.py: grades a folder of submissions, several at once, each in a fresh hand-out.

    make grades SUBMISSIONS=folder LAYERS="gpas rope" CUDA=1 GRADES=results

A submission is a file, NAME.c (with CUDA=1 beside it NAME.cu), or a folder NAME in which there is
train_gpas.c. Other files are skipped. Names may have spaces, umlauts or anything else. LAYERS must
be those of the hand-out; LAYERS=all means all ten. The folder GRADES gets:

    grades.csv      a line for each student: name, points, points of each layer, first error
    NAME.json       all results, as of make grade JSON=1
    NAME.txt        the table and the hints, for the student

If it was interrupted, it continues. A grade is kept unless its submission is newer.
"""
import contextlib
import csv
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)), ".."))
from command import CLEAR, Error, Parser, main, new_file
from feedback import first_error, print_table
from grade import FUSED, LAYERS
from gradescope import write_handout

ROOT = os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "../.."))
MOST_SECONDS = 3600     # of wall time for one submission: far more than the limits inside of it


def find_submissions(folder):
    """{name: {"train_gpas.c": path, "train_gpas.cu": path}}"""
    if not os.path.isdir(folder):
        raise Error(f"there is no folder {folder}; SUBMISSIONS=folder names it")
    found, skipped = {}, []
    for entry in sorted(os.listdir(folder)):
        path = os.path.join(folder, entry)
        if entry.startswith("."):
            continue
        if os.path.isdir(path):
            found.setdefault(entry, {}).update(
                {file: os.path.join(path, file) for file in ("train_gpas.c", "train_gpas.cu")
                 if os.path.isfile(os.path.join(path, file))})
        elif os.path.isfile(path):
            name, end = os.path.splitext(entry)
            if end in (".c", ".cu"):
                found.setdefault(name, {})["train_gpas" + end] = path
            else:
                skipped.append(entry)
    if skipped:
        print(f"skipped, since a submission is NAME.c, NAME.cu or a folder: {', '.join(skipped)}",
              file=sys.stderr)
    if not found:
        raise Error(f"there are no submissions in {folder}: no NAME.c, and no folder")
    return found


def read_settings(path, options):
    """What the grades in a folder depend on. The seed is chosen once for a class."""
    wanted = {"layers": options.layers, "cuda": options.cuda, "variant": options.variant}
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            settings = json.load(file)
        if {name: settings.get(name) for name in wanted} != wanted or (
                options.seed is not None and settings["seed"] != options.seed):
            raise Error(f"{os.path.dirname(path)} holds grades with other LAYERS, CUDA, VARIANT or "
                        "SEED; choose another folder: GRADES=folder")
        return settings
    seed = int.from_bytes(os.urandom(3), "little") if options.seed is None else options.seed
    settings = {**wanted, "seed": seed}
    write(path, json.dumps(settings))
    return settings


def write(path, text):
    with new_file(path) as name:
        with open(name, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)


def is_graded(path, files):
    return os.path.exists(path) and all(os.path.getmtime(path) >= os.path.getmtime(file)
                                        for file in files.values())


def make_template(options, folder):
    """A hand-out in which the grader itself is compiled already."""
    write_handout(folder, options)
    result = run_make(options, folder, 0)
    if "layers" not in result:
        raise Error(result["error"])


def run_make(options, folder, seed):
    """What make grade says in a hand-out."""
    words = ["make", "-s", "grade", "JSON=1", f"SEED={seed}", f"CC={options.cc}",
             f"CXX={options.cxx}", f"PYTHON={sys.executable}"]
    environment = {name: value for name, value in os.environ.items()
                   if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    try:
        done = subprocess.run(words, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True, errors="replace", check=False,
                              env=environment, timeout=MOST_SECONDS)
        return json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return {"error": f"not graded after {MOST_SECONDS} seconds"}
    except ValueError:
        lines = [line for line in done.stderr.split("\n") if line and not line.startswith("make")]
        return {"error": (lines or ["make grade says nothing"])[-1].split(": ", 1)[-1]}


def grade_one(name, files, options, template, seed):
    """Grades one submission in a copy of the template and writes its two files."""
    folder = tempfile.mkdtemp(dir=os.path.dirname(template))
    try:
        shutil.copytree(template, folder, dirs_exist_ok=True)   # with times: nothing is built anew
        wanted = ["train_gpas.c"] + ["train_gpas.cu"] * options.cuda
        missing = [file for file in wanted if file not in files]
        for file in wanted:
            if file in files:
                shutil.copyfile(files[file], os.path.join(folder, file))
        result = ({"error": f"there is no {' and no '.join(missing)}"} if missing else
                  run_make(options, folder, seed))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        if "layers" in result:
            print_table(result["layers"], result)
        else:
            result = {"points": 0, "max": 0, "seed": seed, "layers": [], **result}
            print(result["error"])
    write(os.path.join(options.out, name + ".txt"), text.getvalue())
    write(os.path.join(options.out, name + ".json"), json.dumps(result, indent=1))


def write_csv(names, options):
    """grades.csv, from what has been graded so far."""
    kernels = options.layers + [FUSED] * bool(set(FUSED.split("_")) & set(options.layers))
    columns = [("train_gpas.c", layer) for layer in options.layers]
    columns += [("train_gpas.cu", layer) for layer in kernels if options.cuda]
    headings = [layer + " (CUDA)" * (file == "train_gpas.cu") for file, layer in columns]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["name", "points", "max", *headings, "first error"])
    for name in names:
        path = os.path.join(options.out, name + ".json")
        if os.path.exists(path):
            with open(path, encoding="utf-8", errors="surrogateescape") as file:
                result = json.load(file)
            points = {(row["file"], row["layer"]): row["points"] for row in result["layers"]}
            table.writerow([name, result["points"], 10 * len(columns),
                            *[points.get(column, 0) for column in columns], first_error(result)])
    write(os.path.join(options.out, "grades.csv"), text.getvalue())


def run():
    parser = Parser(description="Grades a folder of submissions.")
    parser.add_argument("--submissions", required=True, help="the folder")
    parser.add_argument("--out", default="grades", help="the folder for the grades")
    parser.add_argument("--cc", default="gcc")
    parser.add_argument("--cxx", default="g++")
    parser.add_argument("--cuda", action="store_true", help="grade train_gpas.cu too")
    parser.add_argument("--variant", action="store_true", help="of a hand-out with VARIANT=1")
    parser.add_argument("--seed", type=int, help="default: one for all, chosen by chance")
    parser.add_argument("layers", nargs="*", help="those of the hand-out, or all")
    options = parser.parse_args()
    if not options.layers:
        raise Error('LAYERS is missing: give those of the hand-out, as in LAYERS="gpas rope", or '
                    "LAYERS=all")
    wanted = LAYERS if options.layers == ["all"] else options.layers
    for layer in wanted:
        if layer not in LAYERS:
            raise Error(f"there is no layer {layer}; choose from: {' '.join(LAYERS)}")
    options.layers = [layer for layer in LAYERS if layer in wanted]
    submissions = find_submissions(options.submissions)
    os.makedirs(options.out, exist_ok=True)
    seed = read_settings(os.path.join(options.out, "settings.json"), options)["seed"]
    left = [(name, files) for name, files in submissions.items()
            if not is_graded(os.path.join(options.out, name + ".json"), files)]
    os.makedirs(os.path.join(ROOT, "build"), exist_ok=True)     # TMPDIR may allow no programs
    with tempfile.TemporaryDirectory(dir=os.path.join(ROOT, "build")) as folder:
        template = os.path.join(folder, "hand-out")
        if left:
            make_template(options, template)
        with ThreadPoolExecutor(os.cpu_count() or 2) as pool:
            jobs = [pool.submit(grade_one, name, files, options, template, seed)
                    for name, files in left]
            try:
                for i, job in enumerate(jobs):
                    job.result()
                    print(f"{CLEAR}{i + 1} of {len(left)} graded", end="" if CLEAR else "\n",
                          file=sys.stderr, flush=True)
            finally:
                for job in jobs:
                    job.cancel()
                write_csv(submissions, options)
    print(f"{CLEAR}{os.path.join(options.out, 'grades.csv')}: {len(submissions)} submissions, "
          f"{len(submissions) - len(left)} graded before")


if __name__ == "__main__":
    main(run)
