"""
What the tests written in Python share: checks, programs to run, files to read and write.

    check(good, "what must be true", "what was seen instead")
    sys.exit(summary())
"""
import os
import resource
import struct
import subprocess
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)), ".."))
from command import read_json

BYTE_PIECES = [b"<unk>", b"\n<s>\n", b"\n</s>\n"] + [bytes([b]) for b in range(256)]
prefix = ""         # of the names of all checks
passed = failed = 0


def check(good, name, seen=""):
    """Counts a check and prints its line. If it failed, the line also says what was seen."""
    global passed, failed
    seen = " ".join(str(seen).split())[:500]
    print(f"ok   {prefix}{name}" if good else f"FAIL {prefix}{name}: {seen}", flush=True)
    passed, failed = passed + bool(good), failed + (not good)


def check_error(name, result, words):
    """Status 1 and exactly one line on stderr, which contains the words and fits on two lines of a
    terminal."""
    status, _, errors = result
    check(status == 1 and errors.count("\n") == 1 and errors.endswith("\n") and words in errors
          and len(errors) < 160, name, f"status {status}: {errors}")


def summary():
    """Prints how many checks passed and failed. Returns the exit status of the test."""
    print(f"{passed} passed, {failed} failed")
    return failed > 0


def run(*command, limit=None, **environment):
    """Exit status (or minus the signal), stdout and stderr. limit: the maximum size of a file."""
    def limit_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, timeout=300,
                              preexec_fn=limit_files if limit else None,
                              env={**os.environ, **environment})
    except subprocess.TimeoutExpired:
        return None, "", "it was still running after 300 seconds"
    return (done.returncode, done.stdout.decode(errors="backslashreplace"),
            done.stderr.decode(errors="backslashreplace"))


def read(path):
    with open(path, "rb") as file:
        return file.read()


def write(path, data):
    with open(path, "wb") as file:
        file.write(data)


# ------------------------------------------------------------------------------------------------
# Token files, tokenizers and checkpoints.

def token_file(tokens):
    """The bytes of a token file."""
    return (struct.pack("<3i", 20240520, 1, len(tokens)).ljust(1024, b"\0")
            + struct.pack(f"<{len(tokens)}H", *tokens))


def tokenizer(pieces):
    """The bytes of a tokenizer.bin. Its longest piece must be that of BYTE_PIECES."""
    return struct.pack("<i", 6) + b"".join(struct.pack("<fi", -i, len(piece)) + piece
                                           for i, piece in enumerate(pieces))


def floats(data):
    return list(struct.unpack(f"<{len(data) // 4}f", data))


def header_of(data):
    """(the header of a checkpoint, where it ends)"""
    end = 8 + int.from_bytes(data[:8], "little")
    return read_json(data[8:end]), end


def read_safetensors(path):
    """(header, {name: numbers})"""
    data = read(path)
    header, start = header_of(data)
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            tensors[name] = floats(data[start + begin:start + end])
    return header, tensors


def changed(checkpoint, old, new):
    """A copy of a checkpoint whose header has `new` in place of `old`, and the right length."""
    end = 8 + int.from_bytes(checkpoint[:8], "little")
    header = checkpoint[8:end]
    if old not in header:
        raise ValueError(f"the checkpoint's header lacks {old}")
    header = header.replace(old, new, 1)
    return len(header).to_bytes(8, "little") + header + checkpoint[end:]
