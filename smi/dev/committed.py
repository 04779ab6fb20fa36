"""The committed results as rows that paths of words choose from, for the pages that `smi.dev.evidence` writes."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from smi.analysis.study import MEASURED, stored_analysis
from smi.errors import InputError, unknown_name
from smi.study.records import Record
from smi.study.results import COLUMNS, Difference, Row, compare, stored
from smi.study.spec import load_study

WORDS = ("domain", "architecture", "attack", "source", "defense", "seed", "flagged")  # columns that words choose by
PLAIN = {"frechet", "nearest", "score_joint", "score_input", "score_parameter", "n", "seconds"}  # not in percent


class Committed:
    """The results in a folder, each file read once.

    A path is ``STUDY.WORD.WORD``, of the file ``STUDY.jsonl`` or ``STUDY.csv``. A word stands for the rows that have it
    as attack, source, seed, ...; ``a+b`` for those with either, ``a/b`` for those with both, ``-a`` for those without.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._rows: dict[str, list[Row]] = {}

    def records(self, study: str) -> list[Record]:
        """Of the finished cells of a study."""
        return [record for record, _ in stored(self._file(study))]

    def rows(self, study: str) -> list[Row]:
        """All rows of a study, with what was measured of their samples; by attack, as the study ``digits`` has them."""
        if study not in self._rows:
            file = self._file(study)
            rows = _cells(file) if file.suffix == ".jsonl" else _lines(file)
            order = dict.fromkeys(
                [*(cell.attack_name for cell in load_study("digits").cells), *_values(rows, "attack")]
            )
            self._rows[study] = sorted(rows, key=lambda row: list(order).index(row["attack"]))
        return self._rows[study]

    def _file(self, study: str) -> Path:
        files = {file.stem: file for pattern in ("*.csv", "*.jsonl") for file in self.folder.glob(pattern)}
        if study not in files:
            raise unknown_name("study", study, [name for name in files if "." not in name])
        return files[study]

    def chosen(self, path: str) -> list[Row]:
        """The rows that a path stands for."""
        study, *words = path.split(".")
        rows = self.rows(study)
        for word in words:
            names, wanted = word.removeprefix("-").split("+"), not word.startswith("-")
            for name in names:
                if not any(_has(row, name) for row in rows):
                    raise unknown_name("word", name, {value for column in WORDS for value in _values(rows, column)})
            rows = [row for row in rows if any(_has(row, name) for name in names) == wanted]
        return rows

    def column(self, path: str) -> tuple[list[Row], str]:
        """The rows that have a value in the column of ``PATH.COLUMN``, and the column."""
        where, _, column = path.rpartition(".")
        rows = self.chosen(where or path)
        if not any(isinstance(row.get(column), int | float) for row in rows):
            known = {name for row in rows for name, value in row.items() if isinstance(value, int | float)}
            raise unknown_name("column", column, known)
        return [row for row in rows if row.get(column) is not None], column

    def number(self, path: str, how: Callable[[Sequence[float]], float] = fmean) -> float:
        """The mean of ``PATH.COLUMN``, or another number of its values; in percent where they are rates."""
        rows, column = self.column(path)
        return how([row[column] for row in rows]) * (1 if column in PLAIN else 100)

    def ahead(self, path: str, other: str) -> Difference:
        """How far the removals of a path are ahead of others, of the same victims, in DER.

        Raises:
            InputError: Where the victims are others, or one has several removals.
        """
        pair = {name: self.chosen(each) for name, each in (("first", path), ("second", other))}
        first, second = (sorted((r["domain"], r["attack"], r["seed"]) for r in rows) for rows in pair.values())
        if first != second or len(set(first)) < len(first):
            raise InputError(
                f"{path} and {other} are {len(first)} and {len(second)} removals. Needed is one of each victim, and of "
                "the same victims. Add words to the paths."
            )
        return compare(
            [row | {"source": name, "defense": ""} for name, rows in pair.items() for row in rows], "first", "second"
        )


def _values(rows: Sequence[Row], column: str) -> dict[str, None]:
    return dict.fromkeys(str(row[column]) for row in rows if column in row)


def _has(row: Row, name: str) -> bool:
    return all(any(part == str(row.get(column)) for column in WORDS) for part in name.split("/"))


def _cells(file: Path) -> list[Row]:
    """Of the cells of a study; ``lost`` is what accuracy has fallen, ``shown`` how much of the trigger samples show."""
    measured = {_cell(row): {name: row[name] for name in MEASURED} for row in stored_analysis(file)}
    rows = [row | measured.get(_cell(row), {}) for _, row in stored(file)]
    for row in rows:
        residual = row.get("residual_target")
        row |= {"lost": row["acc_before"] - row["acc"], "shown": None if residual is None else 1 - residual}
    return rows


def _cell(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in COLUMNS[:5])


def _lines(file: Path) -> list[Row]:
    """Of a CSV; of one with ``acc_after`` in percent, that of `smi.analysis.removal_check`, as `_cells` has them."""
    with file.open(encoding="utf-8") as content:
        rows: list[Row] = [row | {"seed": int(row["seed"])} for row in csv.DictReader(content)]
    for row in rows if rows and "acc_after" in rows[0] else []:
        for name in ("acc_before", "asr_before", "floor", "acc_after", "asr_after", "der"):
            row[name.removesuffix("_after")] = float(row[name]) / 100 if row[name] else None
        row["lost"] = row["acc_before"] - row["acc"]
    return rows
