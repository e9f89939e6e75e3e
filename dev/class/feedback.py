"""
feedback.py: what grade.c found, for people: the hint of a wrong result, how a submission's process
ended, the table of a submission, and its first error.

grade.c says what explains the numbers of a result. This file says where it is wrong: in which
cases, rows and columns, and, where nothing explains it, what is known of the errors.
"""
import math
import re
import signal
import textwrap
from collections import namedtuple

NUMBERS = ("alias first stop_grad no_gate norm_last act large stride V t NH B T C A").split()
Case = namedtuple("Case", ["name", "special", *NUMBERS, "tokens"])
Wrong = namedtuple("Wrong", "rows columns inner adds elements")

# What cases may have in common. Only MODES are combined: two sizes in common would be chance.
MODES = [
    ("output and input are the same array", lambda c: c.alias),
    ("first is not 0", lambda c: c.first),
    ("stop_grad is 0", lambda c: not c.stop_grad),
    ("stop_grad is 1", lambda c: c.stop_grad),
    ("dgate, or a gate, is NULL", lambda c: c.no_gate),
    ("the norm comes last", lambda c: c.norm_last),
    ("the norm comes first", lambda c: not c.norm_last),
    ("the activation is not silu", lambda c: c.act),
    ("the activation is silu", lambda c: not c.act),
    ("A is 1", lambda c: c.A == 1),
    ("output and input are different arrays", lambda c: not c.alias),
    ("first is 0", lambda c: not c.first)]
SIZES = [
    ("rows are longer than 256 (does each sum cover the whole row, and all threads of the block?)",
     lambda c: c.C > 256 and c.T > 1),
    ("sizes are large (look at what happens between blocks)", lambda c: c.large),
    ("V is not a multiple of 8: rows are padded", lambda c: c.stride > c.V),
    ("V is not a multiple of 4", lambda c: c.V % 4),
    ("t is above 1", lambda c: c.t > 1),
    ("there are several heads", lambda c: c.NH > 1),
    ("there are several sequences", lambda c: c.B > 1),
    ("there are several rows", lambda c: c.T > 1),
    ("there are several columns", lambda c: c.C > 1),
    ("there are more than 32 columns", lambda c: c.C > 32),
    ("the length of a row is not a multiple of 4", lambda c: c.C % 4)]

# Areas of a result. i, n: the index of a row, or column, and how many there are.
AREAS = [
    ("{}s after the first", lambda i, n: i > 0), ("the first {}", lambda i, n: i == 0),
    ("{}s after the first quarter (is sizeof missing?)", lambda i, n: i >= n // 4),
    ("{}s before the last", lambda i, n: i < n - 1), ("the last {}", lambda i, n: i == n - 1),
    ("odd-numbered {}s", lambda i, n: i % 2),
    ("even-numbered {}s", lambda i, n: i % 2 == 0),
    ("the first half of the {}s", lambda i, n: i < n // 2),
    ("the second half of the {}s", lambda i, n: i >= n // 2),
    ("the first third of the {}s", lambda i, n: i < n // 3),
    ("the second third of the {}s", lambda i, n: n // 3 <= i < n // 3 * 2),
    ("the last third of the {}s", lambda i, n: i >= n // 3 * 2),
    *[("{}s after the last full group of %d" % m, lambda i, n, m=m: i >= n - n % m)
      for m in (4, 8, 32)],
    *[("{}s from %d on" % m, lambda i, n, m=m: i >= m) for m in (8, 24, 32, 64, 128, 256)]]


class Facts:
    """What grade.c prints: all cases, and of the result that follows, where it is wrong."""

    def __init__(self):
        self.cases, self.wrongs, self.numbers = [], {}, {}

    def read(self, kind, words, said):
        """Reads the words of a line. Returns the hint that it gives, if any. said: see ending()."""
        if kind == "case":
            self.cases.append(Case(words[0], words[1], *map(float, words[2].split()),
                                   [int(x) for x in words[3].split()]))
        elif kind == "wrong":
            self.wrongs[int(words[0])] = Wrong(*map(int, words[1].split()), words[2])
        elif kind == "numbers":
            self.numbers[words[0]] = [float(x) for x in words[1].split()]
        elif kind == "memory":
            return f"{where(self.cases, words[0], True)}{words[1]} ({words[2]})"
        elif kind == "ended":
            return f"{ending(int(words[0]), *words[1:], said)} (in the case {words[2]})"
        elif kind == "result" and words[4]:
            hint = hint_of(words[0], *words[3:], self)
            self.wrongs, self.numbers = {}, {}
            return f"{words[0]}: {hint}"
        return None


def where(cases, bad, at_length):
    """In which cases something is wrong, if not in all: what they, and no others, have in common,
    or their names. bad: a character for each case; '-' where it has no such result."""
    wrong = [case for case, b in zip(cases, bad) if b == "1"]
    right = [case for case, b in zip(cases, bad) if b == "0"]
    if not right:
        return ""
    special = wrong[0].special
    if special and {c.special for c in wrong} == {special} and special not in {
            c.special for c in right}:
        return f"only where {special}: "
    for text, has in MODES + SIZES:
        luck = len(right) < 2 and "several" in text or len(right) < 3 and "multiple of 4" in text
        if all(map(has, wrong)) and not any(map(has, right)) and not luck:
            return f"only where {text}: "
    for text, has in MODES:
        for other, has_other in MODES:
            if all(has(c) and has_other(c) for c in wrong) and not any(
                    has(c) and has_other(c) for c in right):
                return f"only where {text} and {other}: "
    if not at_length:
        return ""
    few = right if len(wrong) > len(right) else wrong
    names = [f'"{case.name}"' for case in few[:4]] + ["..."] * (len(few) > 4)
    return ("right in the cases: " if few is right else "wrong only in the cases: ") + (
        "; ".join(names) + "; ")


def area(cases, wrongs):
    """The smallest area that holds all wrong elements, if there are several cases to learn from."""
    places = []         # is it wrong? row, rows, column, columns, case
    for i, wrong in wrongs.items():
        if len(wrong.elements) > 3000:      # would take long
            continue
        for at, element in enumerate(wrong.elements):
            if element != "-":
                places.append((element == "1", at // wrong.columns, wrong.rows,
                               at % wrong.columns, wrong.columns, cases[i]))
    areas = [(text.format(axis), lambda p, has=has, k=k: has(p[k], p[k + 1]))
             for text, has in AREAS for axis, k in (("row", 1), ("column", 3))]
    areas += [("the targets' places", lambda p: p[3] == p[5].tokens[p[1] % len(p[5].tokens)]),
              ("heads after the first", lambda p: p[5].NH > 1
               and p[3] % p[5].C >= p[5].C // p[5].NH),
              ("the second half of each head", lambda p: p[5].NH > 0
               and p[3] * p[5].NH % p[5].C * 2 >= p[5].C),
              ("odd-numbered heads", lambda p: p[3] * p[5].NH // p[5].C % 2),
              ("sequences after the first", lambda p: p[1] >= p[2] // p[5].B)]
    best, found = 0.4, ""
    for text, has in areas if len(wrongs) > 1 else []:
        inside = [p[0] for p in places if has(p)]
        if sum(inside) == sum(p[0] for p in places) and len(places) - len(inside) > 2 and (
                sum(inside) > best * len(inside)):
            best, found = sum(inside) / len(inside), text
    return found and f"it is wrong only in {found}; "


def multiple_of(wrong, numbers, factors):
    """Is the error of each row a number times the product of these arrays?"""
    n, rows = wrong.columns, 0
    scale = max(abs(y) for y in numbers["expected"])
    for at in range(0, wrong.rows * n, n):
        error = [a - b for a, b in zip(numbers["got"][at:at + n], numbers["expected"][at:at + n])]
        if max(map(abs, error)) < 1e-4 * scale:
            continue
        x = [math.prod(f[(at + j) % len(f)] for f in factors) for j in range(n)]
        factor = sum(a * b for a, b in zip(error, x)) / (sum(a * a for a in x) or 1)
        if not max(abs(a - factor * b) for a, b in zip(error, x)) < 2e-3 * max(map(abs, error)):
            return False
        rows += 1
    return n > 3 and rows > 0


def same(x, y):
    return len(x) > 3 and all(abs(a - b) <= 1e-4 * abs(b) for a, b in zip(x, y))


def errors(case, wrong, numbers):
    """What the errors of a case look like, if nothing explains them."""
    got, expected = numbers["got"], numbers["expected"]
    wrong_ones = [x for x, element in zip(got, wrong.elements) if element == "1"]
    if len(got) == 1 or not all(map(math.isfinite, got + expected)) or not any(wrong_ones):
        return ""
    names = [name for name in numbers if name not in ("got", "expected", "old")]
    arrays = {name: [numbers[name][i % len(numbers[name])] for i in range(len(got))]
              for name in names}
    sizes = {"C": case.C, "T": case.T, "NH": case.NH, "V": case.V, "B": case.B,
             "the square root of C": math.sqrt(case.C), "A (or scale)": case.A,
             "the square of A (or scale)": case.A ** 2}
    arrays.update({f"{name} = {x:.4g}": [x] * len(got) for name, x in sizes.items()
                   if x not in (0, 1)})
    for name, x in arrays.items():
        if same(got, [a * b for a, b in zip(expected, x)]):
            return f"it is multiplied by {name}; "
        if same([a * b for a, b in zip(got, x)], expected):
            return f"it is divided by {name}; "
    for name in names:
        for word, sign in (("added to", 1), ("subtracted from", -1)):
            if same(got, [a + sign * b for a, b in zip(expected, arrays[name])]):
                return f"{name} is {word} it; "
    if multiple_of(wrong, numbers, [expected]):
        return "each row is multiplied by a number: one of its factors is wrong; "
    if multiple_of(wrong, numbers, []):
        return ("the error is the same in a whole row: a term that its elements share, such as a "
                "sum or a mean, is wrong; ")
    for a in names:
        if multiple_of(wrong, numbers, [numbers[a]]):
            return f"the error is, in each row, a number times {a}: look at the term with it; "
    for a in names:
        for b in names:
            if a < b and multiple_of(wrong, numbers, [numbers[a], numbers[b]]):
                return (f"the error is, in each row, a number times {a} and {b}: look at the term "
                        "with both; ")
    return ""


def index(wrong, at):
    row, column = divmod(at, wrong.columns)
    if wrong.inner:
        return f"[{row // wrong.inner}][{row % wrong.inner}][{column}]"
    return f"[{at}]" if 1 in (wrong.rows, wrong.columns) else f"[{row}][{column}]"


def elsewhere(name, wrong, got, expected, kept):
    """Do wrong elements hold what belongs in other places?"""
    found, strange, sources = [], 0, set()
    for i, element in enumerate(wrong.elements):
        if element == "1" and not kept[i]:
            source = next((k for k, y in enumerate(expected)
                           if y and abs(got[i] - y) <= 1e-5 * abs(y)), None)
            strange += source is None
            if source is not None and source not in sources:
                found.append((i, source))
                sources.add(source)
    if len(found) < 2 or len(found) < strange:
        return ""
    return "; " + " and ".join(f"{name}{index(wrong, a)} holds what belongs in {index(wrong, b)}"
                               for a, b in found[:2])


def elements(name, case, wrong, numbers):
    """The first wrong element of a case, where the wrong ones are, what they have in common."""
    got, expected, old = numbers["got"], numbers["expected"], numbers["old"]
    kept = [a == (0 if wrong.adds else b) for a, b in zip(got, old)]
    bad = [i for i in range(len(got)) if len(got) == 1 or wrong.elements[i] == "1"]
    first, held = bad[0], old[bad[0]] if wrong.adds else 0
    at, last = wrong.elements.index("1"), wrong.elements.rindex("1")
    text = (f"{name}{index(wrong, at)} is {got[first] + held:.6g}, should be "
            f"{expected[first] + held:.6g} ({case.name}; {wrong.elements.count('1')} of "
            f"{len(wrong.elements) - wrong.elements.count('-')} wrong")
    if wrong.adds:
        text += f"; it held {held:.6g} before"
    row, last = at // wrong.columns, last // wrong.columns
    if last - row + 1 < wrong.rows and "-" not in wrong.elements:
        text += f", rows {row} to {last} of {wrong.rows}"
    text += ")"
    if all(kept[i] for i in bad):
        return text + "; the wrong elements hold what they held before"
    if not all(math.isfinite(got[i]) for i in bad):
        return text + ("; NaN or infinity comes from what is read outside an input, from an "
                       "exponential that overflows, the root or log of a negative number, or 0 / 0")
    if all(got[i] == 0 for i in bad):
        return text + "; the wrong elements are 0"
    if all(abs(got[i] + expected[i]) < 1e-3 * abs(expected[i]) for i in bad):
        return text + "; the wrong elements have the wrong sign"
    return text + (elsewhere(name, wrong, got, expected, kept) if len(got) > 1 else "")


def hint_of(name, bad, kind, text, facts):
    """The hint of a wrong result. kind: how much the text explains."""
    cases, wrongs, numbers = facts.cases, facts.wrongs, facts.numbers
    if not wrongs:
        return "nothing is written"
    first, wrong = bad.index("1"), wrongs[bad.index("1")]
    kept = all(got == (0 if wrong.adds else old) for got, old, element in zip(
        numbers["got"], numbers["old"], wrong.elements)
        if element == "1" or len(numbers["got"]) == 1)
    if kind == "partly" and kept:       # what is not written needs no other explanation
        kind = "nothing"
    hint = where(cases, bad, kind != "all" or text.endswith("is not written"))
    if kind == "static":
        hint = "right if called first, wrong after another call: is something static? "
    elif kind == "nothing":
        hint += errors(cases[first], wrong, numbers)
    else:
        hint += ("where it is wrong, " if kind == "partly" and not hint else "") + text + "; "
    if kind != "all":
        hint += area(cases, wrongs)
    return hint + elements(name, cases[first], wrong, numbers)


def passes(layer):
    return ["update"] if layer == "adamw" else ["forward", "backward"]


def print_table(rows, result):
    print(f"{'':14} {'layer':22} {'points':9} result by result")
    for row in rows:
        checks = [f"{one['name']} {one['points']}/{one['max']}"
                  for which in passes(row["layer"]) for one in row.get(which, {}).get("checks", [])]
        print(f"{row['file']:14} {row['layer']:22} {row['points']:2} of {row['max']}  ",
              "  ".join(checks))
    for error in dict.fromkeys(row["error"] for row in rows if "error" in row):
        print("\n" + textwrap.fill(error, 96, subsequent_indent="  "))
    for row in rows:
        for which in passes(row["layer"]):
            for i, hint in enumerate(row.get(which, {}).get("hints", [])):
                if i == 0:
                    print(f"\n{row['file']}, {row['layer']}_{which}:")
                print(textwrap.fill(hint, 96, initial_indent="    ", subsequent_indent="      "))
    print(f"\n{result['points']} of {result['max']} points; make grade SEED={result['seed']} "
          "repeats these numbers")


def first_error(result):
    for row in result["layers"]:
        for part in [row] + [row[which] for which in passes(row["layer"]) if which in row]:
            hint = part.get("error") or (part.get("hints") or [""])[0]
            if hint:
                return hint if "error" in part else f"{row['layer']}: {hint}"
    return result.get("error", "")


ENDINGS = {
    signal.SIGXCPU: "stopped after {} seconds of computing: an endless loop? Does its counter "
                    "change, and is its bound right?",
    signal.SIGALRM: "stopped after two minutes ({} s of computing): does it wait for something?",
    signal.SIGSEGV: "crashed (segmentation fault): an index far outside an array, a NULL "
                    "pointer (from too large an allocation?), or endless recursion",
    signal.SIGFPE: "crashed: an integer divided by 0",
    signal.SIGABRT: "crashed (abort): memory was overwritten, or abort() was called",
    signal.SIGXFSZ: "stopped after printing a megabyte: an endless loop?"}
ENDINGS[signal.SIGKILL], ENDINGS[signal.SIGBUS] = ENDINGS[signal.SIGXCPU], ENDINGS[signal.SIGSEGV]


def ending(status, cpu, case, said):
    """What to say of a process that did not return from all calls. status: as of waitpid()."""
    if status & 127 in (signal.SIGSEGV, signal.SIGBUS) and "dgate is NULL" in case:
        return "crashed (segmentation fault): dgate is NULL in this case, which is allowed"
    if re.search("out of memory|not enough memory|bad_alloc|allocate memory", said):
        return "not enough memory: it asks for far more than a layer needs"
    if status & 127 in ENDINGS:
        return ENDINGS[status & 127].format(cpu)
    if re.search("(race|nothing has written).* shared memory", said):
        said += "; is there a __syncthreads() between writing and reading?"
    if status & 127:
        return f"crashed (signal {status & 127})" + (f": {said}" if said else "")
    return f"ended by itself with status {status >> 8}: " + (said or "it must return, not exit()")
