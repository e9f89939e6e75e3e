#!/usr/bin/env python3
"""
assignment.py: cuts the hand-out from the one source.

    python3 dev/class/assignment.py [--cuda] [--out FOLDER] [LAYER ...]

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
        "embedding": "embedding_forward_kernel embedding_backward_kernel",
        "rope": "rope_forward rope_backward",
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
TOOLS = {"sigmoid", "head_of"}

# What gives a layer away in a comment, but is not indented below a "Given".
SPOILERS = {
    "gpas": r"\n +dg -?= .*|(: *|  +)dg -?= [^.,\n]*,?",
    "rope": r"(?s) direction: .*?back\.",
    "attention": r"(?s)A tile of keys s updates them to\n.*?new maximum\.\s",
    "crossentropy": r"  +dx_v = scale \(.*",
}

# Copied as they are. So are all headers of dev/, and with --cuda those of dev/gpu/.
COPIED = ["LICENSE", "dev/class/grade.py", "dev/class/grade.c", "dev/class/grade.h",
          "dev/class/submission.c", "dev/tools/compare.py", "dev/tools/report.py",
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


def makefile(source, layers, cuda):
    """The variables of the Makefile, and of its rules those that the hand-out needs."""
    title = "# make grade   compiles and grades what you have written; JSON=1 for a gradebook"
    result = [title, "# make run     trains the same network without and with GPAS", "",
              "ASSIGNED = " + " ".join(layers)]
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
    return "\n".join(result) + "\n\n.PHONY: run grade\n"


TASK = """# Your task

Write these functions, in any order. The comment above each one says what it gets, with all
shapes, and what it must produce; the comment of the forward pass has the mathematics. You find
the derivative yourself.

%s

    make grade

compiles the file with warnings and checks every layer, on new random numbers each time. Where a
result is wrong it says what it looks like: a sign, a factor, a sum that should add. You may add
functions of your own. Leave the parameters of the given ones as they are.

When all is right, `make run` trains the network that you have completed.
"""


def task_sheet(layers, files):
    text = []
    for file in files:
        for key, names in FUNCTIONS[file].items():
            if set(key.split()) & set(layers):
                text.append("- %s, %s: %s" % (file, key.replace(" ", " + "),
                                              ", ".join("`%s`" % n for n in names.split())))
    return TASK % "\n".join(text)


def write(folder, name, text):
    path = os.path.join(folder, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)


def run():
    parser = Parser(description="Cuts a hand-out from the source.")
    parser.add_argument("--cuda", action="store_true", help="train_gpas.cu too")
    parser.add_argument("--out", default="assignment", help="the folder to write")
    parser.add_argument("layers", nargs="*", help="of: " + " ".join(LAYERS))
    options = parser.parse_args()
    layers = options.layers or LAYERS
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
    texts = {file: cut(file, read(file), layers) for file in files}
    texts["Makefile"] = makefile(read("Makefile"), layers, options.cuda)
    texts["TASK.md"] = task_sheet(layers, files)
    with new_folder(options.out) as folder:
        for name, text in texts.items():
            write(folder, name, text)
        for name in COPIED + headers + COPIED_CUDA * options.cuda:
            write(folder, name, read(name))
            shutil.copymode(os.path.join(root, name), os.path.join(folder, name))
    print("%s: %s to write; make grade grades it there" % (options.out, ", ".join(layers)))


if __name__ == "__main__":
    main(run)
