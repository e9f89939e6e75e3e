#!/usr/bin/env python3
"""
assignment.py: cuts the hand-out from the one source.

    python3 dev/class/assignment.py [--cuda] [--variant] [--out FOLDER] [LAYER ...]

writes a folder with train_gpas.c (with --cuda also train_gpas.cu) in which the chosen layers, by
default all of them, are left to write, and with what is needed to build, to run and to grade it.

The source has no marks for this. What goes is found by these rules:

  - The functions of a layer lose their bodies (FUNCTIONS below).
  - A helper that only such functions call goes as a whole, except for the TOOLS and for what is
    defined inside of #ifdef PLAIN, the slow versions of what dev/gemm.h has. If its comment cites
    a paper, it defines the layer, and stays. An enum goes if nothing that is left needs its names.
  - The comment of a backward pass begins with "Given" and says what is given and what is to be
    computed; its indented lines are the derivation, and go. So do lines of other comments that
    give a derivation away (SPOILERS).
"""
import os
import re
import shutil
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)), ".."))
from command import Error, Parser, main, new_folder

# The functions that are left to write, file by file and layer by layer.
FUNCTIONS = {
    "train_gpas.c": {
        "gpas": "gpas_forward gpas_backward",
        "residual": "residual_forward residual_backward",
        "embedding": "embedding_forward embedding_backward",
        "rmsnorm": "rmsnorm_forward rmsnorm_backward",
        "rope": "rope_forward rope_backward",
        "swiglu": "swiglu_forward swiglu_backward",
        "matmul": "matmul_forward matmul_backward",
        "attention": "attention_forward attention_backward",
        "crossentropy": "crossentropy_forward crossentropy_backward",
        "adamw": "adamw_update",
    },
    "train_gpas.cu": {
        "gpas": "gpas_forward_kernel gpas_backward_kernel gpas_add_partial_kernel",
        "residual": "residual_forward_kernel residual_backward",
        "rmsnorm": "rmsnorm_forward_kernel rmsnorm_backward_kernel add_partial_kernel",
        # They show all three: whichever is chosen, these are to be written too.
        "gpas residual rmsnorm": "residual_gpas_rmsnorm_forward_kernel "
                                 "residual_gpas_rmsnorm_backward_kernel "
                                 "gpas_residual_rmsnorm_backward_kernel",
        "embedding": "embedding_forward_kernel embedding_backward_kernel "
                     "embedding_add_partial_kernel",
        "rope": "rope_forward rope_backward rotate_back",
        "swiglu": "swiglu_forward_kernel swiglu_backward_kernel",
        "matmul": "matmul_forward matmul_backward",
        "attention": "attention_forward_kernel "
                     "attention_backward_q_kernel attention_backward_kv_kernel",
        "crossentropy": "crossentropy_kernel",
        "adamw": "adamw_kernel",
    },
}
LAYERS = list(FUNCTIONS["train_gpas.c"])

# What layers are built with. It is given, even if only one layer calls it.
TOOLS = {"sigmoid", "head_of", "rotate_back"}

# What gives a layer away in a comment, but is not indented below a "Given".
SPOILERS = {
    "gpas": r"\n +dg -?= .*|(: *|  +)dg -?= [^.,\n]*,?",
    "rope": r"(?s) direction: .*?back\.",
    "attention": r"(?s)A tile of keys s updates them to\n.*?new maximum\.\s",
    "crossentropy": r"  +dx_v = scale \(.*",
}

# The variant of --variant, in which other formulas are right: what is replaced in the solution. A
# function that was written for the original fails. grade.c knows the same under `variant`.
VARIANT = {
    "train_gpas.c": [
        ("1e-6", "1e-5"),
        ("SwiGLU (arXiv 2002.05202): y = silu(h1) h3, where silu(x) = x sigmoid(x).",
         "SwiGLU (arXiv 2002.05202), with an activation close to GELU: y = a(h1) h3, where\n"
         "// a(x) = x sigmoid(1.702 x)."),
        ("With s = sigmoid(h1):  dh1 = dy h3 silu'(h1) = dy h3 (s + h1 s (1 - s))",
         "With s = sigmoid(1.702 h1):  dh1 = dy h3 a'(h1) = dy h3 (s + 1.702 h1 s (1 - s))"),
        ("sigmoid(h1[i])", "sigmoid(1.702f * h1[i])"),
        ("(s + h1[i] * s * (1 - s))", "(s + 1.702f * h1[i] * s * (1 - s))"),
        ("scale = 1/sqrt(hs)", "scale = 1/hs"),
        ("1 / sqrtf((float)hs)", "1 / (float)hs"),
        ("row n of out is row tokens[n] of weight.",
         "row n of out is row tokens[n] of weight,\n// multiplied by sqrt(C)."),
        ("        memcpy(out + (size_t)n * C, weight + (size_t)tokens[n] * C, C * sizeof(float));",
         "        for (int c = 0; c < C; c++)\n            out[(size_t)n * C + c] = "
         "sqrtf((float)C) * weight[(size_t)tokens[n] * C + c];"),
        ("dw[c] += dy[c];", "dw[c] += sqrtf((float)C) * dy[c];"),
    ],
    "train_gpas.cu": [
        ("1e-6", "1e-5"),
        ("Computes SwiGLU, y = silu(h1) h3,",
         "Computes y = a(h1) h3, where a(x) = x sigmoid(1.702 x),"),
        ("With s = sigmoid(h1):  dh1 = dy h3 (s + h1 s (1 - s))",
         "With s = sigmoid(1.702 h1):  dh1 = dy h3 (s + 1.702 h1 s (1 - s))"),
        ("sigmoid(h1[k])", "sigmoid(1.702f * h1[k])"),
        ("(s + h1[k] * s * (1 - s))", "(s + 1.702f * h1[k] * s * (1 - s))"),
        ("scale = 1/sqrt(hs)", "scale = 1/hs"),
        ("1/sqrt(hs)", "1/hs"),
        ("1 / sqrtf((float)hs)", "1 / (float)hs"),
        ("Row n of out is row tokens[n] of weight.",
         "Row n of out is row tokens[n] of weight times sqrt(C)."),
        ("        load(x, row + c);\n        store(out + (size_t)blockIdx.x * C + c, x);",
         "        load(x, row + c);\n        for (int k = 0; k < W; k++) x[k] *= sqrtf((float)C);\n"
         "        store(out + (size_t)blockIdx.x * C + c, x);"),
        ("sum[k] += dy[k];", "sum[k] += sqrtf((float)C) * dy[k];"),
    ],
}
VARIANT_TOLD = """This is a variant of the project's network: RMSNorm's eps is 1e-5, SwiGLU has
sigmoid(1.702 h1), the scores of attention are scaled by 1/hs, and the embedding is multiplied by
sqrt(C). The comments say so. Code from elsewhere does not fit.

"""

# Copied as they are. So are all headers of dev/, and with --cuda those of dev/gpu/.
COPIED = ["LICENSE", "dev/class/grade.py", "dev/class/grade.c", "dev/class/grade.h",
          "dev/class/submission.c", "dev/class/compiler.py", "dev/class/feedback.py",
          "dev/class/ready.py", "dev/tools/compare.py", "dev/tools/report.py",
          "dev/tools/runs.py", "dev/command.py", "prepro_tinystories.py"]
COPIED_CUDA = ["dev/test/on_gpu.h"]
CUDA_RULES = ["build/%.cu", "train_gpas_cuda", "train_gpas_cuda_on_cpu"]
RULES = [".DELETE_ON_ERROR", "train_gpas", "build/flags", "data/toy/tokenizer.bin", "run",
         "grade"] + CUDA_RULES
BOUNDS = r"__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s*"


class Function:
    """A function's place in the lines of a file: its comment, its head, its body, its end."""

    def __init__(self, name, comment, head, body, end):
        self.name, self.comment, self.head, self.body, self.end = name, comment, head, body, end


def read_functions(lines):
    """All function definitions. They begin in column 0 and end with a brace in column 0."""
    functions, i = [], 0
    while i < len(lines):
        if not re.match(r"(static|template|__global__|__device__|inline|__attribute__|void|double|"
                        r"float|int|size_t|const)\b", lines[i]):
            i += 1
            continue
        head = i
        while i < len(lines) and not re.search(r"[{;]", lines[i]):
            i += 1
        if i == len(lines):
            break
        text = "\n".join(lines[head:i + 1])
        plain = re.sub(r"__attribute__\(\(.*?\)\)\)?|alignas\([^)]*\)\)?|" + BOUNDS, "", text)
        name = re.search(r"(\w+)\(", plain)
        if "{" not in plain or not name or re.search(r"=\s*\{|\bstruct \w*\s*\{", plain):
            i += 1
            continue
        body = end = i
        if lines[i].count("{") != lines[i].count("}"):
            while not lines[end].startswith("}"):
                end += 1
        comment = head
        while comment > 0 and lines[comment - 1].startswith("//"):
            comment -= 1
        functions.append(Function(name.group(1), comment, head, body, end))
        i = end + 1
    return functions


def code_of(lines, function):
    return "\n".join(re.sub(r"//.*", "", line) for line in lines[function.body:function.end + 1])


def plain_functions(source):
    """The names of the functions that are defined inside of #ifdef PLAIN."""
    blocks = re.findall(r"^#ifn?def PLAIN\b.*?^#endif", source, re.M | re.S)
    return {f.name for block in blocks for f in read_functions(block.split("\n"))}


def helpers_of(lines, functions, written):
    """The functions that only those to be written call, directly or by one another."""
    given = TOOLS | plain_functions("\n".join(lines))
    words = [(f.name, set(re.findall(r"\w+", code_of(lines, f))) - {f.name}) for f in functions]
    gone = set(written)
    while True:
        more = set()
        for f in functions:
            callers = {name for name, used in words if f.name in used and name != f.name}
            if f.name not in gone | given and callers and callers <= gone:
                more.add(f.name)
        if not more:
            return gone - set(written)
        gone |= more


def parameters(head):
    """The names of a function's parameters."""
    inside, depth, names = head[head.index("(") + 1:head.rindex(")")], 0, [""]
    for c in inside:
        depth += (c in "(<[") - (c in ")>]")
        if c == "," and depth == 0:
            names.append("")
        else:
            names[-1] += c
    return [re.findall(r"\w+", re.sub(r"\[.*", "", name))[-1] for name in names]


def task(lines, function):
    """The function with its signature and nothing in it."""
    head = "\n".join(lines[function.head:function.body + 1])
    head = head[:head.rindex("{") + 1] if head.count("{") == 1 else head[:head.index("{") + 1]
    plain = re.sub(BOUNDS, "", head)
    unused = ", ".join("(void)" + name for name in parameters(plain[plain.index(function.name):]))
    result = ["    // Your code, in place of these lines."]
    while len(unused) > 95:
        cut = unused.rindex(", ", 0, 95) + 1
        result.append("    " + unused[:cut])
        unused = unused[cut + 1:]
    result.append("    " + unused + ";")
    if not re.search(r"\bvoid\s+\w+\(", plain):
        result.append("    return 0;")
    return head.split("\n") + result + ["}"]


def definition(lines, function):
    """The comment of a helper that goes, if it defines a layer: if it cites a paper."""
    comment = lines[function.comment:function.head]
    return comment if "(arXiv" in "\n".join(comment) else []


def without_derivation(lines, begin, end):
    """A comment, lines[begin:end], without its indented lines if it begins with "Given"."""
    text = [re.sub(r"^//", "", line) for line in lines[begin:end]]
    first = next((t.strip() for t in text if t.strip() not in ("", "/*")), "")
    if not first.startswith("Given"):
        return lines[begin:end]
    kept = []
    for line, t in zip(lines[begin:end], text):
        indented = re.match(r" {2,}\S", t)
        if not indented and not (line == "" and kept and kept[-1] == ""):
            kept.append(line)
    return kept


def chosen_functions(file, layers):
    names = []
    for key, value in FUNCTIONS[file].items():
        if set(key.split()) & set(layers):
            names += value.split()
    return names


def cut(file, source, layers):
    """The text of the file with the chosen layers left to write."""
    lines = source.split("\n")
    functions = read_functions(lines)
    by_name = {f.name: f for f in functions}
    written = chosen_functions(file, layers)
    for name in written:
        if name not in by_name:
            raise Error("%s has no function %s; dev/class/assignment.py names it" % (file, name))
    gone = helpers_of(lines, functions, written)
    every = {n for key in FUNCTIONS[file] for n in chosen_functions(file, key.split())}
    result, at = [], 0
    for f in functions:
        between = lines[at:f.comment]
        following = next((g.name for g in functions if g.head >= f.head and g.name in every), "")
        if following in written:
            between = cut_blocks(between)
        result += between
        if f.name in gone:
            while result and result[-1] == "":
                result.pop()
            result += [""] * bool(definition(lines, f)) + definition(lines, f)
        elif f.name in written:
            result += without_derivation(lines, f.comment, f.head) + task(lines, f)
        else:
            result += lines[f.comment:f.end + 1]
        at = f.end + 1
    text = "\n".join(without_unused_enums(result + lines[at:]))
    for layer in set(layers) & set(SPOILERS):
        text = re.sub(SPOILERS[layer], "", text)
    return text


def without_unused_enums(lines):
    """All but the enums of one line of which no name occurs elsewhere, and their comments."""
    words, result = re.findall(r"\w+", "\n".join(lines)), []
    for line in lines:
        enum = re.match(r"enum \{ (.*) \};", line)
        names = re.findall(r"\b[A-Za-z_]\w*", enum.group(1)) if enum else []
        if names and all(words.count(name) == 1 for name in names):
            while result and (result[-1].startswith("//") or result[-1] == ""):
                result.pop()
        else:
            result.append(line)
    return result


def cut_blocks(lines):
    """Comments that stand by themselves, in /* and */, without derivations."""
    result, i = [], 0
    while i < len(lines):
        end = i + 1
        if lines[i].startswith("/*"):
            while end < len(lines) and "*/" not in lines[end - 1]:
                end += 1
        result += without_derivation(lines, i, end)
        i = end
    return result


def varied(file, source):
    """The source of the variant."""
    for old, new in VARIANT[file]:
        if old not in source:
            raise Error("%s has no %r; dev/class/assignment.py replaces it" % (file, old))
        source = source.replace(old, new)
    return source


# Rules of the hand-out alone: before it compiles, it says what is missing.
READY = """
openmp written:
	@$(PYTHON) dev/class/ready.py $@ $(call q,$(CC))
.PHONY: openmp written
"""


def makefile(source, layers, cuda, variant=False):
    """The variables of the Makefile, and of its rules those that the hand-out needs."""
    title = "# make grade   compiles and grades what you have written; JSON=1 for a gradebook"
    result = [title, "# make run     trains the same network without and with GPAS", "",
              "ASSIGNED = " + " ".join(layers)] + ["VARIANT = 1"] * variant
    for block in re.split(r"\n\n+", source):
        lines = [x for x in block.split("\n") if not x.startswith(".PHONY")]
        targets = {target for x in lines for heads in re.findall(r"^([^\s#:=][^#:=]*):(?!=)", x)
                   for target in heads.split()}
        if targets and not targets & set(RULES):
            continue
        if all(x.startswith("#") or not x for x in lines) or (
                not cuda and "grade" not in targets and
                ("CUDA" in block or targets & set(CUDA_RULES))) or "KERNELS" in block:
            continue
        result += ["", "\n".join(lines)]
    text = "\n".join(result) + "\n" + READY + "\n.PHONY: run grade\n"
    text = re.sub(r"^(train_gpas: .*)", r"\1 | openmp", text, flags=re.M)
    return re.sub(r"^run: ", "run: written ", text, flags=re.M)


# Hours that a layer takes: in C, and as a kernel besides. And what is hard about it.
HOURS = {
    "gpas": (1, 2, "easy to write; the point is why it is right"),
    "residual": (0.5, 0.5, "a warm-up"),
    "embedding": (1, 2, "easy; a token may occur twice"),
    "rmsnorm": (2, 3, "the first derivative with a sum in it"),
    "rope": (1.5, 1.5, "indices"),
    "swiglu": (1, 1, "the product rule"),
    "matmul": (1.5, 1, "which product has which shape"),
    "attention": (6, 10, "the hardest: mask, softmax, three gradients"),
    "crossentropy": (1.5, 3, "a softmax that must not overflow"),
    "adamw": (1, 1, "no derivative; care with the corrections"),
}

TASK = """# Your task

train_gpas.c trains a small LLaMA with GPAS; its first page explains GPAS.%(cuda)s
Some of %(its)s functions are empty, and you write them, in any order:

%(layers)s

The comment above each function says what it gets, with all shapes, and what it must produce; the
comment of the forward pass has the mathematics. You find the derivatives yourself%(given)s.

%(hand_in)s

%(variant)s## What you need

A C compiler with OpenMP, make and python3 (3.8 or newer; nothing to install with pip).%(cxx)s

- Linux: gcc from your distribution (Debian, Ubuntu: apt install gcc%(gxx)s make python3).
- Mac: Apple's clang has no OpenMP. `brew install gcc`, then add `CC=gcc-14%(cxx14)s` to each
  make command. Or take Homebrew's clang: `brew install llvm libomp`, and
  `CC=$(brew --prefix llvm)/bin/clang`.
- Windows: WSL (`wsl --install`), and in it as on Linux.

## Build, grade, run

    make                 compiles (warnings are on); it already compiles with the functions empty
    make grade           checks every layer of the table above and says what is wrong
    make grade SEED=7    the same, on the numbers of seed 7: without it they are new each time
    make run             trains the network without and with GPAS, when all is written; before that
                         it says which functions are still empty

A layer has 10 points: 4 for the forward pass, 6 for the backward pass. Each result of a pass has
points of its own, which make grade prints: dinp may be right and dgate wrong. A result must be
right in all cases. Most hints end with the first wrong number, what it should be, and the case:

    dgate: it has the wrong sign; dgate[0] is 2.48771, should be 1.24146 (n = 7, silu, gate 0.34,
      stop_grad 1; 1 of 1 wrong; it held 1.86458 before); the wrong elements have the wrong sign

That is, dgate[0] was 1.86458; your function made 2.48771 of it, and 1.24146 is right.

A crash, an endless loop or a write outside an array costs its own pass and no other. You may add
functions of your own. Leave the names and the parameters of the given ones as they are.

## Words

- inp, out, dinp, dout: what a layer gets and returns, and the gradients of the loss with respect to
  them. dweight: that of its parameters.
- "Added to": a gradient of parameters is a sum over several calls. Add with +=; the array is not 0.
  Every other result is written with =, whatever the array held before.
- "May be the same array", in place: the caller may pass dinp == dout. What you have overwritten you
  cannot read again; so read first.
- stop_grad: 1, the usual case, treats sg(x) as a constant in the backward pass. 0 is a comparison:
  GPAS is then an ordinary learned scale, and has its ordinary derivative.
- dgate NULL: the gate is not trained, so nobody needs its gradient. dinp is needed all the same.
- rows N = B T: the positions of all sequences, one after another. Index (n,c) is at n * C + c.

## Threads

`#pragma omp parallel for` before a loop shares its iterations among threads. Two threads must not
write the same number: a sum in a variable needs `reduction(+ : sum)`, and where several iterations
write the same row (as in embedding), parallelize another loop. Without any pragma all layers are
right, and fast enough for this course.

Such races between threads are not graded, because they show only now and then.%(races)s
To find them, train with many threads several times, when all layers are right. What differs from
run to run, in more than the last digits, comes from a race:

    make train_gpas data/toy/tokenizer.bin
    for i in 1 2 3 4 5; do OMP_NUM_THREADS=16 ./train_gpas --steps 10 --val-batches 1 \\
        --overwrite on --out out/race | grep "step 10"; done

If a layer is wrong now and then, `OMP_NUM_THREADS=1 make grade SEED=7` tells you whether it is
right with one thread.

## Where not to look

The project is public, and so is its solution: train_gpas.c and train_gpas.cu of the project, and
their history. README.md and docs/figures.md of the project give parts of it away, too. Reading the
solution saves you the hour in which you would have learned something. dev/class/grade.c knows the
usual mistakes by name; reading it takes the fun out of finding them. dev/gemm.h is not forbidden:
matmul and attention may call what it defines, and three plain loops are right as well.
"""
GIVEN = """,
except for dx of gpas: the first page of train_gpas.c gives it, and says why it is so"""
CUDA_RACES = """ In
train_gpas.cu they are: the kernels run on the CPU, where each access to memory is watched."""


def task_sheet(layers, files, variant):
    rows = ["| file | layer | functions | hours | |", "|---|---|---|---|---|"]
    cuda = len(files) > 1
    for file in files:
        for key, names in FUNCTIONS[file].items():
            if set(key.split()) & set(layers):
                hours, kernel_hours, why = HOURS.get(key, (0, 4, "three layers in one kernel"))
                rows.append("| %s | %s | %s | %g | %s |" % (
                    file, key.replace(" ", " + "), ", ".join("`%s`" % n for n in names.split()),
                    kernel_hours if file.endswith(".cu") else hours, why))
    return TASK % {
        "layers": "\n".join(rows), "variant": VARIANT_TOLD if variant else "",
        "cuda": "\ntrain_gpas.cu does the same on a GPU." if cuda else "",
        "its": "their" if cuda else "its", "given": GIVEN if "gpas" in layers else "",
        "hand_in": ("Hand in train_gpas.c and train_gpas.cu, and nothing else." if cuda else
                    "Hand in train_gpas.c alone."),
        "cxx": "\nThe kernels also need a C++ compiler (g++), but no GPU." if cuda else "",
        "gxx": " g++" if cuda else "", "cxx14": " CXX=g++-14" if cuda else "",
        "races": CUDA_RACES if cuda else ""}


def write(folder, name, text):
    path = os.path.join(folder, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)


def run():
    parser = Parser(description="Cuts a hand-out from the source.")
    parser.add_argument("--cuda", action="store_true", help="train_gpas.cu too")
    parser.add_argument("--variant", action="store_true",
                        help="change some formulas, so that the public solution does not fit")
    parser.add_argument("--out", default="assignment", help="the folder to write")
    parser.add_argument("layers", nargs="*", help="all, or of: " + " ".join(LAYERS))
    options = parser.parse_args()
    layers = LAYERS if options.layers in ([], ["all"]) else options.layers
    for layer in layers:
        if layer not in LAYERS:
            raise Error("there is no layer %s; choose from: %s" % (layer, " ".join(LAYERS)))
    layers = [layer for layer in LAYERS if layer in layers]
    root = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../..")
    files = ["train_gpas.c"] + ["train_gpas.cu"] * options.cuda

    def read(name):
        path = os.path.join(root, name)
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()

    headers = [folder + name for folder in ["dev/"] + ["dev/gpu/"] * options.cuda
               for name in sorted(os.listdir(os.path.join(root, folder))) if name.endswith(".h")]
    texts = {file: cut(file, varied(file, read(file)) if options.variant else read(file), layers)
             for file in files}
    texts["Makefile"] = makefile(read("Makefile"), layers, options.cuda, options.variant)
    texts["TASK.md"] = task_sheet(layers, files, options.variant)
    with new_folder(options.out, ": OUT=folder") as folder:
        for name, text in texts.items():
            write(folder, name, text)
        for name in COPIED + headers + COPIED_CUDA * options.cuda:
            write(folder, name, read(name))
            shutil.copymode(os.path.join(root, name), os.path.join(folder, name))
    print("%s: %s to write; make grade grades it there" % (options.out, ", ".join(layers)))


if __name__ == "__main__":
    main(run)
