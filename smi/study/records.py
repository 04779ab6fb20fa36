"""What a study found, kept as JSON lines: ``NAME.jsonl`` has a line a cell.

A line is one JSON object, compact, its keys sorted, its numbers as they were recorded. ``key`` names it, and of two
lines of one key the later counts, so that a cell that failed is replaced by being computed again. A line that is not
whole, the last one of a process that was killed, does not count and does not spoil the next.

A worker writes a cell that it has finished to a file of its own, ``running/KEY.json``; the process that runs the study
gives it its line and removes the file. So one process alone adds lines, workers on several machines need no lock that
all of them see and no file system that appends for several at once, and whatever is killed, what is lost is what it was
computing: a file that was left gets its line from the next run. Two runs of the same results are kept apart by a lock
of their folder. Where a file system has no locks, what is lost is time: a line that was spoilt is a cell that is
missing, and is computed again.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from smi.errors import InputError
from smi.runtime.files import write_atomic

FORMER = re.compile(r"[0-9a-f]{20}\.json")  # names of the files, one a cell, that versions up to 0.1 wrote
ORDER = ("domain", "attack", "source", "defense")
Record = dict[str, Any]


def read(file: Path) -> dict[str, Record]:
    """The records of a file by key, those of whole lines; none where there is no file.

    Raises:
        InputError: Where there is no file, but the folder has a file a cell, as former versions wrote them.
    """
    if not file.exists():
        refuse_former(file.parent)
        return {}
    found = (_record(line) for line in file.read_bytes().split(b"\n"))
    return {record["key"]: record for record in found if record is not None}


def _record(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("key"), str) else None


def append(file: Path, record: Record) -> None:
    """Add a record, flushed to disk; on a line of its own also where the last one was left in the middle."""
    with file.open("ab+") as out:
        end = out.seek(0, os.SEEK_END)
        out.seek(max(0, end - 1))
        cut = out.read(1) not in (b"", b"\n")
        out.write(b"\n" * cut + _line(record))
        out.flush()
        os.fsync(out.fileno())


def write(file: Path, records: Iterable[Record]) -> None:
    """Write the whole file, atomically, a line a record: by domain, attack, source, defense, seed."""
    content = b"".join(map(_line, sorted(records, key=_place)))
    if not file.exists() or file.read_bytes() != content:
        write_atomic(file, content)


def tidy(file: Path) -> None:
    """Put the lines of a file in order, and leave out those that do not count."""
    if file.exists():
        write(file, read(file).values())


def once(folder: Path, key: str, compute: Callable[[], Record]) -> Record:
    """The record of a key, from a file of its own in ``folder``: computed and written where it is not there."""
    file = folder / f"{key}.json"
    record = _record(file.read_bytes()) if file.exists() else None
    if record is None:
        record = compute()
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(file, _line(record))
    return record


def waiting(folder: Path) -> dict[str, Record]:
    """What `once` has written to a folder, by key."""
    found: dict[str, Record] = {}
    for file in folder.glob("*.json"):
        with suppress(FileNotFoundError):  # it has its line by now
            if record := _record(file.read_bytes()):
                found[record["key"]] = record
    return found


def _line(record: Record) -> bytes:
    return json.dumps(record, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def _place(record: Record) -> tuple[Any, ...]:
    of = record.get("config", record)
    names = (of.get(name, "") for name in ORDER)
    return *(value["name"] if isinstance(value, dict) else value for value in names), of.get("seed", 0), record["key"]


def refuse_former(folder: Path) -> None:
    """Raise `InputError` for a folder with a file a cell."""
    if folder.is_dir() and any(FORMER.fullmatch(path.name) for path in folder.iterdir()):
        raise InputError(
            f"{folder} has a file for each cell, as former versions wrote them. `smi study convert {folder}` makes one "
            "file of them, which `smi study table` and `smi study plot` read. For new cells choose another folder."
        )


class Measured:
    """Rows that are measured once and kept in a file of lines.

    Args:
        file: Of the lines, each with a key and the columns.
        columns: That a row has. A line that lacks one of them does not count.
    """

    def __init__(self, file: Path, columns: Sequence[str]) -> None:
        self.file, self.columns, self._records = file, columns, read(file)

    def __contains__(self, key: str) -> bool:
        return set(self.columns) <= self._records.get(key, {}).keys()

    def row(self, key: str, measure: Callable[[], Record]) -> Record:
        """The row of a key: what ``measure`` gives, floats with six digits, the first time."""
        if key not in self:
            rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in measure().items()}
            self._records[key] = {"key": key, **rounded}
            self.file.parent.mkdir(exist_ok=True, parents=True)
            append(self.file, self._records[key])
        return {name: self._records[key][name] for name in self.columns}
