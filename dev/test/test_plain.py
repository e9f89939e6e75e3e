"""
Compares the program that has the plain matrix multiplication with the one that uses dev/gemm.h.

    python3 dev/test/test_plain.py ./train_gpas build/train_gpas_plain

Both train 20 steps. They add numbers in a different order, so their losses may differ in the last
digits, by at most 1e-4 of their size, and the norms of their gradients by 1e-3.
"""
import csv
import os
import struct
import subprocess
import sys
import tempfile

OPTIONS = ("--norm sandwich --layers 3 --channels 40 --hidden 77 --heads 2 --seq-len 70 --batch 3 "
           "--vocab-size 101 --steps 20 --lr 0.003 --val-every 5").split()


def write_tokens(path, count, multiplier):
    tokens = [i * i * multiplier // 7 % 101 for i in range(count)]
    with open(path, "wb") as file:
        file.write(struct.pack("<3i", 20240520, 1, count).ljust(1024, b"\0"))
        file.write(struct.pack(f"<{count}H", *tokens))


def train(program, data, out):
    """Returns the lines of log.csv."""
    subprocess.run([program, *OPTIONS, "--data", data, "--out", out], check=True,
                   stdout=subprocess.DEVNULL)
    with open(os.path.join(out, "log.csv"), newline="") as file:
        return list(csv.DictReader(file))


def main():
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        write_tokens(os.path.join(folder, "train.bin"), 9000, 3)
        write_tokens(os.path.join(folder, "val.bin"), 1500, 5)
        fast, plain = [train(os.path.abspath(program), folder, os.path.join(folder, str(i)))
                       for i, program in enumerate(sys.argv[1:])]
    for column, tolerance in [("train_loss", 1e-4), ("val_loss", 1e-4), ("grad_norm", 1e-3)]:
        pairs = [(float(a[column]), float(b[column])) for a, b in zip(fast, plain) if a[column]]
        worst = max(abs(a / b - 1) for a, b in pairs)
        good = len(fast) == len(plain) == 21 and worst < tolerance
        failed += not good
        print("ok  " if good else "FAIL", f"plain program: {column} of 20 steps",
              f"({worst:.1e})" if good else f"off by {worst:.1e}: {pairs}")
    print(f"{3 - failed} passed, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
