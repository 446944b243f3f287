"""The probe set of a version: rows of validation that stand beside its weights, to compare faster engines by.

A line of ``probe.jsonl`` is a row: ``cells`` as a task reads them, ``added`` what its split knows beside them, and
``target`` where that is a number.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from banjoray.data.splits import Split

FILE = "probe.jsonl"


def write_probe(split: Split, most: int, folder: Path) -> None:
    """At most ``most`` rows of a split, from all over it, as a file in ``folder``; no file for none."""
    numbers = np.unique(np.linspace(0, len(split) - 1, min(most, len(split)), dtype=np.int64))
    if not len(numbers):
        return
    rows = split.taken(numbers, "probe")
    lines = []
    (columns,) = rows.batches(len(rows))
    for row in range(len(rows)):
        cells = {key: cell[row] for key, cell in columns.items() if key not in rows.added}
        added = {key: cell[row] for key, cell in rows.added.items()}
        target = {} if rows.targets is None else {"target": rows.targets[row]}
        lines.append(json.dumps({"cells": cells, "added": added} | target, ensure_ascii=False, default=_plain))
    (folder / FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_probe(folder: Path) -> Split | None:
    """The rows that `write_probe` wrote; None where a version has none."""
    import datasets

    file = folder / FILE
    if not file.is_file():
        return None
    # Not splitlines: a text may hold what that takes for the end of a line.
    found = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    rows = datasets.Dataset.from_list([row["cells"] for row in found])
    added = {key: [row["added"][key] for row in found] for key in found[0]["added"]}
    targets = np.array([row["target"] for row in found]) if "target" in found[0] else None
    return Split("probe", rows, {key: key for key in found[0]["cells"]}, targets, added)


def _plain(found: Any) -> Any:
    return found.tolist()
