"""
Compares the program that has the plain matrix multiplication with the one that uses dev/gemm.h.

    python3 dev/test/test_plain.py ./train_gpas build/train_gpas_plain

Both train 20 steps. They add numbers in a different order, so their losses may differ in the last
digits, by at most 1e-4 of their size, and the norms of their gradients by 1e-3.
"""
import csv
import os
import subprocess
import sys
import tempfile

from harness import check, summary, token_file, write

OPTIONS = ("--norm sandwich --layers 3 --channels 40 --hidden 77 --heads 2 --seq-len 70 --batch 3 "
           "--vocab-size 101 --steps 20 --lr 0.003 --val-every 5").split()


def train(program, data, out):
    """Returns the lines of log.csv."""
    subprocess.run([program, *OPTIONS, "--data", data, "--out", out], check=True,
                   stdout=subprocess.DEVNULL)
    with open(os.path.join(out, "log.csv"), newline="") as file:
        return list(csv.DictReader(file))


def main():
    with tempfile.TemporaryDirectory() as folder:
        for name, count, multiplier in (("train.bin", 9000, 3), ("val.bin", 1500, 5)):
            write(os.path.join(folder, name),
                  token_file([i * i * multiplier // 7 % 101 for i in range(count)]))
        fast, plain = [train(os.path.abspath(program), folder, os.path.join(folder, str(i)))
                       for i, program in enumerate(sys.argv[1:])]
    for column, tolerance in [("train_loss", 1e-4), ("val_loss", 1e-4), ("grad_norm", 1e-3)]:
        pairs = [(float(a[column]), float(b[column])) for a, b in zip(fast, plain) if a[column]]
        worst = max(abs(a / b - 1) for a, b in pairs)
        check(len(fast) == len(plain) == 21 and worst < tolerance,
              f"plain program: {column} of 20 steps ({worst:.1e})", pairs)
    return summary()


if __name__ == "__main__":
    sys.exit(main())
