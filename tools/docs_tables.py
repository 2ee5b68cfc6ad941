#!/usr/bin/env python3
"""Writes the generated tables of README.md and docs/: `python tools/docs_tables.py`, then look at
`git diff`.

A page holds `<!-- generated: COMMAND -->`, the table, and `<!-- end -->`. COMMAND is one of

- `ghm`, whose output becomes the table;
- `"HEAD" of COMMAND`: the first table in that output whose header begins with HEAD; instead of a
  command, the path of a report.md may be given;
- `keys GROUP`: the configuration keys that the function `_add_GROUP` of ghm_d2/config/keys.py adds,
  with their comments;
- `simulation`: the results of tools/simulate_verdicts.py;
- `noise weights`: the results of benchmarks/noise_weights.py.
"""

import ast
import json
import os
import re
from itertools import takewhile
from pathlib import Path

ROOT = Path(__file__).parents[1]
KEYS = ROOT / "ghm_d2" / "config" / "keys.py"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
ONE = re.compile(r'"(.*)" of (.*)')
PART = re.compile(r"(<!-- generated: (.*?) -->\n\n).*?(<!-- end -->)", re.S)


def main() -> None:
    """Rewrite every page whose tables have changed."""
    for page in PAGES:
        old = page.read_text(encoding="utf-8")
        if (new := generate(old)) != old:
            page.write_text(new, encoding="utf-8")
            print(f"wrote {page.relative_to(ROOT)}")


def generate(text: str) -> str:
    """The text of a page with its tables updated from their commands."""
    return PART.sub(lambda part: f"{part[1]}{run(part[2]).strip()}\n\n{part[3]}", text)


def run(command: str) -> str:
    """The table that a command gives, in Markdown."""
    if one := ONE.fullmatch(command):
        head, source = one.groups()
        is_report = source.endswith(".md")
        text = (ROOT / source).read_text(encoding="utf-8") if is_report else run(source)
        return table_of(head, text)
    program, *words = command.split()
    if program == "keys":
        return keys_table(words[0])
    if program == "simulation":
        return simulation_table()
    if program == "noise":
        return noise_weights_table()
    from typer.testing import CliRunner

    from ghm_d2.cli.app import app

    before = Path.cwd()
    try:
        os.chdir(ROOT)  # the commands name folders of the repository
        shown = CliRunner().invoke(app, words, catch_exceptions=False)
    finally:
        os.chdir(before)
    if shown.exit_code:
        raise SystemExit(f"{command} ended with {shown.exit_code}: {shown.output}")
    return shown.stdout


def table_of(head: str, text: str) -> str:
    """The first table in `text` whose header begins with `head`."""
    tables = re.findall(r"(?:^\|.*\n?)+", text, re.M)
    return next(table for table in tables if table.startswith(f"| {head}"))


def simulation_table() -> str:
    """The shares of simulated comparisons, one row per case and number of seeds."""
    file = ROOT / "results" / "simulation" / "verdicts.json"
    found = json.loads(file.read_text(encoding="utf-8"))
    columns = ["primary", "others", "with a look", "seeds alone", "found", "planned"]
    heads = ["Spread of a run (SD seed, images, both)", "Seeds", *columns]
    rows = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for row in found["rows"]:
        spread = ", ".join(str(sd) for sd in found["standard deviations"][row["case"]].values())
        cells = [f"{row['case']} ({spread})", row["seeds"], *(row[name] for name in columns)]
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(rows)


def noise_weights_table() -> str:
    """The weight of spoilt boxes relative to clean ones, one column per number of images."""
    from ghm_d2.reports.statistics.estimates import estimate

    file = ROOT / "results" / "noise" / "by_batch.json"
    found = json.loads(file.read_text(encoding="utf-8"))["results"]
    sizes = sorted({row["images"] for row in found})
    heads = ["Loss", "Gradient of", "Annotation", *(f"{n} images" for n in sizes)]
    rows = ["| " + " | ".join(heads) + " |", "| --- | --- | --- |" + " ---: |" * len(sizes)]
    shown = (("class", "class score", "weight"), ("shift", "class score", "weight"))
    for method in dict.fromkeys(row["method"] for row in found):
        form = "GHM (robust)" if "robust" in method else "GHM (published)"
        for kind, gradient, name in (*shown, ("shift", "box", "box_weight")):
            cells = []
            for size in sizes:
                same = [r for r in found if (r["method"], r["kind"]) == (method, kind)]
                value = estimate([r[name] for r in same if r["images"] == size])
                cells.append(f"{value.mean:.2f} ± {value.half_width:.2f}")
            what = "wrong class" if kind == "class" else "shifted box"
            rows.append(f"| {form} | {gradient} | {what} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def keys_table(group: str) -> str:
    """Key, default and meaning of each key that `_add_GROUP` adds."""
    source = KEYS.read_text(encoding="utf-8")
    functions = {f.name: f for f in ast.parse(source).body if isinstance(f, ast.FunctionDef)}
    lines = source.splitlines()
    rows = ["| Key | Default | Meaning |", "| --- | --- | --- |"]
    for node in functions[f"_add_{group}"].body:
        if isinstance(node, ast.Assign) and not isinstance(node.value, ast.Call):
            key = ast.unparse(node.targets[0]).removeprefix("cfg.")
            default = ast.literal_eval(node.value)
            shown = default or '""' if isinstance(default, str) else default
            rows.append(f"| `{key}` | `{shown}` | {as_markdown(comment(lines, node))} |")
    return "\n".join(rows)


def comment(lines: list[str], node: ast.Assign) -> str:
    """The comment of an assignment: the lines right above it, or what follows on its own line."""
    above = [line.strip() for line in reversed(lines[: node.lineno - 1])]
    above = list(takewhile(lambda line: line.startswith("#"), above))[::-1]
    behind = lines[node.end_lineno - 1][node.end_col_offset :]
    return " ".join(part.strip().lstrip("# ") for part in [*above, behind] if part.strip())


def as_markdown(text: str) -> str:
    """Return `text` with values and keys as code, and with the table's separator escaped."""
    text = re.sub(r'"([^"]*)"', lambda quoted: f"`{quoted[1] or chr(34) * 2}`", text)
    return re.sub(r"\b(?:MODEL|SOLVER)\.[A-Z0-9_.]*[A-Z]", r"`\g<0>`", text).replace("|", r"\|")


if __name__ == "__main__":
    main()
