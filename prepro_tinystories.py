#!/usr/bin/env python3
"""Converts text to token files, the data that train_gpas learns from.

  prepro_tinystories.py                                  4.5 MB of made-up toy stories
  prepro_tinystories.py --download                       TinyStories, 2 GB (needs sentencepiece)
  prepro_tinystories.py --input my.txt --out data/my     your own text, with a line <|endoftext|>
                                                         between two stories
  prepro_tinystories.py --multiple-choice hellaswag_val.jsonl --out data/my
                                                         questions for --eval-choice, in the
                                                         vocabulary of data/my
All but the last write into the --out folder
  train.bin, val.bin   llm.c's format: 256 int32 (magic, version, number of tokens), then uint16
                       tokens; train_000.bin, train_001.bin, ... where one file is not enough
  tokenizer.bin        llama2.c's format: the text that each token stands for
  tokenizer.model      the same for sentencepiece, if --vocab-size is more than 259
  prepro.json          the options and inputs that these files were made from

A token is one byte of text (259 tokens, nothing to install) or, with --vocab-size, a frequent piece
of a word. A story is stored as the token <s>, a space, and its text. To keep memory use small, a
story of more than 16 KB is cut into several.
"""
import argparse
import codecs
import contextlib
import fcntl
import http.client
import io
import itertools
import json
import os
import random
import re
import signal
import struct
import sys
import time
import urllib.error
import urllib.request
import zlib
from array import array
from importlib import import_module

sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)), "dev"))
from command import CLEAR, Error, Parser, check_file, main, read_json, say

SEPARATOR = b"<|endoftext|>"
LONGEST = 1 << 14                   # bytes of the longest story; longer ones are cut
CHUNK = 1 << 18                     # bytes read or received at a time
BATCH = 1 << 20                     # bytes of text encoded at a time
SHARD_TOKENS = 100_000_000          # tokens in one file
TOY_BYTES = 4_500_000               # bytes of toy stories
SAMPLE_BYTES = 100_000_000          # bytes of training text that a BPE vocabulary is made from
UNK, BOS, EOS = 0, 1, 2             # <unk>, <s>, </s>; then come the bytes
BYTE_VOCABULARY = 3 + 256
DOWNLOAD_URL = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main"
DOWNLOADS = ["TinyStoriesV2-GPT4-train.txt", "TinyStoriesV2-GPT4-valid.txt"]
OUR_FILES = re.compile(r"(train|val)(_\d{3,})?\.bin|tokenizer\.(bin|model)|prepro\.(json|tmp)")


class Progress:
    """Shows progress: on a terminal a line that rewrites itself, otherwise a line now and then."""

    def __init__(self, label, total, done=0):
        self.label, self.total, self.done, self.shown = label, total, done, time.monotonic()

    def add(self, size):
        self.done += size
        if time.monotonic() - self.shown > (0.2 if CLEAR else 15):
            self.show("" if CLEAR else "\n")

    def show(self, end="\n"):
        self.shown = time.monotonic()
        percent = f" ({100 * self.done // self.total}%)" if self.total else ""
        print(f"{CLEAR}{self.label}: {self.done / 1e6:,.1f} of {self.total / 1e6:,.1f} MB{percent}",
              end=end, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------
# Stories, from files or from the grammar at the end of this file.

def cut(text, most=LONGEST):
    """Cut the text into pieces of at most LONGEST bytes, between lines or words if possible. The
    last piece may have `most` bytes."""
    pieces = []
    while len(text) > most:
        half = LONGEST // 2
        end = (text.rfind(b"\n", half, LONGEST) + 1 or text.rfind(b" ", half, LONGEST) + 1
               or LONGEST)
        while end > LONGEST - 4 and text[end] & 0xC0 == 0x80:       # not inside a UTF-8 character
            end -= 1
        pieces.append(text[:end].strip())
        text = text[end:].lstrip()
    return pieces + [text]


def read_file(path):
    with open(check_file(path), "rb") as file:
        return file.read()


def write_file(path, data):
    with open(path, "wb") as file:
        file.write(data)


def read_text(path):
    """Yields the chunks of a UTF-8 text, without the byte-order mark that some editors write.
    UTF-16 and UTF-32 are recognized by another byte-order mark, or by the zero bytes in them."""
    with open(check_file(path), "rb") as file:
        mark = file.read(3)
        file.seek(3 if mark == codecs.BOM_UTF8 else 0)
        for chunk in iter(lambda: file.read(CHUNK), b""):
            if b"\0" in chunk or mark[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                wide = "UTF-32" if b"\0\0\0" in chunk else "UTF-16"
                raise Error(f"{path} is {wide} or not text; iconv -f {wide} -t UTF-8 converts it")
            yield chunk


def read_stories(paths, progress=None):
    """Yields the stories of these files, stripped of white space, without the empty ones."""
    for path in paths:
        tail, cuts = b"", 0
        for chunk in itertools.chain(read_text(path), [b""]):
            *stories, tail = (tail + (chunk or SEPARATOR)).split(SEPARATOR)
            pieces = [piece for story in stories for piece in cut(story.strip())]
            *more, tail = cut(tail.lstrip(), LONGEST + len(SEPARATOR))  # may end inside SEPARATOR
            cuts += len(pieces) - len(stories) + len(more)
            yield from filter(None, pieces + more)
            if progress:
                progress.add(len(chunk))
        if cuts and progress:
            say(f"note: {path}: stories of over {LONGEST:,} bytes were cut, in {cuts:,} places")


def read_corpus(args, progress=None):
    """Yields pairs (is it held out for validation?, story), the same pairs on every call."""
    if args.val_input:
        yield from ((False, story) for story in read_stories(args.input, progress))
        yield from ((True, story) for story in read_stories(args.val_input, progress))
        return
    stories = read_stories(args.input, progress) if args.input else toy_stories(args.seed)
    for i, story in enumerate(stories):         # every 20th if the fraction is 0.05
        yield int((i + 1) * args.val_fraction) > int(i * args.val_fraction), story


# ------------------------------------------------------------------------------------------------
# The download. It goes to NAME.part, which a later run resumes, and which gets its final name when
# it is complete. NAME.part.version holds its length and version, so that versions are never mixed.

def version_of(response):
    """The server's name for this version of the file, or "". A weak tag (W/) may name two."""
    tag = response.headers.get("ETag", "")
    return tag if tag.startswith('"') else response.headers.get("Last-Modified", "")


def open_url(url, start=0, total=0, version=""):
    """Request the bytes from `start` on if the file is still this version, otherwise all of it.
    Returns (response, the position of its first byte, the length of the whole file)."""
    headers = {"Range": f"bytes={start}-", "If-Range": version} if start else {}
    request = urllib.request.Request(url, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:         # the file ends before `start`
            return open_url(url)
        raise
    if response.status == 206 and start:
        part = version_of(response), response.headers.get("Content-Range")
        if part != (version, f"bytes {start}-{total - 1}/{total}"):     # not what was requested
            return open_url(url)
        return response, start, total
    length = response.headers.get("Content-Length", "")
    if response.status != 200 or not length.isdigit() \
            or response.headers.get_content_type() == "text/html":
        raise Error(f"{url}: the server answered with a web page, or without a length")
    return response, 0, int(length)


def download(url, path, overwrite):
    part, note, start, total, version = path + ".part", path + ".part.version", 0, 0, ""
    if os.path.exists(path):
        return say(f"{path} is already there")
    if os.path.exists(part) and os.path.exists(note):
        known = re.fullmatch(rb"(\d+) (.+)", read_file(note))
        if known:                               # the server named a version
            start, total = os.path.getsize(part), int(known[1])
            version = known[2].decode("latin-1")
    elif os.path.lexists(part) and not overwrite:
        raise Error(f"{part} may belong to another program; --overwrite replaces it")
    try:
        response, start, total = open_url(url, start, total, version)
        if start == 0:                          # remove the old part before its version
            if os.path.lexists(part):
                os.remove(part)
            write_file(note, f"{total} {version_of(response)}".encode("latin-1"))
        progress = Progress(os.path.basename(path), total, start)
        with response, open(part, "ab") as file:
            for chunk in iter(lambda: response.read(CHUNK), b""):
                file.write(chunk)
                progress.add(len(chunk))
        progress.show()
        if progress.done != total:
            raise ValueError(f"received {progress.done:,} bytes instead of {total:,}")
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise Error(f"cannot download {url}: {str(error).strip('<>')} "
                    "(run the same command again to resume)")
    os.replace(part, path)
    os.remove(note)


# ------------------------------------------------------------------------------------------------
# Vocabularies. Each has `pieces`, the (text, score) of every token in order; `model`, the bytes of
# tokenizer.model, or None; and encode(), from a list of stories to little-endian uint16 tokens.

class Vocabulary:
    def file(self):
        """The bytes of tokenizer.bin."""
        return (struct.pack("<i", max(len(text) for text, score in self.pieces))
                + b"".join(struct.pack("<fi", score, len(text)) + text
                           for text, score in self.pieces))

    def checksum(self):
        """Stored in the header of token files, which mean nothing in another vocabulary."""
        return zlib.crc32(self.file())


class ByteVocabulary(Vocabulary):
    """Byte b is token 3 + b."""
    pieces = [(text, 0.0) for text in [b"<unk>", b"\n<s>\n", b"\n</s>\n"]
              + [bytes([b]) for b in range(256)]]
    model = None
    tokens = "".join(chr(3 + b) for b in range(256))

    def encode(self, stories):
        """Python is slow at converting bytes to numbers above 255, but fast at encoding text as
        UTF-16. So each token becomes a character for a moment."""
        return "".join(chr(BOS) + codecs.charmap_decode(b" " + story, "strict", self.tokens)[0]
                       for story in stories).encode("utf-16-le")


class BpeVocabulary(Vocabulary):
    """Byte-pair encoding by sentencepiece, with the settings of llama2.c."""

    def __init__(self, model):
        self.model, self.damaged = model, False
        self.processor = import_module("sentencepiece").SentencePieceProcessor(model_proto=model)
        self.pieces = [(self.processor.id_to_piece(i).replace("\u2581", " ").encode(),
                        self.processor.get_score(i)) for i in range(len(self.processor))]
        self.pieces[BOS:EOS + 1] = ByteVocabulary.pieces[BOS:EOS + 1]

    @classmethod
    def make(cls, size, lines):
        spm, writer = import_module("sentencepiece"), io.BytesIO()
        say(f"making a BPE vocabulary of {size:,} pieces")
        try:
            spm.SentencePieceTrainer.train(
                sentence_iterator=lines, model_writer=writer, model_type="bpe",
                vocab_size=size, byte_fallback=True, character_coverage=1.0, split_digits=True,
                normalization_rule_name="identity", remove_extra_whitespaces=False,
                add_dummy_prefix=True, allow_whitespace_only_pieces=True,
                max_sentence_length=2 * LONGEST, self_test_sample_size=0, minloglevel=2,
                unk_id=UNK, bos_id=BOS, eos_id=EOS)
        except RuntimeError as error:           # "INTERNAL: file.cc(744) [condition] Reason."
            reason = str(error).split("] ")[-1].strip() or "no reason given"
            raise Error(f"cannot make a BPE vocabulary of {size:,} pieces from this text; try "
                        f"another --vocab-size or more text ({reason})")
        return cls(writer.getvalue())

    def encode(self, stories):
        """sentencepiece uses all cores, and itself adds the space before each story."""
        texts = [story.decode("utf-8", "replace") for story in stories]
        if not self.damaged and any("\ufffd" in text for text in texts):
            say("note: not all of the text is UTF-8; invalid bytes become U+FFFD")
            self.damaged = True
        tokens = array("H", itertools.chain(*self.processor.encode(texts, add_bos=True)))
        if sys.byteorder == "big":
            tokens.byteswap()
        return tokens.tobytes()


def sample_lines(args):
    """Yields the lines of about the first SAMPLE_BYTES of the training text."""
    size = 0
    for held_out, story in read_corpus(args):
        if size > SAMPLE_BYTES:
            break
        if not held_out:
            size += len(story)
            yield from filter(None, story.decode("utf-8", "replace").split("\n"))


# ------------------------------------------------------------------------------------------------
# The files. They are written to OUT/prepro.unfinished and moved when all of them are complete, so a
# killed run leaves no half-written file under a name that the trainer would open. No other file is
# deleted, and nothing in OUT is replaced without --overwrite.

class TokenWriter:
    """Writes the token files of one split, "train" or "val"."""

    def __init__(self, folder, split, vocabulary, shard_tokens):
        self.path, self.file = f"{folder}/{split}", None
        self.vocabulary, self.shard_tokens, self.room = vocabulary, shard_tokens, 0
        self.stories, self.tokens, self.files = 0, 0, 0
        self.batch, self.batch_bytes = [], 0

    def add(self, story):
        self.stories += 1
        self.batch.append(story)
        self.batch_bytes += len(story)
        if self.batch_bytes >= BATCH:
            self.flush()

    def flush(self):
        tokens = memoryview(self.vocabulary.encode(self.batch))
        self.tokens += len(tokens) // 2
        self.batch, self.batch_bytes = [], 0
        while tokens:
            if self.room == 0:
                self.next_file()
            written = self.file.write(tokens[:2 * self.room])
            self.room -= written // 2
            tokens = tokens[written:]

    def next_file(self):
        if self.file:
            self.file.close()
        self.file = open(f"{self.path}_{self.files:03d}.bin", "wb")
        self.file.write(bytes(1024))            # finish() writes the header
        self.files, self.room = self.files + 1, self.shard_tokens

    def finish(self):
        self.flush()
        self.file.close()
        checksum = self.vocabulary.checksum()
        for i in range(self.files):
            tokens = min(self.shard_tokens, self.tokens - i * self.shard_tokens)
            with open(f"{self.path}_{i:03d}.bin", "r+b") as file:
                file.write(struct.pack("<4iI2i", 20240520, 1, tokens, 0, checksum, self.files, i))
        if self.files == 1:
            os.rename(f"{self.path}_000.bin", f"{self.path}.bin")


def our_files(folder):
    return sorted(filter(OUR_FILES.fullmatch, os.listdir(folder) if os.path.isdir(folder) else []))


def remove_ours(folder):
    for name in our_files(folder):
        os.remove(f"{folder}/{name}")


@contextlib.contextmanager
def work_folder(out):
    """OUT/prepro.unfinished, for one run at a time. OUT is locked until the process ends, even by
    kill -9, so files that are already there were left by a killed run."""
    folder = f"{out}/prepro.unfinished"
    os.makedirs(out, exist_ok=True)
    lock = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Error(f"{out} is in use by another run of this script")
    except OSError:                             # a file system without locks
        pass
    os.makedirs(folder, exist_ok=True)
    if os.path.islink(folder) or sorted(os.listdir(folder)) != our_files(folder):
        raise Error(f"{folder} holds files that this script did not write; move them away")
    try:
        remove_ours(folder)
        yield folder
    except OSError as error:
        error.filename = error.filename or out  # a full disk names no file
        raise
    finally:
        remove_ours(folder)
        os.rmdir(folder)
        os.close(lock)


def publish(folder, out):
    """Replace the files of an earlier run; no signal may interrupt this. Files are removed in
    alphabetical order and moved in reverse, so tokenizer.bin is removed before the token files and
    appears after them. Nothing trains without it, so old and new files are never used together."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    remove_ours(out)
    for name in reversed(our_files(folder)):
        os.replace(f"{folder}/{name}", f"{out}/{name}")


def how_made(args):
    """Everything that the files in OUT depend on."""
    made = {key: vars(args)[key] for key in ("vocab_size", "val_fraction", "shard_tokens", "seed")}
    for name in ("input", "val_input"):
        made[name] = [[os.path.abspath(path), os.path.getsize(path), os.path.getmtime(path)]
                      for path in getattr(args, name)]
    return made


def record(made, folder):
    """The bytes of prepro.json: how the other files in this folder were made, and their sizes."""
    files = {name: os.path.getsize(f"{folder}/{name}") for name in our_files(folder)
             if name != "prepro.json"}
    return json.dumps({**made, "files": files}, indent=1).encode()


def is_made(args):
    """Has this same command filled OUT before? Raises an Error if another one has."""
    there = our_files(args.out)
    if args.overwrite or not there:
        return False
    if "prepro.json" in there and all(map(os.path.exists, args.input + args.val_input)):
        if read_file(f"{args.out}/prepro.json") == record(how_made(args), args.out):
            return True
    raise Error(f"{args.out} has {', '.join(there[:3])}{', ...' * (len(there) > 3)} already; "
                "--overwrite replaces them, another --out keeps them")


def write_files(args, folder):
    made, files = how_made(args), args.input + args.val_input
    progress = Progress("encoding", sum(os.path.getsize(path) for path in files))
    vocabulary = ByteVocabulary()
    if args.vocab_size > BYTE_VOCABULARY:
        vocabulary = BpeVocabulary.make(args.vocab_size, sample_lines(args))
    writers = {split: TokenWriter(folder, split, vocabulary, args.shard_tokens)
               for split in ("train", "val")}
    for held_out, story in read_corpus(args, progress):
        writers["val" if held_out else "train"].add(story)
    if files:
        progress.show()
    for split, writer in writers.items():
        if writer.stories == 0:
            raise Error(f"too few stories, none is left for {split}; put {SEPARATOR.decode()} "
                        "between stories, or see --val-fraction and --val-input")
        writer.finish()
    write_file(f"{folder}/tokenizer.bin", vocabulary.file())
    if vocabulary.model:
        write_file(f"{folder}/tokenizer.model", vocabulary.model)
    write_file(f"{folder}/prepro.json", record(made, folder))
    is_made(args)                               # raises an error if OUT has been filled meanwhile
    publish(folder, args.out)
    for split, writer in writers.items():
        print(f"{split}: {writer.stories:,} stories, {writer.tokens:,} tokens")
    print(f"vocabulary: {len(vocabulary.pieces):,} pieces\nthe files are in {args.out}")


# ------------------------------------------------------------------------------------------------
# Multiple choice: a context and several endings, one of which is right. The input has HellaSwag's
# lines of JSON, the output llm.c's format: 256 int32 (magic, version, number of questions, bytes of
# the longest, and the vocabulary's checksum), then uint16. Each question has 65535, its size in
# bytes, its number, the index of the right ending and the number of endings; then the length and
# the tokens of the context; then the length and the tokens of each ending.

def read_vocabulary(folder):
    """The vocabulary of the token files in a folder."""
    try:
        expected = read_file(f"{folder}/tokenizer.bin")
    except FileNotFoundError:
        raise Error(f"{folder}/tokenizer.bin is missing; --out must be a folder that has one")
    vocabulary = ByteVocabulary()
    if os.path.exists(f"{folder}/tokenizer.model"):
        require_sentencepiece()
        try:
            vocabulary = BpeVocabulary(read_file(f"{folder}/tokenizer.model"))
        except RuntimeError:
            raise Error(f"{folder}/tokenizer.model is damaged")
    if vocabulary.file() != expected:
        raise Error(f"{folder}: tokenizer.bin and tokenizer.model hold different vocabularies")
    return vocabulary


def clean(text):
    """Remove WikiHow's marks [header], [title] and [step], which are not text."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def encode_question(line, number, vocabulary):
    """Convert a line of JSON to the file's format. As in lm-evaluation-harness, the context begins
    with the name of the activity, if there is one, and a space separates it from the ending."""
    question = read_json(line)
    if {"activity_label", "ctx_a", "ctx_b"} <= question.keys():
        question["ctx"] = question["ctx_a"] + " " + question["ctx_b"].capitalize()
    if "activity_label" in question:
        question["ctx"] = question["activity_label"] + ": " + question["ctx"]
    texts = [clean(text) for text in [question["ctx"]] + question["endings"]]
    label, endings = int(str(question["label"])), len(texts) - 1       # 1 or "1", but not 1.5
    if endings < 2 or not all(question["endings"]):
        raise ValueError("the endings must be two or more texts, none of them empty")
    if not 0 <= label < endings:
        raise ValueError(f"label {label} is not one of the {endings} endings")
    body = struct.pack("<2H", label, endings)
    for i, text in enumerate(texts):
        tokens = vocabulary.encode([text.encode()])[2 * (i > 0):]      # only the context has BOS
        if not tokens:
            raise ValueError(f"ending {i} has no text")
        body += struct.pack("<H", min(len(tokens) // 2, 65535)) + tokens
    if len(body) + 6 > 65535:
        raise ValueError("a question may have at most 65,535 bytes")
    return struct.pack("<3H", 65535, len(body) + 6, number) + body


def write_questions(args):
    path, questions = args.multiple_choice, []
    name = os.path.splitext(os.path.basename(path))[0] + ".bin"
    target = f"{args.out}/{name}"
    if OUR_FILES.fullmatch(name) or os.path.realpath(target) == os.path.realpath(path):
        raise Error(f"{path}: {target} is needed for something else; rename {path}")
    vocabulary = read_vocabulary(args.out)
    for number, line in enumerate(b"".join(read_text(path)).split(b"\n"), 1):
        try:
            if line.strip():
                questions.append(encode_question(line, len(questions), vocabulary))
        except KeyError as error:
            raise Error(f"{path}, line {number}: it has no {error.args[0]!r}")
        except (AttributeError, TypeError):
            raise Error(f"{path}, line {number}: ctx is not a text, or endings are not texts")
        except (ValueError, RecursionError, struct.error) as error:
            raise Error(f"{path}, line {number}: {error}")
    if not 0 < len(questions) < 65536:
        raise Error(f"{path} has {len(questions):,} questions, but must have 1 to 65,535")
    header = struct.pack("<4iI", 20240522, 1, len(questions), max(map(len, questions)),
                         vocabulary.checksum())
    data = header.ljust(1024, b"\0") + b"".join(questions)
    if not os.path.lexists(target) or args.overwrite:
        with work_folder(args.out) as folder:
            write_file(f"{folder}/prepro.tmp", data)
            os.replace(f"{folder}/prepro.tmp", target)
    elif read_file(target) != data:
        raise Error(f"{target} already exists with other content; --overwrite replaces it")
    print(f"{len(questions):,} questions are in {target}")


# ------------------------------------------------------------------------------------------------
# The command line.

def number(kind, low, high):
    """The type of an option: a number from low to high."""
    def number(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return kind(text)
    return number


def parse_options():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--out", metavar="DIR", help="folder to write into (data/toy, or data/tinystories)")
    add("--overwrite", action="store_true", help="replace files made with other options or inputs")
    add("--vocab-size", metavar="N", type=number(int, BYTE_VOCABULARY, 1 << 16),
        help="259 for bytes, more for BPE by sentencepiece (259; with --download 4096)")
    add("--val-fraction", metavar="F", type=number(float, 1e-6, 0.5),
        help="fraction of the stories held out for validation (0.05, every 20th)")
    add("--shard-tokens", metavar="N", type=number(int, 1, SHARD_TOKENS),
        help=f"maximum number of tokens in one file ({SHARD_TOKENS:,})")
    add = parser.add_argument_group("toy stories").add_argument
    add("--seed", metavar="N", type=number(int, 0, 1 << 32), help="random seed (1)")
    add("--show", metavar="N", type=number(int, 1, 1 << 32), help="only print the first N stories")
    add = parser.add_argument_group("your own text").add_argument
    add("--input", metavar="FILE", nargs="+", help="text files to train on")
    add("--val-input", metavar="FILE", nargs="+",
        help="text files to validate on, instead of held-out stories")
    add = parser.add_argument_group("multiple choice").add_argument
    add("--multiple-choice", metavar="FILE",
        help="lines of JSON with ctx, endings and label, as in HellaSwag; --out must be a folder "
             "with a tokenizer.bin")
    add = parser.add_argument_group("TinyStories").add_argument
    add("--download", action="store_true",
        help="download it to the --out folder, or resume an interrupted download")
    add("--url", metavar="BASE", help="download it from this address, not from Hugging Face")
    args = parser.parse_args()
    check_options(args)
    return args


def check_options(args):
    """Reject options that would have no effect, then fill in the defaults."""
    source = ("--show" if args.show else "--download" if args.download else
              "--multiple-choice" if args.multiple_choice else
              "--input" if args.input else "the toy stories")
    files = {"out", "vocab_size", "shard_tokens", "overwrite"}
    allowed = {"--show": {"show", "seed"}, "--download": files | {"download", "url"},
               "--multiple-choice": {"out", "multiple_choice", "overwrite"},
               "--input": files | {"input", "val_input", "val_fraction"},
               "the toy stories": files | {"seed", "val_fraction"}}
    for option, value in vars(args).items():
        if value is not None and value is not False and option not in allowed[source]:
            raise Error(f"--{option.replace('_', '-')} cannot be used with {source}")
    if args.val_input and args.val_fraction:
        raise Error("--val-fraction cannot be used with --val-input")
    if (args.input or args.multiple_choice) and not args.out:
        raise Error(f"{source} needs --out, the folder of the token files")
    if args.url and not re.match("https?://", args.url):
        raise Error(f"--url {args.url}: an address must start with http:// or https://")
    args.out = args.out or ("data/tinystories" if args.download else "data/toy")
    args.vocab_size = args.vocab_size or (4096 if args.download else BYTE_VOCABULARY)
    args.shard_tokens = args.shard_tokens or SHARD_TOKENS
    args.val_fraction = args.val_fraction or 0.05
    args.seed = 1 if args.seed is None else args.seed
    args.url = (args.url or DOWNLOAD_URL).rstrip("/")
    args.input, args.val_input = args.input or [], args.val_input or []


def require_sentencepiece():
    try:
        import_module("sentencepiece")
    except ImportError:
        raise Error("a BPE vocabulary needs sentencepiece: pip install sentencepiece "
                    f"(or use bytes, which need no library: --vocab-size {BYTE_VOCABULARY})")


def run():
    args = parse_options()
    if args.multiple_choice:
        return write_questions(args)
    if args.show:
        for story in itertools.islice(toy_stories(args.seed), args.show):
            print(f"{story.decode()}\n{SEPARATOR.decode()}")
        return
    if args.download:
        args.input, args.val_input = [[f"{args.out}/{name}"] for name in DOWNLOADS]
    if is_made(args):
        print(f"{args.out} was made by this command; --overwrite makes it again")
        return
    if args.vocab_size > BYTE_VOCABULARY:
        require_sentencepiece()                 # better to fail now than after 2 GB
    ours = [os.path.realpath(f"{args.out}/{name}") for name in our_files(args.out)]
    for path in [] if args.download else args.input + args.val_input:
        next(read_text(path), None)             # report a wrong file before the long work
        if os.path.realpath(path) in ours:
            raise Error(f"{path} would be replaced; give another --out")
    with work_folder(args.out) as folder:
        for name in DOWNLOADS if args.download else []:
            download(f"{args.url}/{name}", f"{args.out}/{name}", args.overwrite)
        write_files(args, folder)


# ------------------------------------------------------------------------------------------------
# Toy stories. A plot is a text with choices: "[a|b]" becomes a or b, "<name>" one of PHRASES, and
# "{toy.use}" a fact; "//" ends a paragraph. '@friend "Yes."' becomes 'Tom said, "Yes."' or similar,
# and '@@' marks an answer. The facts (who is in the story, which toy, its color, the place) are
# chosen before the story is told. So words early in a story determine words much later, which gives
# a deep network something to learn.

SPEECH = re.compile(r'(@@?)(\w+) "([^"]+)([.!?])"')
VERBS = {"@.": ["said"], "@!": ["said", "cried", "called"], "@?": ["asked"],
         "@@.": ["said", "answered", "replied"], "@@!": ["said", "cried"], "@@?": ["asked"]}
MANNERS = {"@": ["", "", "", " softly", " quietly", " gently", " in a low voice"],
           "@@": ["", "", "", " softly", " slowly", " at once", " after a moment"]}
CALLED = {"elder": "{his} {elder}", "rescue": "the {rescue}"}      # speakers without a name


def sections(text):
    """The (name, line, body) of each "== name: line" and the lines that follow it."""
    return re.findall(r"== (\w+): *(.*)\n([^=]*)", text)


def read_table(columns, body):
    """The rows of a table, each a dictionary {column: cell}. A row ends with its line or with ";",
    but a line that starts with a space continues the line before it."""
    rows = (re.split(r"\s/\s+", row) for row in re.split(r"\n(?! )|; ?", body.strip()))
    return [dict(zip(columns.split(), row)) for row in rows]


class Teller:
    """Tells stories. All random choices use random(), which Python promises to return the same
    numbers in every version; choice() and shuffle() may change."""

    def __init__(self, seed):
        self.random = random.Random(seed).random
        self.tables = {name: read_table(columns, body) for name, columns, body in sections(TABLES)}
        self.plots = [(roles.split(), body) for _, roles, body in sections(PLOTS)]
        self.phrases = {name: "[" + f"{line} {body}".strip() + "]"
                        for name, line, body in sections(PHRASES)}

    def choose(self, options):
        return options[int(self.random() * len(options))]

    def expand(self, text):
        """Insert the phrases, then make the choices, innermost first."""
        while "<" in text:
            text = re.sub(r"<(\w+)>", lambda match: self.phrases[match[1]], text)
        while "[" in text:
            text = re.sub(r"\[([^][]*)\]", lambda match: self.choose(match[1].split("|")), text)
        return " ".join(text.split())

    def cast(self, roles):
        """Choose the facts. No two have the same name: Tom never meets Tom, and two toys never have
        the same color. toy2, like toy, comes from the table of toys."""
        self.facts = {}
        animal = ["animal"] if self.random() < 0.3 else []
        draws = [(role, table) for role in ("hero", "friend", "other")
                 for table in [self.choose(["girl", "boy"]), "trait", "hobby"] + animal]
        for role, table in draws + [(role, role.rstrip("23")) for role in roles]:
            for column, cell in self.choose(self.tables[table]).items():
                self.facts[f"{role}.{column}"] = self.expand(cell)
        names = [fact for key, fact in self.facts.items() if key.endswith(".name")]
        if len(set(names)) < len(names):
            self.cast(roles)

    def fact(self, match):
        """{toy} is its name, {toy.use} another fact of it, {he} a fact of the hero; {He} gets a
        capital."""
        key = match[1].lower()
        fact = next(self.facts[k] for k in (key, f"hero.{key}", f"{key}.name") if k in self.facts)
        return fact if match[1] == key else capital(fact)

    def fill(self, text):
        while "{" in text:                      # facts may contain facts
            text = re.sub(r"\{([\w.]+)\}", self.fact, text)
        return text

    def speech(self, match):
        sign, speaker, words, mark = match.groups()
        who = self.fill(CALLED.get(speaker, "{%s}" % speaker))
        verb = self.choose(VERBS[sign + mark])
        how = "" if mark == "!" else self.choose(MANNERS[sign])
        if self.random() < 0.4:
            return f'{capital(who)} {verb}{how}, "{words}{mark}"'
        said = f"{verb} {who}" if self.random() < 0.7 else f"{who} {verb}"
        return f'"{words}{"," if mark == "." else mark}" {said}{how}.'

    def story(self):
        roles, plot = self.choose(self.plots)
        self.cast(["elder", "home"] + roles)
        text = self.fill(self.expand(plot).replace(" // ", "\n\n"))
        return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", SPEECH.sub(self.speech, text))


def capital(text):
    return text[:1].upper() + text[1:]


def toy_stories(seed):
    """Yields TOY_BYTES of stories, all different, so none is in both training and validation."""
    teller, told, size = Teller(seed), set(), 0
    while size < TOY_BYTES:
        story = teller.story().encode()
        if story not in told:
            told.add(story)
            size += len(story)
            yield story


PHRASES = """
== intro: [Once upon a time, there was|Once there was|There once was|Long ago, in a {home}, there
lived|In a {home}, there lived|Once upon a time, in a {home}, there lived] a [[little|young]
{hero.kind} [named|called] {hero}. {He} was [very|always|often] {hero.trait} and [loved|liked] to
{hero.hobby}.|{hero.trait} [little|young] {hero.kind} [named|called] {hero}, who [loved|liked] to
{hero.hobby}.]|{hero} was a {hero.trait} [little|young] {hero.kind} who lived in a {home}. [More
than anything,|Above all,|Every day,|Whenever {he} could,] {he} [loved|liked] to {hero.hobby}.
== day: One [day|morning|afternoon|quiet day|quiet morning]|[One|On a]
[Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday][| morning| afternoon]|[Early|Late] one
morning
== pal: {friend}, {his} [best |good |old |]friend,|{friend} from [next door|across the street|down
the road]|{His} [best |good |old |]friend {friend}|{friend}, the {friend.trait} {friend.kind} [next
door|across the street|down the road],
== happy: happy|glad|very happy|so happy|full of joy|very glad|happy and proud
== sad: sad|very sad|upset|unhappy|close to tears|so sad|in a bad mood
== soon: Soon|After a while|Before long|A little later|Not much later|After an hour|A bit later
== learned: {hero} [learned|never forgot|understood now|saw now] that|From that day on, {hero} knew
that|That [day|is how] {hero} learned that|[So|Now] {hero} knew that
== good: good|wise|best|right|nice
== went: ran|went|walked|hurried|rushed
== aside: [Far away|Nearby|Somewhere|In the distance|Not far away], [a dog barked|a bell rang|a bird
sang|somebody laughed|somebody whistled|a cart rolled by|children sang|a rooster crowed].|
== close: [That [night|evening]|In the evening|Before going to bed|Back home], {hero}
{hero.recall}.|{hero} was <happy> [all day long|for the rest of the day|when {he} went to bed].|
"""

TABLES = """
== girl: kind he him his name
girl / she / her / her / [Lily|Mia|Anna|Sue|Emma|Rose|Nora|Ella|Zoe|Lucy|Amy|Ruby|
 Clara|Ivy|Grace|Molly|Jane|Tina|Sara|Kate|Maya|Lena|Daisy|Nina|Hazel|Olive|Wendy|Polly]
== boy: kind he him his name
boy / he / him / his / [Tom|Ben|Max|Sam|Tim|Leo|Jack|Finn|Noah|Owen|Luke|Adam|
 Eli|Oscar|Henry|Paul|Nick|Peter|Theo|Felix|Hugo|Simon|Otto|Rudy|Milo|Carl|Dan|Fred]
== animal: kind
[rabbit|fox|bear|mouse|squirrel| hedgehog|kitten|puppy|badger|raccoon|monkey|panda]
== elder: name he him his
[mom|mother|grandma] / she / her / her; [dad|father|grandpa] / he / him / his
== trait: trait
[cheerful|curious|quiet|playful|clever|lively|gentle|dreamy|funny|
 busy|shy|polite|friendly|merry|thoughtful|kind]
== hobby: hobby recall
draw pictures / drew a [big|small|colorful] picture of the day
sing / made up a [long|short|little] song about the day
tell stories / told the [stars|moon|clouds] the story of the day
write in a little book / wrote [all of it|every word of it] in the little book
count the stars / counted [twenty|thirty|forty|fifty] stars
play the flute / played a [soft|happy|slow|new] tune on the flute
collect stones / put [one more|a round|a smooth] stone into the box
collect leaves / laid a [red|golden|brown] leaf between two books
build towers / built a tower as high as [the bed|the table|a chair]
talk to the birds / told the birds [all about it|everything]
pick flowers / put fresh flowers [by the window|on the table]
fold paper boats / folded [two|three|four|a dozen] paper boats
== home: name
[small|little|quiet|pretty] [village|town|house] [by the sea|near a river|on a hill]
[small|cozy|white| yellow] [house|cottage] [with a round door|with a red roof|behind the mill]
== color: name
[red|blue|green|yellow|purple|orange|pink|white| black|brown|silver|gray]
== toy: name use
ball / bounce; kite / fly; drum / beat; book / read; doll / hug; toy car / push; toy boat / sail
teddy bear / hug; whistle / blow; hoop / roll; flag / wave; bell / ring; flute / play; wagon / pull
yo-yo / spin; umbrella / twirl; toy train / push; ribbon / wave; lantern / light; pinwheel / spin
rattle / shake; trumpet / play; top / spin; jump rope / swing; tambourine / shake
== place: name at spot spot2
the park / in the park / [under a bench|behind a swing] / [near the slide|around the fountain]
the beach / on the beach / [behind a rock|next to a boat] / [near the steps|by the sand castles]
the forest / in the forest / [under a pine|in a hollow log] / [along the path|among the ferns]
the farm / on the farm / [behind the barn|under a cart] / [by the well|in the stable]
the meadow / in the meadow / [under an oak|behind a bush] / [by the brook|in the tall grass]
the market / at the market / [under a cart|behind a barrel] / [near the bakery|by the baskets]
the hill / on the hill / [under a tree|behind the windmill] / [near the bushes|along the fence]
the lake / at the lake / [under the bridge|behind the reeds] / [on the dock|near the boathouse]
== marvel: name
a [yellow|blue|white] butterfly; a [shiny|green|tiny] beetle; a row of ants; a [tiny|slow] snail
a hopping frog; a [funny|strange] cloud; a singing bird; a rainbow; a [blue|green] dragonfly
== mark: name
[a star|two stripes|three dots|a tiny heart| a half moon|a small scratch|a picture of a
 [fish|tree|crown]]
== number: name few
five / two; six / [two|three]; seven / [two|three]; eight / [two|three|four]; nine / [three|four]
ten / [three|four|five]; twelve / [four|five|six]
== sum: name given left
four / two / two; five / two / three; five / three / two; six / two / four; six / four / two
seven / three / four; seven / four / three; eight / three / five; eight / five / three
nine / four / five; nine / six / three; ten / four / six; ten / seven / three; ten / two / eight
== fruit: name
[apples|pears|plums|peaches|oranges|bananas| cherries|strawberries|cookies|muffins|pancakes|nuts]
== weekday: name next
Monday / Tuesday; Tuesday / Wednesday; Wednesday / Thursday; Thursday / Friday; Friday / Saturday
Saturday / Sunday; Sunday / Monday
== weather: name it sign why event bad good
raincoat / it / [Gray|Dark|Heavy] clouds hung over the [roofs|trees] / [It is going to rain|It will
 rain] / [it began to pour|a heavy shower came down|it rained [hard|a lot]] / was [soon wet|wet from
 head to toe] / [stayed|kept] dry
mittens / them / Snow lay on the [roofs|fields] / It is [freezing|very cold] outside / [an icy|a
 cold] wind [came up|came from the north|began to blow] / [shook|shivered] with cold / [stayed|kept]
 warm
sun hat / it / The sun [burned|blazed] in a blue sky / It will be [very|so] hot / [it grew|the day
 became] hotter and hotter / [had|got] a bad headache / felt [fine|well]
boots / them / Deep puddles lay on the road / It has rained all night / they had to cross
 [deep|thick] mud / [had|got] [cold|wet] feet / had [dry|warm] feet
scarf / it / The wind shook the [windows|trees] / The wind is [cold|cool] / the wind [grew
 stronger|became colder|began to howl] / [had|got] a sore throat / [felt|stayed] warm
== rescue: name trouble free need help
bird / was caught in a thorn bush / [pushed|bent] the thorns aside / {hero} lost {his} way in the
 fog / It flew ahead and [sang|called], and {hero} [followed|went after] it [all the way |]home
bee / was lying in a puddle with wet wings / lifted it out [on a leaf|with a straw] / {hero} had no
 present for {friend}'s birthday / It showed {him} a tree full of [honey|sweet honey], and {friend}
 got a [big|whole] jar of it
frog / was stuck in a deep bucket / tipped the bucket over / {hero} dropped {his} {elder}'s ring
 into the pond / It [dived|swam] to the bottom and [brought the ring back|came up with the ring]
firefly / was caught in a spider's web / [broke|cut] the threads [with a twig|one by one] / night
 fell while {hero} was still in the forest / It lit up the [path|road] [all the way home|until {he}
 was home]
donkey / was stuck in a ditch / laid [branches|boards|stones] under its hooves / {hero}'s wagon sank
 into the mud / It pulled the wagon out [with one strong tug|step by step]
== plant: name grown gift
pumpkin / a pumpkin as big as a [chair|wheel] lay in the grass / cooked soup for [the whole
 street|all the neighbors]
sunflower / a [tall|bright] sunflower looked over the fence / [gave|fed] its seeds to the birds
tomato / a [tall|strong] plant was full of [red|ripe] tomatoes / took a [basket|bowl] of them to
 {friend}
melon / [three|four|five] round melons lay in the sun / gave [everybody|{friend}] a [cool|sweet]
 slice
bean / [long|green] beans hung from a pole / cooked a [big|whole] pot of them
strawberry / [sweet|red] strawberries shone under the leaves / made [six|eight|nine] jars of jam
== dish: name a b c
cake / [flour|sugar] / [eggs|butter|milk] / [honey|cherries|nuts|lemons]
soup / [carrots|turnips] / [onions|beans|peas] / [potatoes|tomatoes|mushrooms]
fruit salad / [apples|pears] / [plums|grapes|bananas] / [oranges|peaches|berries]
pizza / [cheese|dough] / [tomatoes|onions] / [mushrooms|olives|peppers]
"""

PLOTS = """
== lost: toy color place marvel
<intro> [{His} {elder} had given {him}|{He} had|{He} owned] a {color} {toy}, and {he} [liked|loved]
to {toy.use} it [every day|all day long|before breakfast|after lunch|when nobody was around].
<aside> // <day>, {hero} took the {toy} to {place}. <soon>, {he} saw {marvel}. To [get closer|see it
better|have a better look], {he} [put|left|laid] the {toy} {place.spot}. <soon>, [it was time to go
home|{his} {elder} called {him} home|{he} got hungry and went home]. // [At home|In the
evening|Before dinner|After dinner], {hero} looked for the {toy}, but [it was gone|{he} could not
find it]. @hero "[Oh no|Oh dear|Help]! My {color} {toy} is [lost|gone|missing]!" {He} [was
<sad>|began to cry|looked under the bed]. <pal> [heard {him}|came by|knocked at the door]. @friend
"Do not [worry|cry|be sad]. Where did you [go|play] today?" @@hero "[I was|I played|I was all alone]
{place.at}." // [The two of them|Together they|So they] <went> to {place}. First they looked
{place.spot2}, but [nothing was there|it was not there|they found only [an old shoe|a stone|dry
leaves|a broken cup]]. @friend "What did you [see|do] [|when you were ]here?" @@hero "I saw
{marvel}. [Now I remember! I|Wait! I|Then I] [put|left] the {toy} {place.spot}!" [They looked there,
and|{friend} ran there, and|And indeed,] there [it was|was the {color} {toy}]. <learned> [it is
<good> to put things back|two can find what one has lost|it [helps|is <good>] to [think back|stay
calm]]. <close>
== borrow: toy color weekday
<intro> <pal> had a {color} {toy}. @hero "[May|Can] I borrow your {toy}[|, please]?" @@friend
"[Yes|All right|Of course], but [bring it back|I need it back|I want to {toy.use} it myself] on
{weekday}. [Do you promise|Can you promise that]?" @@hero "[Yes, I promise|I promise]!" [All week
long|Every day|From morning to night], {he} [was busy with|had fun with|played with] the {toy}.
<aside> // [[When {weekday} came|On {weekday}], {hero} wanted to {toy.use} the {toy} [once more|a
little longer]. But {he} [thought of|remembered] the promise and <went> to {friend}. @hero "It is
{weekday}, and here is your {color} {toy}." @@friend "[Thank you! I|I] knew [I could trust you|you
would keep your word]. You may borrow [it again|anything you like]." <learned> [people trust those
who keep their word|a kept promise makes friends happy|it feels good to keep a promise]. <close>
|When {weekday} came, {hero} [forgot|did not think of] the promise. {friend} [waited all day|sat at
the window|waited until dark], but nobody came. On {weekday.next}, {hero} [remembered|saw the {toy}
on {his} bed] and <went> to {friend}. @hero "Here is your {toy}. [I am sorry that I am late|I am so
sorry]." @@friend "You promised to bring it on {weekday}, and now it is {weekday.next}." {hero}
[looked at the floor|was <sad>|had no answer] and [swept {friend}'s yard|gave {friend} a
picture|carried {friend}'s bag all week] to make up for it. <learned> [a broken promise makes
friends sad|a promise must be kept|it is hard to win back trust].]
== weather: weather place
<intro> <day>, {he} wanted to meet {friend} {place.at}. {weather.sign}. @elder "{weather.why},
{hero}. [Do not forget|Put on|You will need] your {weather}." // [@@hero "[Yes|All right|Of course],
{Elder}." {He} [took|got|pulled] the {weather} [from the hook|from the closet|from the shelf] and
[ran off|set out|left the house]. <aside> <soon>, {weather.event}. {hero} {weather.good}, but
{friend} had left {friend.his} {weather} at home and {weather.bad}. @friend "I wish I had my
{weather} [too|with me]!" @@hero "[Take mine for a while|You can have mine for a while|We can take
turns with mine]." <learned> it is <good> to [listen to good advice|think ahead|be ready]. <close>
|@@hero "[No|Oh no], I do not [need|want|like] {weather.it}!" {He} [ran out|left] without
{weather.it}. <aside> {friend} was already {place.at} and had {friend.his} {weather} on. <soon>,
{weather.event}. {friend} {weather.good}, but {hero} {weather.bad}. // [At home|Back home|In the
evening], {his} {elder} gave {him} a [cup of tea|glass of water|bowl of soup] and did not scold
{him}. @hero "[Now I know|Now I see|I see now] why I need my {weather}." The next [day|morning]
looked [just |]the same, and {hero} put on {his} {weather} before anyone [could say a word|told
{him} to]. <learned> it is <good> to listen to [those who know more|{his} {elder}|good advice].]
== rescue: rescue number
<intro> <day>, {hero} [met|found|saw] a [little|small|young] {rescue}. It {rescue.trouble}. @rescue
"[Help|Please help|Help me, please]!" [Others had just walked by|{friend} said that there was no
time|Nobody else had stopped], but {hero} [knelt down|came closer|felt sorry for it] and
{rescue.free}. @rescue "[Thank you|You are kind], {hero}. I will [not forget this|always remember
it]." <aside> // {Number} [days|weeks] later, {rescue.need}. {He} [was <sad>|did not know what to
do|sat down and sighed]. [Then|Suddenly|At that moment] {he} heard a [small|soft|clear] voice. It
was the {rescue}. @rescue "[You helped me when I {rescue.trouble}|Once I {rescue.trouble}, and you
helped me]. Now [I will help you|it is my turn]." {rescue.help}. {hero} [thanked the {rescue} [again
and again|with all {his} heart]|said thank you [twice|[three|ten] times]]. <learned> [kindness comes
back|even a [small|new] friend can be a big help|it is <good> to help others[|, big or small]].
<close>
== gift: toy color color2 number
<intro> <day>, {he} talked with {friend} about colors. @friend "[My favorite color is {color}|I like
{color}[| best of all]]. What [color do you like|is your favorite color], {hero}?" @@hero "I like
{color2} best." {Number} [days|weeks] later, it was {friend}'s birthday. [In the shop|At the
market], {hero} [saw|found] [a {color} {toy} and a {color2} {toy}|a {color2} {toy} and a {color}
{toy}], but [{his} coins were|{his} money was] enough for only one. <aside> // [[The {color2} one
looked nicer to {him}, but {he}|{He} thought hard, and then {he}|{He} closed {his} eyes and]
remembered [{friend}'s words|what {friend} had said] and [bought|chose|took] the {color} one. [At
the party|In the evening], {friend} opened the box. @friend "A {color} {toy}! [You remembered|Just
what I wanted]!" {friend.He} wanted to {toy.use} it at once. <learned> [the best gift is chosen with
the other in mind|a good friend listens]. <close>
|{He} [liked the {color2} one so much that {he}|forgot what {friend} had said and] bought it. [At
the party|In the evening], {friend} opened the box and said thank you, but {friend.his} smile was
small. Then {hero} remembered. @hero "[You like {color}, and I bought what I like|I forgot that you
like {color}]. [Wait here|Come with me]!" {He} <went> back to the shop and changed it for the
{color} one. Now {friend} [had a big smile|was <happy>]. <learned> [a gift should please the one who
gets it|it is <good> to think of [what others like|others]]. <close>]
== seed: plant number
<intro> <day>, {his} {elder} gave {him} a {plant} seed. @elder "[Plant it|Put it in the ground] and
water it [every day|well]. It [needs|takes] {number} days to come up." {hero} [made|dug] a
[little|small] hole [behind the house|by the fence|next to the well|near the back door] and put the
seed in. <aside> // [{He} watered it [every morning|every evening|before breakfast]. After
{number.few} days, there was [still |]nothing to see. @friend "[It is dead|Nothing will come]. [Dig
it up|Forget about it]!" @@hero "No, it needs {number} days." {He} [went on|did not give up|waited].
|But after {number.few} days, {he} [could not wait any longer|lost patience]. {He} dug up the seed
[to look at it|to have a look], and the [thin|tiny] root broke. @elder "I said {number} days, not
{number.few}. Here is another seed." This time, {hero} [counted the days on the wall|watered it and
waited|left it alone].] After {number} days, a [green|tiny|pale|curly] leaf [peeped out|came
up|stood there]. [In the summer|When summer came|Some weeks later], {plant.grown}, and {hero}
{plant.gift}. <learned> [good things take time|it is <good> to [wait|be patient]|nobody can hurry a
seed]. <close>
== owner: toy color color2 place mark mark2
<intro> <day>, {he} found a {toy} {place.spot} {place.at}. It was {color} and had {mark} on it. [It
was pretty, and {he} wanted to keep it.|{He} liked it a lot.|It looked [almost |]new.] But {he}
thought that somebody must [miss it|be looking for it]. <aside> So {he} <went> to {friend}. @hero
"Did you lose a {toy}?" // [@@friend "Yes! [Mine is|It is] {color2}[| with {mark2}]." @@hero "Then
this one is not yours." {He} [walked on|went on] and met {other}. @other "[Have you seen my {toy}|I
lost my {toy}. Have you seen it]? It is {color} and has {mark} on it." @@hero "Then [this is yours|I
have it here]!" {other} was <happy>
|@@friend "Yes! It is [all |]{color} and has {mark} on it." @@hero "Then [this is yours|I have it
here]!" {friend} was <happy>
|@@friend "Yes, it is mine!" @@hero "Then what is on it?" @friend "Let me think. Is it {mark2}?"
@@hero "No, it is not." {friend} [blushed|turned red] and went away. <soon>, {other} came by,
[looking at the ground|looking everywhere]. @other "My {color} {toy} is gone. It has {mark} on it."
{hero} gave it to {other.him} at once. {other} was <happy>] and [gave {him} a hug|said thank you
three times|let {him} {toy.use} it all afternoon]. <learned> [a thing one finds belongs to
someone|it is <good> to give back what one finds|making somebody happy is better than having one
more toy]. <close>
== cook: dish
<intro> <day>, {hero}, {friend}, and {other} [wanted|planned] to make a [big |]{dish} for {hero}'s
{elder}. @hero "I will bring the {dish.a}." @@friend "[Then I|I] will [bring|get] the {dish.b}."
@@other "[And I|I] will [bring|get] the {dish.c}." <soon>, they met [in {hero}'s kitchen|at {hero}'s
house] and [began|set to work|got to work]. <aside> // The {dish} [looked|smelled] [good|wonderful],
but {his} {elder} [tasted it and stopped|made a funny face|put down the spoon]. [@elder "I can taste
the {dish.b} and the {dish.c}. [What is missing|Is that all]?" @@hero "Oh no! I forgot the
{dish.a}!" {hero}|@elder "I can taste the {dish.a} and the {dish.c}. [What is missing|Is that all]?"
@@friend "Oh no! I forgot the {dish.b}!" {friend}|@elder "I can taste the {dish.a} and the {dish.b}.
[What is missing|Is that all]?" @@other "Oh no! I forgot the {dish.c}!" {other}] <went> to the shop
and came back [out of breath|with a full bag|before long]. They made a new {dish}, and [this
time|now] it was [perfect|delicious|just right]. <learned> [every [part|little thing]
counts|[friends need|a team needs] one another|a mistake can be put right]. <close>
== trade: toy color toy2 color2 toy3 color3
<intro> {He} had a {color} {toy}, {friend} had a {color2} {toy2}, and {other} had a {color3} {toy3}.
<day>, {hero} met {friend}. @hero "[I like your {toy2}|Your {toy2} is so nice]. [Will you trade it
for|Do you want to trade it for] my {toy}?" @@friend "[Yes|All right|Of course]!" So {hero}
[got|took|now had] the {color2} {toy2}. <soon>, {he} met {other} and liked the {toy3} even more.
They traded, too, and {hero} went home with the {color3} {toy3}. <aside> // In the evening, {he}
[missed|longed for|wanted] {his} old {toy}[| so much]. {He} <went> to {friend}. @hero "[Can|May] I
have my {toy} back?" @@friend "[Only if I get|Yes, but then I want] my {toy2} back." But {other} had
the {toy2} now. So {hero} <went> to {other}, gave back the {color3} {toy3}, and got the {color2}
{toy2}. Then {he} [brought|took] it to {friend} and got the {color} {toy}. [Now|At last], everyone
had the same things as before. <learned> [it is <good> to think [first|twice|before one trades]|old
things are often the best|new things are not always better]. <close>
== share: fruit sum
<intro> <day>, {his} {elder} gave {him} {sum} {fruit}. On the way to the [park|lake|meadow], {he}
met {friend}, who [was hungry|had no lunch]. <aside> @friend "[May|Can] I have some of your
{fruit}[|, please]?" // [@@hero "[Of course|Yes|Sure]! [Take|Here are] {sum.given}." So {hero} had
{sum.left} left[|, and that was enough]. The next day, {hero} had forgotten {his} lunch. {friend}
[saw it|noticed it] and [broke {friend.his} bread in two|opened {friend.his} bag]. @friend
"Yesterday you gave me {sum.given} {fruit}. [Today I share with you|Now it is my turn]." <learned>
[who shares is never alone|sharing comes back|it is <good> to share[| with others]]. <close>
|@@hero "No, all {sum} are mine!" {friend} [went away|walked on] and was <sad>. {hero} sat down
[alone|under a tree] to eat, but {he} was not [really |]hungry anymore. {He} [got up|jumped up] and
ran after {friend}. @hero "I am sorry. I have {sum} {fruit}, and {sum.given} of them are for you."
Now {he} had only {sum.left}, but [they tasted twice as good|eating together was much nicer].
<learned> [it is <good> to share|sharing makes [everything|{fruit}] taste better|it is no fun to eat
alone]. <close>]
"""

if __name__ == "__main__":
    main(run)
