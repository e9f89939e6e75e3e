#!/usr/bin/env python3
"""Tests of the classroom: hand-outs are empty but build, and the grader finds mistakes."""
import csv
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile

ROOT = os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "../.."))
sys.path.insert(0, os.path.join(ROOT, "dev/class"))
from assignment import LAYERS, VARIANT, cut, makefile, varied  # noqa: E402

counts = {True: 0, False: 0}

# Mistakes, one in each layer, all planted at once: layer, what was there, what stands there now,
# and what the hint must say.
MISTAKES = [
    ("gpas", "if (stop_grad) {", "if (stop_grad < 0) {", "stop-gradient"),
    ("residual", "= A * shortcut[i] +", "= shortcut[i] + A *", r"shortcut \+ A branch is used"),
    ("embedding", "dw[c] += dy[c]", "dw[c] = dy[c]", r"\+="),
    ("rmsnorm", "r * r * sum / C", "r * r * sum",
     "the factor 1 / C in the term through r is missing"),
    ("rope", "(size_t)(n % T) * hs", "(size_t)n * hs", "n % T"),
    ("swiglu", "(s + h1[i] * s * (1 - s))", "s",
     "the term through the sigmoid .* is missing"),
    ("matmul", "matrix(dout, OC), matrix(weight, C)",
     "matrix(dout, OC), transpose(matrix(weight, OC))", "transposed"),
    ("attention", "S[s] * (dP[s] - delta)", "S[s] * dP[s]",
     "the term with the sum over the row in dS .* is missing"),
    ("crossentropy", "lse[n] - x[targets[n]]", "x[targets[n]] - lse[n]", "sign"),
    ("adamw", "p[i] -= adam.lr * (mhat", "p[i] -= adam.lr * (m[i]",
     "the correction of m, is missing")]
READINGS = [
    ("gpas", "out[i] = scale * inp[i]", "out[i] = inp[i] / scale", "divides"),
    ("residual", "shortcut[i] + branch[i]", "shortcut[i] + branch[n - 1 - i]", "reverse order"),
    ("embedding", "dw[c] += dy[c]", "dw[c] += dy[0]",
     "the first column of dout is read for every one"),
    ("rmsnorm", "sum += x[c] * x[c]", "sum += x[c]", r"x is used; it must be x\^2"),
    ("rope", "x1 = x[c + j + 1]", "x1 = x[c + j + 2]", "too far.*too far"),
    ("swiglu", "*h3 = h1 + H;\n        float *y", "*h3 = h1 + 1;\n        float *y",
     r"row\[j \+ 1\] is used"),
    ("attention", "stride, t0 + i + 1, seen);", "stride, t0 - first + i + 1, seen);",
     "only where first is not 0: first is missing in the mask"),
    ("crossentropy", "(size_t)n * V;\n        float la", "(size_t)n;\n        float la",
     "from element n on")]
VIOLENT = [
    ("crossentropy", "lse[n] = largest +", "while (n < N) lse[n] = largest +", "endless loop"),
    ("swiglu", "y[i] = h1[i] * sigmoid", "y[i + (1 << 30)] = h1[i] * sigmoid",
     "segmentation fault"),
    ("attention", "hs = C / NH, rows = T - first;", "hs = C / NH, rows = T - (first = 0);",
     "only where first is not 0: writes outside"),
    ("residual", "i < n; i++) out[i] = A", "i <= n; i++) out[i] = A", "outside")]
KERNELS = [
    ("gpas", "*dgate -= gate_slope", "*dgate += gate_slope", "sign"),
    ("residual", "A * (float)shortcut[i] +", "(float)shortcut[i] + A *",
     r"shortcut \+ A branch is used"),
    ("embedding", "sum[k] += dy[k]", "sum[k] -= dy[k]", "sign"),
    ("rmsnorm", "    __syncthreads();\n    if (threadIdx.y > 0)", "    if (threadIdx.y > 0)",
     "__syncthreads"),
    ("rope", "C, hs, -1);", "C, hs, 1);", "the same way as in the forward pass"),
    ("swiglu", "(size_t)blockIdx.x * H + i, y)", "(size_t)(blockIdx.x + 1) * H + i, y)",
     "of a cudaMalloc"),
    ("matmul", "gemm(dweight, inp, 0, dout, 1, C, OC, N, 1)",
     "gemm(dweight, inp, 0, dout, 1, C, OC, N, 0)", r"set \(=\)"),
    ("attention", "row > column : column > row", "row >= column : column >= row", "s < t is used"),
    ("crossentropy", "target_logit = row[target]", "target_logit = logits[target]",
     "row 0|first row"),
    ("adamw", "x -= adam.lr", "x += adam.lr", "sign"),
    ("residual_gpas_rmsnorm", "inp_scale * x[k] + b[k]", "x[k] + b[k]", "inp lacks both factors")]
MORE_KERNELS = [
    ("gpas", "i += step) {\n        float dy", "i += blockDim.x) {\n        float dy", "race"),
    ("residual", "scale_array(dshortcut, dout, A, 0, n)",
     "scale_array(dshortcut, dout, A, 1, n)", r"\+="),
    ("embedding", "i < s.count; i++)", "i < s.count; i += 2)",
     "only where a token occurs more than 32 times"),
    ("rmsnorm", "x, w, rstd[n], C)", "x, w, rstd[0], C)", "r of row 0"),
    ("rope", "table + (size_t)(blockIdx.x % T) * hs", "table + (size_t)blockIdx.x * hs",
     "of a cudaMalloc"),
    ("swiglu", "(s + h1[k] * s * (1 - s))", "(s - h1[k] * s * (1 - s))", "sign"),
    ("matmul", "gemm(out, weight, 1, inp", "gemm(out, weight, 0, inp", "weight is read transposed"),
    ("attention", "        l[half] *= correction;\n", "", "between blocks"),
    ("crossentropy", "-lse * LOG2_E)) - 1)", "-lse * LOG2_E)) + 1)", "sign"),
    ("adamw", "(1 - adam.beta2) * dp * dp", "(1 - adam.beta2) * dp", "square"),
    ("residual_gpas_rmsnorm", "gate_sum += x[k] * dz", "gate_sum -= x[k] * dz", "sign")]

# Mistakes that show only in some cases: these have to be said first.
SUBTLE = [
    ("gpas", """        if (dinp != dout) memcpy(dinp, dout, n * sizeof(float));  // dx = dy
        return;
    }
    float scale = 1 - gate_value(gate, activation);
    #pragma omp parallel for simd
    for (size_t i = 0; i < n; i++) dinp[i] = scale * dout[i];
""", """        if (dinp != dout) memcpy(dinp, dout, n * sizeof(float));
        return;
    }
    float scale = 1 - gate_value(gate, activation);
    for (size_t i = 0; i < n; i++) dinp[i] = scale * dout[i];
    float s = gate_slope(gate, activation);
    if (dgate) *dgate += s * (float)dot(inp, dout, n) * (dinp == dout ? 1 - scale : 0);
""", "only where output and input are the same array|wrong only in the cases: .*dinp is dout"),
    ("residual", "for (size_t i = 0; i < n; i++) out[i] = A * shortcut[i] + branch[i];",
     "for (size_t i = 0; i < n; i++) out[i] = branch[i];\n"
     "    for (size_t i = 0; i < n; i++) out[i] += A * shortcut[i];",
     "only where output and input are the same array: out is written before shortcut is read"),
    ("rmsnorm", "1 / sqrtf(sum / C + 1e-6f)", "1 / (sqrtf(sum / C) + 1e-6f)",
     r"only where the inputs are small: 1 / \(sqrt\(mean\) \+ eps\) is used"),
    ("rope", "float cosine = cos_sin[j], sine",
     "static float kept[2];\n                if (kept[0] == 0) kept[0] = T;\n"
     "                float cosine = kept[0] == T ? cos_sin[j] : 0, sine",
     "right if called first, wrong after another call: is something static"),
    ("attention", "seen = t0 + n, accumulate = t0 < last", "seen = t0 + n, accumulate = 0 * last",
     "only where sizes are large"),
    ("embedding", "for (int c = c0; c < imin(C, c0 + BLOCK); c++) dw[c] += dy[c]",
     "for (int c = c0; c0 + BLOCK <= C && c < c0 + BLOCK; c++) dw[c] += dy[c]",
     "the columns of dout after the last full group of 32 are left out"),
    ("swiglu", "float *dh1 = dinp + (size_t)n * 2 * H, *dh3 = dh1 + H;",
     "float *dh1 = dinp + (size_t)n * H, *dh3 = dh1 + (size_t)N * H;", "all rows of one part"),
    ("matmul", "gemm(dinp, C, matrix(dout, OC), matrix(weight, C), N, C, OC, 0)",
     "memset(dinp, 0, sizeof dinp);\n    "
     "gemm(dinp, C, matrix(dout, OC), matrix(weight, C), N, C, OC, 1)",
     "where it is wrong, it adds to what was there"),
    ("adamw", "pow(adam.beta1, adam.t)", "pow(adam.beta1, adam.t + (adam.t > 1))",
     "right in the cases: .*n = 7, t = 1.*1 - beta1.* is used")]
# What another network does, or half of a formula. None of them may be told as something else.
OTHER_NETWORKS = [
    ("residual", "dshortcut[i] = A * dout[i]", "dshortcut[i] = dout[i]",
     "dshortcut: the factor A is missing"),
    ("swiglu", "*h1 = inp + (size_t)n * 2 * H, *h3 = h1 + H;\n        float *y",
     "*h1 = inp + (size_t)n * H, *h3 = h1 + (size_t)N * H;\n        float *y",
     "inp is read as all rows of h1, then all rows of h3"),
    ("attention", "dP[s] = S[s] * (dP[s] - delta)", "dP[s] = S[s] * (1 - S[s]) * dP[s]",
     r"dk: dS is P \(1 - P\) dP")]
SUBTLE_KERNELS = [
    ("gpas", "dinp[i] = scale * dy;", "dinp[i] = dy;", "only where stop_grad is 0"),
    ("crossentropy", "        if (v + W > V)\n            for (int k = 0; k < W; k++) "
     "x[k] = v + k < V ? x[k] : -INFINITY;\n", "",
     "the sum with the padding is used"),
    ("adamw", "chunk.decays ? adam.weight_decay : 0", "adam.weight_decay",
     "norms and gates decay; only"),
    ("residual_gpas_rmsnorm", "gate_sum += s[k] * dy;", "gate_sum += y[k] * dy;",
     "dgate from its output is used")]

# Mistakes that are graded one round at a time, as several of them are in the same function.
ADDED = "*dgate -= gate_slope(gate, activation) * (float)dot(inp, dout, n);"
COPIED = "if (dinp != dout) memcpy(dinp, dout, n * sizeof(float));"
NEEDED = "only where stop_grad is 1: dgate is not written; the stop-gradient is on x, not on g"
ROUNDS = [
    [("gpas", f"    if (dgate) {ADDED}\n    if (stop_grad) {{\n        {COPIED}  // dx = dy\n"
      "        return;\n    }\n",
      f"    if (stop_grad) {{\n        {COPIED}\n        return;\n    }}\n    if (dgate) {ADDED}\n",
      NEEDED),
     ("rmsnorm", "dweight[c] += dy[c]", "dweight[c] = dy[c]",
      r"only the last row counts; and it is set \(=\)")],
    [("gpas", "if (dgate) *dgate", "if (dgate && !stop_grad) *dgate", NEEDED),
     ("rmsnorm", "r * (weight[c] * dy[c] - x[c] * p)", "r * (dy[c] - x[c] * p)",
      "the factor weight in the direct term is missing")],
    [("gpas", COPIED, "memset(dinp, 0, n * sizeof(float));",
      "dinp: only where stop_grad is 1: dinp is 0; sg.x. is a constant, but x itself is not")],
    [("gpas", "*dgate -= gate_slope", "*dgate = gate_slope",
      r"dgate: it has the wrong sign; and it is set \(=\)")],
    [("gpas", "*dgate -= gate_slope", "*dgate += gate_slope",
      r"dgate: it has the wrong sign; .*\(n = 7, .* it held [-0-9.e]+ before\)")],
    [("gpas", "    if (dgate) *dgate", "    if (!dgate) return;\n    *dgate",
      "dinp: only where dgate, or a gate, is NULL: dinp is not written")],
    [("gpas", "dot(inp, dout, n);", "dot(inp, dout, n) / n;",
      "dgate: the mean of x_i dy_i is used; it must be their sum")],
    [("gpas", "gate_slope(gate, activation) * (float)dot", "(float)dot",
      r"dgate: the factor a'\(g\) is missing; dgate")],
    [("gpas", "if (dgate) *dgate", "*dgate",
      r"crashed \(segmentation fault\): dgate is NULL in this case, which is allowed")]]

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
    check("\nA := 1\n\ntrain_gpas: x | openmp\n\tcc\n\nopenmp written:\n" in kept,
          "assignment: the rules of the Makefile that stay", kept)


def test_empty(folder):
    done = hand_out(folder, "--cuda")
    check(done.returncode == 0, "assignment: writes a folder", done.stderr)
    texts = {os.path.join(place, name): read(place, name)
             for place, _, names in os.walk(folder) for name in names}
    task = read(folder, "TASK.md")
    check("Hand in train_gpas.c and train_gpas.cu, and nothing else." in task
          and "need a C++ compiler (g++), but no GPU" in task, "assignment: TASK.md, CUDA", task)
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
    for file in ("train_gpas.c", "train_gpas.cu"):      # they may be older than what was graded
        shutil.copy(os.path.join(ROOT, file), folder)
        os.utime(os.path.join(folder, file), (1e9, 1e9))
    result = grade(folder)
    wrong = [(r["file"], r["layer"], r["forward"] if "forward" in r else r["update"])
             for r in result["layers"] if r["points"] < 10]
    check(result["points"] == 210, "grade: the original gets 210 of 210", wrong or result)


def test_some(folder):
    hand_out(folder, "rope", "gpas")
    task = read(folder, "TASK.md")
    check("Hand in train_gpas.c alone." in task and "except for dx of gpas" in task
          and not [line for line in task.split("\n") if len(line) > 100 and line[0] != "|"],
          "assignment: TASK.md says what to hand in, and what is given", task)
    result = grade(folder)
    points = {row["layer"]: row["points"] for row in result["layers"]}
    check(result["max"] == 20 and points == {"gpas": 0, "rope": 0},
          "grade: with two layers left to write, these alone are graded, and get 0", points)
    hints = [row[which]["hints"] for row in result["layers"] for which in ("forward", "backward")]
    check(hints == [["nothing is written yet"]] * 4, "grade: an empty function says so", hints)
    done = run("make", "-s", "run", cwd=folder)
    check(done.returncode == 2 and "still to write: gpas_forward, gpas_backward, rope_forward, "
          "rope_backward" in done.stderr, "make run: says what is still empty", done)
    write(read(folder, "train_gpas.c").replace("// Your code", "int x = ; // Your code", 1), folder,
          "train_gpas.c")
    result = grade(folder)
    check(result["points"] == 0 and "does not compile" in str(result),
          "grade: a syntax error is said, and the report is still JSON", result)
    done = run("make", "-s", "grade", cwd=folder)
    check(done.stdout.count("does not compile") == 1, "grade: and said once", done.stdout)
    source = read(ROOT, "train_gpas.c")
    gate, rows = "float gate, int activation", "int N,\n                            int C)"
    for layer, old, new in (("gpas_forward", gate, gate.replace("float", "double")),
                            ("rmsnorm_forward", rows, rows.replace("int C", "long C"))):
        check(old in source, f"grade: the parameters of {layer} are there")
        write(source.replace(old, new, 1), folder, "train_gpas.c")
        said = str(grade(folder))
        check(f"the parameters of {layer} or their types" in said,
              f"grade: {layer} with other parameters is named", said)


def test_mistakes(folder, mistakes, name, file="train_gpas.c", source=None):
    text = source or read(ROOT, file)
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
        check(result["points"] == 10, "grade: a file with %s, CC of two words" % name, result)
    write(source.replace("scale * inp[i]", "scale * imp[i]"), folder, "train_gpas.c")
    write('case $LC_ALL,$TMPDIR in C,*/build/*) exec gcc "$@"; esac; echo Fehler; exit 1', folder,
          "cc.sh")                  # a compiler that would speak German, and write to TMPDIR
    os.environ.update(LANG="de_DE.UTF-8", LC_ALL="de_DE.UTF-8", TMPDIR="/nowhere")
    result = grade(folder, "CC=sh cc.sh")
    for name in ("LANG", "LC_ALL", "TMPDIR"):
        del os.environ[name]
    check("'imp' undeclared" in str(result["layers"]),
          "grade: in another language and without TMPDIR", result)
    for compiler in ("gcc \"", " "):
        done = run(sys.executable, "dev/class/grade.py", "--cc", compiler, cwd=folder)
        check(done.returncode == 1 and done.stderr.count("\n") == 1 and "--cc" in done.stderr,
              "grade: error: --cc '%s'" % compiler, done.stderr)


def test_signal(folder):
    """A grader that is stopped in an endless loop stops at once and leaves nothing."""
    write(read(ROOT, "train_gpas.c") + "__attribute__((constructor)) static void f(void) "
          "{ for (;;); }\n", folder, "train_gpas.c")
    child = subprocess.Popen([sys.executable, "dev/class/grade.py", "--json"], cwd=folder,
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    build = os.path.join(folder, "build")
    while child.poll() is None and not any(
            name.endswith(".grade") for _, _, names in os.walk(build) for name in names):
        time.sleep(0.01)
    time.sleep(0.1)
    child.terminate()
    begin = time.monotonic()            # each of the twenty checks would take two seconds
    check(child.wait() == 128 + signal.SIGTERM and {"grade.o", "grade.o.made"}.issuperset(
        x for x in os.listdir(build) if x not in ("flags", "dev", "train_gpas.cu"))
          and time.monotonic() - begin < 12, "grade: SIGTERM stops it, and leaves nothing",
          (time.monotonic() - begin, os.listdir(build)))


def test_class(place):
    """make grades: files of any names, of any content; a student gets the own grade."""
    submissions, grades = os.path.join(place, "sub missions"), os.path.join(place, "gr\u00e4des")
    right, empty = read(ROOT, "train_gpas.c"), os.path.join(place, "empty_class")
    hand_out(empty, "gpas", "crossentropy")
    os.makedirs(os.path.join(submissions, "Zo\u00eb in a folder"))
    loop = right.replace("lse[n] = largest +", "while (n < N) lse[n] = largest +")
    crash = right.replace("out[i] = scale * inp[i]", "out[i + (1l << 40)] = scale * inp[i]")
    texts = {"a b.c": right, "M\u00fcller, J\u00f6rg.c": right.replace("\n", "\r\n"),
             "loop.c": loop, "crash.c": crash, "-syntax;$x.c": right + "}", "no ending": right,
             "Zo\u00eb in a folder/train_gpas.c": right,
             "empty.c": read(empty, "train_gpas.c"), "names.txt": ""}
    for name, text in texts.items():
        with open(os.path.join(submissions, name), "w", encoding="utf-8", newline="") as file:
            file.write(text)
    with open(os.path.join(submissions, "latin.c"), "wb") as file:
        file.write(right.encode() + b"// Zo\xeb\n")
    os.mkdir(os.path.join(submissions, "nothing"))
    command = ["make", "-s", "grades", f"SUBMISSIONS={submissions}", f"GRADES={grades}",
               "LAYERS=gpas crossentropy"]
    done = run(*command, cwd=ROOT)
    with open(os.path.join(grades, "grades.csv"), encoding="utf-8", newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    points = {name: int(row["points"]) for name, row in rows.items()}
    check(points == {"a b": 20, "M\u00fcller, J\u00f6rg": 20, "loop": 16, "crash": 16,
                     "-syntax;$x": 0, "Zo\u00eb in a folder": 20, "empty": 0,
                     "latin": 20, "nothing": 0}, "make grades: names, CRLF, Latin-1, a folder",
          (points, done.stderr))
    check("skipped, since a submission is NAME.c, NAME.cu or a folder: names.txt, no ending\n"
          in done.stderr, "make grades: says which files it skips", done.stderr)
    for name, said in (("loop", "endless loop"), ("crash", "segmentation fault"),
                       ("-syntax;$x", "does not compile"), ("nothing", "no train_gpas.c"),
                       ("empty", "nothing is written yet"), ("a b", "^$")):
        check(re.search(said, rows.get(name, {}).get("first error", "")),
              f"make grades: first error of {name}", rows.get(name))
    check(rows["loop"]["gpas"] == "10" and rows["loop"]["crossentropy"] == "6"
          and "endless loop" in read(grades, "loop.txt")
          and json.loads(read(grades, "loop.json"))["points"] == 16,
          "make grades: points of a layer, text and JSON", rows["loop"])
    write(right, submissions, "empty.c")
    before = os.path.getmtime(os.path.join(grades, "loop.json"))
    os.utime(os.path.join(submissions, "empty.c"), (time.time() + 5, time.time() + 5))
    done = run(*command, cwd=ROOT)
    check("8 graded before" in done.stdout
          and before == os.path.getmtime(os.path.join(grades, "loop.json"))
          and ",20,20," in re.search("^empty.*", read(grades, "grades.csv"), re.M)[0],
          "make grades: continues with what is new", done)
    for more, say in (("LAYERS=gpas", "other LAYERS"), ("SUBMISSIONS=/nowhere", "no folder"),
                      ("SEED=7", "SEED"), ("LAYERS=gaps", "no layer gaps"),
                      ("LAYERS=all", "other LAYERS"), ("", "LAYERS is missing")):
        words = [*command, more] if more else command[:-1]
        done = run(*words, cwd=ROOT)
        lines = [line for line in done.stderr.split("\n")
                 if line and "make:" not in line and not line.startswith("skipped")]
        check(done.returncode == 2 and len(lines) == 1 and say in lines[0],
              f"make grades: error: {say}", done)


def test_gradescope(place):
    """The autograder: the zip file as documented, and what it writes."""
    archive, root = os.path.join(place, "auto.zip"), os.path.join(place, "autograder")
    done = run("make", "-s", "gradescope", "LAYERS=gpas", f"ZIP={archive}", cwd=ROOT)
    check(done.returncode == 0, "gradescope: writes the zip file", done)
    with zipfile.ZipFile(archive) as files:
        files.extractall(os.path.join(root, "source"))
        modes = {info.filename: info.external_attr >> 16 & 0o111 for info in files.infolist()}
    check(modes.get("setup.sh") and modes.get("run_autograder"),
          "gradescope: setup.sh and run_autograder can be run", modes)
    script = read(root, "source/run_autograder").replace("/autograder", root)
    os.makedirs(os.path.join(root, "submission"))
    os.makedirs(os.path.join(root, "results"))
    run("sh", "-c", script)
    report = json.loads(read(root, "results/results.json"))
    check(report["score"] == 0 and "train_gpas.c" in report["output"],
          "gradescope: without train_gpas.c", report)
    text = read(ROOT, "train_gpas.c").replace("*dgate -= gate_slope", "*dgate += gate_slope")
    write(text, root, "submission/train_gpas.c")
    done = run("sh", "-c", script)
    report = json.loads(read(root, "results/results.json"))
    tests = {test["name"]: test for test in report["tests"]}
    wrong = tests.get("train_gpas.c, gpas_backward: dgate", {})
    check([(test["score"], test["max_score"], test["status"]) for test in report["tests"]]
          == [(4, 4, "passed"), (3, 3, "passed"), (0, 3, "failed")]
          and "wrong sign" in wrong.get("output", "") and isinstance(report["execution_time"], int),
          "gradescope: results.json", (report, done))
    example = re.search(r"```json\n(.*?)```", read(ROOT, "docs/syllabus.md"), re.S)
    check(example and set(json.loads(example[1])) == set(report)
          and set(json.loads(example[1])["tests"][0]) == set(wrong),
          "gradescope: the example in docs/syllabus.md has the same fields", example)


def test_variant(place):
    """make assignment VARIANT=1: the public solution loses exactly what the variant changes."""
    folder = os.path.join(place, "variant")
    hand_out(folder, "--cuda", "--variant")
    check("sigmoid(1.702 h1)" in read(folder, "TASK.md") and "1e-5" in read(folder, "train_gpas.c"),
          "variant: TASK.md and the comments say it")
    for file in VARIANT:
        write(varied(file, read(ROOT, file)), folder, file)
    result = grade(folder)
    wrong = [row for row in result["layers"] if row["points"] < 10]
    check(result["points"] == 210, "variant: its solution gets 210 of 210", wrong)
    for file in VARIANT:
        shutil.copy(os.path.join(ROOT, file), folder)
    lost = {(row["file"][11:], row["layer"]) for row in grade(folder)["layers"]
            if row["points"] < 10}
    layers = {"embedding", "rmsnorm", "swiglu", "attention"}
    check(lost == {("c", layer) for layer in layers} | {("cu", layer) for layer in
                                                        layers | {"residual_gpas_rmsnorm"}},
          "variant: the public solution fails where formulas differ", lost)


def test_openmp(folder):
    """A compiler like Apple's."""
    write("""case "$*" in *-fopenmp*) echo "clang: error: unsupported option '-fopenmp'"; exit 1
esac; exec gcc "$@"
""", folder, "cc.sh")
    for target in ("grade", "train_gpas", "run"):
        os.utime(os.path.join(folder, "train_gpas.c"))
        done = run("make", "-s", target, "CC=sh cc.sh", cwd=folder)
        lines = [line for line in done.stderr.split("\n") if line and not line.startswith("make")]
        check(done.returncode == 2 and len(lines) == 1 and "brew install gcc" in lines[0],
              "no OpenMP: make %s tells the remedy, in one line" % target, done)


def test_makefile(folder):
    """Of a hand-out, in which nobody minds what is built."""
    for variable in ("OUT=", "LAYERS= ", "SEED=", "CC=", "PYTHON="):
        done = run("make", "-s", "grade", variable, cwd=folder)
        check(done.returncode == 2 and "given, but empty" in done.stderr
              and done.stderr.count("\n") == 1, "make: %s" % variable, done.stderr)
    done = run("make", "-sn", "assignment", cwd=ROOT, env={**os.environ, "OUT": "", "SECONDS": "1"})
    check("--out='assignment'" in done.stdout, "make: OUT of the environment does not count", done)
    flags = "CFLAGS=-O0 -DX='\"a b\"' -DY=\"'z'\""
    done = [run("make", "train_gpas", flags, cwd=folder) for _ in range(2)]
    check(done[0].returncode == 0 and done[1].stdout == "", "make: flags in quotes", done)
    os.utime(os.path.join(folder, "train_gpas.c"))
    write('case "$*" in *" train_gpas.c "*) touch train_gpas; exit 1; esac; exec gcc "$@"', folder,
          "fails.sh")
    run("make", "train_gpas", "CC=sh fails.sh", cwd=folder)
    check(not os.path.exists(os.path.join(folder, "train_gpas")),
          "make: what a compiler that failed has written is gone")
    if os.path.exists(os.path.join(ROOT, ".git")) and shutil.which("git"):
        done = run("git", "ls-files", "--eol", cwd=ROOT)
        wrong = [x for x in done.stdout.split("\n") if x and "eol=lf" not in x and "-text" not in x]
        check(done.stdout and not wrong, "a clone has LF everywhere", wrong)


def test_run_tests(place):
    """run_tests.sh: words in quotes, bytes of any kind, results that nobody could read."""
    script = os.path.join(ROOT, "dev/test/run_tests.sh")
    write("printf '\\351\\0 seen\\n3 passed, 1 failed\\n'", place, "a test.sh")
    done = subprocess.run(["sh", script, "sh 'a test.sh'", "true"], cwd=place, check=False,
                          stdout=subprocess.PIPE)
    check(done.returncode == 1 and b" seen\n" in done.stdout
          and done.stdout.endswith(b"4 passed, 1 failed\n"), "run_tests.sh adds up", done)
    with open("/dev/full", "w", encoding="ascii") as full:
        done = subprocess.run(["sh", script, "true"], cwd=place, check=False, stdout=full,
                              stderr=subprocess.DEVNULL)
    check(done.returncode != 0, "run_tests.sh: a full disk", done)


def test_places(place):
    """A project in an odd place, with a comment in Latin-1; folders to write to."""
    project = os.path.join(place, "[a] b \u00e9")
    for name in ("train_gpas.c", "Makefile", "LICENSE", "prepro_tinystories.py", "dev"):
        copy = shutil.copytree if name == "dev" else shutil.copy
        os.makedirs(project, exist_ok=True)
        copy(os.path.join(ROOT, name), os.path.join(project, name))
    with open(os.path.join(project, "train_gpas.c"), "ab") as file:
        file.write(b"// Zo\xeb\n")
    done = run("make", "-s", "assignment", "OUT=it's $$HOME", cwd=project)
    check(done.returncode == 0, "assignment: a project in [a] b \u00e9", done)
    with open(os.path.join(project, "it's $HOME", "train_gpas.c"), "rb") as file:
        check(file.read().endswith(b"// Zo\xeb\n"), "assignment: bytes remain what they are")
    check(os.path.exists(os.path.join(project, "it's $HOME", "dev", "gemm.h")),
          "assignment: the headers are there")
    program, empty = os.path.join(ROOT, "dev/class/assignment.py"), os.path.join(place, "empty")
    os.mkdir(empty)
    for command, cwd in ((["--out", "new/folder"], place), (["--out", "."], empty)):
        done = run(sys.executable, program, "gpas", *command, cwd=cwd, preexec_fn=lambda:
                   resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)))
        check(done.returncode == 1 and done.stderr.count("\n") == 1 and not os.listdir(empty)
              and not os.path.exists(os.path.join(place, "new/folder")),
              "assignment: %s: complete or not there" % command, done)
    done = run(sys.executable, program, "gpas", "--out", ".", cwd=empty)
    check(os.path.exists(os.path.join(empty, "TASK.md")), "assignment: an empty folder", done)


def test_errors(folder):
    for arguments, say in ((["gpas", "gaps"], "no layer gaps"), (["--out", ""], "empty"),
                           (["gpas"], "already there; choose another folder: OUT=folder")):
        done = hand_out(folder, *arguments)
        check(done.returncode == 1 and say in done.stderr and done.stderr.count("\n") == 1,
              "assignment: error: %s" % say, done.stderr)


def main():
    os.environ["OMP_WAIT_POLICY"] = "passive"
    for name in ("MAKEFLAGS", "MAKELEVEL"):     # called by make, they are not for the hand-out's
        os.environ.pop(name, None)
    test_rules()
    os.makedirs(os.path.join(ROOT, "build"), exist_ok=True)
    # Below build/, for TMPDIR may allow no programs.
    with tempfile.TemporaryDirectory(dir=os.path.join(ROOT, "build")) as place:
        test_empty(os.path.join(place, "all"))
        test_mistakes(os.path.join(place, "all"), KERNELS, "kernels", "train_gpas.cu")
        test_mistakes(os.path.join(place, "all"), MORE_KERNELS, "more kernels", "train_gpas.cu")
        test_mistakes(os.path.join(place, "all"), SUBTLE_KERNELS, "subtle kernels",
                      "train_gpas.cu")
        test_some(os.path.join(place, "some"))
        in_c = os.path.join(place, "in_c")
        hand_out(in_c)
        test_mistakes(in_c, MISTAKES, "mistakes")
        test_mistakes(in_c, READINGS, "readings")
        test_mistakes(in_c, VIOLENT, "violence")
        test_mistakes(in_c, SUBTLE, "subtle")
        test_mistakes(in_c, OTHER_NETWORKS, "other networks")
        alone = os.path.join(place, "alone")
        hand_out(alone, "gpas", "rmsnorm")
        for i, mistakes in enumerate(ROUNDS):
            test_mistakes(alone, mistakes, "round %d" % (i + 1))
        test_openmp(in_c)
        test_errors(in_c)
        test_variant(place)
        folder = os.path.join(place, "with a space, \u00e9")
        test_surroundings(folder)
        test_signal(folder)
        test_makefile(folder)
        test_class(place)
        test_gradescope(place)
        test_run_tests(place)
        test_places(place)
    print("%d passed, %d failed" % (counts[True], counts[False]))
    sys.exit(counts[False] > 0)


if __name__ == "__main__":
    main()
