#!/usr/bin/env python3
"""
Exports a trained network for other programs. Its gates are folded into its weights, which leaves a
plain LLaMA with the same logits. Needs only Python's standard library.

    python3 dev/tools/export.py out/gpas/ckpt_000800.safetensors --to llama2c --out out/llama2c
    python3 dev/tools/export.py out/gpas/ckpt_000800.safetensors --to hf --out out/hf

llama2c  model.bin and tokenizer.bin, for llama2.c's run:
             ./run out/llama2c/model.bin -z out/llama2c/tokenizer.bin -t 0 -i "Lily"
hf       config.json, model.safetensors and a tokenizer, for transformers' AutoModelForCausalLM and
         AutoTokenizer and for llama.cpp's convert_hf_to_gguf.py

Works for --norm pre and lns only; docs/export.md says why. The folder appears when it is complete.
"""
import errno
import json
import math
import mmap
import os
import struct
import sys
import zlib
from array import array

sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)), ".."))
from command import Error, Parser, check_file, main, new_folder, read_json
from runs import checkpoints, gate_value

EPS = 1e-6                          # in train_gpas's RMSNorm
LLAMA2C_EPS = 1e-5                  # in llama2.c's
BYTES = range(3, 3 + 256)           # ids of the bytes, after <unk>, <s>, </s>; then come the pieces
SPACE = "\u2581"                    # what sentencepiece writes for a space
CHUNK = 4096                        # numbers scaled at a time; their list stays in the cache


# ------------------------------------------------------------------------------------------------
# The checkpoint. Nothing is copied: tensors are views of the mapped file.

class Checkpoint:
    """options: {name: text}; C, H, ...: sizes among them; tensors: {name: little-endian fp32}."""

    def __init__(self, path):
        with open(check_file(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise Error(f"{path} is not a checkpoint: it does not begin with a safetensors "
                            "header")
            text = file.read(length)
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))[8 + length:]
        try:
            header = read_json(text)
            self.options = header.pop("__metadata__")
            if self.options["kind"] != "checkpoint":
                raise KeyError
            self.norm, self.gpas = self.options["norm"], self.options["gpas"] == "on"
        except ValueError as error:
            raise Error(f"{path} is not a checkpoint of train_gpas: wrong metadata ({error})")
        except (KeyError, TypeError, AttributeError, RecursionError):
            raise Error(f"{path} is not a checkpoint of train_gpas: it lacks its metadata")
        self.path = path
        self.C, self.H, self.L, self.NH, self.T, self.V = map(
            self.number, ("channels", "hidden", "layers", "heads", "seq-len", "vocab-size"))
        if self.C % (2 * self.NH):
            raise Error(f"{path} is damaged: {self.C} channels do not fit {self.NH} heads")
        refuse_what_does_not_fold(self)
        self.read_tensors(header, data)

    def number(self, name):
        text = str(self.options.get(name))
        if not (text.isascii() and text.isdigit() and len(text) < 8 and 0 < int(text) < 1 << 20):
            raise Error(f"{self.path} is damaged: its --{name} is {text[:40]!r}")
        return int(text)

    def folder_of_data(self):
        """The --data of the training. A checkpoint stores it in UTF-8, whatever the locale is."""
        data = self.options.get("data", ".")
        try:
            if "\0" not in data:
                return os.fsdecode(data.encode())
        except (AttributeError, TypeError, UnicodeError):
            pass
        raise Error(f"{self.path} is damaged: its --data is {data!r}")

    def shapes(self):
        """Names and shapes of the tensors of pre and lns, in the checkpoint's order."""
        C, H, V = self.C, self.H, self.V
        yield "tok_embeddings.weight", [V, C]
        for layer in range(self.L):
            for name, shape in (("attention.wq", [C, C]), ("attention.wk", [C, C]),
                                ("attention.wv", [C, C]), ("attention.wo", [C, C]),
                                ("feed_forward.w1", [H, C]), ("feed_forward.w3", [H, C]),
                                ("feed_forward.w2", [C, H]), ("attention_norm", [C]),
                                ("ffn_norm", [C])):
                yield f"layers.{layer}.{name}.weight", shape
            if self.gpas:
                yield f"layers.{layer}.gate", [1]
        yield "norm.weight", [C]
        yield "output.weight", [V, C]

    def read_tensors(self, header, data):
        """The tensors must match the options, with or without Adam's moments. They fill the file
        without gaps, but in any order, because another program may have written them."""
        self.tensors, begin = {}, 0
        adam = ["adam_m.", "adam_v."] if any(name.startswith("adam_") for name in header) else []
        size = sum(4 * math.prod(shape) for _, shape in self.shapes()) * (1 + len(adam))
        if len(data) != size:
            raise Error(f"{self.path} is damaged: {len(data)} bytes of numbers, not {size}")
        shapes = {kind + name: shape for kind in ["", *adam] for name, shape in self.shapes()}
        for name in sorted(set(header) ^ set(shapes), key=lambda name: (name in header, name)):
            raise Error(f"{self.path} is damaged: {name} is missing, or should not be there")
        for name in sorted(shapes, key=lambda name: place(header[name])):
            end = begin + 4 * math.prod(shapes[name])
            if header[name] != {"dtype": "F32", "shape": shapes[name],
                                "data_offsets": [begin, end]}:
                raise Error(f"{self.path} is damaged: its {name} does not match its options")
            if not name.startswith("adam_"):
                self.tensors[name] = data[begin:end]
            begin = end
        for name, view in self.tensors.items():
            if not math.isfinite(sum(floats(view))):
                raise Error(f"{self.path}: {name} holds NaN or infinity; "
                            "did the training diverge?")


def place(entry):
    """Where a tensor begins, according to its entry in a header; 0 if the entry does not say."""
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    return offsets[0] if isinstance(offsets, list) and offsets and type(offsets[0]) is int else 0


def refuse_what_does_not_fold(checkpoint):
    norm, path = checkpoint.norm, checkpoint.path
    if norm == "sandwich":
        raise Error(f"{path}: --norm sandwich has a norm after each branch, x + N2 f(N1 x); "
                    "a LLaMA has none there")
    if norm in ("post", "deepnorm") or (norm == "mix" and checkpoint.L >= 4):
        raise Error(f"{path}: --norm {norm} normalizes the sum, N(x + f(x)); a LLaMA normalizes "
                    "only f's input")
    if norm not in ("pre", "lns", "mix"):
        raise Error(f"{path} is damaged: its --norm is {norm!r}")


def floats(view):
    numbers = array("f")
    numbers.frombytes(view)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


# ------------------------------------------------------------------------------------------------
# Folding. The stream x is c x', where x' is the stream of the plain LLaMA and c the product of the
# factors 1 - a(g) of all sites before it. docs/export.md derives this.

def products(checkpoint):
    """The values of c before each of the 2L sublayers and before the final norm."""
    c = [1.0]
    for layer in range(checkpoint.L):
        factor = 1.0
        if checkpoint.gpas:
            gate = floats(checkpoint.tensors[f"layers.{layer}.gate"])[0]
            factor -= gate_value(gate, checkpoint.options.get("gate-act"))
        if factor == 0:
            raise Error(f"{checkpoint.path}: the gate of layer {layer + 1} makes 1 - a(g) = 0, "
                        "which cuts off the stream; a LLaMA cannot")
        c += [c[-1] * factor, c[-1] * factor * factor]
    sizes = list(map(abs, c))
    if not all(map(math.isfinite, sizes)) or max(sizes) > 1e15 * min(sizes):
        raise Error(f"{checkpoint.path}: the gates scale the stream from {max(sizes):.3g} to "
                    f"{min(sizes):.3g}, too far apart for fp32 without gates")
    return c


class Folded:
    """The weights of the plain LLaMA for a target with this eps, under the checkpoint's names.

    A larger eps is undone by a larger stream: embedding, wo and w2 times `scale`. One thing does
    not fold: where the network adds EPS to the mean square of x, the LLaMA in effect adds EPS c^2.
    Next to a stream of order 1 both are no more than a few rounding errors of fp32."""

    def __init__(self, checkpoint, eps):
        self.checkpoint, self.c, self.scale = checkpoint, products(checkpoint), math.sqrt(eps / EPS)

    def __getitem__(self, name):
        view = self.checkpoint.tensors[name]
        parts = name.split(".")             # layers, number, attention or feed_forward, wo, weight
        at = 2 * int(parts[1]) if parts[0] == "layers" else 2 * self.checkpoint.L
        if name == "tok_embeddings.weight":
            return scaled(view, self.scale)
        if "wo" in parts or "w2" in parts:
            return scaled(view, self.scale / self.c[at + ("w2" in parts)])
        if parts[-2].endswith("norm"):      # N(c x') is N(x') with the sign of c
            return scaled(view, math.copysign(1, self.c[at + (parts[-2] == "ffn_norm")]))
        return view


def scaled(view, factor):
    """The numbers times the factor, computed in double and rounded once."""
    if factor == 1:
        return view
    parts = []
    for at in range(0, len(view), 4 * CHUNK):
        chunk = view[at:at + 4 * CHUNK]
        layout = f"<{len(chunk) // 4}f"
        try:
            parts.append(struct.pack(layout, *[x * factor for x in struct.unpack(layout, chunk)]))
        except OverflowError:
            raise Error("a weight divided by its gates' factors is too large for fp32")
    return b"".join(parts)


# ------------------------------------------------------------------------------------------------
# The tokenizer.

class Tokenizer:
    """pieces: a (score, bytes) for each id. raw: are the byte pieces the bytes themselves?"""

    def __init__(self, folder, V, checksum=None):
        self.path = f"{folder}/tokenizer.bin"
        try:
            with open(check_file(self.path), "rb") as file:
                self.file = file.read()
        except FileNotFoundError:
            raise Error(f"{self.path} is missing; --data names the folder that has it")
        self.pieces, at = [], 4
        while at < len(self.file):
            if len(self.file) - at < 8:
                raise Error(f"{self.path}: piece {len(self.pieces)} is damaged")
            score, length = struct.unpack_from("<fi", self.file, at)
            at += 8 + length
            if length <= 0 or at > len(self.file) or math.isnan(score):
                raise Error(f"{self.path}: piece {len(self.pieces)} is damaged")
            self.pieces.append((score, self.file[at - length:at]))
        if len(self.pieces) != V:
            raise Error(f"{self.path} has {len(self.pieces)} pieces, but the network has {V}")
        if checksum not in (None, str(zlib.crc32(self.file))):
            raise Error(f"{self.path}: the network was trained with another tokenizer")
        texts = [text for _, text in self.pieces]
        if V < BYTES.stop or struct.unpack("<i", self.file[:4])[0] != max(map(len, texts)):
            raise Error(f"{self.path} is damaged: it is not in llama2.c's format")
        found = texts[BYTES.start:BYTES.stop]
        self.raw = found == [bytes([b]) for b in range(256)]
        if not self.raw and found != [b"<0x%02X>" % b for b in range(256)]:
            raise Error(f"{self.path}: ids 3 to 258 are not the bytes")
        if len(set(texts)) < V:
            raise Error(f"{self.path} has two pieces that are spelled alike; no target can tell "
                        "them apart")
        if b" " not in texts:
            raise Error(f"{self.path} has no piece for the space with which every text begins")

    def spelled(self):
        """The text of each id for a Hugging Face tokenizer. There, as in llama.cpp, spaces become
        SPACE before anything else, so byte 32 must have that name."""
        names = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]
        try:
            names += [text.decode().replace(" ", SPACE)
                      for _, text in self.pieces[BYTES.stop:]]
        except UnicodeDecodeError:
            raise Error(f"{self.path} has a piece that is not UTF-8, which a tokenizer.json cannot "
                        "hold")
        if SPACE not in names:
            names[BYTES.start + ord(" ")] = SPACE
        if len(set(names)) < len(names):
            raise Error(f"{self.path} has two pieces that a tokenizer.json cannot tell apart")
        return names

    def merges(self, names):
        """Byte-pair encoding joins the pair whose joined piece has the best score. A tokenizer.json
        lists pairs instead, best first. If several pairs make the same piece, the one with the
        longer left part comes first, as in transformers' own conversion."""
        ids = {name: i for i, name in enumerate(names) if i >= BYTES.stop}
        pairs = []
        for name, i in ids.items():
            for cut in range(len(name) - 1, 0, -1):
                if name[:cut] in ids and name[cut:] in ids:
                    pairs.append((-self.pieces[i][0], -cut, name))
        pairs.sort()
        if len({pair[0] for pair in pairs}) < len({pair[2] for pair in pairs}):
            raise Error(f"{self.path} has pieces of equal score; a tokenizer.json cannot say that "
                        "the first pair in the text is joined")
        return [f"{name[:-cut]} {name[-cut:]}" for _, cut, name in pairs]


def sentencepiece_model(tokenizer):
    """The bytes of tokenizer.model beside tokenizer.bin; llama.cpp takes the scores from it. It is
    a protobuf message: each of its fields 1 is a piece, whose own field 1 is the text."""
    path = f"{os.path.dirname(tokenizer.path)}/tokenizer.model"
    try:
        with open(check_file(path), "rb") as file:
            model = file.read()
    except FileNotFoundError:
        raise Error(f"{path} is missing; without it llama.cpp cannot join pieces")

    def number(at):
        value = shift = 0
        while True:
            value |= (model[at] & 127) << shift
            at, shift = at + 1, shift + 7
            if model[at - 1] < 128:
                return value, at

    texts, at = [], 0
    try:
        while at < len(model):
            tag, at = number(at)
            if tag & 7 != 2:
                raise IndexError
            length, at = number(at)
            if tag == 10:
                size, start = number(at + 1)
                texts.append(model[start:start + size])
            at += length
    except IndexError:
        at = -1
    expected = [text for _, text in tokenizer.pieces]
    ours = [text.replace(SPACE.encode(), b" ") for text in texts]
    if at != len(model) or ours[3:] != expected[3:]:
        raise Error(f"{path} is damaged, or another vocabulary than {tokenizer.path}")
    return model


# ------------------------------------------------------------------------------------------------
# The two targets: each a dict from file names to parts, which are computed as they are written.

def llama2c_files(checkpoint, tokenizer):
    """The layout that llama2.c's export.py calls version 0."""
    if checkpoint.C * max(checkpoint.V, checkpoint.L * checkpoint.T) >= 1 << 31:
        raise Error(f"{checkpoint.path} is too large for llama2.c, which counts in 32 bits")
    folded, layers = Folded(checkpoint, LLAMA2C_EPS), range(checkpoint.L)
    C, H, L, NH, T, V = (checkpoint.C, checkpoint.H, checkpoint.L, checkpoint.NH, checkpoint.T,
                         checkpoint.V)

    def model():
        yield struct.pack("<7i", C, H, L, NH, NH, -V, T)    # -V: output is a matrix of its own
        yield folded["tok_embeddings.weight"]
        for name in ("attention_norm", "attention.wq", "attention.wk", "attention.wv",
                     "attention.wo", "ffn_norm", "feed_forward.w1", "feed_forward.w2",
                     "feed_forward.w3"):
            for layer in layers:
                yield folded[f"layers.{layer}.{name}.weight"]
        yield folded["norm.weight"]
        pairs = C // NH // 2
        for function in (math.cos, math.sin):       # RoPE's angles, which run computes itself
            for t in range(T):
                yield struct.pack(f"<{pairs}f", *[function(t * 10000 ** (-j / pairs))
                                                  for j in range(pairs)])
        yield folded["output.weight"]

    return {"model.bin": model(), "tokenizer.bin": [tokenizer.file]}


def halves(view, C, NH):
    """The rows of wq or wk for a RoPE that rotates channels j and j + hs/2 of a head as a pair,
    where ours rotates 2j and 2j + 1."""
    hs = C // NH
    rows = [head * hs + j for head in range(NH) for first in (0, 1) for j in range(first, hs, 2)]
    return b"".join(view[4 * C * row:4 * C * (row + 1)] for row in rows)


HF_NAMES = {"attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
            "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
            "feed_forward.w1": "mlp.gate_proj", "feed_forward.w3": "mlp.up_proj",
            "feed_forward.w2": "mlp.down_proj", "attention_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm"}


def hf_name(name):
    if not name.startswith("layers."):
        return {"tok_embeddings.weight": "model.embed_tokens.weight",
                "norm.weight": "model.norm.weight", "output.weight": "lm_head.weight"}[name]
    _, layer, rest = name.split(".", 2)
    return f"model.layers.{layer}.{HF_NAMES[rest[:-len('.weight')]]}.weight"


def hf_files(checkpoint, tokenizer):
    folded = Folded(checkpoint, EPS)
    header, begin, names = {"__metadata__": {"format": "pt"}}, 0, []
    for name, shape in checkpoint.shapes():
        if not name.endswith(".gate"):
            end = begin + 4 * math.prod(shape)
            header[hf_name(name)] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
            begin = end
            names.append(name)

    def model():
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        yield len(text).to_bytes(8, "little") + text
        for name in names:
            rotated = name.endswith(("wq.weight", "wk.weight"))
            yield halves(folded[name], checkpoint.C, checkpoint.NH) if rotated else folded[name]

    files = {"model.safetensors": model()}
    for name, value in (("config.json", hf_config(checkpoint)),
                        ("generation_config.json", {"bos_token_id": 1, "eos_token_id": [1, 2]}),
                        ("tokenizer.json", hf_tokenizer(tokenizer)),
                        ("tokenizer_config.json", hf_tokenizer_config(checkpoint))):
        files[name] = [json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n"]
    if len(tokenizer.pieces) > BYTES.stop:
        files["tokenizer.model"] = [sentencepiece_model(tokenizer)]
    return files


def hf_config(checkpoint):
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama",
            "vocab_size": checkpoint.V, "hidden_size": checkpoint.C,
            "intermediate_size": checkpoint.H, "num_hidden_layers": checkpoint.L,
            "num_attention_heads": checkpoint.NH, "num_key_value_heads": checkpoint.NH,
            "head_dim": checkpoint.C // checkpoint.NH, "hidden_act": "silu",
            "max_position_embeddings": checkpoint.T, "rms_norm_eps": EPS, "rope_theta": 10000.0,
            "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False,
            "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32"}


def hf_tokenizer(tokenizer):
    names = tokenizer.spelled()
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": names[i], "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False, "special": True}
                         for i in range(3)],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": SPACE},
            {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]},
        "pre_tokenizer": None,
        "post_processor": {"type": "TemplateProcessing", "single": [bos, first],
                           "pair": [bos, first, bos, second],
                           "special_tokens": {"<s>": {"id": "<s>", "ids": [1],
                                                      "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>",
                  "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": True, "byte_fallback": True,
                  "vocab": {name: i for i, name in enumerate(names)},
                  "merges": tokenizer.merges(names)}}


def hf_tokenizer_config(checkpoint):
    return {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
            "unk_token": "<unk>", "pad_token": "</s>",
            "add_bos_token": True, "add_eos_token": False,
            "clean_up_tokenization_spaces": False, "model_max_length": checkpoint.T,
            "model_input_names": ["input_ids", "attention_mask"]}


# ------------------------------------------------------------------------------------------------
# Writing, and the command line.

def sync(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:                        # other errors: it cannot be synced
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            raise
    os.close(handle)


def write_folder(out, files):
    """Write the files, wait until they are on the disk, then move them into place."""
    with new_folder(out) as folder:
        for name, parts in files.items():
            with open(f"{folder}/{name}", "wb") as file:
                for part in parts:
                    file.write(part)
            sync(f"{folder}/{name}")
        sync(folder)
    sync(out)
    sync(os.path.dirname(os.path.abspath(out)))


def run():
    parser = Parser(description=__doc__)
    parser.add_argument("checkpoint", help="ckpt_*.safetensors of train_gpas, or a folder, whose "
                        "newest checkpoint is used")
    parser.add_argument("--to", choices=["llama2c", "hf"], required=True, help="the format")
    parser.add_argument("--out", metavar="DIR", required=True, help="a new or empty folder")
    parser.add_argument("--data", metavar="DIR",
                        help="folder of the tokenizer (that of the training)")
    args = parser.parse_args()
    path = args.checkpoint
    if os.path.isdir(path):
        if not checkpoints(path):
            raise Error(f"{path} contains no checkpoint (ckpt_*.safetensors)")
        path = os.path.join(path, checkpoints(path)[-1])
    checkpoint = Checkpoint(path)
    data = args.data or checkpoint.folder_of_data()
    tokenizer = Tokenizer(data, checkpoint.V, checkpoint.options.get("tokenizer"))
    files = {"llama2c": llama2c_files, "hf": hf_files}[args.to](checkpoint, tokenizer)
    write_folder(args.out, files)
    print(f"{args.out}: {', '.join(sorted(files))}")


if __name__ == "__main__":
    main(run)
