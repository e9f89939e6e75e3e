#!/usr/bin/env python3
"""Tests of the classroom: hand-outs are empty but build, and the grader finds mistakes."""
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../..")
sys.path.insert(0, os.path.join(ROOT, "dev/class"))
from assignment import LAYERS, cut, makefile  # noqa: E402

counts = {True: 0, False: 0}

# Mistakes, one in each layer, all planted at once: layer, what was there, what stands there now,
# and what the hint must say.
MISTAKES = [
    ("gpas", "if (stop_grad) {", "if (stop_grad < 0) {", "stop-gradient"),
    ("residual", "= A * shortcut[i] +", "= shortcut[i] + A *", "A scales the branch"),
    ("embedding", "dw[c] += dy[c]", "dw[c] = dy[c]", r"\+="),
    ("rmsnorm", "r * r * sum / C", "r * r * sum", "factor C"),
    ("rope", "(size_t)(n % T) * hs", "(size_t)n * hs", "n % T"),
    ("swiglu", "(s + h1[i] * s * (1 - s))", "s", "product: the term through the sigmoid"),
    ("matmul", "matrix(dout, OC), matrix(weight, C)",
     "matrix(dout, OC), transpose(matrix(weight, OC))", "transposed"),
    ("attention", "S[s] * (dP[s] - delta)", "S[s] * dP[s]", "term is missing"),
    ("crossentropy", "lse[n] - x[targets[n]]", "x[targets[n]] - lse[n]", "sign"),
    ("adamw", "p[i] -= adam.lr * (mhat", "p[i] -= adam.lr * (m[i]", "without its correction")]
READINGS = [
    ("gpas", "out[i] = scale * inp[i]", "out[i] = inp[i] / scale", "divided"),
    ("residual", "shortcut[i] + branch[i]", "shortcut[i] + branch[n - 1 - i]", "reverse order"),
    ("embedding", "dw[c] += dy[c]", "dw[c] += dy[0]", r"dout is read at \[0\]"),
    ("rmsnorm", "sum += x[c] * x[c]", "sum += x[c]", "square is missing"),
    ("rope", "x1 = x[c + j + 1]", "x1 = x[c + j + 2]", "too far.*too far"),
    ("swiglu", "*h3 = h1 + H;\n        float *y", "*h3 = h1 + 1;\n        float *y", "h3 begins H"),
    ("attention", "stride, t0 + i + 1, seen);", "stride, t0 - first + i + 1, seen);",
     "first is missing in the mask.*all cases with first = 0 are right"),
    ("crossentropy", "(size_t)n * V;\n        float la", "(size_t)n;\n        float la",
     "from element n on")]
VIOLENT = [
    ("crossentropy", "lse[n] = largest +", "while (n < N) lse[n] = largest +", "endless loop"),
    ("swiglu", "y[i] = h1[i] * sigmoid", "y[i + (1 << 30)] = h1[i] * sigmoid",
     "segmentation fault"),
    ("attention", "hs = C / NH, rows = T - first;", "hs = C / NH, rows = T - (first = 0);",
     "outside.*all cases with first = 0 are right"),
    ("residual", "i < n; i++) out[i] = A", "i <= n; i++) out[i] = A", "outside")]
KERNELS = [
    ("gpas", "*dgate -= gate_slope", "*dgate += gate_slope", "sign"),
    ("residual", "A * (float)shortcut[i] +", "(float)shortcut[i] + A *", "A scales the branch"),
    ("embedding", "C + channel] += total", "C + channel] = total", r"\+="),
    ("rmsnorm", "    __syncthreads();\n    if (threadIdx.y > 0)", "    if (threadIdx.y > 0)",
     "__syncthreads"),
    ("rope", "C, hs, -1);", "C, hs, 1);", "the same way as in the forward pass"),
    ("swiglu", "(size_t)blockIdx.x * H + i, y)", "(size_t)(blockIdx.x + 1) * H + i, y)",
     "of a cudaMalloc"),
    ("matmul", "gemm(dweight, inp, 0, dout, 1, C, OC, N, 1)",
     "gemm(dweight, inp, 0, dout, 1, C, OC, N, 0)", "overwritten"),
    ("attention", "row > column : column > row", "row >= column : column >= row", "own position"),
    ("crossentropy", "target_logit = row[target]", "target_logit = logits[target]",
     "row 0|first row"),
    ("adamw", "x -= adam.lr", "x += adam.lr", "sign"),
    ("residual_gpas_rmsnorm", "inp_scale * x[k] + b[k]", "x[k] + b[k]", "inp_gate")]
MORE_KERNELS = [
    ("gpas", "i += step) {\n        float dy", "i += blockDim.x) {\n        float dy", "race"),
    ("residual", "scale_array(dshortcut, dout, A, 0, n)",
     "scale_array(dshortcut, dout, A, 1, n)", r"\+="),
    ("embedding", "c < C; i += 8)", "c < C; i += 16)", "right in: .*no token twice"),
    ("rmsnorm", "x, w, rstd[n], C)", "x, w, rstd[0], C)", "r of row 0"),
    ("rope", "table + (size_t)(blockIdx.x % T) * hs", "table + (size_t)blockIdx.x * hs",
     "of a cudaMalloc"),
    ("swiglu", "(s + h1[k] * s * (1 - s))", "(s - h1[k] * s * (1 - s))", "sign"),
    ("matmul", "gemm(out, weight, 1, inp", "gemm(out, weight, 0, inp", "weight is read transposed"),
    ("attention", "        l[half] *= correction;\n", "", "from one block to the next"),
    ("crossentropy", "(p - (v + k == target))", "(p + (v + k == target))", "sign"),
    ("adamw", "(1 - adam.beta2) * dp * dp", "(1 - adam.beta2) * dp", "square"),
    ("residual_gpas_rmsnorm", "gate_sum += x[k] * dz", "gate_sum -= x[k] * dz", "sign")]

# A source with all that assignment.py has rules for, and what it must become.
SOURCE = """\
#ifdef PLAIN
static void plain(float *x) { *x = 1; }
#endif

// Another function needs it too.
static void shared(float *x) { *x = 2; }

// Parts of the solution.
enum { THREE = 3 };

static void helper(float *x) {
    *x = THREE;
}

// The layer's definition (arXiv 2506.22049).
static void defined(float *x, int sign) { *x = sign; }

static void residual_forward(float *out) {
    plain(out), shared(out), helper(out), defined(out, 1);
}

// Given dy, compute dx.
//   The derivation.
static void residual_backward(float *dx) {
    shared(dx), defined(dx, -1);
}

void model_forward(float *x) { shared(x); }
"""
HAND_OUT = """\
#ifdef PLAIN
static void plain(float *x) { *x = 1; }
#endif

// Another function needs it too.
static void shared(float *x) { *x = 2; }

// The layer's definition (arXiv 2506.22049).

static void residual_forward(float *out) {
    // Your code, in place of these lines.
    (void)out;
}

// Given dy, compute dx.
static void residual_backward(float *dx) {
    // Your code, in place of these lines.
    (void)dx;
}

void model_forward(float *x) { shared(x); }
"""
MAKEFILE = """\
A := 1

train_gpas: x
\tcc

train_gpas_plain: A = 2
train_gpas_plain: x
\tcc -DPLAIN

$(B): x
\tcc
"""


def check(good, name, seen=""):
    counts[bool(good)] += 1
    print("%s %s%s" % ("ok  " if good else "FAIL", name, "" if good else ": " + str(seen)))


def run(*command, **more):
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          check=False, **more)


def hand_out(folder, *arguments):
    program = os.path.join(ROOT, "dev/class/assignment.py")
    return run(sys.executable, program, "--out", folder, *arguments)


def grade(folder, *variables):
    done = run("make", "-s", "grade", "JSON=1", *variables, cwd=folder)
    try:
        return json.loads(done.stdout)
    except ValueError:
        return {"points": None, "max": 0, "layers": [], "said": done.stdout + done.stderr}


def read(*path):
    with open(os.path.join(*path), encoding="utf-8") as file:
        return file.read()


def write(text, *path):
    with open(os.path.join(*path), "w", encoding="utf-8") as file:
        file.write(text)


def test_rules():
    cut_source = cut("train_gpas.c", SOURCE, ["residual"])
    check(cut_source == HAND_OUT, "assignment: what goes, and what stays", cut_source)
    kept = makefile(MAKEFILE, ["gpas"], False)
    check("\nA := 1\n\ntrain_gpas: x\n\tcc\n\n.PHONY" in kept,
          "assignment: the rules of the Makefile that stay", kept)


def test_empty(folder):
    done = hand_out(folder, "--cuda")
    check(done.returncode == 0, "assignment: writes a folder", done.stderr)
    texts = {os.path.join(place, name): read(place, name)
             for place, _, names in os.walk(folder) for name in names}
    kept = {re.sub(r"\s+", " ", line) for text in texts.values() for line in text.split("\n")}
    for file in ("train_gpas.c", "train_gpas.cu"):
        left = set(read(folder, file).split("\n"))
        gone = {re.sub(r"\s+", " ", x) for x in read(ROOT, file).split("\n") if x not in left}
        formulas = [x for x in gone if re.match(r".{12,}[-+*/]?= .*[-+*/(].*;", x) or "//  " in x]
        # Given are the scale of the scores, in a launcher, and the first index of a grid's loop.
        given = r"for \(|sqrtf\(\(float\)|thread_index"
        told = [x for x in formulas if x in kept and not re.search(given, x)]
        check(len(formulas) > 40 and not told,
              "assignment: the solution of %s is nowhere in it" % file, told[:3] or len(formulas))
    text = read(folder, "train_gpas.c")
    told = re.findall(r".*\bdg -?=.*|.*delta_t.*|.*P_tr.*|.*direction: .*|.*dx_v = .*|.*\bm' = .*",
                      text + read(folder, "train_gpas.cu"))
    check("(arXiv 2104.09864) rotates" in text and not told,
          "assignment: RoPE's definition is left, and no derivation of the gate, attention or "
          "crossentropy", told)
    result = grade(folder)
    wrong = [row["file"] + " " + row["layer"] for row in result["layers"] if row["points"]]
    check(result["points"] == 0 and result["max"] == 210 and not wrong,
          "grade: the empty hand-out, C and CUDA, gets 0 for each layer", wrong or result)
    for file in ("train_gpas.c", "train_gpas.cu"):
        shutil.copy(os.path.join(ROOT, file), folder)
    result = grade(folder)
    wrong = [(r["file"], r["layer"], r["forward"] if "forward" in r else r["update"])
             for r in result["layers"] if r["points"] < 10]
    check(result["points"] == 210, "grade: the original gets 210 of 210", wrong or result)


def test_some(folder):
    hand_out(folder, "rope", "gpas")
    result = grade(folder)
    points = {row["layer"]: row["points"] for row in result["layers"]}
    check(result["max"] == 20 and points == {x: 0 if x in ("rope", "gpas") else 10 for x in LAYERS},
          "grade: with two layers left to write, these get 0 and the others full points", points)
    write(read(folder, "train_gpas.c").replace("// Your code", "int x = ; // Your code", 1), folder,
          "train_gpas.c")
    result = grade(folder)
    check(result["points"] == 0 and "does not compile" in str(result),
          "grade: a syntax error is said, and the report is still JSON", result)


def test_mistakes(folder, mistakes, name, file="train_gpas.c"):
    text = read(ROOT, file)
    for layer, old, new, _ in mistakes:
        check(text.count(old) == 1, "%s: there is one place for the mistake in %s" % (name, layer),
              text.count(old))
        text = text.replace(old, new)
    write(text, folder, file)
    # Always the same numbers: by chance, two mistakes can give the same result.
    rows = {row["layer"]: row for row in grade(folder, "SEED=1")["layers"] if row["file"] == file}
    for layer, _, _, hint in mistakes:
        row = rows.get(layer, {"points": 10})
        said = str([row[w]["hints"] for w in ("forward", "backward", "update") if w in row])
        check(row["points"] < 10 and re.search(hint, said), "%s: %s, with a hint" % (name, layer),
              said)
    hit = {layer for layer, row in rows.items() if row["points"] < 10}
    check(hit == {m[0] for m in mistakes}, "%s: no other layer loses points" % name, hit)


def test_surroundings(folder):
    """What other machines and editors do to a hand-out."""
    plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    program = os.path.join(ROOT, "dev/class/assignment.py")
    done = run(sys.executable, program, "--out", folder, "gpas", env=plain)
    check(done.returncode == 0, "assignment: in the locale C", done.stderr)
    source = read(ROOT, "train_gpas.c")
    for name, text in (("CRLF", source.replace("\n", "\r\n").encode()),
                       ("a byte-order mark", source.encode("utf-8-sig")),
                       ("Latin-1", source.encode() + b"// Zo\xeb\n")):
        with open(os.path.join(folder, "train_gpas.c"), "wb") as file:
            file.write(text)
        result = grade(folder, "CC=env gcc", "CXX=env g++")
        check(result["points"] == 10, "grade: a file with %s, a compiler of two words" % name, result)
    write(source.replace("scale * inp[i]", "scale * imp[i]"), folder, "train_gpas.c")
    os.environ.update(LANG="de_DE.UTF-8", LC_ALL="de_DE.UTF-8", TMPDIR="/nowhere")
    result = grade(folder)
    for name in ("LANG", "LC_ALL", "TMPDIR"):
        del os.environ[name]
    check("'imp' undeclared" in str(result["layers"]),
          "grade: in another language and without TMPDIR", result)
    for variable in ("OUT=", "LAYERS= ", "SEED=", "CC=", "PYTHON="):
        done = run("make", "-s", "assignment" if variable < "P" else "grade", variable, cwd=ROOT)
        check(done.returncode == 2 and "given, but empty" in done.stderr
              and done.stderr.count("\n") == 1, "make: %s" % variable, done.stderr)


def test_errors(folder):
    for arguments, say in ((["gpas", "gaps"], "no layer gaps"), (["gpas"], "exists already"),
                           (["--out", ""], "empty"), (["--out", "."], "exists already")):
        done = hand_out(folder, *arguments)
        check(done.returncode == 1 and say in done.stderr and done.stderr.count("\n") == 1,
              "assignment: error: %s" % say, done.stderr)


def main():
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ.pop("MAKEFLAGS", None)  # called by make, its options are not for the hand-out's
    test_rules()
    with tempfile.TemporaryDirectory() as place:
        test_empty(os.path.join(place, "all"))
        test_mistakes(os.path.join(place, "all"), KERNELS, "kernels", "train_gpas.cu")
        test_mistakes(os.path.join(place, "all"), MORE_KERNELS, "more kernels", "train_gpas.cu")
        test_some(os.path.join(place, "some"))
        test_mistakes(os.path.join(place, "some"), MISTAKES, "mistakes")
        test_mistakes(os.path.join(place, "some"), READINGS, "readings")
        test_mistakes(os.path.join(place, "some"), VIOLENT, "violence")
        test_errors(os.path.join(place, "some"))
        test_surroundings(os.path.join(place, "with a space, \u00e9"))
    print("%d passed, %d failed" % (counts[True], counts[False]))
    sys.exit(counts[False] > 0)


if __name__ == "__main__":
    main()
