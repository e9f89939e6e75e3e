"""
Checks export.py, --eval, --eval-choice and prepro_tinystories.py --multiple-choice.

    python3 dev/test/test_export.py                       from the project's folder, after make
    python3 dev/test/test_export.py ./train_gpas_cuda     only the evaluations, by that program

A LLaMA in plain Python, in double, which knows no gates, computes the exported networks, once with
llama2.c's conventions and once with Hugging Face's. train_gpas must report the same losses for the
checkpoint. dev/tools/check_export.py compares with those programs themselves.
"""
import json
import math
import os
import random
import re
import struct
import sys
import tempfile
import zlib

import harness
from harness import (changed, check, floats, header_of, read, read_safetensors, run, token_file,
                     write)

HERE = os.path.abspath(".")
EXPORT, PREPRO = f"{HERE}/dev/tools/export.py", f"{HERE}/prepro_tinystories.py"
TRAIN = f"{HERE}/train_gpas"
C, H, L, NH, T, V = 16, 24, 3, 2, 20, 259
SIZES = ["--channels", str(C), "--hidden", str(H), "--heads", str(NH),
         "--seq-len", str(T), "--batch", "2"]
harness.prefix = "export: "


def export(*arguments, **settings):
    return run(sys.executable, EXPORT, *arguments, **settings)


def check_error(what, result, words):
    harness.check_error(f"error: {what}", result, words)


def change(path, new_path, tensors):
    """A copy of a checkpoint in which these tensors have other numbers."""
    data = bytearray(read(path))
    header, start = header_of(data)
    for name, numbers in tensors.items():
        begin, end = header[name]["data_offsets"]
        data[start + begin:start + end] = struct.pack(f"<{len(numbers)}f", *numbers)
    write(new_path, data)


# ------------------------------------------------------------------------------------------------
# A LLaMA.

def matvec(matrix, x):
    n = len(x)
    return [sum(map(float.__mul__, matrix[i:i + n], x)) for i in range(0, len(matrix), n)]


class Llama:
    """weights: by the checkpoint's names. halves: RoPE rotates the pairs (j, j + hs/2)."""

    def __init__(self, weights, eps, halves):
        self.weights, self.eps, self.halves = weights, eps, halves

    def norm(self, name, x):
        scale = 1 / math.sqrt(sum(map(float.__mul__, x, x)) / C + self.eps)
        return [w * scale * value for w, value in zip(self.weights[name], x)]

    def rope(self, x, t):
        hs, out = C // NH, list(x)
        for head in range(0, C, hs):
            for j in range(hs // 2):
                a, b = (j, j + hs // 2) if self.halves else (2 * j, 2 * j + 1)
                angle = t * 10000 ** (-2 * j / hs)
                cos, sin, p, q = math.cos(angle), math.sin(angle), x[head + a], x[head + b]
                out[head + a], out[head + b] = p * cos - q * sin, p * sin + q * cos
        return out

    def attention(self, q, keys, values):
        hs, out = C // NH, []
        for head in range(0, C, hs):
            part = slice(head, head + hs)
            scores = [math.exp(sum(map(float.__mul__, q[part], k[part])) / math.sqrt(hs))
                      for k in keys]
            out += [sum(s * v[i] for s, v in zip(scores, values)) / sum(scores)
                    for i in range(head, head + hs)]
        return out

    def losses(self, tokens):
        """The losses of tokens 1, 2, ... in nats."""
        w, cache, out = self.weights, [([], []) for _ in range(L)], []
        for t, token in enumerate(tokens[:-1]):
            x = w["tok_embeddings.weight"][token * C:(token + 1) * C]
            for layer, (keys, values) in enumerate(cache):
                name = f"layers.{layer}.{{}}.weight".format
                n = self.norm(name("attention_norm"), x)
                q, k, v = (matvec(w[name(f"attention.w{which}")], n) for which in "qkv")
                keys.append(self.rope(k, t))
                values.append(v)
                a = self.attention(self.rope(q, t), keys, values)
                x = list(map(float.__add__, x, matvec(w[name("attention.wo")], a)))
                n = self.norm(name("ffn_norm"), x)
                a, b = (matvec(w[name(f"feed_forward.w{which}")], n) for which in "13")
                h = [p / (1 + math.exp(-p)) * r for p, r in zip(a, b)]
                x = list(map(float.__add__, x, matvec(w[name("feed_forward.w2")], h)))
            logits = matvec(w["output.weight"], self.norm("norm.weight", x))
            out.append(math.log(sum(map(math.exp, logits))) - logits[tokens[t + 1]])
        return out


def llama2c_model(path):
    """Reads model.bin as llama2.c does."""
    data = read(path)
    if struct.unpack_from("<7i", data) != (C, H, L, NH, NH, -V, T):
        raise ValueError("another header")
    weights, at = {}, 28
    for name, layers, size in (
            ("tok_embeddings", 0, V * C), ("attention_norm", L, C), ("attention.wq", L, C * C),
            ("attention.wk", L, C * C), ("attention.wv", L, C * C), ("attention.wo", L, C * C),
            ("ffn_norm", L, C), ("feed_forward.w1", L, H * C), ("feed_forward.w2", L, C * H),
            ("feed_forward.w3", L, H * C), ("norm", 0, C), ("rope", 0, T * C // NH),
            ("output", 0, V * C)):
        for i in range(max(layers, 1)):
            full = f"layers.{i}.{name}.weight" if layers else f"{name}.weight"
            weights[full] = floats(data[at:at + 4 * size])
            at += 4 * size
    if at != len(data):
        raise ValueError("another length")
    return Llama(weights, 1e-5, False)


def hf_model(folder):
    """Reads a folder as transformers does."""
    config = json.loads(read(f"{folder}/config.json"))
    sizes = [config[key] for key in (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "vocab_size", "rope_theta")]
    if sizes != [C, H, L, NH, NH, T, V, 10000] or config["tie_word_embeddings"]:
        raise ValueError(f"another configuration: {config}")
    names = (("self_attn.q_proj", "attention.wq"), ("self_attn.k_proj", "attention.wk"),
             ("self_attn.v_proj", "attention.wv"), ("self_attn.o_proj", "attention.wo"),
             ("mlp.gate_proj", "feed_forward.w1"), ("mlp.up_proj", "feed_forward.w3"),
             ("mlp.down_proj", "feed_forward.w2"), ("input_layernorm", "attention_norm"),
             ("post_attention_layernorm", "ffn_norm"), ("model.embed_tokens", "tok_embeddings"),
             ("lm_head", "output"), ("model.norm", "norm"), ("model.layers", "layers"))
    weights = {}
    for name, numbers in read_safetensors(f"{folder}/model.safetensors")[1].items():
        for theirs, ours in names:
            name = name.replace(theirs, ours)
        weights[name] = numbers
    return Llama(weights, config["rms_norm_eps"], True)


# ------------------------------------------------------------------------------------------------

def train(out, *options, layers=L, data="data"):
    """Writes a checkpoint of random weights. Returns its path."""
    status, _, errors = run(TRAIN, *SIZES, "--layers", str(layers), "--data", data, "--steps", "1",
                            "--out", out, *options)
    if status:
        raise RuntimeError(errors)
    return f"{out}/ckpt_000001.safetensors"


def loosen(path, gates, embedding=1.0):
    """Gives a checkpoint larger weights, norms of both signs and these gates, and multiplies its
    embedding."""
    draw, new = random.Random(1), {}
    for name, numbers in read_safetensors(path)[1].items():
        if name.startswith("adam"):
            continue
        if name.endswith("norm.weight"):
            new[name] = [draw.choice((-1, 1)) * draw.uniform(0.5, 1.5) for _ in numbers]
        elif name.endswith("gate"):
            new[name] = [gates[int(name.split(".")[1])]]
        elif name == "tok_embeddings.weight":
            new[name] = [embedding * number for number in numbers]
        else:
            new[name] = [draw.gauss(0, 0.3) for _ in numbers]
    change(path, path, new)
    return path


def evaluate(program, path, tokens):
    """The mean loss that --eval reports for this text, and the whole line."""
    write("text.bin", token_file(tokens))
    status, line, errors = run(program, "--dtype", "fp32", "--load", path, "--eval", "text.bin",
                               "--seq-len", str(len(tokens) - 1), "--batch", "2")
    found = re.search(r"loss ([\d.]+) nats", line)
    return (float(found[1]) if found and status == 0 else math.nan), line + errors


NETWORKS = [
    ("pre", ["--norm", "pre"], [0.3, 0.7, 1.0]),
    ("lns, negative gates", ["--norm", "lns"], [-0.5, 0.4, -2.0]),
    ("pre, a factor of -0.76", ["--norm", "pre"], [2.0, 0.5, 2.0]),
    ("pre, tanh", ["--norm", "pre", "--gate-act", "tanh"], [0.5, -3.0, 0.1]),
    ("pre, leaky_relu", ["--norm", "pre", "--gate-act", "leaky_relu"], [-1.0, 1.5, 0.2]),
    ("pre, relu", ["--norm", "pre", "--gate-act", "relu", "--gate-init", "0.1"], [0.9, -1, 2.5]),
    ("lns, identity", ["--norm", "lns", "--gate-act", "identity"], [1.8, 0.9, -0.4]),
    ("pre without gates", ["--norm", "pre", "--gpas", "off"], None),
    ("pre, a stream so small that eps matters", ["--norm", "pre"], [0.0, 0.0, 0.0]),
    ("mix of three layers, which is pre", ["--norm", "mix"], [0.2, 0.3, 0.4]),
]


def test_networks():
    draw = random.Random(2)
    tokens = [1] + [draw.randrange(V) for _ in range(T)]
    for i, (what, options, gates) in enumerate(NETWORKS):
        path = loosen(train(f"net{i}", *options), gates, 0.003 if "eps" in what else 1.0)
        results = [export(path, "--to", to, "--out", f"{to}{i}") for to in ("llama2c", "hf")]
        check(all(status == 0 and not errors for status, _, errors in results), f"{what}: exports",
              results)
        for name, model in (("llama2.c", llama2c_model(f"llama2c{i}/model.bin")),
                            ("Hugging Face", hf_model(f"hf{i}"))):
            losses = model.losses(tokens)
            for n in (1, 4, T):
                expected, (got, line) = sum(losses[:n]) / n, evaluate(TRAIN, path, tokens[:n + 1])
                tolerance = 1e-5 if gates in (None, [0.0] * L) else 2e-4    # docs/export.md: eps
                check(abs(got - expected) < tolerance, f"{what}: {name}, loss of {n} tokens",
                      f"{expected:.7f} in Python, {line}")
    export("net0/ckpt_000001.safetensors", "--to", "hf", "--out", "again")
    check(all(read(f"again/{name}") == read(f"hf0/{name}") for name in os.listdir("hf0")),
          "the same bytes each time")
    check(read("llama2c0/tokenizer.bin") == read("data/tokenizer.bin"), "tokenizer.bin")


def test_tokenizer():
    """Tests bytes, then a vocabulary with pieces whose merges are known."""
    vocab = json.loads(read("hf0/tokenizer.json"))["model"]["vocab"]
    check(vocab["<s>"] == 1 and vocab["\u2581"] == 3 + 32 and vocab["<0x41>"] == 3 + 65
          and len(vocab) == V, "tokenizer.json: bytes, and the space has its own name", vocab)
    check(sorted(os.listdir("hf0")) == ["config.json", "generation_config.json",
                                        "model.safetensors", "tokenizer.json",
                                        "tokenizer_config.json"], "the files of a byte vocabulary")
    texts = ["th", "he", " t", "the", " the", " ", "t", "h", "e"]
    pieces = ([(0.0, name) for name in ("<unk>", "\n<s>\n", "\n</s>\n")]
              + [(0.0, f"<0x{b:02X}>") for b in range(256)]
              + [(-float(i), text) for i, text in enumerate(texts)])
    os.makedirs("pieces", exist_ok=True)
    data, model = struct.pack("<i", 6), b""
    for score, text in pieces:
        data += struct.pack("<fi", score, len(text)) + text.encode()
        text = text.strip("\n").replace(" ", "\u2581").encode()
        message = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", score)
        model += b"\x0a" + bytes([len(message)]) + message
    write("pieces/tokenizer.bin", data)
    write("pieces/tokenizer.model", model + b"\x12\x02\x18\x02")
    for split in ("train", "val"):
        write(f"pieces/{split}.bin", token_file(read("data/train.bin")[1024:1124]))
    path = train("pieces_net", data="pieces")
    status, _, errors = export(path, "--to", "hf", "--out", "pieces_hf")
    merges = json.loads(read("pieces_hf/tokenizer.json"))["model"]["merges"] if not status else []
    check(merges == ["t h", "h e", "\u2581 t", "th e", "t he", "\u2581t he", "\u2581 the"],
          "tokenizer.json: merges in the order of their scores", f"{merges} {errors}")
    check(status == 0 and read("pieces_hf/tokenizer.model") == model + b"\x12\x02\x18\x02",
          "tokenizer.model is copied", errors)
    write("pieces/tokenizer.model", model[:-30])
    check_error("tokenizer.model is damaged", export(path, "--to", "hf", "--out", "x"), "damaged")
    write("pieces/tokenizer.model", model.replace(b"the", b"tho"))
    check_error("another tokenizer.model", export(path, "--to", "hf", "--out", "x"), "another")
    os.remove("pieces/tokenizer.model")
    check_error("no tokenizer.model", export(path, "--to", "hf", "--out", "x"), "is missing")
    check_error("another tokenizer than in training",
                export(path, "--to", "hf", "--out", "x", "--data", "data"), "pieces")
    write("pieces/tokenizer.bin", data.replace(b"the", b"tho"))
    check_error("another tokenizer of the same size", export(path, "--to", "hf", "--out", "x"),
                "another tokenizer")
    checksum = b',"tokenizer":"%d"' % zlib.crc32(data)
    for value in (b'"x"', b"7", b"[]"):
        write("bad", changed(read(path), checksum, b',"tokenizer":' + value))
        check_error(f"a checksum that is {value.decode()}",
                    export("bad", "--to", "hf", "--out", "x"), "another tokenizer")
    write("old", changed(read(path), checksum, b""))     # older checkpoints lack it
    path = "old"
    place = data.index(b"the")
    for what, bad, words in (
            ("pieces spelled alike", data.replace(b"th", b"he", 1), "spelled alike"),
            ("a piece that is not UTF-8", data.replace(b"the", b"\xff\xfe\xfd"), "UTF-8"),
            ("pieces of equal score",
             data[:place - 8] + struct.pack("<f", -2.0) + data[place - 4:], "equal score"),
            ("a wrong length of the longest piece", struct.pack("<i", 3) + data[4:], "damaged"),
            ("wrong byte pieces", data.replace(b"<0x41>", b"<0x42>"), "not the bytes")):
        write("pieces/tokenizer.bin", bad)
        check_error(what, export(path, "--to", "hf", "--out", "x"), words)


def test_refusals():
    good = "net0/ckpt_000001.safetensors"
    data, length = read(good), int.from_bytes(read(good)[:8], "little")
    weights = read_safetensors(good)[1]
    for norm, words in (("sandwich", "after each branch"), ("post", "normalizes the sum"),
                        ("deepnorm", "normalizes the sum")):
        check_error(norm, export(train(norm, "--norm", norm), "--to", "hf", "--out", "x"), words)
    mix = train("mix", "--norm", "mix", layers=4)
    check_error("mix", export(mix, "--to", "llama2c", "--out", "x"), "normalizes the sum")
    identity = train("identity", "--gate-act", "identity", "--gate-init", "1")
    change(identity, identity, {f"layers.{i}.gate": [0.5] for i in (0, 2)})
    check_error("c = 0", export(identity, "--to", "llama2c", "--out", "x"), "layer 2")
    change(identity, "far", {f"layers.{i}.gate": [1 - 1e-6] for i in range(L)})
    check_error("gates far apart", export("far", "--to", "hf", "--out", "x"), "too far apart")
    change(identity, "huge", {"layers.0.gate": [0.9999], "layers.1.gate": [0.5],
                              "layers.2.attention.wo.weight": [3e38] * (C * C)})
    check_error("a weight too large", export("huge", "--to", "hf", "--out", "x"), "too large")
    change(good, "nan", {"layers.1.feed_forward.w3.weight": [math.nan] + [0.0] * (H * C - 1)})
    check_error("a weight that is not a number", export("nan", "--to", "hf", "--out", "x"),
                "layers.1.feed_forward.w3.weight holds NaN or infinity")
    header, end = header_of(data)
    norm = re.search(rb'"norm.weight":\{.*?\}', data)[0]
    at = header["norm.weight"]["data_offsets"][0]
    for what, bad, words in (
            ("an empty file", b"", "safetensors header"), ("7 bytes", data[:7], "safetensors"),
            ("half a header", data[:length // 2], "safetensors"),
            ("not JSON", data[:8] + b"x" + data[9:], "metadata"),
            ("another kind", data.replace(b'"checkpoint"', b'"gradients!"', 1), "metadata"),
            ("a truncated file", data[:-1], "bytes of numbers"),
            ("a name twice", changed(data, b'"seed":"1"', b'"seed":"1","norm":"pre"'), "twice"),
            ("a tensor twice", changed(data, b'"norm.weight":', b'"norm.weight":{},"norm.weight":'),
             "twice"),
            ("no numbers", data[:end], "bytes of numbers"), ("a longer file", data + b"x", "bytes"),
            ("another shape", data.replace(b"[259,16]", b"[16,259]", 1), "tok_embeddings"),
            ("another name", data.replace(b'"norm.weight"', b'"morn.weight"', 1), "norm.weight"),
            ("a tensor that is a number", changed(data, norm, b'"norm.weight":5'), "norm.weight"),
            ("no offsets", changed(data, norm, b'"norm.weight":{}'), "norm.weight"),
            ("offsets in words", changed(data, norm, norm[:-1].replace(b"[", b'["x",', 2)
                                        + b"}"), "does not match its options"),
            ("a place used twice", changed(data, norm, norm.replace(str(at).encode(), b"0")),
             "does not match its options"),
            ("half a character", changed(data, b'"data":"data', b'"data":"\\ud800'), "--data"),
            ("layers of 5000 digits", changed(data, b'"layers":"3', b'"layers":"' + b"3" * 5000),
             "--layers"),
            ("nested arrays", changed(data, b"{", b"[" * 100000), "metadata"),
            ("a folder with a zero byte", changed(data, b'"data":"data', b'"data":"\\u0000'),
             "--data"),
            ("layers that are not a number", data.replace(b'"layers":"3', b'"layers":"x', 1),
             "--layers"),
            ("an unknown norm", data.replace(b'"norm":"pre"', b'"norm":"prx"', 1), "--norm"),
            ("an unknown gate", data.replace(b'"gate-act":"silu"', b'"gate-act":"silo"', 1),
             "silo")):
        write("bad", bad)
        for to in ("llama2c", "hf"):
            check_error(f"{what}, {to}", export("bad", "--to", to, "--out", "x"), words)
    tokenizer = read("data/tokenizer.bin")
    os.makedirs("torn", exist_ok=True)
    for what, bad, words in (("a truncated tokenizer", tokenizer[:-1], "damaged"),
                             ("a tokenizer of 258 pieces", tokenizer[:-9], "258 pieces")):
        write("torn/tokenizer.bin", bad)
        check_error(what, export(good, "--to", "llama2c", "--out", "x", "--data", "torn"), words)
    check_error("no tokenizer", export(good, "--to", "hf", "--out", "x", "--data", "none"),
                "is missing")
    check_error("no checkpoint", export("none", "--to", "hf", "--out", "x"), "none")
    check_error("a folder", export("data", "--to", "hf", "--out", "x"), "data")
    os.mkfifo("pipe")
    check_error("a pipe", export("pipe", "--to", "hf", "--out", "x"), "not a file")
    os.symlink("hf0", "link")
    check_error("a link", export(good, "--to", "hf", "--out", "link"), "already there")
    for option in ("--out", "--data", "--to"):
        check(export(good, "--to", "hf", "--out", "x", option, "")[0] == 1, f"empty: {option}")
    check_error("an existing folder", export(good, "--to", "hf", "--out", "hf0"), "already there")
    check_error("no --out", export(good, "--to", "hf"), "--out")
    check_error("another target", export(good, "--to", "onnx", "--out", "x"), "--to")
    check_error("a limit on file sizes", export(good, "--to", "hf", "--out", "x", limit=2000),
                "too large")
    names = sorted(set(header) - {"__metadata__"}, reverse=True)    # as another program writes it
    moved, body = {"__metadata__": header["__metadata__"]}, b""
    for name in names:
        first, last = header[name]["data_offsets"]
        moved[name] = {**header[name], "data_offsets": [len(body), len(body) + last - first]}
        body += data[end + first:end + last]
    text = json.dumps(moved, indent=1).encode()
    write("moved", len(text).to_bytes(8, "little") + text + body)
    status, _, errors = export("moved", "--to", "llama2c", "--out", "moved_c")
    check(status == 0 and read("moved_c/model.bin") == read("llama2c0/model.bin"),
          "a checkpoint that another program rewrote", errors)
    left = [name for name in os.listdir(".") if name.startswith(("x", ".unfinished"))]
    check(not left, "errors leave nothing behind", left)
    check(weights == read_safetensors(good)[1], "the checkpoint is not touched")


def test_places():
    """Where the files may go, and what remains if writing them fails."""
    good = "net0/ckpt_000001.safetensors"
    home, files = os.getcwd(), sorted(os.listdir("hf0"))
    for name in ("there", "a b \u00e9"):
        os.mkdir(name)
        folder = os.stat(name)
        status, _, errors = export(good, "--to", "hf", "--out", name, limit=2000)
        check(status == 1 and os.listdir(name) == [], f"{name}: an error leaves it empty", errors)
        os.chdir(name)
        result = export(f"{home}/{good}", "--to", "hf", "--out", ".", "--data", f"{home}/data")
        os.chdir(home)
        check(sorted(os.listdir(name)) == files and os.path.samestat(folder, os.stat(name)),
              f"{name}: an empty folder is filled and stays the same folder", result)
    os.makedirs("y.unfinished/mine")
    export(good, "--to", "hf", "--out", "y/z/")
    check(sorted(os.listdir("y/z")) == files and os.path.isdir("y.unfinished/mine"),
          "a folder in a folder; one of another program stays", os.listdir("y.unfinished"))
    for split in ("train", "val"):
        write(f"a b \u00e9/{split}.bin", token_file([1] * 100))
    write("a b \u00e9/tokenizer.bin", read("data/tokenizer.bin"))
    result = export(train("foreign", data="a b \u00e9"), "--to", "hf", "--out", "plain", LC_ALL="C",
                    PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    check(result[0] == 0, "a data folder whose name the locale cannot spell", result)
    padded = json.loads(read("hf0/tokenizer_config.json"))["pad_token"]
    check(padded == "</s>", "tokenizer_config.json: </s> pads a batch", padded)


# ------------------------------------------------------------------------------------------------

def test_evaluation(program, model, path):
    """Compares --eval and --eval-choice with the LLaMA in Python."""
    text = b" Once upon a time there was a cat. It sat. "
    tokens = [1] + [3 + b for b in text]
    write("text.bin", token_file(tokens))
    windows = [tokens[at:at + T + 1] for at in range(0, len(tokens) - T, T + 1)]
    losses = [loss for window in windows for loss in model.losses(window)]
    mean = sum(losses) / len(losses)
    size = sum(token >= 3 for window in windows for token in window[1:]) - 1    # the first space
    status, line, errors = run(program, "--dtype", "fp32", "--load", path, "--eval", "text.bin")
    numbers = list(map(float, re.findall(r"\d+\.\d+", line)))
    expected = [mean, math.exp(mean), sum(losses) / size]
    check(status == 0 and len(numbers) == 3
          and all(abs(a / b - 1) < 1e-5 for a, b in zip(numbers, expected)),
          "--eval: loss, perplexity, loss per byte", f"{expected} in Python, {line}{errors}")
    draw, lines, right, cut = random.Random(7), [], [0, 0], 0
    for question in range(12):
        words = ["".join(draw.choices("abcde", k=draw.randint(1, 6))) for _ in range(5)]
        text = words[4] * draw.randint(1, 2)
        context = [1] + [3 + b for b in (" " + text).encode()]
        sums, means, shortened = [], [], False
        for word in words[:4]:
            ending = [3 + b for b in (" " + word).encode()]
            kept = context[-(12 + 1 - len(ending)):]
            shortened |= len(kept) < len(context)
            sums.append(sum(model.losses(kept + ending)[len(kept) - 1:]))
            means.append(sums[-1] / len(word))
        cut += shortened
        label = (sums if question % 2 else means).index(min(sums if question % 2 else means))
        lines.append({"ctx": text, "endings": words[:4], "label": label})
        right[0] += sums.index(min(sums)) == label
        right[1] += means.index(min(means)) == label
    write("choice.jsonl", "\n".join(map(json.dumps, lines)).encode() + b"\n\n")
    result = run(sys.executable, PREPRO, "--multiple-choice", "choice.jsonl", "--out", "data")
    check(result[0] == 0, "--multiple-choice", result)
    status, page, errors = run(program, "--dtype", "fp32", "--load", path, "--eval-choice",
                               "data/choice.bin", "--seq-len", "12")
    expected = (f"12 questions: accuracy {right[0] / 12:.4f}, with losses per character "
                f"{right[1] / 12:.4f}\nthe beginning of {cut} questions was cut off")
    check(status == 0 and expected in page, "--eval-choice: accuracies, contexts cut to fit",
          f"{expected} in Python, {page}{errors}")
    check(0 < cut < 12 and right[0] != right[1],
          "--eval-choice: the test can tell the accuracies apart", f"{cut}, {right}")


def test_evaluation_errors(path):
    question = {"ctx": "A cat", "endings": ["sat.", "flew."], "label": 1}
    write("good.jsonl", json.dumps(question).encode())
    run(sys.executable, PREPRO, "--multiple-choice", "good.jsonl", "--out", "data")
    data = read("data/good.bin")
    numbers = struct.unpack(f"<{len(data) // 2 - 512}H", data[1024:])
    byte = [[3 + b for b in text] for text in (b" A cat", b" sat.", b" flew.")]
    checksum = zlib.crc32(read("data/tokenizer.bin"))
    check(numbers == (65535, 2 * len(numbers), 0, 1, 2, 7, 1, *byte[0], 5, *byte[1], 6, *byte[2])
          and struct.unpack_from("<4iIi", data) == (20240522, 1, 1, 2 * len(numbers), checksum, 0),
          "--multiple-choice: llm.c's layout", numbers)

    def number(at, value):
        return data[:1024 + 2 * at] + struct.pack("<H", value) + data[1026 + 2 * at:]

    for what, bad, words in (
            ("another magic", read("text.bin"), "multiple-choice file"),
            ("a short file", data[:1000], "shorter"), ("no start", number(0, 1), "question 0"),
            ("another size", number(1, 8), "question 0"),
            ("another number", number(2, 5), "question 0"),
            ("a label out of range", number(3, 2), "question 0"),
            ("a text that is too long", number(5, 999), "too early"),
            ("a token out of range", number(7, 300), "only 259"),
            ("a cut file", data[:-2], "too early"), ("half a number", data[:-1], "too early"),
            ("a longer file", data + b"xx", "length"),
            ("no questions", data[:8] + bytes(4) + data[12:1024], "length"),
            ("one question instead of two", data[:8] + b"\2" + data[9:], "question 1")):
        write("bad.bin", bad)
        check_error(f"--eval-choice, {what}",
                    run(TRAIN, "--load", path, "--eval-choice", "bad.bin"), words)
    for arguments, words in (
            (["--eval", "text.bin"], "need --load"), (["--eval-choice", "x"], "need --load"),
            (["--load", path, "--eval", "none"], "cannot open none"),
            (["--load", path, "--eval", "data/good.bin"], "is not a token file"),
            (["--load", path, "--eval", "text.bin", "--seq-len", "99"], "fewer than 100 tokens"),
            (["--load", path, "--eval-choice", "data/good.bin", "--seq-len", "4"], "--seq-len"),
            (["--load", path, "--eval", "text.bin", "--dump-grads", "x"], "--dump-grads")):
        check_error(" ".join(arguments), run(TRAIN, *arguments), words)
    for what, line, words in (
            ("not JSON", b"{", "line 2"), ("no ctx", b"{}", "'ctx'"), ("a list", b"[]", "line 2"),
            ("deep nesting", b"[" * 100000, "line 2"),
            ("an infinite label", b'{"ctx": "a", "endings": ["b", "c"], "label": 1e999}', "line 2"),
            ("no label", json.dumps({**question, "label": ""}).encode(), "line 2"),
            ("a label out of range", json.dumps({**question, "label": 2}).encode(), "label 2"),
            ("one ending", json.dumps({**question, "endings": ["a"]}).encode(), "endings"),
            ("an empty ending", json.dumps({**question, "endings": ["a", ""]}).encode(), "texts"),
            ("too long", json.dumps({**question, "ctx": "a" * 40000}).encode(), "65,535")):
        write("bad.jsonl", read("good.jsonl") + b"\n" + line)
        check_error(f"--multiple-choice, {what}",
                    run(sys.executable, PREPRO, "--multiple-choice", "bad.jsonl", "--out", "data"),
                    words)
    write("val.jsonl", read("good.jsonl"))
    for arguments, words in ((["val.jsonl", "--out", "data"], "rename"),
                             (["good.jsonl", "--out", "none"], "tokenizer.bin is missing"),
                             (["good.jsonl"], "needs --out"), (["none", "--out", "data"], "none"),
                             (["good.jsonl", "--out", "data", "--seed", "1"], "cannot be used")):
        check_error(" ".join(["--multiple-choice"] + arguments),
                    run(sys.executable, PREPRO, "--multiple-choice", *arguments), words)
    check(not os.path.exists("data/bad.bin"), "--multiple-choice: errors write no file")


def main():
    program = os.path.abspath(sys.argv[1]) if len(sys.argv) > 1 else None
    os.environ["OMP_WAIT_POLICY"] = "passive"
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write("story.txt", b"<|endoftext|>".join(b"A cat sat on mat %d and slept. " % i * 3
                                                 for i in range(40)))
        run(sys.executable, PREPRO, "--input", "story.txt", "--out", "data")
        if program is None:
            test_networks()
            test_tokenizer()
            test_refusals()
            test_places()
        path = loosen(train("evaluated", "--norm", "lns"), [0.3, 0.5, 0.2])
        export(path, "--to", "hf", "--out", "evaluated_hf")
        test_evaluation(program or TRAIN, hf_model("evaluated_hf"), path)
        if program is None:
            test_evaluation_errors(path)
        os.chdir(HERE)
    return harness.summary()


if __name__ == "__main__":
    sys.exit(main())
