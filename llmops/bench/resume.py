"""Rows of a run that was cut short, kept in a file: `llmops bench --resume FILE`.

JSON lines: first the machine and the commit, then one per row with the setting it was measured in,
written as soon as it is measured.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SAME = ("cpu", "isa", "cores", "commit", "torch")  # else rows cannot stand in one result


class Kept:
    """The rows in `file` of one setting, e.g. {"threads": 1}; a missing file holds none.

    Raises:
        ValueError: the file is of another machine, commit or torch.
    """

    def __init__(self, file: Path, machine: dict[str, Any], setting: dict[str, Any]) -> None:
        self.file, self.setting = file, setting
        text = file.read_text() if file.exists() else ""
        # A line without its end was cut off as it was written.
        whole = [json.loads(line) for line in text.splitlines(keepends=True) if line[-1] == "\n"]
        here = {k: machine.get(k) for k in SAME}
        if whole and whole[0] != here:
            differs = [f"{k} {whole[0].get(k)}" for k in SAME if whole[0].get(k) != here[k]]
            raise ValueError(
                f"llmops bench: {file} was begun with {', '.join(differs)}; here it is "
                f"{', '.join(str(here[k]) for k in SAME if whole[0].get(k) != here[k])}: "
                "delete it, or name another file"
            )
        if not whole or text[-1] != "\n":
            file.write_text("".join(f"{json.dumps(x)}\n" for x in whole or [here]))
        self.rows = [x["row"] for x in whole[1:] if x["setting"] == setting]

    def find(self, **fields: Any) -> dict[str, Any] | None:
        """The row whose fields have these values."""
        return next((r for r in self.rows if all(r[k] == v for k, v in fields.items())), None)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with self.file.open("a") as file:
            file.write(json.dumps({"setting": self.setting, "row": row}) + "\n")
