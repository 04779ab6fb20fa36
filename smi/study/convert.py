"""A study as versions up to 0.1 kept it, a JSON file a cell in a folder, as one file of lines (`smi.study.records`).

Cells keep the names of their files as keys, hashes of all of their settings as they were: no cell of the present
version has one of these, so what was computed then is never taken for what would be computed now.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from smi.analysis.study import MEASURED
from smi.errors import InputError
from smi.study.records import FORMER, Record, write
from smi.study.spec import digest


def convert(folder: Path, file: Path) -> tuple[int, int]:
    """Write ``file`` with the cells of a folder, and beside it what was measured of their samples.

    Args:
        folder: Of ``KEY.json``, and ``analyses/KEY.json`` where there were analyses. It is left as it is.
        file: ``NAME.jsonl``; analyses go to ``NAME.analyses.jsonl``.

    Returns:
        How many cells and how many analyses were written.

    Raises:
        InputError: For a folder without cells, a file in it that is not whole, or an analysis of no cell.
    """
    cells = [_cell(path) for path in sorted(folder.glob("*.json")) if FORMER.fullmatch(path.name)]
    if not cells:
        raise InputError(f"{folder} has no files KEY.json of cells. Name a folder that a former `smi study` wrote.")
    made: dict[str, Record] = {}
    for cell in cells:
        analysis = folder / "analyses" / f"{digest({'samples': cell['samples_key'], 'columns': MEASURED})}.json"
        if analysis.exists() and analysis.name not in made:
            names = {name: cell["config"][name] for name in ("domain", "source", "seed")}
            names |= {"attack": cell["config"]["attack"]["name"]}
            made[analysis.name] = {"key": cell["samples_key"]} | names | _read(analysis)
    if strange := {path.name for path in folder.glob("analyses/*.json")} - made.keys():
        raise InputError(
            f"{folder / 'analyses'} has analyses of no cell here: {', '.join(sorted(strange))}. Remove them."
        )
    write(file, cells)
    if made:
        write(file.with_suffix(".analyses.jsonl"), made.values())
    return len(cells), len(made)


def _cell(path: Path) -> Record:
    record = _read(path)
    samples = digest({name: value for name, value in record["config"].items() if name != "defense"})
    return {"key": path.stem, "samples_key": samples} | record


def _read(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not whole: {error}. Remove it; its cell was never finished.") from error
    return record
