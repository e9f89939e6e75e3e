#!/usr/bin/env python3
"""
Checks figures.py on a table of tiny runs: missing runs are trained, an interrupted set
continues and ends with the same numbers, and a wrong table gives one line. Drawing is checked where
matplotlib is installed.

    python3 dev/test/test_figures.py
"""
import os
import subprocess
import sys
import tempfile

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../..")
sys.path.insert(0, os.path.join(ROOT, "dev/tools"))
import figures  # noqa: E402

SIZES = "--layers 2 --channels 8 --hidden 16 --heads 2 --seq-len 8 --batch 2"
TABLE = f"""# pre without, with, and with GPAS but no stop-gradient
common\t{SIZES} --steps 4 --val-every 2 --val-batches 1 --save-every 1
seeds\t1 2
pre.base.toy.1e-3\t--norm pre --gpas off
pre.gpas.toy.1e-3\t--norm pre --gpas on
pre.plain.toy.1e-3\t--norm pre --gpas on --stop-grad off
pre.base.real.1e-3\t--norm pre --gpas off
"""
counts = {True: 0, False: 0}


def check(good, name, seen=""):
    counts[bool(good)] += 1
    print("%s %s%s" % ("ok  " if good else "FAIL", name, "" if good else ": " + str(seen)))


def run(*command):
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          check=False, cwd=ROOT)


def write(path, text):
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    return path


def log_without_time(folder):
    with open(os.path.join(folder, "log.csv"), encoding="utf-8") as file:
        return [line.split(",")[:5] for line in file.read().split("\n")]


def test_runs(folder):
    table, out = write(os.path.join(folder, "table.tsv"), TABLE), os.path.join(folder, "out")
    data = os.path.join(folder, "data")
    run(sys.executable, "prepro_tinystories.py", "--out", data)
    figures_py = [sys.executable, "dev/tools/figures.py", "--table", table, "--out", out,
                  "--toy", data,
                  "--real", os.path.join(folder, "none"), "--figures", os.path.join(folder, "fig")]
    done = run(*figures_py, "--run-only")
    check(done.returncode == 0 and "0 of 6 runs are there, 6 to go" in done.stdout, "runs", done)
    check("real stories are left out" in done.stdout, "says what it leaves out", done.stdout)
    folders = [os.path.join(out, f"pre.{kind}.toy.1e-3", f"seed-{seed}")
               for kind in ("base", "gpas", "plain") for seed in (1, 2)]
    check(all(figures.read_log(f)[-1]["step"] == "4" for f in folders), "to the last step")
    check(len({figures.read_log(f)[-1]["train_loss"] for f in folders}) > 1, "seeds differ")
    check(not any(name.endswith(".safetensors") for f in folders for name in os.listdir(f)),
          "a finished run keeps its logs only")

    # One run again, up to step 3 as an interrupt leaves it: the set goes on from its checkpoint.
    before = log_without_time(folders[0])
    experiment = figures.read_table(table, out)[0][0]
    run("./train_gpas", *experiment.options, "--seed", "1", "--out", folders[0], "--data", data,
        "--overwrite", "on")
    os.unlink(os.path.join(folders[0], "ckpt_000004.safetensors"))
    with open(os.path.join(folders[0], "log.csv"), encoding="utf-8") as file:
        lines = file.read().split("\n")
    write(os.path.join(folders[0], "log.csv"), "\n".join(lines[:-2] + [""]))
    done = run(*figures_py, "--run-only")
    check("5 of 6 runs are there, 1 to go" in done.stdout, "an interrupted set goes on", done)
    with open(os.path.join(folders[0], "log.csv"), encoding="utf-8") as file:
        check(file.read().split("\n")[:-2] == lines[:-2], "from the last checkpoint")
    check(log_without_time(folders[0]) == before, "and ends with the same numbers")
    check("6 of 6 runs are there, 0 to go" in run(*figures_py, "--run-only").stdout, "then rests")

    done = run(*figures_py)
    drawn = os.path.join(folder, "fig", "variance.svg")
    if "pip install matplotlib" in done.stderr:
        check(done.returncode == 1 and done.stderr.count("\n") == 1, "says what draws", done)
    else:
        check(done.returncode == 0 and os.path.getsize(drawn) > 1000, "draws", done)
    os.unlink(os.path.join(folders[1], "log.csv"))
    done = run(*figures_py, "--draw-only")
    check(done.returncode == 1 and done.stderr.count("\n") == 1, "misses a run", done)


def test_tables(folder):
    for name, table in (("no tab", "pre.base.toy.1e-3 --norm pre\n"),
                        ("no runs", "common\t--steps 4\nseeds\t1\n"),
                        ("a name of two parts", "seeds\t1\ncommon\t--steps 4\npre.base\t\n"),
                        ("a name twice", "seeds\t1\na.b.toy.1\t--steps 4\na.b.toy.1\t--steps 4\n"),
                        ("seeds in words", "seeds\tone\na.b.toy.1\t--steps 4\n"),
                        ("no --steps", "seeds\t1\na.b.toy.1\t--norm pre\n"),
                        ("other data", "seeds\t1\na.b.elsewhere.1\t--steps 4\n")):
        path = write(os.path.join(folder, "wrong.tsv"), table)
        done = run(sys.executable, "dev/tools/figures.py", "--run-only", "--table", path,
                   "--out", os.path.join(folder, "none"))
        check(done.returncode == 1 and done.stderr.count("\n") == 1
              and done.stderr.startswith("figures.py: "), "a table with " + name, done)


def main():
    with tempfile.TemporaryDirectory() as folder:
        test_runs(folder)
        test_tables(folder)
    print(f"{counts[True]} passed, {counts[False]} failed")
    return counts[False] > 0


if __name__ == "__main__":
    sys.exit(main())
