#!/usr/bin/env python3
"""
What a training step of train_gpas.cu must cost: for every kernel the floating-point operations and
the fewest bytes it moves through the GPU's memory, and the time that takes at the given rates. The
larger of the two times is a floor; their sum over all kernels is the floor of a step.

    python3 dev/gpu/roofline.py 71m 256 256     # preset, B, T: one table, as in roofline.md
    python3 dev/gpu/roofline.py                         # the floors of all presets
    python3 dev/gpu/roofline.py --tflops 600 --tbytes 3 350m 128 256
    python3 dev/gpu/roofline.py --recompute 1b 32 1024          # with --recompute on
    python3 dev/gpu/roofline.py --measured FILE 71m 256 256     # beside ./bench_cuda kernels

The rates default to what one H200 was seen to reach: 790 TFLOP/s in bf16 and 4.3 TB/s. bf16 is two
bytes. A network that puts its norms first, with GPAS; V 32000.
"""
import argparse
import sys

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
    """dinp = dout weight, dweight += dout^T inp; dweight is fp32, read and written in each part."""
    return 4 * N * C * OC, 2 * (2 * N * OC + OC * C + 2 * N * C) + 8 * OC * C * parts


AGAIN = ("matmul_forward qkv", "rope_forward", "attention_forward", "matmul_forward w13",
         "swiglu_forward")  # with --recompute


def kernels(C, H, L, NH, B, T):
    """Rows (name, calls in a step, flops of a call, bytes of a call)."""
    N, x = B * T, 2 * B * T * C  # x: bytes of one (B,T,C) array
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
             ("scaled: two gradients", 1, 0, 2 * x + 12 * V * C),
             ("residual_gpas_rmsnorm_backward", 2 * L, 0, 4 * x)]
    rows += [("matmul_backward " + p[0], L, *matmul_backward(*p[1:])) for p in products]
    # S and dP twice. For dq: qkv, dout, out in, dq out; for dk and dv: qkv, dout in, two out.
    rows += [("attention_backward", L, 7 * N * T * C, 12 * x),
             ("rope_backward", L, 0, 4 * x),
             ("swiglu_backward", L, 0, 2 * 5 * N * H),
             ("embedding_backward", 1, 0, x + 8 * V * C),
             ("gradients: zero, squares", 1, 0, 8 * P),
             ("adamw", 1, 0, 30 * P)]
    return rows


def floors(o, shape):
    """Rows (name, calls, GFLOP, GB, ms), all calls of a kernel together, and the model's FLOPs."""
    preset, B, T = shape
    C, H, L, NH = PRESETS[preset]
    rows = []
    for name, calls, flops, moved in kernels(C, H, L, NH, B, T):
        calls += L - 1 if o.recompute and name in AGAIN else 0
        ms = 1e3 * max(flops / (o.tflops * 1e12), moved / (o.tbytes * 1e12))
        rows.append((name, calls, calls * flops / 1e9, calls * moved / 1e9, calls * ms))
    parameters = V * C + L * (4 * C * C + 3 * H * C)  # without the embedding
    return rows, B * T * (6 * parameters + 6 * L * C * T)


def beside(rows, path):
    """Measured times beside the floors, what is most above its floor first."""
    measured = {}
    with open(path) as file:
        for line in file:
            if line.count(";") == 2:
                measured[line.split(";")[0]] = float(line.split(";")[2])
    table = [(name, calls, floor, measured.get(name, float("nan")))
             for name, calls, _, _, floor in rows]
    table.sort(key=lambda row: row[2] - row[3])
    table.append(("all", "", sum(row[2] for row in table), sum(row[3] for row in table)))
    print("| kernel | calls | floor, ms | measured, ms | floor / measured |\n|---|---|---|---|---|")
    for row in table:
        print("| %s | %s | %.2f | %.2f | %.0f%% |" % (*row, 100 * row[2] / row[3]))


def main():
    parser = argparse.ArgumentParser(description="Floors of a training step's kernels.")
    parser.add_argument("shape", nargs="*", help="PRESET B T")
    parser.add_argument("--tflops", type=float, default=790)
    parser.add_argument("--tbytes", type=float, default=4.3)
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--measured", metavar="FILE", help="name;calls;milliseconds of each kernel")
    o = parser.parse_args()
    if o.recompute and o.measured:
        sys.exit("roofline.py: ./bench_cuda kernels measures a step without --recompute")
    if o.shape and (len(o.shape) != 3 or o.shape[0] not in PRESETS):
        sys.exit("roofline.py: give a preset (%s), B and T" % ", ".join(PRESETS))
    if o.shape:
        preset, B, T = o.shape[0], int(o.shape[1]), int(o.shape[2])
        rows, _ = floors(o, (preset, B, T))
        if o.measured:
            return beside(rows, o.measured)
        total = sum(row[4] for row in rows)
        print("| kernel | calls | GFLOP | GB | floor, ms | share |\n|---|---|---|---|---|---|")
        for row in rows + [("all", "", sum(r[2] for r in rows), sum(r[3] for r in rows), total)]:
            print("| %s | %s | %.0f | %.2f | %.2f | %.0f%% |" % (*row, 100 * row[4] / total))
        return
    print("| preset | B | T | floor, ms | of it products | tokens/s | model FLOPs in it |\n"
          "|---|---|---|---|---|---|---|")
    for shape in SHAPES:
        rows, flops = floors(o, shape)
        total = sum(row[4] for row in rows)
        products = sum(row[4] for row in rows if "matmul" in row[0])
        print("| %s | %d | %d | %.1f | %.0f%% | %.0f | %.0f%% of the matrix rate |"
              % (*shape, total, 100 * products / total, shape[1] * shape[2] / total * 1e3,
                 100 * flops / (total / 1e3) / (o.tflops * 1e12)))


if __name__ == "__main__":
    main()
