"""
feedback.py: what grade.py found, for people: the table with the hints, and the first error.
"""
import textwrap


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
