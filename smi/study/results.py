"""Reads the file of a study: how far it is, its rows, and their summary."""

from __future__ import annotations

import csv
import io
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from smi.errors import InputError
from smi.study.records import Record, read, waiting
from smi.study.spec import Cell, Study
from smi.study.stages import Store

COLUMNS = (
    "domain", "attack", "source", "defense", "seed", "n", "acc_before", "asr_before", "acc", "asr", "der", "seconds",
)  # fmt: skip
DRAWS = 4000  # of the bootstrap
Row = dict[str, Any]


def known(study: Study, store: Store) -> dict[str, Record]:
    """The records of a study by key, those that have no line yet among them."""
    keys = {cell.key for cell in study.cells}
    late = {key: record for key, record in waiting(store.running).items() if key in keys}
    return read(store.found(study)) | late  # in this order: a cell has its line before its file goes


def outcome(cell: Cell, records: Mapping[str, Record]) -> str:
    """``done``, ``failed`` or ``missing``, by the records of a study."""
    record = records.get(cell.key)
    return "missing" if record is None else "failed" if "error" in record else "done"


def status(study: Study, store: Store) -> dict[str, int]:
    """How many cells are done, failed and missing."""
    records = known(study, store)
    found = Counter(outcome(cell, records) for cell in study.cells)
    return {state: found[state] for state in ("done", "failed", "missing")}


def errors(study: Study, store: Store) -> list[tuple[str, str]]:
    """Cell and error of those that failed."""
    records = known(study, store)
    return [(cell.title, records[cell.key]["error"]) for cell in study.cells if outcome(cell, records) == "failed"]


def read_rows(study: Study, store: Store) -> list[Row]:
    """One row a finished cell of ``study``, with `COLUMNS`.

    Rates are in [0, 1], seconds those of making the samples and of removal.
    """
    records = known(study, store)
    return [row_of(records[cell.key]) for cell in study.cells if outcome(cell, records) == "done"]


def stored(file: Path) -> list[tuple[Record, Row]]:
    """Record and row of each finished cell in a ``NAME.jsonl``, by domain, attack, source, defense and seed.

    Whatever study they are of: also cells of settings and of removals that this version does not have.
    """
    found = [(record, row_of(record)) for record in read(file).values() if "error" not in record]
    return sorted(found, key=lambda pair: [pair[1][name] for name in COLUMNS[:5]])


def row_of(record: Record) -> Row:
    """`COLUMNS` of the record of a finished cell."""
    config, before, after = record["config"], record["before"], record["after"]
    values = (
        config["domain"], config["attack"]["name"], config["source"], config["defense"]["name"], config["seed"],
        record["n"], round(before["acc"], 4), round(before["asr"], 4), round(after["acc"], 4), round(after["asr"], 4),
        round(after["der"], 4), round(sum(record["seconds"].values()), 1),
    )  # fmt: skip
    return dict(zip(COLUMNS, values, strict=True))


def as_csv(rows: Iterable[Row], columns: Sequence[str] = COLUMNS) -> str:
    """Rows as CSV with a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def from_csv(text: str) -> list[Row]:
    """The rows that `as_csv` wrote: numbers as numbers. Raises `InputError` where a column is missing or no number."""
    rows: list[Row] = []
    for number, values in enumerate(csv.DictReader(io.StringIO(text)), 1):
        try:
            names = {name: values[name] for name in COLUMNS[:4]}
            counts = {name: int(values[name]) for name in COLUMNS[4:6]}
            rows.append(names | counts | {name: float(values[name]) for name in COLUMNS[6:]})
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"Row {number} is no row of a study ({type(error).__name__}: {error}). "
                f"Needed are the columns {', '.join(COLUMNS)}, as `smi study table NAME --csv FILE` writes them."
            ) from error
    return rows


def summarise(rows: Iterable[Row], by: Sequence[str] = ("attack", "source", "defense")) -> list[Row]:
    """Mean and worst ACC, ASR and DER over what has the same values of ``by``, in the order of the rows."""
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[name] for name in by)].append(row)
    made = []
    for key, members in groups.items():
        summary: Row = dict(zip(by, key, strict=True)) | {"cells": len(members)}
        for name, worst in (("acc", min), ("asr", max), ("der", min)):
            values = [row[name] for row in members]
            summary |= {name: sum(values) / len(values), f"worst_{name}": worst(values)}
        made.append(summary)
    return made


@dataclass(frozen=True)
class Difference:
    """A mean difference of a rate, its 95 % interval, and the number of cells that it is of."""

    mean: float
    low: float
    high: float
    cells: int


def compare(rows: Iterable[Row], source: str, other: str, rate: str = "der", *, seed: int = 0) -> Difference:
    """How far ``source`` is above ``other`` in ``rate``, over the cells that both have.

    Paired by domain, attack, defense and seed, so that a study that is still running compares like with like. The
    interval is a percentile bootstrap over attacks: cells of one attack are not independent.

    Raises:
        InputError: Where the two have no cell in common.
    """
    found: dict[str, dict[tuple[Any, ...], float]] = {source: {}, other: {}}
    for row in rows:
        if row["source"] in found:
            found[row["source"]][row["domain"], row["attack"], row["defense"], row["seed"]] = row[rate]
    by_attack: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for key in found[source].keys() & found[other].keys():
        by_attack[key[:2]].append(found[source][key] - found[other][key])
    if not by_attack:
        raise InputError(f"The study has no cell with {source!r} that it has with {other!r}, too. Run more of it.")
    groups = [np.array(by_attack[key]) for key in sorted(by_attack)]
    sums, counts = (np.array([each(group) for group in groups]) for each in (np.sum, len))
    drawn = np.random.default_rng(seed).integers(len(groups), size=(DRAWS, len(groups)))
    low, high = np.quantile(sums[drawn].sum(1) / counts[drawn].sum(1), (0.025, 0.975))
    return Difference(float(sums.sum() / counts.sum()), float(low), float(high), int(counts.sum()))


def as_markdown(summary: Sequence[Row]) -> str:
    """A summary as a Markdown table, in percent, with the worst in brackets."""
    if not summary:
        return "No cell is finished."
    by = [name for name in summary[0] if name in COLUMNS[:5]]
    head = [*by, "cells", "ACC % (worst)", "ASR % (worst)", "DER % (worst)"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in summary:
        rates = [f"{100 * row[n]:.1f} ({100 * row[f'worst_{n}']:.1f})" for n in ("acc", "asr", "der")]
        lines.append("| " + " | ".join(map(str, [*(row[n] for n in by), row["cells"], *rates])) + " |")
    return "\n".join(lines)
