#!/usr/bin/env python3
"""
Checks figures.py on a table of tiny runs: missing runs are trained, an interrupted set
continues and ends with the same numbers, and a wrong table gives one line. Drawing is checked where
matplotlib is installed. What compare.py, report.py, roofline.py, soak.py and gpu.sh do with wrong
calls and with files that are not theirs is checked at the end.

    python3 dev/test/test_figures.py
"""
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time

ROOT = os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "../.."))
sys.path.insert(0, os.path.join(ROOT, "dev/tools"))
import figures  # noqa: E402
from harness import check, summary  # noqa: E402

SIZES = "--layers 2 --channels 8 --hidden 16 --heads 2 --seq-len 8 --batch 2"
TABLE = f"""# pre without, with, and with GPAS but no stop-gradient
common\t{SIZES} --steps 4 --val-every 2 --val-batches 1 --save-every 1
seeds\t1 2
pre.base.toy.1e-3\t--norm pre --gpas off
pre.gpas.toy.1e-3\t--norm pre --gpas on
pre.plain.toy.1e-3\t--norm pre --gpas on --stop-grad off
pre.base.real.1e-3\t--norm pre --gpas off
"""


def check_error(what, done, words):
    """One line on stderr, of two lines of a terminal at most, that holds the words; status 1."""
    check(done.returncode == 1 and done.stderr.count("\n") == 1 and words in done.stderr
          and len(done.stderr) < 160, f"error: {what}", done)


def run(*command, cwd=ROOT, **settings):
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          stdin=subprocess.DEVNULL, check=False, cwd=cwd, **settings)


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
    runs = [figures.Run(f) for f in folders]
    check(all(run.last == 4 for run in runs), "to the last step")
    check(len({run.rows[4]["train_loss"] for run in runs}) > 1, "seeds differ")
    check(not any(name.endswith(".safetensors") for f in folders for name in os.listdir(f)),
          "a finished run keeps its logs only")

    # One run again, up to step 3 as an interrupt leaves it: the set goes on from its checkpoint.
    before = log_without_time(folders[0])
    experiment = figures.read_experiments(table, out)[0][0]
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
    write(os.path.join(folders[1], "ckpt_best.safetensors"), "mine")
    check_error("misses a run", run(*figures_py, "--draw-only"), "1 runs are missing")
    check(run(*figures_py, "--run-only").returncode == 0
          and os.path.exists(os.path.join(folders[1], "ckpt_best.safetensors")),
          "a run that died is trained again; other files stay")
    shutil.rmtree(folders[1])
    os.mkdir(folders[1])
    write(os.path.join(folders[1], "samples.txt"), "mine")
    check_error("another's run", run(*figures_py, "--run-only"), "did not write")
    os.mkdir(os.path.join(folders[1], "log.csv"))
    check_error("a log that is a folder", run(*figures_py, "--run-only"), "not a file")


def test_signal(folder):
    """A signal to all processes at once, as a terminal or `timeout` sends it: the run saves."""
    slow = SIZES.replace("--channels 8 --hidden 16", "--channels 256 --hidden 1024")
    table = write(os.path.join(folder, "slow.tsv"), f"common\t{slow} --total-batch 1000 --steps 4 "
                  "--val-batches 1\nseeds\t1\npre.base.toy.1\t--norm pre\n")
    out = os.path.join(folder, "slow")
    child = subprocess.Popen([sys.executable, "dev/tools/figures.py", "--table", table,
                              "--out", out, "--toy", os.path.join(folder, "data"), "--run-only"],
                             cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL)
    run_folder = os.path.join(out, "pre.base.toy.1", "seed-1")
    try:
        while child.poll() is None and not os.path.exists(os.path.join(run_folder, "log.csv")):
            time.sleep(0.05)
        time.sleep(0.5)
        os.killpg(child.pid, signal.SIGTERM)
        status = child.wait(timeout=60)
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
    check(status == 128 + signal.SIGTERM and figures.checkpoints(run_folder),
          "a signal to all processes: the run saves", (status, os.listdir(run_folder)))


def test_pair(folder):
    """make run PRESET=...: it trains what is missing of the pair, and repeats nothing."""
    pair = os.path.join(folder, "pair")
    make = ["make", "run", "PRESET=toy", f"PAIR={pair}", f"DATA={folder}/data",
            f"OPTIONS={SIZES} --steps 4 --val-batches 1 --save-every 2"]
    done = run(*make)
    before = log_without_time(f"{pair}/pre_gpas")
    check(done.returncode == 0 and before[-2][0] == "4"
          and "report.html shows 2 runs" in done.stdout, "make run PRESET=toy trains a pair", done)
    os.unlink(f"{pair}/pre_gpas/ckpt_000004.safetensors")
    done = run(*make)
    check("pair/pre is complete" in done.stdout and f"--resume {pair}/pre_gpas" in done.stderr
          and log_without_time(f"{pair}/pre_gpas") == before, "an interrupted pair resumes", done)


def write_run(folder, gate, losses):
    """The logs of a run of one layer."""
    os.makedirs(folder)
    write(f"{folder}/log.csv", "step,train_loss,val_loss,lr,grad_norm,ms,tokens_per_s\n" + "".join(
        f"{step},{loss},{loss},0.001,1,10,1000\n" for step, loss in enumerate(losses)))
    write(f"{folder}/layers.csv", "step,layer,attention_variance,mlp_variance,gate,grad_norm\n"
          + "".join(f"{step},1,1,2,{gate},1\n" for step in range(len(losses))))
    return folder


def test_pages(folder):
    """compare.py and report.py."""
    a = write_run(os.path.join(folder, "up"), "", [5, 6, 7])
    b = write_run(os.path.join(folder, "b\udce9 \n<b>"), "0.1", [5, 4, 3])
    page, tools = os.path.join(folder, "page", "report.html"), "dev/tools/"
    os.mkdir(os.path.dirname(page))
    write(page, "<!DOCTYPE html><!-- written by dev/tools/report.py -->")
    write(os.path.join(b, "ckpt_best.safetensors"), "")
    for program, arguments in (("compare.py", []), ("report.py", ["--out", page])):
        done = run(sys.executable, tools + program, a, b, *arguments)
        check(done.returncode == 0 and "Another story" not in done.stdout,
              f"{program}: losses that rise, a name in bytes, no checkpoint", done)
    with open(page, encoding="utf-8") as file:
        text = file.read()
    check("<b>" not in text and "&lt;b&gt;" in text, "report.py: a name is no HTML")
    done = run(sys.executable, tools + "report.py", a, "--out", page,
               preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)))
    with open(page, encoding="utf-8") as file:
        check(file.read() == text and os.listdir(os.path.dirname(page)) == ["report.html"],
              "report.py: after an error the old page is there, and nothing else", done)
    os.mkfifo(os.path.join(folder, "pipe"))
    check_error("report.py to a pipe", run(sys.executable, tools + "report.py", a, "--out",
                                           os.path.join(folder, "pipe")), "not a file")
    write(os.path.join(a, "log.csv"), "")
    check_error("compare.py: an empty log", run(sys.executable, tools + "compare.py", a, b),
                "line 1")


def test_wrong_calls(folder):
    roofline = [sys.executable, "dev/gpu/roofline.py"]
    measured = write(os.path.join(folder, "measured"), "rope_forward;12;x\nswiglu_forward;12;0\n")
    for arguments, words in ((["71m", "\u00b2", "1"], "give a preset"), (["--tbytes", "0"], "rate"),
                             (["71m", "1", "1", "--measured", folder], "not a file"),
                             (["71m", "1", "1", "--measured", ""], "empty")):
        check_error(f"roofline.py {arguments}", run(*roofline, *arguments), words)
    done = run(*roofline, "71m", "1", "1", "--measured", measured)
    check(done.returncode == 0 and "nan" in done.stdout, "roofline.py: times that are none", done)
    soak = [sys.executable, "dev/test/soak.py"]
    for arguments in (["--kills", "0"], ["--seconds", "nan"], ["--seconds", "inf"]):
        check_error(f"soak.py {arguments}", run(*soak, *arguments), "above 0")
    os.makedirs(os.path.join(folder, "out", "gpu"), exist_ok=True)
    gpu = ["sh", os.path.join(ROOT, "dev/gpu/gpu.sh")]
    for arguments, words in (([], "rename it"), (["--peer", ""], "--peer"), ([""], "no part")):
        check_error(f"gpu.sh {arguments}", run(*gpu, *arguments, cwd=folder), words)


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
        test_signal(folder)
        test_pair(folder)
        test_pages(folder)
        test_wrong_calls(folder)
        test_tables(folder)
    return summary()


if __name__ == "__main__":
    sys.exit(main())
