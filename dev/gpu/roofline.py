#!/usr/bin/env python3
"""
Computes the least time that a training step of train_gpas.cu can take. For each kernel it counts
the floating-point operations, and the fewest bytes that must pass through the GPU's memory. Each of
the two takes a time at the given rates, and the longer one is the kernel's floor. The sum over all
kernels is the floor of a step.

    python3 dev/gpu/roofline.py                         # the floors of all presets
    python3 dev/gpu/roofline.py 71m 256 256             # preset, B, T: each kernel of its step
    python3 dev/gpu/roofline.py --tflops 600 --tbytes 3 350m 128 256
    python3 dev/gpu/roofline.py --recompute 1b 32 1024          # with --recompute on
    python3 dev/gpu/roofline.py --measured FILE 71m 256 256     # beside ./bench_cuda kernels

The default rates are those that one H200 reached with PyTorch: 790 TFLOP/s in bf16, and 4.3 TB/s.
The network is in bf16, puts its norms first, and has GPAS and a vocabulary of 32000.
"""
import os
import re
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)), ".."))
from command import Error, Parser, check_file, main

PRESETS = {"71m": (512, 1368, 12, 8), "130m": (768, 2048, 12, 12), "250m": (768, 2560, 24, 16),
           "350m": (1024, 2736, 24, 16), "1b": (2048, 5464, 24, 32)}  # C, H as padded, L, NH
SHAPES = [("71m", 256, 256), ("130m", 256, 256), ("250m", 128, 256), ("350m", 128, 256),
          ("1b", 64, 256), ("71m", 64, 1024), ("130m", 64, 1024), ("250m", 32, 1024),
          ("350m", 32, 1024), ("1b", 16, 1024)]
V = 32000


def matmul(N, C, OC):
    """(flops, bytes) of out (N,OC) = inp (N,C) weight^T."""
    return 2 * N * C * OC, 2 * (N * C + OC * C + N * OC)


def matmul_backward(N, C, OC, parts=1):
    """The same for dinp = dout weight and dweight += dout^T inp, called for 1/parts of N at a time.
    dweight is in fp32, and each part reads and writes it."""
    return 4 * N * C * OC, 2 * (2 * N * OC + OC * C + 2 * N * C) + 8 * OC * C * parts


AGAIN = ("matmul_forward qkv", "rope_forward", "attention_forward", "matmul_forward w13",
         "swiglu_forward")  # what --recompute computes a second time, in all layers but the last


def kernels(C, H, L, NH, B, T):
    """Rows (name, calls in a step, flops of a call, bytes of a call) of all kernels of a step. Not
    counted are the first norm, and arrays that are set to 0: less than 1% of a step."""
    N, x = B * T, 2 * B * T * C  # x: the bytes of one (B,T,C) array
    P = 2 * V * C + L * (4 * C * C + 3 * H * C)
    products = [("qkv", N, C, 3 * C), ("wo", N, C, C), ("w13", N, C, 2 * H), ("w2", N, H, C)]
    rows = [("embedding_forward", 1, 0, 4 * min(N, V) * C + x),
            ("residual_gpas_rmsnorm_forward", 2 * L, 0, 4 * x)]
    rows += [("matmul_forward " + p[0], L, *matmul(*p[1:])) for p in products]
    rows += [("rope_forward", L, 0, 4 * x),
             ("attention_forward", L, 2 * N * T * C, 4 * x),
             ("swiglu_forward", L, 0, 2 * 3 * N * H),
             ("matmul_forward output", 1, *matmul(N, C, V)),
             ("crossentropy", 1, 0, 4 * N * V),
             ("matmul_backward output", 1, *matmul_backward(N, C, V, 4)),
             ("scale_array: two gradients", 1, 0, 2 * x + 12 * V * C),
             ("residual_gpas_rmsnorm_backward", 2 * L, 0, 4 * x)]
    rows += [("matmul_backward " + p[0], L, *matmul_backward(*p[1:])) for p in products]
    # Two kernels that both compute S and dP. The first loads q, k, v, dout and out, and stores dq.
    # The second loads q, k, v and dout, and stores dk and dv.
    rows += [("attention_backward", L, 7 * N * T * C, 12 * x),
             ("swiglu_backward", L, 0, 2 * 5 * N * H),
             ("embedding_backward", 1, 0, x + 8 * min(N, V) * C),
             ("gradients: zero, squares", 1, 0, 8 * P),
             ("adamw", 1, 0, 30 * P)]
    return rows


def unfused(C, L, B, T):
    """The same rows for what --fused off runs as separate kernels."""
    x = 2 * B * T * C
    return [("residual_forward, gpas_forward, rmsnorm_forward", 2 * L, 0, 7 * x),
            ("rmsnorm_backward, residual_forward, gpas_backward", 2 * L, 0, 9 * x),
            ("rope_backward", L, 0, 4 * x)]


def add_floor(o, row):
    """The row (name, calls, GFLOP, GB, ms) for all calls together."""
    name, calls, flops, moved = row
    ms = 1e3 * max(flops / (o.tflops * 1e12), moved / (o.tbytes * 1e12))
    return name, calls, calls * flops / 1e9, calls * moved / 1e9, calls * ms


def floors(o, shape):
    """The rows (name, calls, GFLOP, GB, ms) of a step, and the floating-point operations that count
    as the model's."""
    preset, B, T = shape
    C, H, L, NH = PRESETS[preset]
    rows = []
    for name, calls, flops, moved in kernels(C, H, L, NH, B, T):
        calls += L - 1 if o.recompute and name in AGAIN else 0
        rows.append(add_floor(o, (name, calls, flops, moved)))
    parameters = V * C + L * (4 * C * C + 3 * H * C)  # without the embedding
    return rows, B * T * (6 * parameters + 6 * L * C * T)


def read_measured(path):
    """The milliseconds of each kernel, by name. Other lines of the file are ignored."""
    measured = {}
    with open(check_file(path), encoding="utf-8", errors="replace") as file:
        for line in file:
            name, *rest = line.strip().split(";")
            if len(rest) == 2 and re.fullmatch(r"[0-9]+\.?[0-9]*", rest[1]) and float(rest[1]):
                measured[name] = float(rest[1])
    return measured


def print_beside(rows, instead, measured):
    """Prints measured times beside the floors, the kernel that is furthest above its floor first.
    `instead`: rows that are not part of a step; they come last."""
    def with_time(row):
        return row[0], row[1], row[4], measured.get(row[0], float("nan"))
    table = sorted(map(with_time, rows), key=lambda row: row[2] - row[3])
    table.append(("all", "", sum(row[2] for row in table), sum(row[3] for row in table)))
    table += [("with --fused off: " + row[0], *row[1:]) for row in map(with_time, instead)]
    print("| kernel | calls | floor, ms | measured, ms | floor / measured |\n|---|---|---|---|---|")
    for row in table:
        print("| %s | %s | %.2f | %.2f | %.0f%% |" % (*row, 100 * row[2] / row[3]))


def rate(text):
    """A number above 0. argparse reports the ValueError."""
    if not 0 < float(text) < 1e9:
        raise ValueError
    return float(text)


def run():
    parser = Parser(description="Floors of a training step's kernels.")
    parser.add_argument("shape", nargs="*", help="PRESET B T")
    parser.add_argument("--tflops", type=rate, default=790, help="matrix rate in TFLOP/s (790)")
    parser.add_argument("--tbytes", type=rate, default=4.3, help="memory rate in TB/s (4.3)")
    parser.add_argument("--recompute", action="store_true", help="a step with --recompute on")
    parser.add_argument("--measured", metavar="FILE", help="lines name;calls;milliseconds")
    o = parser.parse_args()
    if o.recompute and o.measured:
        raise Error("./bench_cuda kernels measures a step without --recompute")
    numbers = [bool(re.fullmatch("[1-9][0-9]{0,8}", text)) for text in o.shape[1:]]
    if (o.shape or o.measured) and (numbers != [True, True] or o.shape[0] not in PRESETS):
        raise Error("give a preset (%s), B and T" % ", ".join(PRESETS))
    if o.shape:
        preset, B, T = o.shape[0], int(o.shape[1]), int(o.shape[2])
        rows, _ = floors(o, (preset, B, T))
        if o.measured:
            C, _, L, _ = PRESETS[preset]
            instead = [add_floor(o, row) for row in unfused(C, L, B, T)]
            return print_beside(rows, instead, read_measured(o.measured))
        total = sum(row[4] for row in rows)
        print("| kernel | calls | GFLOP | GB | floor, ms | share |\n|---|---|---|---|---|---|")
        for row in rows + [("all", "", sum(r[2] for r in rows), sum(r[3] for r in rows), total)]:
            print("| %s | %s | %.0f | %.2f | %.2f | %.0f%% |" % (*row, 100 * row[4] / total))
        return
    print("| preset | B | T | floor, ms | share of products | tokens/s | model FLOP/s |\n"
          "|---|---|---|---|---|---|---|")
    for shape in SHAPES:
        rows, flops = floors(o, shape)
        total = sum(row[4] for row in rows)
        products = sum(row[4] for row in rows if "matmul" in row[0])
        print("| %s | %d | %d | %.1f | %.0f%% | %.0f | %.0f%% of the matrix rate |"
              % (*shape, total, 100 * products / total, shape[1] * shape[2] / total * 1e3,
                 100 * flops / (total / 1e3) / (o.tflops * 1e12)))


if __name__ == "__main__":
    main(run)
