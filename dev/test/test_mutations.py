"""
Damages files. train_gpas must either read them or exit with status 1 and one line on stderr.

    python3 dev/test/test_mutations.py           from the project's folder, after make
    python3 dev/test/test_mutations.py 10000 7   10000 files, with seed 7

Checkpoints, token files and tokenizers are changed in every way that is easy to think of: bits,
lengths, numbers in the header, fields swapped or given twice, deep nesting, NaN. The program must
not be ended by a signal, take longer than 20 seconds or use more than 1 GiB of memory.
"""
import os
import random
import re
import struct
import subprocess
import sys
import tempfile
import time

from harness import BYTE_PIECES, check, read, summary, token_file, tokenizer, write

PROGRAM = os.path.abspath("train_gpas")
NETWORK = ("--layers 2 --channels 16 --hidden 24 --heads 2 --seq-len 16 --batch 2 --length 5 "
           "--val-batches 1").split()
NUMBERS = [0, 1, 2, -1, 3, 7, 8, 255, 256, 65535, 65536, 1 << 24, (1 << 31) - 1, 1 << 31,
           (1 << 32) - 1, 1 << 32, (1 << 63) - 1, -(1 << 63), (1 << 64) - 1, 10 ** 18, 10 ** 30]
WORDS = ["nan", "inf", "-inf", "1e308", "0x10", "1e9", "", "-", "+5", " 5", "1.5", "on", "null",
         "[]", "post", "relu", "\\u0000", "\x01", "a" * 2000, "9" * 400, "262144", "4096"]
PIECES = BYTE_PIECES + [b"t", b"h", b"e", b"th", b"the", b" the", b" ", b"\xc3\xa9"]


def change_bytes(draw, data, first=None):
    """Changes bits, the length, or a piece of any file. first: only bits in the first bytes."""
    way = draw.randrange(1 if first else 5)
    at, size = draw.randrange(len(data)), draw.randrange(1, 200)
    if way == 0:
        changed = bytearray(data)
        for _ in range(draw.choice([1, 2, 8])):
            changed[draw.randrange(min(first or len(data), len(data)))] ^= 1 << draw.randrange(8)
        return bytes(changed)
    return [data[:at], data[:len(data) - draw.randrange(1, 9)], data + bytes(size),
            data[:at] + data[at + size:]][way - 1]


def change_checkpoint(draw, data):
    length = int.from_bytes(data[:8], "little")
    header, numbers = data[8:8 + length].decode(), bytearray(data[8 + length:])
    fields = list(re.finditer(r'"([a-z-]+)":"([^"]*)"', header))
    one, two = sorted(draw.sample(fields, 2), key=lambda field: field.start())
    way = draw.randrange(9)
    if way < 2:
        return change_bytes(draw, data, 8 + length if way else None)
    if way == 2:
        return (draw.choice(NUMBERS) % (1 << 64)).to_bytes(8, "little") + data[8:]
    if way == 3:                        # a number anywhere in the header
        number = draw.choice(list(re.finditer(r"\d+", header)))
        header = header[:number.start()] + str(draw.choice(NUMBERS)) + header[number.end():]
    elif way == 4:
        header = (header[:one.start()] + two[0] + header[one.end():two.start()] + one[0]
                  + header[two.end():])
    elif way == 5:
        header = header[:one.end()] + "," + one[0] + header[one.end():]
    elif way == 6:
        header = draw.choice(["[", '{"a":']) * draw.choice([10, 100000]) + header
    elif way == 7:
        for at in draw.choices(range(0, len(numbers), 4), k=draw.choice([1, 50])):
            numbers[at:at + 4] = struct.pack("<f", draw.choice([float("nan"), float("inf"), 3e38]))
    else:                               # the value of an option
        value = draw.choice([str(draw.choice(NUMBERS)), draw.choice(WORDS)])
        header = header[:one.start(2)] + value + header[one.end(2):]
    text = header.encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + numbers


def change_tokens(draw, data):
    if draw.random() < 0.5:
        return change_bytes(draw, data, draw.choice([None, 12]))
    at = draw.choice([0, 4, 8, 1024 + 2 * draw.randrange((len(data) - 1024) // 2)])
    number = struct.pack("<Q", draw.choice(NUMBERS) % (1 << 64))[:4 if at < 1024 else 2]
    return data[:at] + number + data[at + len(number):]


def change_tokenizer(draw, data):
    if draw.random() < 0.5:
        return change_bytes(draw, data)
    pieces = list(PIECES)
    for _ in range(draw.choice([1, 5])):
        pieces[draw.randrange(len(pieces))] = draw.choice([b"", b"x" * 300, b"x" * 70000, b"the"])
    return tokenizer(pieces + [b"ab"] * draw.choice([0, 1, 65536 - len(PIECES), 70000]))


def run(arguments):
    """Status (or minus the signal), stderr, peak of memory in KiB, seconds."""
    with open("errors", "w+b") as errors:
        begin = time.monotonic()
        process = subprocess.Popen([PROGRAM, *arguments], stdin=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL, stderr=errors)
        done = 0
        while not done and time.monotonic() - begin < 20:
            done, status, usage = os.wait4(process.pid, os.WNOHANG)
            time.sleep(0.001)
        if not done:
            process.kill()
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = -os.WTERMSIG(status) or os.WEXITSTATUS(status)
        errors.seek(0)
        return process.returncode, errors.read(), usage.ru_maxrss, time.monotonic() - begin


def mutate(draw, good):
    """Changes one file. Returns the arguments that read it, and its name."""
    kind = draw.choice(["checkpoint", "checkpoint", "tokens", "tokenizer"])
    load = ["--load", "good.safetensors"]
    if kind == "checkpoint":
        write("bad", change_checkpoint(draw, good["checkpoint"]))
        out = ["--out", "out2", "--val-batches", "1", "--length", "5"]
        return draw.choice([["--resume", "bad", "--steps", "4", *out],
                            ["--load", "bad", "--steps", "1", "--batch", "2", *out],
                            ["--load", "bad", "--eval", "data/val.bin"],
                            ["--load", "bad", "--steps", "0", "--prompt", "the", *out]]), "bad"
    for name in good:
        if "bin" in name:
            write(f"data2/{name}", good[name])
    if kind == "tokens":
        name = draw.choice(["train.bin", "val.bin"])
        write(f"data2/{name}", change_tokens(draw, good[name]))
        return ["--data", "data2", "--out", "out2", *NETWORK, "--steps", "1"], f"data2/{name}"
    write("data2/tokenizer.bin", change_tokenizer(draw, good["tokenizer.bin"]))
    return [*load, "--data", "data2", "--steps", "0", "--prompt", "the th", "--length",
            "5"], "data2/tokenizer.bin"


def main():
    count, seed = map(int, (sys.argv[1:] + ["300", "1"][len(sys.argv) - 1:])[:2])
    draw, statuses, problems, most, longest = random.Random(seed), {}, [], 0, 0
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    home = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.mkdir("data")
        os.mkdir("data2")
        good = {"train.bin": token_file([i % 101 for i in range(3000)]),
                "val.bin": token_file([i % 103 for i in range(300)]),
                "tokenizer.bin": tokenizer(BYTE_PIECES)}
        for name, data in good.items():
            write(f"data/{name}", data)
        status, errors, _, _ = run(["--data", "data", "--out", "out", *NETWORK, "--steps", "3"])
        if status:
            sys.exit(f"test_mutations.py: {errors.decode()}")
        good["checkpoint"] = read("out/ckpt_000003.safetensors")
        write("good.safetensors", good["checkpoint"])
        for number in range(count):
            arguments, path = mutate(draw, good)
            status, errors, memory, seconds = run(arguments)
            statuses[status] = statuses.get(status, 0) + 1
            most, longest = max(most, memory), max(longest, seconds)
            lines = errors.count(b"\n")
            if (status, lines) not in ((0, 0), (1, 1)) or memory > 1 << 20 or seconds > 20:
                problems.append(f"number {number}: status {status}, {memory} KiB, "
                                f"{seconds:.1f} s, {' '.join(arguments)}: {errors[:200]}")
                write(f"{home}/mutation_{seed}_{number}", read(path))
        os.chdir(home)
    check(not problems and statuses.get(1, 0) > count / 4 and statuses.get(0, 0) > count / 20,
          f"mutations: {count} damaged files, by status {statuses}, at most {most >> 10} MiB and "
          f"{longest:.1f} s", f"{len(problems)} problems")
    for problem in problems:
        print(f"  {problem}")
    return summary()


if __name__ == "__main__":
    sys.exit(main())
