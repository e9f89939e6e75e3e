"""
Runs train_gpas as its users do and checks what it writes, prints and rejects.

    python3 dev/test/test_program.py                          from the project's folder, after make
    python3 dev/test/test_program.py ./train_gpas_cuda bf16   compares this one with ./train_gpas

Tiny networks are trained on made-up tokens in a temporary folder. Their logs and checkpoints must
show the rules of training: the scale of the gradient, a new order in each epoch, the learning rate
of each step, which parameters decay. In the second form the given program, in fp32 or bf16, must
have the losses of ./train_gpas, and each must be able to resume the other's run.
"""
import csv
import json
import math
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from array import array

import harness
from harness import (BYTE_PIECES, changed, check, check_error, header_of, read, read_safetensors,
                     summary, token_file, tokenizer, write)

PROJECT = os.getcwd()
TRAIN = os.path.abspath("train_gpas")
SIZES = "--channels 16 --hidden 24 --heads 2 --seq-len 16"
NETWORK = "--layers 2 " + SIZES
SMALL = f"--data data --out run --overwrite on {NETWORK} --batch 2 --val-every 5 "
STOPPED = (f"--data data --out stop {NETWORK} --batch 2 --val-every 5 --steps 3000 "
           "--sample-every 300 --length 30 ")
LOG = "step,train_loss,val_loss,lr,grad_norm,ms,tokens_per_s"
LAYERS = "step,layer,attention_variance,mlp_variance,gate,grad_norm"


def run(arguments, program=TRAIN, limit="", threads=None):
    """Exit status (or minus the signal), stdout and stderr. limit: a shell command, like ulimit."""
    shell = ["sh", "-c", f'{limit}; exec "$0" "$@"'] if limit else []
    environment = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    return harness.run(*shell, program, *shlex.split(arguments), **environment)


def check_success(name, result, also=True, seen=""):
    """Status 0, nothing on stderr, and whatever else the check requires."""
    status, _, errors = result
    check(status == 0 and not errors and also, name, f"status {status}, {errors}{seen}")


def content(path):
    """The bytes of a file, or no bytes if it does not exist."""
    return read(path) if os.path.isfile(path) else b""


def remove(path):
    shutil.rmtree(path, ignore_errors=True)


def table(path):
    """The rows of a log, each {column: number}, None where the column is empty."""
    with open(path, newline="") as file:
        return [{name: float(text) if text else None for name, text in row.items()}
                for row in csv.DictReader(file)]


def column(rows, name):
    return [row[name] for row in rows]


def without_time(path):
    """The fields of log.csv except ms and tokens_per_s, which differ from run to run."""
    return [line.split(b",")[:5] for line in read(path).split(b"\n")]


def train(options, out="new", data="data", layers=2):
    """Trains a tiny network from the start. Returns the rows of its log.csv."""
    remove(out)
    status, _, errors = run(f"--data {data} --out {out} --layers {layers} {SIZES} {options}")
    if status or errors:
        raise RuntimeError(f"{options}: status {status}, {errors}")
    return table(f"{out}/log.csv")


def gradients_of(options):
    """The tensors that --dump-grads writes with these options: {name: numbers}."""
    status, _, errors = run(f"--data data {NETWORK} {options} --dump-grads gradients")
    if status or errors:
        raise RuntimeError(f"{options} --dump-grads: status {status}, {errors}")
    return read_safetensors("gradients")[1]


def norm(tensors, words):
    """The Euclidean norm of all tensors whose names contain the words."""
    return math.sqrt(sum(x * x for name, numbers in tensors.items() if words in name
                         for x in numbers))


def close(got, expected, tolerance):
    """Are the numbers equal within a relative tolerance? A missing number or NaN never is."""
    return len(got) == len(expected) > 0 and all(
        x is not None and abs(x - y) <= tolerance * abs(y) for x, y in zip(got, expected))


def same_bits(one, other):
    return array("f", one).tobytes() == array("f", other).tobytes()


def tokens(count, modulus):
    return token_file([i % modulus for i in range(count)])


def write_data():
    os.mkdir("data")
    write("data/train.bin", tokens(3000, 101))
    write("data/val.bin", tokens(300, 103))
    write("data/tokenizer.bin", tokenizer(BYTE_PIECES))


# ------------------------------------------------------------------------------------------------
# Training, resuming, telling stories, stopping.

def test_training():
    result = run(SMALL + "--steps 20 --save-every 10 --sample-every 10 --total-batch 4 "
                         "--gate-clip 0.01", threads=2)
    check_success("program: trains 20 steps", result)
    last = "run/ckpt_000020.safetensors"
    checkpoint, layers, log = read(last), read("run/layers.csv"), without_time("run/log.csv")
    stories = read("run/samples.txt")
    check(b"--- step 10 ---\n" in stories and b"--- step 20 ---\n" in stories,
          "program: tells a story every --sample-every steps", stories)
    write(last, b"old")
    check_success("program: resumes at step 10, with one thread instead of two",
                  run("--resume run/ckpt_000010.safetensors", threads=1))
    check(read(last) == checkpoint, "program: resumed at step 10, it ends with the same bits",
          f"{len(read(last))} and {len(checkpoint)} bytes")
    check(read("run/layers.csv") == layers,
          "program: a resumed run continues layers.csv", read("run/layers.csv"))
    check(without_time("run/log.csv") == log,
          "program: a resumed run continues log.csv", read("run/log.csv"))
    check(read("run/samples.txt") == stories,
          "program: a resumed run continues samples.txt", read("run/samples.txt"))
    write(last, b"old")
    result = run("--resume run/ckpt_000010.safetensors --recompute on --check-finite on",
                 threads=3)
    check_success("program: with three threads, --recompute, --check-finite: the same checkpoint",
                  result, read(last) == checkpoint, "another checkpoint")
    steps = column(table("run/log.csv"), "step")
    check(steps == list(range(21)), "program: log.csv has one line for each step", steps)


def test_telling():
    train("--batch 2 --steps 20", out="told")
    status, story, errors = run("--steps 0 --load told/ckpt_000020.safetensors "
                                "--prompt 'Once upon' --length 20")
    check(status == 0 and not errors and story.startswith("Once upon"),
          "program: --steps 0 --load only tells a story", f"status {status}, {errors}{story}")
    remove("run")
    status, _, errors = run(SMALL + "--steps 0 --length 5")
    check(status == 0 and "the story is an untrained network's" in errors,
          "program: says so when an untrained network tells a story", f"status {status}, {errors}")
    check(not os.path.exists("run"), "program: --steps 0 leaves no files")
    status, text, errors = run("--help")
    check(status == 0 and not errors and "--norm" in text and "--top-p" in text,
          "program: --help", f"status {status}, {errors}")
    check(run("-h") == (0, text, ""), "program: -h is --help", run("-h"))


def test_story_by_heart():
    """A network memorizes a story in which each letter depends on many before it. The tokens of the
    prompt are computed at once, the others one by one. Where the prompt ends must not matter."""
    story = "ABACABADABACABA"
    os.mkdir("letters")
    for name in ("train", "val"):
        write(f"letters/{name}.bin", token_file([1, *[3 + ord(c) for c in " " + story]] * 20))
    shutil.copy("data/tokenizer.bin", "letters")
    for scheme in ("pre", "post"):
        train(f"--norm {scheme} --gate-init 0.3 --batch 4 --steps 150 --lr 0.02", "told", "letters")
        told = [run("--load told/ckpt_000150.safetensors --steps 0 --temperature 0 "
                    f"--prompt '{story[:known]}' --length {15 - known if known else 16}")
                for known in (0, 1, 4, 8, 14)]  # without a prompt the space is a token too
        check(all(result == (0, story + "\n", "") for result in told),
              f"program: a {scheme} network tells a memorized story from any beginning",
              told)


def test_gates_kept():
    train("--batch 2 --gate-train off --gate-init 0.3 --steps 3")
    rows = table("new/layers.csv")
    check(set(column(rows, "gate")) == {0.3} and rows[-1]["step"] == 3,
          "program: --gate-train off keeps the gates", rows)


def test_checkpoints_kept():
    remove("run")
    names = [f"ckpt_00000{step}.safetensors" for step in range(4)]

    def kept():
        return sorted(name for name in os.listdir("run") if name.startswith("ckpt"))

    check_success("program: --keep removes old checkpoints",
                  run(SMALL + "--steps 3 --keep 1 --save-every 1"), kept() == names[3:], kept())
    write(f"run/{names[1]}", b"old")
    write(f"run/{names[0]}.tmp", b"half")
    write("run/ckpt_1.safetensors", b"mine")
    check_success("program: and checkpoints that a killed run left behind",
                  run(SMALL + "--steps 3 --keep 2 --save-every 1"),
                  kept() == names[2:] + ["ckpt_1.safetensors"], kept())


def run_and_stop(*numbers, stderr=subprocess.PIPE, **settings):
    """Trains, and sends signals after about 20 steps; 0 closes the pipe that receives the output.
    Returns the exit status, stdout and stderr."""
    remove("stop")
    process = subprocess.Popen([TRAIN, *STOPPED.split()], stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=stderr, **settings)
    try:
        while process.poll() is None and content("stop/log.csv").count(b"\n") < 20:
            time.sleep(0.002)
        for number in numbers:
            if number:
                process.send_signal(number)
            else:
                process.stdout.close()
        output = b"" if process.stdout.closed else process.stdout.read()
        errors = process.stderr.read() if process.stderr else b""
        process.wait(timeout=300)
    finally:
        process.kill()
    return process.returncode, output.decode("latin-1"), errors.decode("latin-1")


def stopped_checkpoints():
    return [f"stop/{name}" for name in os.listdir("stop") if name.startswith("ckpt_")]


def test_stop():
    """A stopped run finishes its step and saves. Resumed, it ends like one that was not stopped."""
    result = run(STOPPED)
    check_success("stop: a run that is not stopped", result)
    last = "stop/ckpt_003000.safetensors"
    checkpoint, stories = read(last), read("stop/samples.txt")
    for number, words in ((signal.SIGTERM, "saving; a second SIGTERM stops at once\n"),
                          (signal.SIGINT, "saving; a second Ctrl-C stops at once\n"),
                          (signal.SIGHUP, "finishing this step, then saving\n")):
        status, output, errors = run_and_stop(number)
        check(status == 128 + number and words in errors,
              f"stop: {number.name} ends the run with status {128 + number} and says what it does",
              f"status {status}, {errors}")
        saved = stopped_checkpoints()
        named = re.findall(r"Stopped\..* --resume (\S+)", output)
        check(saved == named and saved != [last],
              f"stop: {number.name}: it saves and says how to resume", f"{saved}, {output[-200:]}")
        result = run(f"--resume {saved[0]}")
        check_success(f"stop: {number.name}: resumed, it ends with the same bits", result,
                      read(last) == checkpoint, "another checkpoint")
        check(read("stop/samples.txt") == stories,
              f"stop: {number.name}: resumed, it tells the same stories", read("stop/samples.txt"))


def test_stop_without_a_reader():
    """`| head` stops a run like a signal. `| tee` gets the Ctrl-C too, and ends first."""
    status, _, _ = run_and_stop(0)
    check(status == 128 + signal.SIGPIPE and stopped_checkpoints(),
          "stop: a run whose output nobody reads saves and stops", f"status {status}")
    status, _, _ = run_and_stop(0, signal.SIGINT)
    check(status == 130 and stopped_checkpoints(),
          "stop: Ctrl-C after the reader has ended saves, with status 130", f"status {status}")
    status, _, _ = run_and_stop(0, signal.SIGINT, stderr=subprocess.STDOUT)
    check(status == 130 and stopped_checkpoints(),
          "stop: the same if the reader had stderr too: 2>&1 | tee", f"status {status}")
    status, _, errors = run_and_stop(signal.SIGHUP, signal.SIGHUP, signal.SIGTERM)
    check(status in (129, 143) and stopped_checkpoints(),
          "stop: a closing terminal sends several signals; the run saves anyway",
          f"status {status}, {errors}")
    ignore = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    status, output, errors = run_and_stop(signal.SIGHUP, **ignore)
    check(status == 0 and not errors and os.path.exists("stop/ckpt_003000.safetensors"),
          "stop: nohup: SIGHUP stays ignored", f"status {status}, {errors}")


def test_stop_at_once():
    """One step takes seconds here, so the second Ctrl-C comes before its end."""
    remove("slow")
    child = subprocess.Popen([TRAIN, *shlex.split(
        "--data data --out slow --channels 256 --hidden 1024 --heads 2 --seq-len 16 --batch 64 "
        "--total-batch 2816 --steps 9 --val-batches 1 --layers 4")],
                             stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    while child.poll() is None and content("slow/layers.csv").count(b"\n") < 5:
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    first = os.read(child.stderr.fileno(), 1000)
    child.send_signal(signal.SIGINT)
    errors = child.communicate(timeout=30)[1]
    check(child.returncode == 130 and b"a second Ctrl-C" in first and b"stopped at once" in errors,
          "stop: the second Ctrl-C stops at once and says so",
          f"status {child.returncode}, {first + errors}")


# ------------------------------------------------------------------------------------------------
# Standard files, other files, folders in use.

def test_standard_files():
    train("--batch 2 --steps 3", "told")
    telling = "--load told --steps 0"
    for arguments in (telling, "--load told --eval data/val.bin", "--help",
                      SMALL + "--steps 3 --dump-grads dump", SMALL + "--steps 3"):
        with open("/dev/full", "w", encoding="ascii") as full:
            done = subprocess.run([TRAIN, *arguments.split()], stdout=full, stderr=subprocess.PIPE,
                                  check=False)
        check_error(f"full device: {arguments}", (done.returncode, "", done.stderr.decode()),
                    "cannot write to standard output")
    check(os.path.exists("run/ckpt_000003.safetensors"), "full device: a run trains and saves")
    result = run(SMALL + "--steps 3", limit="exec <&- >&- 2>&-")
    logs = read("run/log.csv") + read("run/layers.csv") + read("run/samples.txt")
    check(result[0] == 0 and b"tok/s" not in logs and logs.startswith(LOG.encode()),
          "closed: nothing that is printed ends up in a log", f"{result}, {logs}")
    status, _, _ = run("--banana", limit="exec <&- >&- 2>&-")
    check(status == 1, "closed: an error has status 1", status)


def test_special_files():
    train("--batch 2 --steps 3", "told")
    for folder, name in (("p1", "log.csv"), ("p2", "layers.csv"), ("p3", "samples.txt")):
        os.mkdir(folder)
        os.mkfifo(f"{folder}/{name}")
        check_error(f"special: a pipe as {name}",
                    run(SMALL.replace("--out run", f"--out {folder}") + "--steps 3"), "regular")
    os.mkfifo("fifo")
    os.symlink("nowhere", "dangling")
    os.symlink("target", "link")
    write("target", b"old")
    write("mine", b"old")
    write("mine.tmp", b"precious")
    for name, words in (("fifo", "regular"), ("/dev/null", "regular"), ("data", "regular"),
                        ("dangling", "No such file"), ("mine", "mine.tmp: File exists")):
        check_error(f"special: --dump-grads {name}", run(SMALL + f"--dump-grads {name}"), words)
    check(read("mine") == b"old" and read("mine.tmp") == b"precious",
          "special: neither the target nor another program's .tmp file is touched")
    check_success("special: --dump-grads through a link", run(SMALL + "--dump-grads link"),
                  os.path.islink("link") and len(read("target")) > 100)
    os.chdir("told")
    check_success("special: --resume . --out .", run("--resume . --out . --data ../data --steps 5"),
                  os.path.exists("ckpt_000005.safetensors"))
    os.chdir("..")


def test_empty_values():
    """An unset shell variable leaves an empty value: --resume "$UNSET"."""
    remove("out")
    names = re.findall(r"^  --(\S+)", run("--help")[1], re.MULTILINE)
    for name in names:
        if name != "prompt":
            check_error(f"empty: --{name} ''", run(f"--{name} ''"), "is empty; it needs a value")
    check(len(names) > 40 and not os.path.exists("out"), "empty: nothing is written", names)
    check_error("empty: --resume=", run("--resume="), "is empty; it needs a value")
    train("--batch 2 --steps 1", "told")
    check_success("empty: a prompt may be empty", run("--load told --steps 0 --prompt ''"))


def folder_content(folder):
    return {name: read(f"{folder}/{name}") for name in os.listdir(folder)}


def test_folder_in_use():
    network = f"--data data {NETWORK} --batch 2 --val-every 5 "
    train("--batch 2 --steps 20 --save-every 10", "first")
    train("--batch 2 --steps 4", "other")
    before = folder_content("first")
    for options in (network, "--load other ", "--resume other ", "--resume other/. "):
        check_error(f"in use: {options}", run(options + "--out first --steps 5"), "holds a run")
    check(folder_content("first") == before, "in use: nothing in it changes")
    for name in ("samples.txt", "options.txt", "log.csv", "layers.csv"):
        os.mkdir(f"my_{name}")
        write(f"my_{name}/{name}", b"my own\n")
        check_error(f"in use: a {name} of another program",
                    run(network + f"--steps 2 --out my_{name}"), "holds a run")
        check(folder_content(f"my_{name}") == {name: b"my own\n"}, "in use: it is kept")
    check_success("in use: --overwrite on replaces the run",
                  run(network + "--steps 5 --out first --overwrite on"),
                  sorted(os.listdir("first")) == ["ckpt_000005.safetensors", "layers.csv",
                                                  "log.csv", "options.txt", "samples.txt"])
    check("steps 5\n" in read("first/options.txt").decode(), "in use: its options, too")
    check(column(table("first/log.csv"), "step") == [0, 1, 2, 3, 4, 5],
          "in use: its logs, too", read("first/log.csv"))
    check_success("in use: a copied run continues in the copy",
                  run("--resume other --out copy --steps 6"),
                  column(table("copy/log.csv"), "step") == [5, 6])
    remove("failed")
    check_error("in use: a run that fails before its first step",
                run(network.replace("--data data", "--data big --vocab-size 300")
                    + "--out failed --steps 5"), "vocabulary")
    check_success("in use: its folder stays free", run(network + "--out failed --steps 5"))


def test_shortcuts():
    """Spellings that users try."""
    train("--batch 2 --steps 20 --save-every 5 --keep 9", "many")
    check_success("shortcut: --name=value", run(SMALL + "--steps=3 --lr=0.001"))
    check_success("shortcut: --resume FOLDER takes the newest", run("--resume many --steps 21"),
                  os.path.exists("many/ckpt_000021.safetensors"))
    for options in ("--load many --prompt Lily", "--load many/ --prompt Lily --length 3"):
        status, story, errors = run(options)
        check(status == 0 and not errors and story.startswith("Lily") and "step" not in story,
              f"shortcut: {options} only tells a story", f"{status}, {story}{errors}")
    check_success("shortcut: with --steps, --load trains",
                  run("--load many --prompt Lily --steps 2 --out run --overwrite on"),
                  b"Lily" in read("run/samples.txt"))
    status, story, _ = run("--load many --prompt 'a\tb' --length 1")
    check(status == 0 and story.startswith("a\tb"), "shortcut: a prompt may contain a tab", story)


# ------------------------------------------------------------------------------------------------
# Files that belong together: data in several files, tokenizers, checkpoints of other versions.

def with_header(data, number, value):
    return data[:4 * number] + struct.pack("<I", value) + data[4 * number + 4:]


def test_shards():
    os.mkdir("shards")
    whole = tokens(3000, 101)
    write("shards/val.bin", tokens(300, 103))
    for i in range(3):
        write(f"shards/train_{i:03d}.bin", with_header(with_header(whole, 5, 3), 6, i))
    training = f"--data shards --vocab-size 259 {NETWORK} --out run --overwrite on --steps 1"
    check_success("shards: three of three", run(training))
    os.rename("shards/train_002.bin", "shards/kept")
    check_error("shards: the last is missing", run(training),
                "has 2 train files, but 3 were made")
    shutil.copy("shards/train_001.bin", "shards/train_002.bin")
    check_error("shards: one twice", run(training), "train_002.bin was made as file number 1")
    os.remove("shards/train_002.bin")
    os.rename("shards/kept", "shards/train_1002.bin")
    check_error("shards: one is missing in the middle", run(training),
                "train_002.bin is missing; there should be at least 1003")
    os.remove("shards/train_1002.bin")
    write("shards/train.bin", whole)
    check_error("shards: two sets in one folder", run(training), "has both train.bin and train_")
    shutil.copytree("data", "loop")
    os.remove("loop/train.bin")
    os.symlink("train.bin", "loop/train.bin")
    check_error("data: a link to itself",
                run(SMALL.replace("--data data", "--data loop") + "--steps 3"), "Too many levels")


def test_tokenizers():
    """A checkpoint remembers its tokenizer."""
    shutil.copytree("data", "bytes")
    pieces = tokenizer(BYTE_PIECES)
    write("bytes/train.bin", with_header(tokens(3000, 101), 4, zlib.crc32(pieces)))
    train("--batch 2 --steps 3", "known", "bytes")
    header = read_safetensors("known/ckpt_000003.safetensors")[0]["__metadata__"]
    check(header.get("tokenizer") == str(zlib.crc32(pieces)), "tokenizer: its checksum is stored",
          header)
    shutil.copytree("bytes", "swapped")
    write("swapped/tokenizer.bin", pieces[:-1] + b"?")
    before = read("known/ckpt_000003.safetensors")
    for options in ("--load known --steps 0", "--load known --eval data/val.bin",
                    "--resume known --steps 5"):
        check_error(f"tokenizer: {options} with another", run(options + " --data swapped"),
                    "was not trained with swapped/tokenizer.bin")
    check_error("tokenizer: data of another", run(SMALL.replace("--data data", "--data swapped")
                                                  + "--steps 3"), "a different tokenizer")
    write("text.bin", with_header(tokens(300, 101), 4, 12345))
    write("questions.bin", struct.pack("<5i", 20240522, 1, 1, 0, 12345).ljust(1024, b"\0"))
    check_error("tokenizer: a text of another", run("--load known --eval text.bin"),
                "a different tokenizer")
    check_error("tokenizer: questions of another",
                run("--load known --eval-choice questions.bin"), "a different tokenizer")
    write("old", changed(before, f',"tokenizer":"{zlib.crc32(pieces)}"'.encode(), b""))
    check_success("tokenizer: a checkpoint of an older version", run("--load old --steps 0"))
    check_success("tokenizer: resumes, and remembers it from then on",
                  run("--resume old --steps 5 --out run --overwrite on"),
                  b'"tokenizer":' in read("run/ckpt_000005.safetensors"))


def test_rewritten():
    """Other programs write the header's parts in another order, or with spaces."""
    train("--batch 2 --steps 3", "told")
    data = read("told/ckpt_000003.safetensors")
    header, end = header_of(data)
    for name, text in (("reversed", json.dumps(dict(reversed(header.items())))),
                       ("spaced", json.dumps(header)),
                       ("tensors", json.dumps({"__metadata__": header.pop("__metadata__"),
                                               **dict(reversed(header.items()))},
                                              separators=(",", ":")))):
        text = text.encode() + b" " * (-len(text) % 8)
        write("rewritten", len(text).to_bytes(8, "little") + text + data[end:])
        check_error(f"rewritten: {name}", run("--load rewritten --steps 0"),
                    "another program has changed it")


def test_paths():
    """The checkpoint stores paths, in JSON in UTF-8."""
    for path, good in ((b"caf\xc3\xa9 \xe2\x82\xac \xf0\x9f\x99\x82", True), (b"caf\xe9", False),
                       (b"\xc3", False), (b"\xc0\xaf", False), (b"\xed\xa0\x80", False),
                       (b"\xf5\x80\x80\x80", False), (b"a\tb", False)):
        done = subprocess.run([TRAIN, *SMALL.replace("--out run", "").encode().split(), b"--steps",
                               b"1", b"--out", path], stdout=subprocess.DEVNULL,
                              stderr=subprocess.PIPE, check=False)
        check(done.returncode == (not good) and os.path.exists(path) == good
              and (good or b"UTF-8" in done.stderr), f"paths: {path}", done.stderr)
    remove("caf\u00e9 \u20ac \U0001f642")


def test_compiler_options():
    """With -Ofast the losses are wrong in the second digit, and NaN is not detected."""
    compiler = shlex.split(os.environ.get("CC") or "gcc")
    if not shutil.which(compiler[0]):
        return
    for option in ("-Ofast", "-ffast-math", "-ffinite-math-only", "-O2"):
        done = subprocess.run([*compiler, "-std=c11", option, "-fopenmp", "-fsyntax-only",
                               f"{PROJECT}/train_gpas.c"], stderr=subprocess.PIPE, check=False)
        check((done.returncode == 0) == (option == "-O2"), f"compiler: {option}",
              done.stderr.decode(errors="replace"))


# ------------------------------------------------------------------------------------------------
# What must end with status 1 and one line.

def environment_of_a_run(given):
    """The OpenMP settings of a run that was started with only the given ones."""
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    start = {k: v for k, v in os.environ.items() if k not in names}
    remove("wait")
    options = SMALL.replace("--out run", "--out wait") + "--steps 100000"
    child = subprocess.Popen([TRAIN, *shlex.split(options)], env={**start, **given},
                             stdout=subprocess.DEVNULL)
    while child.poll() is None and not os.path.exists("wait/log.csv"):
        time.sleep(0.01)
    pairs = read(f"/proc/{child.pid}/environ").decode("latin-1").split("\0")
    child.kill()
    child.wait()
    return {name: value for name, _, value in (p.partition("=") for p in pairs) if name in names}


def test_waiting_threads():
    """If waiting threads spin, a step can take seconds on a busy machine."""
    if not os.path.exists("/proc/self/environ"):
        return
    seen = environment_of_a_run({})
    check(seen.get("GOMP_SPINCOUNT") == "3000", "waiting threads sleep soon", seen)
    seen = environment_of_a_run({"OMP_WAIT_POLICY": ""})
    check(seen == {"GOMP_SPINCOUNT": "3000", "KMP_BLOCKTIME": "0"},
          "waiting threads sleep soon if OMP_WAIT_POLICY is empty", seen)
    given = {"OMP_WAIT_POLICY": "passive"}
    seen = environment_of_a_run(given)
    check(seen == given, "waiting threads do what the user chooses", seen)


def test_no_room():
    """A limit on file sizes imitates a full disk, one on addresses a lack of memory."""
    remove("stop")
    check_error("full disk: one line on stderr", run(STOPPED, limit="ulimit -f 8"),
                "log.csv: File too large")
    log = read("stop/log.csv")
    check(log.count(b"\n") > 20 and log.endswith(b"\n"),
          "full disk: the log ends with a whole line", log[-100:])
    if b"libomp" not in read(TRAIN):    # clang's OpenMP needs to write a file itself
        remove("stop")
        check_error("full disk: no space for the first line", run(STOPPED, limit="ulimit -f 0"),
                    "File too large")
        check(not os.listdir("stop"), "full disk: no empty file is left behind")
    train("--batch 2 --steps 5", out="full")
    checkpoint = read("full/ckpt_000005.safetensors")
    check_error("full disk: one line if there is no space for a checkpoint",
                run("--steps 9 --resume full/ckpt_000005.safetensors", limit="ulimit -f 40"),
                "000009.safetensors: File too large")
    names = sorted(os.listdir("full"))
    check(names == ["ckpt_000005.safetensors", "layers.csv", "log.csv", "options.txt",
                    "samples.txt"]
          and read("full/ckpt_000005.safetensors") == checkpoint,
          "full disk: the last checkpoint is unchanged, and no half-written one remains", names)
    write("full/ckpt_000009.safetensors", checkpoint)
    run("--steps 9 --resume full/ckpt_000005.safetensors", limit="ulimit -f 40")
    check(read("full/ckpt_000009.safetensors") == checkpoint,
          "full disk: a checkpoint that cannot be replaced is unchanged")
    write("deep", changed(checkpoint, b'"layers":"2","channels":"16"',
                          b'"layers":"400","channels":"1024"'))
    if b"__asan_init" not in read(TRAIN):   # AddressSanitizer takes all addresses there are
        check_error("error: a checkpoint that claims 7 GB is refused before they are allocated",
                    run("--load deep --steps 0", limit="ulimit -v 4000000"),
                    "another program has changed it: its tensors")


def write_broken_files():
    """Writes the files that WRONG_CALLS names."""
    train("--batch 2 --steps 3", out="good")
    good = read("good/ckpt_000003.safetensors")
    write("short", good[:7])
    write("cut", good[:-1])
    write("long", good + b"\0")
    for name, old, new in (
            ("foreign", b'"pt"', b'"xx"'), ("tensors", b"[259,16]", b"[16,259]"),
            ("value", b'"layers":"2', b'"layers":"x'), ("key", b'"heads"', b'"xeads"'),
            ("step", b'"step":"3"', b'"step":"9999999999"'),
            ("position", b'"position":"6"', b'"position":"99999999999999"'),
            ("random", b'"random":"', b'"random":" '),
            ("lines", b'"layers":"2"', b'"layers":"2\n\r\n"'),
            ("twice", b'"layers":"2"', b'"layers":"2","layers":"3"'),
            ("tensor_twice", b',"norm.weight":', b',"norm.weight":{},"norm.weight":'),
            ("large", b'"channels":"16"', b'"channels":"512"'),
            ("hungry", b'"batch":"2","total-batch":"2"',
             b'"batch":"65536","total-batch":"65536"')):
        write(name, changed(good, old, new))
    header, at = header_of(good)
    at += header["layers.1.feed_forward.w2.weight"]["data_offsets"][0]
    write("nan", good[:at] + struct.pack("<f", math.nan) + good[at + 4:])
    gradients_of("--batch 2")
    for folder in ("magic", "version", "count", "header", "big", "torn", "few", "pipe_data"):
        os.mkdir(folder)
    os.mkfifo("pipe")
    os.mkfifo("pipe_data/train.bin")
    for folder, place, number in (("magic", 0, 20240521), ("version", 4, 2), ("count", 8, 301)):
        data = bytearray(tokens(300, 101))
        struct.pack_into("<i", data, place, number)
        write(f"{folder}/train.bin", data)
    write("header/train.bin", tokens(300, 101)[:1000])
    write("big/train.bin", tokens(3000, 400))
    write("big/val.bin", tokens(3000, 400))
    write("torn/tokenizer.bin", tokenizer(BYTE_PIECES)[:-1])
    write("few/tokenizer.bin", tokenizer(BYTE_PIECES[:1]))


GOOD = "good/ckpt_000003.safetensors"
WRONG_CALLS = [
    ("--banana 3", "unknown option --banana"),
    ("banana", "unknown option banana"),
    ("--leyers 3", "did you mean --layers?"),
    ("-seq_len 3", "did you mean --seq-len?"),
    ("--layers", "needs a value"),
    ("--layers=two", "whole number"),
    ("--out " + "x" * 5000, "is too long"),
    ("--layers " + "9" * 5000, "whole number from 1 to 1000"),
    ("y" * 5000, "--help lists them all"),
    ("--layers 2 --layers 3", "twice"),
    ("--layers two", "whole number"),
    ("--layers 1.5", "whole number"),
    ("--layers 0", "from 1"),
    ("--lr nan", "number from"),
    ("--lr -1", "number from"),
    ("--lr 1x", "number from"),
    ("--norm front", "pre|lns|sandwich"),
    ("--gpas maybe", "off|on"),
    ("--seed -1", "number from"),
    ("--channels 50 --heads 4", "even whole number"),
    ("--channels 12 --heads 4", "even whole number"),
    ("--batch 4 --total-batch 6", "multiple"),
    ("--steps 5 --warmup 6", "--warmup"),
    ("--gate-act relu", "never moves"),
    ("--gpas off --gate-init 1", "needs --gpas on"),
    ("--gpas off --stop-grad off", "needs --gpas on"),
    ("--gate-train off --gate-clip 1", "--gate-train on"),
    ("--load a --resume b", "cannot be used together"),
    ("--load a --preset 71m", "the checkpoint has its sizes"),
    ("--batch 65536 --seq-len 65536", "tokens"),
    ("--out 'a\"b'", "quotation"),
    ("--dump-grads x --steps 0", "--dump-grads"),
    ("--resume none", "cannot open"),
    ("--load none", "cannot open"),
    ("--data none", "tokenizer.bin is missing"),
    ("--data none --vocab-size 300", "has no train.bin"),
    ("--data data --vocab-size 300", "--vocab-size has 300 tokens, but data/tokenizer.bin has 259"),
    ("--data data --steps 3 --seq-len 4000", "lower --seq-len"),
    ("--data data --out data/train.bin/x", "folder"),
    (SMALL + "--steps 1 --dump-grads none/x", "cannot write"),
    (f"--load {GOOD} --layers 3", "contradicts"),
    (f"--resume {GOOD} --norm post", "contradicts"),
    (f"--resume {GOOD}", "give a larger --steps"),
    ("--resume data/train.bin", "not a checkpoint"),
    ("--load short", "safetensors header"),
    ("--load foreign", "another program has changed it"),
    ("--load cut", "damaged"),
    ("--load long", "damaged"),
    ("--load tensors", "damaged"),
    ("--load value", "damaged"),
    ("--load step", "not a checkpoint written by this program"),
    ("--load position", "not a checkpoint written by this program"),
    ("--load random", "damaged"),
    ("--load lines", "damaged"),
    ("--load twice", "lacks --channels"),
    ("--load tensor_twice", "damaged"),
    (SMALL + "--total-batch 50000", "16 times"),
    ("--load large", "damaged"),
    ("--resume hungry --steps 9", "GiB"),
    ("--load pipe", "regular file"),
    ("--load .", "contains no checkpoint"),
    ("--data pipe_data --vocab-size 300", "regular file"),
    ("--preset 1b --batch 512 --total-batch 512 --layers 1000", "or try --recompute on"),
    ("--preset 1b --batch 512 --total-batch 512 --layers 1000 --recompute on", "GiB of memory"),
    ("--resume nan --steps 5 --out run --overwrite on --check-finite on",
     "matmul_forward (w2) of layer 2, feed"),
    ("--dtype bf16", "needs a GPU"),
    ("--fused off", "an option of ./train_gpas_cuda"),
    ("--load key", "version"),
    ("--load gradients", "not a checkpoint written by this program"),
    ("--load nan --steps 0", "NaN or infinite logits"),
    ("--load nan --steps 0 --temperature 0", "NaN or infinite logits"),
    ("--resume nan --steps 5 --out run --overwrite on", "first in layer 2, feed-forward"),
    ("--data magic --vocab-size 300", "magic"),
    ("--data version --vocab-size 300", "version"),
    ("--data count --vocab-size 300", "bytes long"),
    ("--data header --vocab-size 300", "header"),
    ("--data big --vocab-size 300 --seq-len 16", "vocabulary has only 300"),
    ("--data torn", "damaged"),
    ("--data few", "259 to 65536"),
]


def test_errors():
    write_broken_files()
    for arguments, words in WRONG_CALLS:
        check_error(f"error: {arguments}", run(arguments), words)


# ------------------------------------------------------------------------------------------------
# The rules of training that logs and checkpoints show.

def test_gradient_scale():
    """The gradient is that of the mean loss over --total-batch sequences, whatever --batch is."""
    for gpas in ("--gpas off", "--gpas on --gate-init 0.3"):
        whole = train(f"{gpas} --batch 4 --total-batch 4 --steps 3 --val-every 1")
        layers = table("new/layers.csv")
        for batch in (1, 2):
            parts = train(f"{gpas} --batch {batch} --total-batch 4 --steps 3")
            for name, tolerance in (("grad_norm", 1e-4), ("train_loss", 1e-5)):
                got, expected = column(parts[1:], name), column(whole[1:], name)
                check(close(got, expected, tolerance),
                      f"gradient: {gpas}, micro-batches of {batch} give the {name} of the batch",
                      f"{got}, not {expected}")
        dump = gradients_of(f"{gpas} --batch 4")
        got = [whole[1]["grad_norm"], whole[1]["train_loss"]]
        expected = [norm(dump, "grad."), dump["loss"][0]]
        check(close(got, expected, 1e-5),
              f"gradient: {gpas}, step 1 has the norm and loss of --dump-grads",
              f"{got}, not {expected}")
        got = [row["grad_norm"] for row in layers if row["step"] == 1]
        expected = [norm(dump, f"grad.layers.{layer}.") for layer in (0, 1)]
        check(close(got, expected, 1e-5),
              f"gradient: {gpas}, layers.csv has the norm of each layer", f"{got}, not {expected}")


def test_epochs():
    """With --lr 0 the weights stay the same, so the loss of a step identifies its sequence."""
    sequences = 12
    os.mkdir("tiny")
    for name in ("train", "val"):
        write(f"tiny/{name}.bin", tokens(17 * sequences + 5, 101))
    train("--vocab-size 259 --batch 1 --steps 1 --lr 0", out="start", data="tiny")

    def losses(seed, out="new"):
        rows = train(f"--load start/ckpt_000001.safetensors --batch 1 --lr 0 --seed {seed} "
                     f"--steps {3 * sequences} --save-every {sequences + 5} --keep 9", out, "tiny")
        return column(rows[1:], "train_loss")

    order = losses(1, "epochs")
    epochs = [order[at:at + sequences] for at in range(0, len(order), sequences)]
    check(len(set(order)) == sequences and all(sorted(epoch) == sorted(order[:sequences])
                                              for epoch in epochs),
          "epochs: each has every sequence once", epochs)
    check(epochs[0] != epochs[1] and epochs[1] != epochs[2] and epochs[0] != epochs[2],
          "epochs: each has another order", epochs)
    again, other = losses(1), losses(2)
    check(again == order, "epochs: the same --seed gives the same order", again)
    check(other[:sequences] not in epochs and sorted(other) == sorted(order),
          "epochs: another --seed gives another order", other)
    log = without_time("epochs/log.csv")
    run(f"--resume epochs/ckpt_{sequences + 5:06d}.safetensors")
    check(without_time("epochs/log.csv") == log,
          "epochs: a run resumed in the second epoch keeps the order", read("epochs/log.csv"))


def expected_rate(peak, warmup, steps, t):
    if t < warmup:
        return peak * (t + 1) / warmup
    progress = (t - warmup) / max(1, steps - warmup)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def test_learning_rate():
    for options, warmup, steps in (("--warmup 6", 6, 30), ("", 3, 30), ("--warmup 0", 0, 9),
                                   ("--warmup 9", 9, 9)):
        rates = column(train(f"--batch 1 --lr 0.02 --steps {steps} {options}")[1:], "lr")
        expected = [expected_rate(0.02, warmup, steps, t) for t in range(steps)]
        check(close(rates, expected, 1e-5) and max(rates) == 0.02,
              f"learning rate: {options or 'default warm-up'}, --steps {steps}: cosine to a tenth",
              f"{rates}, not {expected}")
    before = gradients_of("--batch 2")
    train("--batch 2 --lr 0.02 --warmup 4 --steps 4 --save-every 1 --keep 9")
    after = read_safetensors("new/ckpt_000001.safetensors")[1]
    moved = max(abs(x - y) for name in after if name in before
                for x, y in zip(after[name], before[name]))
    check(close([moved], [0.02 / 4], 1e-3),     # g / |g| is 1 in Adam's first step
          "learning rate: the first step moves the weights by the rate in the log", moved)


def test_weight_decay():
    """AdamW subtracts lr * decay * p from each matrix p; the decay is not part of the gradient."""
    options, factor = "--norm sandwich --gate-init 0.3 --batch 2", 0.01 * 50
    begin = gradients_of(options)
    ends = []
    for decay in (0, 50):
        train(f"{options} --steps 1 --lr 0.01 --weight-decay {decay}")
        ends.append(read_safetensors("new/ckpt_000001.safetensors"))
    (header, plain), (_, decayed) = ends
    names = sorted(plain)
    vectors = [name for name in names if len(header[name]["shape"]) == 1]
    matrices = [name for name in names if len(header[name]["shape"]) == 2]
    different = [name for name in vectors if not same_bits(plain[name], decayed[name])]
    check(any("gate" in name for name in vectors) and any("norm" in name for name in vectors)
          and not different, "weight decay: norms and gates do not decay", different)
    moments = [name for name in matrices if name.startswith("adam_")]
    different = [name for name in moments if not same_bits(plain[name], decayed[name])]
    check(moments and not different, "weight decay: Adam's moments do not depend on it", different)
    wrong = [name for name in set(matrices) - set(moments)
             if same_bits(plain[name], decayed[name])
             or not math.sqrt(sum(x * x for x in decayed[name]))
             < 0.7 * math.sqrt(sum(x * x for x in plain[name]))
             or any(abs(y - (x - factor * x0)) > 1e-5
                    for x0, x, y in zip(begin[name], plain[name], decayed[name]))]
    check(len(matrices) > len(moments) and not wrong,
          "weight decay: every matrix shrinks by lr times decay", wrong)


def test_clips():
    """After one step Adam's first moment is a tenth of the clipped gradient."""
    dump = gradients_of("--batch 2 --gate-init 0.3")
    whole = norm(dump, "grad.")
    gates = math.hypot(*[dump[f"grad.layers.{layer}.gate"][0] for layer in (0, 1)])
    for grad_clip, gate_clip in ((0, 0), (whole / 5, 0), (whole / 5, gates / 9), (0, gates / 9),
                                 (whole * 2, gates * 2), (whole / 5, gates / 4)):
        factor = min(1, grad_clip / whole) if grad_clip else 1
        gate_factor = min(factor, gate_clip / gates) if gate_clip else factor
        rows = train(f"--batch 2 --gate-init 0.3 --steps 1 --grad-clip {grad_clip:.9g} "
                     f"--gate-clip {gate_clip:.9g}")
        after = read_safetensors("new/ckpt_000001.safetensors")[1]
        got = [10 * norm(after, f"adam_m.{name}") / norm(dump, f"grad.{name}")
               for name in ("output.weight", "layers.0.attention.wq", "layers.1.gate")]
        check(close(got, [factor, factor, gate_factor], 1e-4)
              and close([rows[1]["grad_norm"]], [whole], 1e-5),
              f"clips: --grad-clip {grad_clip:.2g} --gate-clip {gate_clip:.2g}: gradient times "
              f"{factor:.2g}, gates {gate_factor:.2g}; grad_norm is the norm before clipping",
              f"{got}, {rows[1]['grad_norm']}")


def test_gates_of_zero():
    """Gates that stay 0 scale by 1, so the network is the same as without GPAS."""
    for scheme in ("pre", "lns", "sandwich", "post", "deepnorm", "mix"):
        logs = []
        for gpas in ("--gpas off", "--gpas on --gate-train off --gate-init 0"):
            train(f"--norm {scheme} --batch 2 --steps 6 --val-every 2 {gpas}", layers=4)
            logs.append(without_time("new/log.csv"))
        check(logs[0] == logs[1], f"gates: {scheme}, gates of 0 change nothing", logs)


# ------------------------------------------------------------------------------------------------
# The logs.

def test_log():
    remove("run")
    begin = time.monotonic()
    status, output, errors = run(f"--data data --out run {NETWORK} --batch 2 --total-batch 6 "
                                 "--steps 12 --val-every 5 --val-batches 3 --print-every 4")
    seconds = time.monotonic() - begin
    rows, header = table("run/log.csv"), read("run/log.csv").split(b"\n")[0].decode()
    check(status == 0 and not errors and header == LOG, "log.csv: its columns",
          f"status {status}, {errors}{header}")
    validated = [row["step"] for row in rows if row["val_loss"] is not None]
    check(validated == [0, 5, 10, 12],
          "log.csv: val_loss at step 0, every --val-every steps and at the last step", validated)
    others = [name for name in LOG.split(",") if name not in ("step", "val_loss")]
    check(all(rows[0][name] is None for name in others)
          and all(row[name] is not None for row in rows[1:] for name in others),
          "log.csv: step 0 has only val_loss, all other steps have the other columns", rows)
    # tokens_per_s is rounded to whole numbers, ms to hundredths.
    wrong = [row for row in rows[1:] if not abs(row["tokens_per_s"] * row["ms"] - 6 * 16 * 1000)
             <= 0.51 * row["ms"] + 0.0051 * row["tokens_per_s"]]
    check(not wrong, "log.csv: tokens_per_s is --total-batch times --seq-len divided by ms", wrong)
    total = sum(column(rows[1:], "ms"))
    check(0 < total < 1000 * seconds, "log.csv: the sum of all ms is less than the run took",
          f"{total}, not {1000 * seconds}")
    printed = [int(step) for step in re.findall(r"^step (\d+)/12 ", output, re.MULTILINE)]
    check(printed == [0, 4, 5, 8, 10, 12],
          "program: prints a line every --print-every steps and at each validation", output)
    write("six.bin", tokens(6 * 17, 103))
    for text, options in (("six.bin", "--val-batches 3"), ("data/val.bin", "--val-batches 0")):
        rows = train(f"--batch 2 --steps 4 --val-every 0 {options}")
        validated = [row["step"] for row in rows if row["val_loss"] is not None]
        _, line, errors = run(f"--load new/ckpt_000004.safetensors --eval {text} --batch 1")
        loss = [float(number) for number in re.findall(r"loss ([\d.]+) nats", line)]
        check(validated == [0, 4] and close([rows[-1]["val_loss"]], loss, 1e-6),
              f"log.csv: {options}, the last val_loss is that of --eval, sequence by sequence",
              f"{validated}, {rows[-1]['val_loss']}: {line}{errors}")


def test_layers():
    for gpas in ("--gpas off", "--gpas on --gate-init 0.3"):
        rows = train(f"{gpas} --batch 2 --total-batch 4 --steps 12 --val-every 5 --lr 0.01")
        layers = table("new/layers.csv")
        header = read("new/layers.csv").split(b"\n")[0].decode()
        places = [(row["step"], row["layer"]) for row in layers]
        check(header == LAYERS and places == [(step, layer) for step in (0, 5, 10, 12)
                                                for layer in (1, 2)],
              f"layers.csv: {gpas}, a row for each layer at each validation", f"{header} {places}")
        check(all((row["grad_norm"] is None) == (row["step"] == 0)
                  and row["attention_variance"] > 0 and row["mlp_variance"] > 0 for row in layers),
              f"layers.csv: {gpas}, variances everywhere, grad_norm except at step 0", layers)
        wrong = []
        for row in rows:
            squares = [layer["grad_norm"] ** 2 for layer in layers
                       if layer["step"] == row["step"] > 0]
            if squares and not 0 < sum(squares) <= row["grad_norm"] ** 2 * (1 + 1e-5):
                wrong.append((row, squares))
        check(not wrong, f"layers.csv: {gpas}, the norms of the layers' gradients", wrong)
        gates = column(layers, "gate")
        if gpas == "--gpas off":
            check(gates == [None] * 8, f"layers.csv: {gpas}, the gate column is empty", gates)
            continue
        tensors = read_safetensors("new/ckpt_000012.safetensors")[1]
        trained = [tensors[f"layers.{layer}.gate"][0] for layer in (0, 1)]
        check(gates[:2] == [0.3, 0.3] and close(gates[-2:], trained, 1e-5) and 0.3 not in gates[2:],
              f"layers.csv: {gpas}, gates start at --gate-init and end as in the checkpoint",
              f"{gates}, {trained}")


# ------------------------------------------------------------------------------------------------
# Another program compared with ./train_gpas.

def test_other_program(program, dtype):
    near = {"fp32": 1e-4, "bf16": 2e-2}[dtype]
    options = SMALL + "--steps 20 --save-every 10 --total-batch 4 --gate-clip 0.01 "
    last, middle = "run/ckpt_000020.safetensors", "run/ckpt_000010.safetensors"

    def losses():
        row = table("run/log.csv")[-1]
        return [row["train_loss"], row["val_loss"]] if row["step"] == 20 else []

    def check_losses(name, result):
        check_success(name, result, close(losses(), cpu, near), f"{losses()}, not {cpu}")

    check_success("program: train_gpas trains 20 steps", run(options))
    cpu = losses()
    check_losses("program: resumes from a checkpoint of train_gpas",
                 run(f"--resume {middle} --dtype {dtype}", program))
    remove("run")
    result = run(f"{options} --sample-every 10 --length 20 --dtype {dtype}", program)
    check_success("program: trains 20 steps", result)
    check_losses("program: its losses are those of train_gpas", result)
    checkpoint = read(last)
    write(last, b"old")
    result = run(f"--resume {middle}", program)
    check_success("program: resumed at step 10, it ends with the same bits", result,
                  read(last) == checkpoint, "another checkpoint")
    stories = read("run/samples.txt")
    check(b"--- step 10 ---\n" in stories and b"--- step 20 ---\n" in stories,
          "program: tells stories", stories)
    check_error("error: --check-finite on", run("--check-finite on", program),
                "option of ./train_gpas")
    check_error("error: a head too wide",
                run("--channels 512 --heads 2 --vocab-size 259 --data data", program),
                "widest head")
    for channels, most in ((4104, "4096"), (1026, "1024")):
        result = run(f"--channels {channels} --heads {channels // 6} --vocab-size 259 --data data",
                     program)
        check_error(f"error: --channels {channels} on the GPU", result,
                    f"is more than {most}, the most on the GPU")
    check_error("error: not enough GPU memory",     # 700 GiB
                run("--preset 1b --data data --layers 256 --seq-len 8 --steps 1", program),
                "lower --batch")
    telling = f"--steps 0 --load {last} --length 20 --temperature 0"
    status, story, errors = run(f"{telling} --dtype fp32", program)
    cpu_status, cpu_story, cpu_errors = run(telling)
    check(status == 0 and cpu_status == 0 and story == cpu_story,
          "program: train_gpas tells the same story from its checkpoint",
          f"{story}{errors}, not {cpu_story}{cpu_errors}")
    check_losses("program: train_gpas resumes from its checkpoint", run(f"--resume {middle}"))


TESTS = [test_training, test_telling, test_story_by_heart, test_gates_kept, test_checkpoints_kept,
         test_stop, test_stop_without_a_reader, test_stop_at_once, test_errors, test_standard_files,
         test_special_files, test_empty_values, test_folder_in_use, test_shortcuts, test_shards,
         test_tokenizers, test_rewritten, test_paths, test_compiler_options, test_waiting_threads,
         test_no_room, test_gradient_scale, test_epochs, test_learning_rate, test_weight_decay,
         test_clips, test_gates_of_zero, test_log, test_layers]


def main():
    arguments, tests = sys.argv[1:], [(test, ()) for test in TESTS]
    if arguments:
        if len(arguments) != 2 or arguments[1] not in ("fp32", "bf16"):
            sys.exit("usage: python3 dev/test/test_program.py [PROGRAM fp32|bf16]")
        tests = [(test_other_program, (os.path.abspath(arguments[0]), arguments[1]))]
    else:   # Two threads are no faster for such networks, and far slower on a busy machine.
        os.environ["OMP_NUM_THREADS"] = "1"
    signal.signal(signal.SIGHUP, signal.SIG_DFL)    # nohup may have started the tests
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_data()
        for test, given in tests:
            try:
                test(*given)
            except Exception as error:      # for example, a file is missing or damaged
                check(False, f"{test.__name__}() does not raise",
                      f"{type(error).__name__}: {error}")
        os.chdir(PROJECT)
    return summary()


if __name__ == "__main__":
    sys.exit(main())
