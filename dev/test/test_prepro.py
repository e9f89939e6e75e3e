"""
Checks prepro_tinystories.py and the scripts compare.py, report.py and figures.py in dev/tools.

    python3 dev/test/test_prepro.py     from the project's folder; needs only the standard library

Downloads come from a small server on this machine, which breaks them in every way it can. Without
sentencepiece, what needs it is not tested.
"""
import hashlib
import html.parser
import http.server
import os
import re
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from array import array

import harness
from harness import check, read, write

PREPRO = os.path.abspath("prepro_tinystories.py")
COMPARE, REPORT, FIGURES = [os.path.abspath(f"dev/tools/{name}.py")
                            for name in ("compare", "report", "figures")]
# Of the tokens of the toy stories with --seed 1. If the grammar changes on purpose, so do these.
TOY_SHA256 = {"train.bin": "a2dc2adab7719cc8fc25f8f06ef2ed96cb955e79daaa1a3d1a11d24402822999",
              "val.bin": "bdb2d09d706865049ca60ef0bd303cb95f9af09119ff1a66f7393ec4da9f8a3a"}
harness.prefix = "prepro: "


def run(script, *arguments, **environment):
    return harness.run(sys.executable, script, *arguments, **environment)


def prepro(*arguments, **environment):
    return run(PREPRO, *arguments, **environment)


def check_error(what, result, words):
    """Status 1 and one line on stderr, perhaps after lines of progress, which contains the words
    and fits on two lines of a terminal."""
    status, _, errors = result
    scripts = "prepro_tiny", "compare", "report", "figures"
    lines = [line for line in errors.splitlines() if line.startswith(scripts)]
    good = status == 1 and len(lines) == 1 and words in lines[0] and "Traceback" not in errors
    good = good and len(lines[0]) < 160
    check(good, f"error: {what}", f"status {status}: {errors}")


def tokens_of(path):
    """The tokens of a token file. Raises an error if the header is wrong."""
    data = read(path)
    header = struct.unpack("<256i", data[:1024])
    tokens = array("H", data[1024:])
    if sys.byteorder == "big":
        tokens.byteswap()
    split = re.match("[a-z]+", os.path.basename(path))[0]
    files = [name for name in os.listdir(os.path.dirname(path)) if name.startswith(split)]
    checksum = zlib.crc32(read(os.path.join(os.path.dirname(path), "tokenizer.bin")))
    number = int((re.findall(r"\d+", os.path.basename(path)) or "0")[0])
    if header[:4] != (20240520, 1, len(tokens), 0) or any(header[7:]) \
            or header[4] % 2**32 != checksum or header[5:7] != (len(files), number):
        raise ValueError(f"{path}: bad header {header[:8]}")
    return tokens


def stories_of(path):
    """The texts of a token file of bytes: each BOS, a space, the text."""
    stories = []
    for token in tokens_of(path):
        if token == 1:
            stories.append(bytearray())
        else:
            stories[-1].append(token - 3)
    if not all(story.startswith(b" ") for story in stories):
        raise ValueError(f"{path}: a story without a space before it")
    return [bytes(story[1:]) for story in stories]


def test_toy_stories():
    for folder, hash_seed in (("toy", "0"), ("toy2", "77")):
        status, _, errors = prepro("--out", folder, PYTHONHASHSEED=hash_seed)
        check(status == 0, f"toy stories, hash seed {hash_seed}", errors)
    train, val = stories_of("toy/train.bin"), stories_of("toy/val.bin")
    check(3e6 < sum(map(len, train)) < 7e6, "toy stories: several MB", sum(map(len, train)))
    check(not set(train) & set(val) and len(set(train)) == len(train),
          "toy stories: all different, none in both training and validation")
    check(max(tokens_of("toy/train.bin")) < 259, "toy stories: tokens are bytes")
    for name, expected in TOY_SHA256.items():
        digests = [hashlib.sha256(read(f"{folder}/{name}")[1024:]).hexdigest()
                   for folder in ("toy", "toy2")]
        check(digests == [expected] * 2, f"toy stories: {name} has the same bytes everywhere",
              digests)
    status, text, _ = prepro("--show", "2")
    check(status == 0 and text.count("<|endoftext|>") == 2, "--show prints stories", text[:80])


def test_tokenizer():
    data, at, pieces = read("toy/tokenizer.bin"), 4, []
    while at < len(data):
        score, length = struct.unpack_from("<fi", data, at)
        pieces.append(data[at + 8:at + 8 + length])
        at += 8 + length
    check(len(pieces) == 259 and pieces[3:] == [bytes([i]) for i in range(256)],
          "tokenizer.bin: 259 pieces, ids 3 to 258 the bytes themselves", len(pieces))
    check(struct.unpack_from("<i", data)[0] == max(map(len, pieces)),
          "tokenizer.bin: begins with the length of the longest piece", data[:4])


def test_input():
    stories = [b"Story %d.\n\nIt has two paragraphs. \xc3\xa9 \xff" % i for i in range(40)]
    write("mine.txt", b"\n<|endoftext|>\n".join([b"", b"  \n"] + [b" %s \n" % s for s in stories]))
    status, _, errors = prepro("--input", "mine.txt", "--out", "mine")
    check(status == 0, "--input", errors)
    train, val = stories_of("mine/train.bin"), stories_of("mine/val.bin")
    check(sorted(train + val) == sorted(stories),
          "--input: every story comes back, stripped, even with bytes that are not UTF-8", val)
    check(len(val) == 2, "--input: every 20th story is held out", len(val))
    write("other.txt", b"The one story to validate on.")
    prepro("--input", "mine.txt", "mine.txt", "--val-input", "other.txt", "--out", "mine",
           "--overwrite")
    check(len(stories_of("mine/train.bin")) == 80
          and stories_of("mine/val.bin") == [b"The one story to validate on."],
          "--input of two files, --val-input")
    whole = tokens_of("mine/train.bin")
    status, _, errors = prepro("--input", "mine.txt", "mine.txt", "--val-input", "other.txt",
                               "--out", "mine", "--shard-tokens", "1000", "--overwrite")
    shards = sorted(name for name in os.listdir("mine") if name.startswith("train"))
    joined = sum((tokens_of(f"mine/{name}") for name in shards), array("H"))
    check(len(shards) > 2 and "train.bin" not in shards and joined == whole,
          "--shard-tokens: the shards together are the whole, and train.bin is gone", shards)
    prepro("--input", "mine.txt", "--out", "mine", "--overwrite")
    left = sorted(name for name in os.listdir("mine") if name.startswith("train"))
    check(left == ["train.bin"], "one file again: the old shards are gone", left)
    before = read("mine/train.bin")
    check_error("a missing file",
                prepro("--input", "mine.txt", "none.txt", "--out", "mine", "--overwrite"),
                "none.txt")
    check(read("mine/train.bin") == before, "an error leaves the old files as they were")
    write("big.txt", b"many words " * 10000)
    status, _, errors = prepro("--input", "big.txt", "mine.txt", "--val-input", "other.txt",
                               "--out", "big")
    text = b" ".join(stories_of("big/train.bin"))
    check(status == 0 and text.count(b"many words") == 10000,
          "a story of 110 KB is cut and nothing is lost", text.count(b"many words"))
    prepro("--input", "mine.txt", "--out", "shards", "--shard-tokens", "1")
    shards = sum(name.startswith("train") for name in os.listdir("shards"))
    check(shards > 1000 and len(tokens_of(f"shards/train_{shards - 1}.bin")) == 1,
          "--shard-tokens 1: more than 1000 shards", shards)


def test_encodings():
    """UTF-8 may begin with a byte-order mark, which is not text. UTF-16 and UTF-32 are refused."""
    text = "\n<|endoftext|>\n".join(f"Zo\u00eb has {i} \u732b." for i in range(40))
    write("bom.txt", text.encode("utf-8-sig"))
    write("plain.txt", text.encode())
    for name in ("bom", "plain"):
        prepro("--input", f"{name}.txt", "plain.txt", f"{name}.txt", "--out", name)
    check(read("bom/train.bin") == read("plain/train.bin"), "encodings: UTF-8 with a mark")
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"):
        write("wide.txt", text.encode(encoding))
        name = encoding[:6].upper()
        check_error(f"encodings: {encoding}", prepro("--input", "wide.txt", "--out", "wide"), name)
        result = prepro("--input", "plain.txt", "--val-input", "wide.txt", "--out", "wide")
        check_error(f"encodings: {encoding}, the second file", result, name)
    write("wide.txt", ("\u732b" * 9).encode("utf-16"))      # only its byte-order mark shows it
    check_error("encodings: utf-16 without a space",
                prepro("--input", "plain.txt", "wide.txt", "--out", "wide"), "iconv")
    write("wide.txt", text.encode() * 999 + b"\0")
    check_error("encodings: a zero byte at the end",
                prepro("--input", "wide.txt", "--out", "end"), "or not text")
    check(not os.path.exists("wide") and os.listdir("end") == [],
          "encodings: nothing is left behind")
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    status, _, errors = prepro("--input", "plain.txt", "--out", os.fsdecode(b"caf\xe9"), **plain)
    check(status == 0 and os.path.exists(b"caf\xe9/train.bin"),
          "encodings: a folder that is not UTF-8, in the locale C", errors)


def content(folder):
    """The bytes of all files in a folder and below it."""
    return {os.path.join(at, name): read(os.path.join(at, name))
            for at, _, names in os.walk(folder) for name in names}


def wait_for(path, child):
    while child.poll() is None and not os.path.exists(path):
        time.sleep(0.01)


def test_ownership():
    """Without --overwrite, a run deletes and replaces only what it wrote itself."""
    text = b"\n<|endoftext|>\n".join(b"A cat sat on mat %d." % i for i in range(50))
    for folder in ("own/unfinished", "own/prepro.unfinished"):
        os.makedirs(folder)
        write(f"{folder}/a.txt", text)
        write(f"{folder}/train.bin", b"mine")
    write("own/tokenizer.model", b"not yours")
    before = content("own")
    for source in ("own/unfinished/a.txt", "own/prepro.unfinished/a.txt", "mine.txt"):
        check_error(f"ownership: a tokenizer.model of another program, --input {source}",
                    prepro("--input", source, "--out", "own"), "tokenizer.model already")
        check_error(f"ownership: a prepro.unfinished of another program, --input {source}",
                    prepro("--input", source, "--out", "own", "--overwrite"), "did not write")
    os.mkdir("link")
    os.symlink("../own/unfinished", "link/prepro.unfinished")
    os.remove("own/unfinished/a.txt")
    del before["own/unfinished/a.txt"]
    check_error("ownership: prepro.unfinished is a link", prepro("--out", "link"), "did not write")
    check(content("own") == before, "ownership: nothing is touched")
    write("a.txt", text)
    child = subprocess.Popen([sys.executable, PREPRO, "--out", "kill"])
    wait_for("kill/prepro.unfinished/train_000.bin", child)
    check_error("ownership: two runs at once",
                prepro("--input", "a.txt", "--out", "kill"), "in use")
    child.kill()
    child.wait()
    check(os.listdir("kill") == ["prepro.unfinished"], "ownership: kill -9 leaves one folder",
          os.listdir("kill"))
    write("kill/prepro.unfinished/train_001.bin", b"half")
    status, _, errors = prepro("--input", "a.txt", "--out", "kill")
    files = ["prepro.json", "tokenizer.bin", "train.bin", "val.bin"]
    check(status == 0 and sorted(os.listdir("kill")) == files,
          "ownership: what a killed run left is removed", errors)
    before = content("kill")
    status, said, errors = prepro("--input", "a.txt", "--out", "kill")
    check(status == 0 and "--overwrite makes it again" in said and content("kill") == before,
          "ownership: the same command again does nothing", said + errors)
    for arguments in ([], ["--input", "mine.txt"], ["--seed", "2"], ["--download"],
                      ["--input", "a.txt", "--val-fraction", "0.1"],
                      ["--input", "a.txt", "--shard-tokens", "99"]):
        check_error(f"ownership: {arguments}: other data is there",
                    prepro(*arguments, "--out", "kill"), "train.bin")
    check_error("ownership: an input that would be replaced", prepro(
        "--input", "kill/prepro.json", "--out", "kill", "--overwrite"), "replaced")
    for name, data in (("val.bin", None), ("train.bin", b"short"), ("prepro.json", b"\xff")):
        os.remove(f"kill/{name}")
        if data:
            write(f"kill/{name}", data)
        check_error(f"ownership: {name} is not as it was written",
                    prepro("--input", "a.txt", "--out", "kill"), "--overwrite")
        write(f"kill/{name}", before[f"kill/{name}"])
    check(content("kill") == before, "ownership: nothing is replaced")
    write("a.txt", text + b"More.")
    check_error("ownership: the same command with another text",
                prepro("--input", "a.txt", "--out", "kill"), "--overwrite")
    status, _, errors = prepro("--input", "mine.txt", "--out", "kill", "--overwrite")
    check(status == 0 and content("kill") != before, "ownership: --overwrite", errors)


# Runs prepro_tinystories.py, and sends it a signal before it removes or moves a file the n-th time.
STOPPED = """
import os, sys
script, number, n = sys.argv.pop(1), int(sys.argv.pop(1)), int(sys.argv.pop(1))
sys.path.insert(0, os.path.dirname(script))
import prepro_tinystories as prepro
def stopped(call):
    def count(*arguments):
        global n
        n -= 1
        if n == 0:
            os.kill(os.getpid(), number)
        return call(*arguments)
    return count
os.remove, os.replace = stopped(os.remove), stopped(os.replace)
prepro.main(prepro.run)
"""


def test_stopped():
    """Old and new files are never used together. Only kill -9 stops a run that replaces files."""
    for number, n in [(signal.SIGKILL, n) for n in range(1, 9)] + [(signal.SIGTERM, 2),
                                                                   (signal.SIGTERM, 7)]:
        folder = f"set{number}.{n}"
        prepro("--input", "mine.txt", "--out", folder)
        old = content(folder)
        status, _, errors = run("-c", STOPPED, PREPRO, str(int(number)), str(n), "--input",
                                "plain.txt", "--out", folder, "--overwrite")
        files = set(os.listdir(folder)) - {"prepro.unfinished"}
        changed = {name for name in files if read(f"{folder}/{name}") != old[f"{folder}/{name}"]}
        if number == signal.SIGTERM:
            check(status == 0 and changed == {"prepro.json", "train.bin", "val.bin"},
                  f"ownership: SIGTERM at file {n} is too late", errors)
        else:
            check(status == -number and ("tokenizer.bin" not in files or not changed
                                         or {"train.bin", "val.bin"} <= changed),
                  f"ownership: kill -9 at file {n} leaves no mixture",
                  f"{status}: {files}, {changed}: {errors}")


def test_special_files():
    os.mkfifo("pipe")
    os.mkdir("real")
    os.symlink("real", "linked")
    for path in ("pipe", "/dev/zero", "real"):
        check_error(f"special: --input {path}", prepro("--input", path, "--out", "x"), "not a file")
        check_error(f"special: --multiple-choice {path}",
                    prepro("--multiple-choice", path, "--out", "plain"), "not a file")
    for name in ("tokenizer.bin", "prepro.json"):
        os.mkfifo(f"real/{name}")
    check_error("special: tokenizer.bin is a pipe",
                prepro("--multiple-choice", "mine.txt", "--out", "real"), "not a file")
    check_error("special: prepro.json is a pipe",
                prepro("--input", "mine.txt", "--out", "real"), "not a file")
    for name in ("tokenizer.bin", "prepro.json"):
        os.remove(f"real/{name}")
    check_error("special: --out is a file", prepro("--input", "mine.txt", "--out", "mine.txt"),
                "mine.txt")
    status, _, errors = prepro("--input", "mine.txt", "--out", "linked")
    check(status == 0 and os.path.islink("linked") and os.path.exists("real/train.bin"),
          "special: --out is a link to a folder", errors)
    os.chdir("real")
    status, _, errors = prepro("--input", "../mine.txt", "--out", ".", "--overwrite")
    check(status == 0, "special: --out .", errors)
    os.chdir("..")
    os.symlink(PREPRO, "script.py")
    check(run("script.py", "--show", "1")[0] == 0, "special: the script itself is a link")


def test_endings():
    """Signals, closed and full standard files, empty values."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        child = subprocess.Popen([sys.executable, PREPRO, "--out", "stopped"],
                                 stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        wait_for("stopped/prepro.unfinished/train_000.bin", child)
        child.send_signal(number)
        errors = child.communicate()[1].decode()
        check(child.returncode == 128 + number and errors.count("\n") == 1
              and os.listdir("stopped") == [],
              f"endings: {number.name}: status, one line, no half-written file",
              f"{child.returncode}, {errors}, {os.listdir('stopped')}")
    for command, expected in (("--show 1 >&- 2>&-", 0), ("--help >&- <&- 2>&-", 0),
                              ("--show 1 > /dev/full", 1), ("--help > /dev/full", 1),
                              ("--input mine.txt --out full > /dev/full", 1),
                              ("--banana 2>&-", 1), ("--input mine.txt --out closed >&- 2>&-", 0)):
        status = subprocess.call(["sh", "-c", f'"$0" "$1" {command}', sys.executable, PREPRO],
                                 stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        check(status == expected, f"endings: {command}", status)
    check(len(stories_of("closed/train.bin")) == 38, "endings: no output gets into data")
    child = subprocess.Popen([sys.executable, PREPRO, "--show", "1000"], stdout=subprocess.PIPE)
    child.stdout.readline()
    child.stdout.close()
    check(child.wait() == 128 + signal.SIGPIPE, "endings: --show 1000 | head", child.returncode)
    done = subprocess.run(["sh", "-c", 'ulimit -f 100; "$0" "$1" --out disk', sys.executable,
                           PREPRO], stderr=subprocess.PIPE)
    check_error("endings: a full disk", (done.returncode, "", done.stderr.decode()), "disk: ")
    check(os.listdir("disk") == [], "endings: a full disk leaves nothing half-written",
          os.listdir("disk"))
    for option in ("--out", "--input", "--val-input", "--url", "--multiple-choice", "--vocab-size",
                   "--val-fraction", "--shard-tokens", "--seed", "--show"):
        check(prepro(option, "")[0] == 1 and not os.path.exists("data"), f"empty: {option}")
    check_error("empty: one of two", prepro("--input", "mine.txt", "", "--out", "x"), "empty")
    check_error("a message that quotes 4 kB", prepro("--input", "y" * 4000, "--out", "x"), "...")


def test_questions():
    """HellaSwag is prepared as in lm-evaluation-harness."""
    def context_and_ending(line):
        write("q.jsonl", b"\xef\xbb\xbf" + line.encode() + b"\n")
        result = prepro("--multiple-choice", "q.jsonl", "--out", "plain", "--overwrite")
        numbers = array("H", read("plain/q.bin")[1024:]) if result[0] == 0 else []
        texts, at = [], 5
        while at < len(numbers):
            tokens = numbers[at + 1:at + 1 + numbers[at]]
            texts.append(bytes(token - 3 for token in tokens if token > 2).decode())
            at += 1 + numbers[at]
        return texts[:2] or result

    for line, expected in (
            ('{"ctx": "How to x [title] Go. [step] Then", "endings": ["a [step] b", "c"]',
             [" How to x. Go. Then", " a b"]),
            ('{"ctx": "A man sits. he", "ctx_a": "A man sits.", "ctx_b": "he", "activity_label": '
             '"Sitting", "endings": ["stands", "c"]', [" Sitting: A man sits. He", " stands"]),
            ('{"ctx": "He sits.", "activity_label": "Sitting", "ctx_a": "A", "endings": ["a", "c"]',
             [" Sitting: He sits.", " a"]),
            ('{"ctx": "He  sits.", "ctx_a": "A", "ctx_b": "b", "endings": [" a [x] b. ", "c"]',
             [" He sits.", " a b."])):
        texts = context_and_ending(line + ', "label": 0}')
        check(texts == expected, f"--multiple-choice: {expected}", texts)
    good = '{"ctx": "a", "endings": ["b", "c"], "label": 0}'
    header = struct.unpack("<6I", read("plain/q.bin")[:24])
    check(header[4] == zlib.crc32(read("plain/tokenizer.bin")), "--multiple-choice: the checksum",
          header)
    write("q.jsonl", good.encode())
    before = read("plain/q.bin")
    check_error("--multiple-choice: other questions of that name",
                prepro("--multiple-choice", "q.jsonl", "--out", "plain"), "--overwrite replaces")
    check(read("plain/q.bin") == before, "--multiple-choice: the other questions stay")
    for _ in range(2):
        check(prepro("--multiple-choice", "q.jsonl", "--out", "bom")[0] == 0,
              "--multiple-choice: the same questions again")
    write("bom/own.jsonl.part", b"mine")
    write("bom/own.bin", good.encode())
    check_error("--multiple-choice: the questions themselves would be replaced",
                prepro("--multiple-choice", "bom/own.bin", "--out", "bom", "--overwrite"), "rename")
    check(read("bom/own.bin") == good.encode(), "--multiple-choice: the input stays")
    for old, new, words in (
            ('"ctx"', '"label": 1, "ctx"', "'label' occurs twice"), ("a", "\xe9", "line 2"),
            ("a", "a\0", "UTF-16"), ("0", "1.5", "1.5"), ("0", "true", "True"), ("0", "2", "label"),
            ('"b"', '""', "empty"), ('"b"', "7", "texts"), ('"a"', "null", "not a text"),
            ('"a"', '"", "activity_label": "", "ctx_a": "", "ctx_b": null', "not a text"),
            (good, "[1]", "line 2"), (good, "[" * 9999, "line 2"), ('"ctx"', '"text"', "'ctx'")):
        write("q2.jsonl", f"{good}\n{good.replace(old, new)}".encode("latin-1"))
        check_error(f"--multiple-choice: {old} becomes {new[:40]!r}",
                    prepro("--multiple-choice", "q2.jsonl", "--out", "plain"), words)
    check(not os.path.exists("plain/q2.bin"), "--multiple-choice: nothing is written")


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `files` in the way that the first part of the path names. tag: their version. breaks:
    does each answer end halfway?"""
    files = {}
    asked = []
    tag = '"one"'
    breaks = False

    def do_GET(self):
        way, name = self.path.strip("/").split("/")
        data, start = self.files[name], 0
        tag = {"weak": 'W/"any"', "dated": "Sun, 29 Nov 2026 06:00:00 GMT"}.get(way, self.tag)
        self.asked.append((name, self.headers.get("Range"), self.headers.get("If-Range")))
        place = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if self.headers.get("If-Range") != tag and way not in ("careless", "silent"):
            place = None
        if way == "missing":
            return self.send_error(404)
        if way == "page":
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", "4")
            self.end_headers()
            return self.wfile.write(b"page")
        if place and int(place[1]) >= len(data):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(data)}")
            return self.end_headers()
        if place and way != "norange" or way == "always206":
            start = int(place[1]) if place else 0
            self.send_response(206)
            start -= way == "repeats"       # sends one byte a second time
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        if way == "dated":
            self.send_header("Last-Modified", tag)
        elif way not in ("untagged", "page", "silent"):
            self.send_header("ETag", tag)
        if way != "nolength":
            self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start:len(data) // 2] if self.breaks else
                         data[start:] + b"more" if way == "longer" else data[start:])
        self.close_connection = True

    def log_message(self, *arguments):
        pass


def test_download():
    text = b"<|endoftext|>".join(b"A story to download, number %d. " % i * 20 for i in range(500))
    names = ["TinyStoriesV2-GPT4-train.txt", "TinyStoriesV2-GPT4-valid.txt"]
    Server.files = {names[0]: text, names[1]: text[:9000]}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}"

    def fetch(way, folder, *more, breaks=False):
        Server.breaks = breaks
        return prepro("--download", "--vocab-size", "259", "--out", folder,
                      "--url", f"{base}/{way}", *more)

    def arrived(folder):
        files = sorted(names + ["prepro.json", "tokenizer.bin", "train.bin", "val.bin"])
        return sorted(os.listdir(folder)) == files and read(f"{folder}/{names[0]}") == text

    status, _, errors = fetch("plain", "a")
    check(status == 0 and arrived("a"), "--download", errors)
    for way, tag in (("plain", Server.tag), ("dated", "Sun, 29 Nov 2026 06:00:00 GMT")):
        check_error(f"a download that breaks off, {way}", fetch(way, f"b{way}", breaks=True),
                    "again to resume")
        check(sorted(os.listdir(f"b{way}")) == [names[0] + ".part", names[0] + ".part.version"],
              "a broken download gets no final name", os.listdir(f"b{way}"))
        status, _, errors = fetch(way, f"b{way}")
        resumed = Server.asked[-2:] == [(names[0], f"bytes={len(text) // 2}-", tag),
                                        (names[1], None, None)]
        check(status == 0 and arrived(f"b{way}") and resumed,
              f"--download again resumes where it broke off, {way}", errors)
    fetch("plain", "c", breaks=True)
    status, _, errors = fetch("norange", "c")
    check(status == 0 and arrived("c"), "a server that ignores Range: starts over", errors)
    check_error("a file that is not there", fetch("missing", "d"), "404")
    fetch("plain", "g", breaks=True)
    status, _, errors = fetch("repeats", "g")
    check(status == 0 and arrived("g"), "a server that repeats a byte: starts over", errors)
    check_error("a web page instead of the file", fetch("page", "h"), "web page")
    check_error("a file without a length", fetch("nolength", "h"), "without a length")
    check_error("a part instead of the file", fetch("always206", "h"), "web page")
    status, _, errors = fetch("longer", "i")
    check(status == 0 and arrived("i"), "bytes beyond the length are ignored", errors)
    for size, what in ((len(text), "a whole"), (len(text) + 5, "too long a")):
        folder = f"j{size}"
        os.mkdir(folder)
        write(f"{folder}/{names[0]}.part", (text + b"other")[:size])
        write(f"{folder}/{names[0]}.part.version", f"{len(text)} {Server.tag}".encode())
        status, _, errors = fetch("plain", folder)
        check(status == 0 and arrived(folder), f"--download when there is {what} .part", errors)
    # The file changes after half of it was received. "dated" and "weak" give both versions the same
    # name: "dated" files differ only in length, and a weak tag does not count as a version.
    # "careless" and "silent" ignore If-Range; "silent" and "untagged" do not name a version.
    for way in ("plain", "careless", "silent", "untagged", "weak", "dated"):
        for change in (b"", b"One more story. " * 20):
            folder = f"v{way}{len(change)}"
            if way == "dated" and not change:
                continue
            Server.files[names[0]], Server.tag = text.upper() + change, '"old"'
            fetch(way, folder, breaks=True)
            Server.files[names[0]], Server.tag = text, '"one"'
            status, _, errors = fetch(way, folder)
            check(status == 0 and arrived(folder), f"a file that has changed, {way}, {len(change)} "
                  "bytes shorter: starts over", errors)
    os.mkdir("w")
    write(f"w/{names[0]}.part", b"mine")
    check_error("a .part of another program", fetch("plain", "w"), "--overwrite")
    check(read(f"w/{names[0]}.part") == b"mine", "a .part of another program is still there")
    check(fetch("plain", "w", "--overwrite")[0] == 0 and arrived("w"), "--overwrite replaces it")
    status, said, _ = fetch("plain", "a")
    check(status == 0 and "--overwrite makes it again" in said, "--download twice", said)
    server.shutdown()
    server.server_close()
    check_error("no server", fetch("plain", "e"), "cannot download")
    asked = len(Server.asked)
    os.mkdir("no")
    write("no/sentencepiece.py", b"raise ImportError('not here')\n")
    refused = prepro("--download", "--out", "f", "--url", base, PYTHONPATH="no")
    check_error("no sentencepiece", refused, "pip install sentencepiece")
    check(len(Server.asked) == asked, "without sentencepiece nothing is downloaded")


def test_pieces():
    try:
        import sentencepiece
    except ImportError:
        return
    status, _, errors = prepro("--input", "toy.txt", "--out", "bpe", "--vocab-size", "400")
    model = sentencepiece.SentencePieceProcessor(model_file="bpe/tokenizer.model")
    stories = []
    for token in tokens_of("bpe/val.bin"):
        if token == 1:
            stories.append([])
        else:
            stories[-1].append(token)
    texts = read("toy.txt").decode().split("\n<|endoftext|>\n")
    check(status == 0 and [model.decode(story) for story in stories] == texts[19:300:20],
          "--vocab-size 400: sentencepiece gives the stories back", errors)


def test_errors():
    for arguments, words in (
            (["--banana"], "--banana"), (["--vocab-size", "100"], "--vocab-size"),
            (["--vocab-size", "x"], "--vocab-size"), (["--input", "mine.txt"], "--out"),
            (["--input", "mine.txt", "--out", "x", "--download"], "cannot be used"),
            (["--val-input", "mine.txt"], "cannot be used"),
            (["--url", "http://x"], "cannot be used"),
            (["--download", "--url", "ftp://x"], "http://"), (["--show", "0"], "--show"),
            (["--input", "mine.txt", "--val-input", "mine.txt", "--val-fraction", "0.1",
              "--out", "x"], "--val-fraction"),
            (["--input", "other.txt", "--out", "x"], "too few stories")):
        check_error(" ".join(arguments), prepro(*arguments), words)
    status, text, _ = prepro("--help")
    check(status == 0 and "--download" in text, "--help", status)


def write_run(folder, gate, losses):
    os.makedirs(folder, exist_ok=True)
    log = "step,train_loss,val_loss,lr,grad_norm,ms,tokens_per_s\n"
    layers = "step,layer,attention_variance,mlp_variance,gate,grad_norm\n"
    for i, loss in enumerate(losses):
        log += f"{i},,{loss},,,,\n" if i == 0 else f"{i},{loss},{loss},0.001,1,10,1000\n"
        for layer in (1, 2):
            layers += f"{i},{layer},{layer},{2 * layer},{gate},{'' if i == 0 else 1}\n"
    write(f"{folder}/log.csv", log.encode())
    write(f"{folder}/layers.csv", layers.encode())
    write(f"{folder}/samples.txt", b"--- step 3 ---\nA story.\n")


def test_compare():
    write_run("base", "", [5, 4, 3, 2])
    write_run("gpas", "0.1", [5, 3, 2, 1])
    write_run("worse", "0.1", [5, 4, 3.5, 3])
    status, page, errors = run(COMPARE, "base", "gpas")
    saved = re.search(r"after\s+about\s+2\s+of\s+3\s+steps", page)
    check(status == 0 and saved and "A story." in page,
          "compare.py: how many steps GPAS saved", page + errors)
    status, page, errors = run(COMPARE, "base", "worse")
    check(status == 0 and "did not reach" in page, "compare.py: says that GPAS lost", page + errors)
    status, page, errors = run(COMPARE, "base", "gpas", PYTHONIOENCODING="ascii")
    check(status == 0 and page.isascii(), "compare.py: a page in ASCII", errors)
    check_error("compare.py: no folder", run(COMPARE, "base", "none"), "none")
    check_error("compare.py: an empty name", run(COMPARE, "base", ""), "empty")
    os.symlink("gpas", "a b \u00e9")
    for folders in (("base/", "./gpas/."), ("base", "a b \u00e9")):
        status, page, errors = run(COMPARE, *folders)
        check(status == 0 and "A story." in page, f"compare.py {folders}", errors)
    for command, expected in (("> /dev/full", 1), (">&- 2>&-", 0), ("--help > /dev/full", 1)):
        status = subprocess.call(["sh", "-c", f'"$0" "$1" base gpas {command}', sys.executable,
                                  COMPARE], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        check(status == expected, f"compare.py {command}", status)
    status, page, errors = run(COMPARE, "base", "gpas", LC_ALL="C", PYTHONUTF8="0",
                               PYTHONCOERCECLOCALE="0")
    check(status == 0 and page.isascii(), "compare.py in the locale C", errors)
    write_run("plain", "0.1", [5, 4, 3, 2.5])
    for name, stop_grad in (("gpas", "on"), ("plain", "off")):
        write(f"{name}/options.txt", f"norm pre\nstop-grad {stop_grad}\ngate-act silu\nsteps 9\n"
              .encode())
    write("plain/log.csv", read("plain/log.csv") + b"4,1.2")            # still being written
    write("plain/layers.csv", read("plain/layers.csv") + b"4,1,1,2,0.1,1\n")
    os.remove("plain/samples.txt")
    status, page, errors = run(COMPARE, "gpas", "plain")
    check(status == 0 and "pre + plain scale, step 3 of 9" in page and "no story yet" in page
          and "The second run did not reach" in page and "0.948" in page,
          "compare.py: two runs with gates, one training, one without a stop-gradient",
          page + errors)
    status, said, errors = run(REPORT, "base", "gpas", "plain", "a b \u00e9", "--out", "r.html")
    page = read("r.html").decode()
    reader = html.parser.HTMLParser()
    opened, words = [], []
    reader.handle_starttag = lambda tag, _: opened.append(tag)
    reader.handle_data = words.append
    reader.feed(page)
    check(status == 0 and "4 runs" in said and opened.count("svg") == 12
          and not re.search("https?:|src=|href=|nan|inf", page)
          and {"pre + GPAS", "pre + plain scale", "no GPAS", "step 3 of 9", "a b \u00e9",
               "2 of 3 (-33%)", "not reached", "+0.5000 at step 3", "A story."} <= set(words),
          "report.py: four runs in one file that needs no others", errors + str(set(words)))
    write("mine.html", b"my own")
    check_error("report.py: a file of another program", run(REPORT, "base", "--out", "mine.html"),
                "is not a report")
    write("gpas/log.csv", read("gpas/log.csv") + b"4,what\n")
    check_error("compare.py: a malformed line", run(COMPARE, "base", "gpas"), "log.csv, line 6")
    write("worse/layers.csv", read("worse/layers.csv") + b"9,999999999999,1,1,0.1,1\n")
    check_error("compare.py: a layer too many", run(COMPARE, "base", "worse"), "lacks some")


def test_figures():
    table = "common\t--steps 3\nseeds\t1\npre.base.toy.1\t--gpas off\n"
    write_run("f/pre.base.toy.1/seed-1", "", [5, 4, 3, 2])
    log = "f/pre.base.toy.1/seed-1/log.csv"
    good = read(log)

    def figures(text, log_text=good):
        write("table.tsv", text.encode("latin-1"))
        write(log, log_text)
        return run(FIGURES, "--table", "table.tsv", "--out", "f", "--draw-only", "--figures", "g")

    for what, text, words in (
            ("no tab", table + "x", "line 4"),
            ("half a quotation", table + "a.b.c.d\t'x", "line 4"),
            ("a seed", table.replace("\t1\n", "\tone\n"), "line 2"),
            ("no steps", table.replace("--steps 3", ""), "--steps"),
            ("not UTF-8", table + "\xff", "UTF-8"),
            ("a name twice", table + "pre.base.toy.1\t\n", "twice"),
            ("a name with a slash", table + "../b.c.d.e\t", "SCHEME.KIND")):
        check_error(f"figures.py: {what}", figures(text), words)
    for what, text, words in (
            ("a step that is not a number", good + b"x,,1,,,,\n", "line 6: step"),
            ("a loss that is not a number", good + b"4,,x,,,,\n", "line 6: val_loss"),
            ("a log that was cut off", good[:-3], "1 runs are missing"),
            ("no header", b"1,2\n3,4\n", "line 1: expected the header")):
        check_error(f"figures.py: {what}", figures(table, text), words)


def main():
    signal.signal(signal.SIGHUP, signal.SIG_DFL)    # nohup may have started the tests
    with tempfile.TemporaryDirectory() as folder:
        home = os.getcwd()
        os.chdir(folder)
        test_toy_stories()
        test_tokenizer()
        test_input()
        test_encodings()
        test_ownership()
        test_stopped()
        test_special_files()
        test_questions()
        test_endings()
        test_download()
        write("toy.txt", prepro("--show", "300")[1].encode())
        test_pieces()
        test_errors()
        test_compare()
        test_figures()
        os.chdir(home)
    return harness.summary()


if __name__ == "__main__":
    sys.exit(main())
