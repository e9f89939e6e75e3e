#!/usr/bin/env python3
"""
Runs what README.md and docs/ quote, and compares what it prints with what they say it prints.

    python3 dev/test/test_docs.py           # commands that take under a minute
    python3 dev/test/test_docs.py --all     # the others too, unless they need a GPU or a network

A block ```sh holds commands. If a block ```text follows, it holds their output, in which a line
[...] stands for any number of lines. Words must be equal and numbers close: other processors round
differently, which changes the third digit of a loss and the second of a variance. Times need only
be numbers. The commands run in a copy of the project. Without --all, training that would take 800
steps takes 8, and its output is not compared. A block ```c must be part of train_gpas.c. Links,
targets of make, options and files must exist.
"""
import glob
import os
import re
import shutil
import subprocess
import sys
import tempfile

from harness import check, summary

ROOT = os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "../.."))
NOT_HERE = ["make test", "make sanitize", "make fuzz", "make soak", "make figures", "make bench",
            "tools/bench", "cuda",                  # take long, measure, or need a GPU
            "--download", "hellaswag", "./run ", "convert_hf", "safetensors.torch"]  # not our files
SLOW = r"--seq-len \$T|--steps 150"  # over a minute
SHORT = "--steps 8 --val-batches 1"


def read(path):
    with open(os.path.join(ROOT, path), encoding="utf-8") as file:
        return file.read()


def blocks(text):
    """(language, text) of each fenced block; what follows an output has language ""."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", text, re.M | re.S)
    return [(language, re.sub(r"\\\n *", "", body)) for language, body in found]


def copy_project(folder):
    """The project with its built program and its data, but without what tests and runs left."""
    ignore = shutil.ignore_patterns(".git", "build", "out", "assignment", "test_gpas*", "*_on_cpu")
    shutil.copytree(ROOT, folder, ignore=ignore, dirs_exist_ok=True)
    os.makedirs(os.path.join(folder, "build"))
    shutil.copy2(os.path.join(ROOT, "build", "flags"), os.path.join(folder, "build"))
    shutil.copy2(os.path.join(ROOT, "train_gpas"), folder)
    os.mkdir(os.path.join(folder, "submissions"))
    shutil.copy(os.path.join(ROOT, "train_gpas.c"), os.path.join(folder, "submissions/van Dyck.c"))
    stories = [f"Once upon a time there were {i} cats. They had {i + 1} mice." for i in range(1000)]
    with open(os.path.join(folder, "my.txt"), "w", encoding="utf-8") as file:
        file.write("\n<|endoftext|>\n".join(stories))


def commands(body, everything):
    """The lines of a block that can be run here. Training is shortened."""
    lines = []
    for line in body.strip().split("\n"):
        command = line.partition(" #")[0].rstrip()
        if any(part in command for part in NOT_HERE) or (
                not everything and re.search(SLOW, command)):
            continue
        if not everything and command == "make run":
            command += f' OPTIONS="{SHORT}"'
        if not everything and re.match(r"\./train_gpas(?!.*(--steps|--load|--dump-gr|--help))",
                                       command):
            command += f" {SHORT}"
        lines.append(command)
    return lines


def same(quoted, printed):
    """Is this the line? Numbers may differ by 5%, or by 0.02."""
    number = r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?"
    def words(line):
        return re.sub(r"[█▐▌\s]+", " ", re.sub(number, "#", line)).strip()
    if words(quoted) != words(printed):
        return False
    pairs = zip(map(float, re.findall(number, quoted)), map(float, re.findall(number, printed)))
    timed = re.search(r"\bms\b|tok/s", quoted)
    return timed or all(abs(a - b) <= max(0.05 * abs(a), 0.02) for a, b in pairs)


def find_output(quoted, printed):
    """None if the quoted lines are in what was printed, in order, else the first that is not."""
    at, gap = 0, True
    for line in quoted:
        if line.strip() == "[...]":
            gap = True
            continue
        places = range(at, len(printed)) if gap else range(at, min(at + 1, len(printed)))
        found = next((i for i in places if same(line, printed[i])), None)
        if found is None:
            return line
        at, gap = found + 1, False
    return None


def checksums(lines):
    """Checksums as letters: they differ from processor to processor, but equal ones stay equal."""
    names = {}
    return [re.sub(r"\b\d{8,10}\b", lambda m: names.setdefault(m[0], f"sum-{len(names)}-"), line)
            for line in lines]


def run_page(page, folder, everything):
    found = blocks(read(page)) + [("", "")]
    for (language, body), (following, output) in zip(found, found[1:]):
        if language == "c":
            for part in body.split("\n\n"):
                check(part in read("train_gpas.c"), f"{page}: code as in train_gpas.c", part)
        if language != "sh":
            continue
        lines = commands(body, everything)
        compared = following == "text" and (everything or SHORT not in "".join(lines))
        if not lines:
            continue
        done = subprocess.run(["bash", "-ec", "\n".join(lines)], cwd=folder, errors="replace",
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              stdin=subprocess.DEVNULL, check=False)
        name = f"{page}: {lines[0][:60]}"
        check(done.returncode == 0, f"{name} runs", done.stderr[-500:] + done.stdout[-500:])
        if compared:
            missing = find_output(checksums(output.rstrip().split("\n")),
                                  checksums(done.stdout.split("\n")))
            check(missing is None, f"{name} prints what is quoted", (missing, done.stdout))


def anchor(heading):
    """The name that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def check_names(page):
    """What a page names must exist."""
    text = read(page)
    for target in re.findall(r"\]\((?!http)([^)]+)\)", re.sub("`[^`\n]*`", "", text)):
        path, _, part = target.partition("#")
        path = os.path.normpath(os.path.join(os.path.dirname(page), path)) if path else page
        good = os.path.exists(os.path.join(ROOT, path))
        if good and part:
            good = part in map(anchor, re.findall(r"^#+ (.*)$", read(path), re.M))
        check(good, f"{page}: link to {target}")
    makefile = read("Makefile")
    for target in sorted(set(re.findall(r"(?:^|`)make ([a-z][a-z_-]+)", text, re.M))):
        check(re.search(rf"^(\.PHONY:.* )?{target}\b", makefile, re.M), f"{page}: make {target}")
    sources = "".join(map(read, ["dev/options.h", "prepro_tinystories.py", "dev/gpu/gpu.sh"])) + \
        "".join(read(os.path.relpath(path, ROOT)) for path in
                glob.glob(f"{ROOT}/dev/*/*.py") + glob.glob(f"{ROOT}/dev/*.h"))
    for name in sorted(set(re.findall(r"`--([a-z][a-z-]+)", text))):
        check(re.search(rf'"(--)?{name}"|--{name}\b', sources), f"{page}: option --{name}")
    for path in sorted(set(re.findall(r"\b(?:dev|docs)/[\w/.]*\w\.\w+", text))):
        check(os.path.exists(os.path.join(ROOT, path)), f"{page}: {path}")


def main():
    everything = sys.argv[1:] == ["--all"]
    pages = ["README.md", *sorted(os.path.relpath(p, ROOT) for p in glob.glob(f"{ROOT}/docs/*.md"))]
    for page in pages:
        check_names(page)
    lines = read("README.md").count("\n")
    check(lines <= 180, "README.md has at most 180 lines", lines)
    with tempfile.TemporaryDirectory() as folder:
        copy_project(folder)
        for page in pages:
            run_page(page, folder, everything)
    return summary()


if __name__ == "__main__":
    sys.exit(main())
