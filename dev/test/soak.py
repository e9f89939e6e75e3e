#!/usr/bin/env python3
"""
Kills training runs at random moments, resumes them, and compares their files with those of a run
that was not disturbed.

    python3 dev/test/soak.py                     toy stories for an hour, killed about every minute
    python3 dev/test/soak.py --seconds 600       for ten minutes
    python3 dev/test/soak.py --kills 500         500 runs of a tiny network, each killed once

Runs are killed by SIGKILL, for which no program can prepare. A killed run continues from the newest
checkpoint in its folder, or from the beginning if there is none. In the end every file in the
folder must have the same bytes as after the undisturbed run, except for the two columns of time in
log.csv. Memory must not grow during a run.
"""
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.realpath(__file__))
sys.path[:0] = [os.path.join(HERE, ".."), os.path.join(HERE, "../tools")]
import harness
from command import Error, Parser, main
from harness import BYTE_PIECES, check, read, token_file, tokenizer, write
from runs import checkpoints

TINY = ("--layers 2 --channels 16 --hidden 24 --heads 2 --seq-len 16 --batch 2 --steps 12 "
        "--save-every 1 --keep 3 --val-every 4 --sample-every 5 --length 20").split()
SLACK = 2048            # KiB by which a run's memory may grow
harness.prefix = "soak: "


def write_data(folder):
    """Tokens and a tokenizer for the tiny network."""
    os.makedirs(folder)
    for name, count in (("train", 3000), ("val", 300)):
        write(f"{folder}/{name}.bin", token_file([(7 * i * i + i) % 259 for i in range(count)]))
    write(f"{folder}/tokenizer.bin", tokenizer(BYTE_PIECES))


def files_of(folder):
    """{name: bytes} of a run's files, log.csv without ms and tokens_per_s, which always differ."""
    files = {name: read(f"{folder}/{name}") for name in os.listdir(folder)}
    if "log.csv" in files:
        lines = files["log.csv"].split(b"\n")
        files["log.csv"] = b"\n".join(b",".join(line.split(b",")[:5]) for line in lines)
    return files


def difference(folder, expected, just_ended=False):
    """The names of the files that differ. A run that was killed at its very end may have one old
    checkpoint more, which it did not have time to remove."""
    files = files_of(folder)
    names = sorted(name for name in set(files) | set(expected)
                   if files.get(name) != expected.get(name))
    if just_ended and len(names) == 1 and names[0].startswith("ckpt_") and names[0] in files:
        names = []
    return ", ".join(names)


class Training:
    """One process that trains in its folder, from the newest checkpoint there."""
    process = None              # of the latest training

    def __init__(self, options):
        self.options, self.out = options, options[options.index("--out") + 1]
        self.steps = int(options[options.index("--steps") + 1])

    def newest(self):
        """The step of the newest checkpoint, or 0."""
        found = checkpoints(self.out) if os.path.isdir(self.out) else []
        return int(found[-1][5:-12]) if found else 0

    def start(self):
        self.began_at = self.newest()
        options = ["--resume", self.out] if self.began_at else self.options[1:]
        self.errors = tempfile.TemporaryFile()
        Training.process = subprocess.Popen([self.options[0], *options], stderr=self.errors,
                                            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        return self.process.wait() == -signal.SIGKILL

    def finish(self):
        """Waits for the process. Returns what went wrong, or ""."""
        status = self.process.wait()
        self.errors.seek(0)
        return f"status {status}, {self.errors.read().decode(errors='replace')}" if status else ""

    def finish_undisturbed(self):
        problem = self.finish()
        if problem:
            raise Error(f"the undisturbed run failed: {problem}")

    def memory(self):
        """KiB in use now, or 0 if that is unknown."""
        try:
            with open(f"/proc/{self.process.pid}/statm", encoding="ascii") as file:
                return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") // 1024
        except (OSError, IndexError):
            return 0


def whole_run(options):
    training = Training(options)
    training.start()
    training.finish_undisturbed()
    return files_of(training.out)


def kill_runs(program, folder, kills, seed):
    """Kills each run once, at a random moment, and resumes it to its end."""
    draw = random.Random(seed)
    counts = {"before the first checkpoint": 0, "later": 0, "while a checkpoint was written": 0,
              "after the last checkpoint": 0}
    problems = []
    write_data(f"{folder}/data")
    options = [program, *TINY, "--data", f"{folder}/data", "--out", f"{folder}/out",
               "--overwrite", "on"]
    whole_run(options)
    shutil.rmtree(f"{folder}/out")
    begin = time.monotonic()
    expected = whole_run(options)
    seconds = time.monotonic() - begin
    for number in range(kills):
        shutil.rmtree(f"{folder}/out")
        training = Training(options)
        training.start()
        time.sleep(draw.uniform(0, seconds))
        training.kill()
        names = os.listdir(f"{folder}/out") if os.path.isdir(f"{folder}/out") else []
        counts["while a checkpoint was written"] += any(n.endswith(".tmp") for n in names)
        ended, problem = training.newest() == training.steps, ""
        if not ended:
            training.start()
            problem = training.finish()
        counts["after the last checkpoint" if ended else "later" if training.began_at else
               "before the first checkpoint"] += 1
        problem = problem or difference(f"{folder}/out", expected, ended)
        if problem:
            problems.append(f"run {number + 1}: {problem}")
    check(not problems, f"{kills} runs, killed once each, end with the same bytes",
          f"{len(problems)} do not; {problems[:1]}")
    print("     killed " + ", ".join(f"{what}: {n}" for what, n in counts.items()))
    if kills >= 20:
        check(counts["later"] > kills / 4, "the kills were spread over the runs", counts)


def growth(training, until):
    """Watches a run until this time or its end. Returns by how many KiB its memory grew after the
    first ten seconds or, if that is longer, the first fifth of the time."""
    begin, first, last = time.monotonic(), 0, 0
    while time.monotonic() < until and training.process.poll() is None:
        time.sleep(0.2)
        now = training.memory()
        last = now or last
        if not first and time.monotonic() - begin > max(10, (until - begin) / 5):
            first = now
    return last - first if first else 0


def soak(program, folder, data, seconds, seed):
    """Half of the time goes to an undisturbed run, half to one that is killed and resumed."""
    draw = random.Random(seed)
    options = [program, "--data", data, "--out", f"{folder}/out", "--val-batches", "4",
               "--overwrite", "on", "--sample-every", "500", "--length", "100", "--steps"]
    begin = time.monotonic()
    whole_run(options + ["100"])
    steps = max(100, int(100 * seconds / 2 / (time.monotonic() - begin)) // 100 * 100)
    every = max(10, steps // 200)
    shutil.rmtree(f"{folder}/out")
    options += [str(steps), "--save-every", str(every)]
    training = Training(options)
    begin = time.monotonic()
    training.start()
    grown = growth(training, begin + 0.45 * seconds)
    training.finish_undisturbed()
    length = time.monotonic() - begin
    check(grown <= SLACK, f"the undisturbed run, {steps} steps in {length:.0f} s: its memory "
          f"grew by {grown} KiB, of {SLACK} allowed", grown)
    expected, kills, worst = files_of(training.out), 0, 0
    shutil.rmtree(training.out)
    while True:
        training.start()
        until = time.monotonic() + draw.uniform(0, length / 15)
        worst = max(worst, growth(training, until))
        if training.process.poll() is not None:
            break
        kills += training.kill()
        if training.newest() == steps:
            break
    status = training.process.returncode
    problem = status not in (0, -signal.SIGKILL) and training.finish()
    problem = problem or difference(training.out, expected, True)
    check(not problem, f"{steps} steps, killed {kills} times, end with the same bytes", problem)
    check(worst <= SLACK, f"between the kills its memory grew by at most {worst} KiB", worst)


def run():
    parser = Parser(description="Kills training runs and compares their results.")
    parser.add_argument("--program", default="./train_gpas")
    parser.add_argument("--data", default="data/toy", help="for the long run, not for --kills")
    parser.add_argument("--kills", type=int, help="kill this many short runs instead of a long one")
    parser.add_argument("--seconds", type=float, default=3600, help="of the long run, roughly")
    parser.add_argument("--seed", type=int, default=1, help="of the random moments")
    o = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if not 0 < o.seconds < 1e9 or o.kills is not None and o.kills < 1:
        raise Error("--kills and --seconds must be above 0")
    with tempfile.TemporaryDirectory(prefix="soak_") as folder:
        try:
            if o.kills:
                kill_runs(os.path.abspath(o.program), folder, o.kills, o.seed)
            else:
                soak(os.path.abspath(o.program), folder, o.data, o.seconds, o.seed)
        finally:
            if Training.process and Training.process.poll() is None:
                Training.process.kill()
                Training.process.wait()
    return harness.summary()


if __name__ == "__main__":
    main(run)
