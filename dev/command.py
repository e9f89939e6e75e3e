"""
What the Python programs of this project share: main(), which ends a program cleanly whatever
happens; Parser, which reads its options; new_folder() and new_file(), for results that appear only
when they are complete.

    from command import Error, Parser, main

    def run():
        ...
        raise Error("what is wrong, and what the user can do")

    if __name__ == "__main__":
        main(run)

Whatever goes wrong is reported in one line on stderr, which fits on two lines of a terminal.
"""
import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile

LONGEST = 158       # characters of a message: two lines of a terminal


class Error(Exception):
    """Something the user can fix. It is reported in one line, without a traceback."""


class Interrupted(BaseException):
    """A signal asks the program to stop; its `finally:` blocks still run."""


class Parser(argparse.ArgumentParser):
    """Rejects abbreviations and empty values: "$UNSET" is a mistake."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
                         **settings)

    def error(self, message):
        raise Error(f"{message} (--help lists the options)")

    def print_help(self, file=None):                # argparse's own ignores a full disk
        print(self.format_help(), end="", file=file)

    def parse_args(self, args=None, namespace=None):
        options = super().parse_args(args, namespace)
        for name, value in vars(options).items():
            if value == "" or isinstance(value, list) and "" in value:
                raise Error(f"{name.replace('_', '-')} is given, but empty")
        return options


def open_standard_files():
    """Open /dev/null in place of standard files that are closed. Otherwise the next file opened
    would get such a number, and whatever is printed would end up in it."""
    while True:
        file = os.open(os.devnull, os.O_RDWR)       # takes the lowest number that is free
        if file > 2:
            break
        os.set_inheritable(file, True)
    os.close(file)
    sys.stdin = sys.stdin or open(0, closefd=False)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)
    sys.stderr = sys.stderr or open(2, "w", closefd=False)
    for stream in (sys.stdout, sys.stderr):         # what the locale cannot spell is not an error
        stream.reconfigure(errors="backslashreplace")


open_standard_files()
CLEAR = "\r\x1b[K" if sys.stderr.isatty() else ""       # erases a line of progress


def read_json(text):
    """The value of a JSON text. Raises ValueError if it is malformed or has a name twice in an
    object, because other programs might take the other value."""
    def unique(pairs):
        values = {}
        for name, value in pairs:
            if name in values:
                raise ValueError(f"the name {name!r} occurs twice")
            values[name] = value
        return values
    return json.loads(text, object_pairs_hook=unique)


def check_file(path):
    """Returns the path. Raises an Error if it is not a file: a pipe would make us wait."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise Error(f"{path} is not a file")
    return path


@contextlib.contextmanager
def new_file(path):
    """with new_file(path) as name: what is written to `name` replaces the file `path` when it is
    complete. After an error nothing has changed."""
    path = os.path.realpath(check_file(path))
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with tempfile.TemporaryDirectory(dir=os.path.dirname(path), prefix=".unfinished_") as folder:
        name = os.path.join(folder, os.path.basename(path))
        yield name
        os.replace(name, path)


@contextlib.contextmanager
def new_folder(out, how=""):
    """with new_folder(out) as folder: what is written into `folder` appears in `out` when all of it
    is complete. After an error nothing is left behind. An `out` that exists must be empty, and is
    kept because it may be a mount point. how: how the caller's user chooses another one."""
    there = os.path.isdir(out)
    if os.path.lexists(out) and (not there or os.listdir(out)):
        raise Error(f"{out} is already there; choose another folder{how}")
    out = os.path.abspath(out)
    place = out if there else os.path.dirname(out)
    os.makedirs(place, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place, prefix=".unfinished_") as temporary:
        folder = os.path.join(temporary, "new")     # the umask decides its mode
        os.mkdir(folder)
        yield folder
        for name in os.listdir(folder) if there else []:
            os.rename(os.path.join(folder, name), os.path.join(out, name))
        if not there:
            os.rename(folder, out)


def interrupt(number, _):
    signal.signal(number, signal.SIG_DFL)           # the second one stops at once
    raise Interrupted(number)


def say(message):
    """Print a message on stderr. If what it quotes makes it too long, it loses its middle."""
    line = f"{os.path.basename(sys.argv[0])}: {message}"
    line = "".join(c if c.isprintable() else "?" for c in line)
    if len(line) > LONGEST:
        line = line[:LONGEST // 2 - 2] + "..." + line[-LONGEST // 2 + 2:]
    print(CLEAR + line, file=sys.stderr, flush=True)


def main(run):
    """Call run() and exit: with the status that it returns (None is 0), with 1 after an error, or
    with 128 plus its number after a signal."""
    status = 1
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:   # by nohup
                signal.signal(number, interrupt)
        try:
            result = run() or 0
        except SystemExit as error:                 # from --help
            result = error.code or 0
        sys.stdout.flush()
        status = result
    except Error as error:
        say(error)
    except BrokenPipeError:                         # whoever reads this has seen enough: `| head`
        status = 128 + signal.SIGPIPE
    except OSError as error:
        say(f"{error.filename or 'error'}: {error.strerror or error}")
    except UnicodeEncodeError as error:
        say(f"this locale cannot spell {error.object!a}; LC_ALL=C.UTF-8 can")
    except MemoryError:
        say("not enough memory")
    except Interrupted as signal_number:
        status = 128 + signal_number.args[0]
        say(f"stopped by {signal.Signals(signal_number.args[0]).name}")
    try:
        sys.stdout.flush()
    except OSError:                                 # or Python would try again and complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(status)
