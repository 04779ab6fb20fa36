"""Keep the notebooks true: run them and store their outputs, and find what would let a comparison pass vacuously.

    python -m smi.dev.notebooks refresh [NAME ...]    run notebooks and store what they put out
    python -m smi.dev.notebooks check [NAME ...]      find what breaks the rules below

nbval compares a cell with its stored output only where the cell has an execution count, so that a stripped notebook
passes whatever it says. `problems` is the guard against that and keeps notebooks short.
"""

from __future__ import annotations

import ast
import base64
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellControlSignal, DeadKernelError

from smi.errors import InputError
from smi.runtime.files import write_atomic

FOLDER = Path("notebooks")
TIMEOUT = 600  # seconds a cell, as for nbval: on a slow and busy machine a removal takes five times as long
WORDS, CODE_CELLS, CODE_LINES, MEGABYTES, WAIVERS = 2000, 25, 250, 2.0, 3
WAIVER_TAGS = {"nbval-ignore-output", "nbval-skip"}  # each needs a "reason" in the cell's metadata
KEPT_METADATA = ("tags", "reason", "saves")
ERROR_TAG = "raises-exception"
PACKAGES = ("smi", "smi_kernels")
LIVE_VIEW = "application/vnd.jupyter.widget-view+json"


def refresh(path: Path) -> None:
    """Run a notebook from top to bottom and store its outputs in a normal form, atomically.

    The file is left as it was where a cell raises or takes too long; nbclient's error says which.
    """
    notebook = nbformat.read(path, as_version=4)
    environment = {name: value for name, value in os.environ.items() if name != "SMI_PROGRESS"}
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,
        coalesce_streams=True,
    )
    client.execute(env=environment)
    normalise(notebook)
    write_atomic(path, nbformat.writes(notebook).rstrip("\n") + "\n")
    _save_pictures(notebook, path.parent / "pictures")


def _save_pictures(notebook: Any, folder: Path) -> None:
    """The figure of a cell with ``"saves": NAME`` in its metadata is also a file, for pages outside the notebook."""
    for cell in notebook.cells:
        if name := cell.metadata.get("saves"):
            png = next(o.data["image/png"] for o in cell.outputs if "image/png" in o.get("data", {}))
            folder.mkdir(exist_ok=True)
            write_atomic(folder / name, base64.b64decode(png))


def normalise(notebook: Any) -> None:
    """Remove what changes from run to run, in place: widget state and ids, kernel details, random cell ids."""
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"file_extension": ".py", "name": "python"},
        }
    )
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for index, cell in enumerate(notebook.cells):
        cell.id = f"cell-{index:02d}"
        cell.metadata = nbformat.from_dict(
            {k: cell.metadata[k] for k in ("tags", "reason", "saves") if k in cell.metadata}
        )
        for output in cell.get("outputs", []):
            # Without a kernel a widget's view is an error message that hides the stored picture.
            output.get("data", {}).pop(LIVE_VIEW, None)


def problems(path: Path) -> list[str]:
    """What is wrong with a notebook, one sentence each; empty where nothing is."""
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    return [
        *_not_run(code),
        *_outputs(code),
        *_waivers(code),
        *_sizes(path, notebook, code),
        *_names(code),
        *_links(path, notebook),
    ]


def _not_run(code: Sequence[Any]) -> Iterator[str]:
    counts = [cell.execution_count for cell in code]
    if not code:
        yield "There is no code cell."
    elif counts != list(range(1, len(code) + 1)):
        yield f"The execution counts are {counts}, not 1 to {len(code)}: run the notebook from the top (refresh)."


def _outputs(code: Sequence[Any]) -> Iterator[str]:
    for number, cell in enumerate(code, 1):
        tags = cell.metadata.get("tags", [])
        for output in cell.outputs:
            if output.output_type == "error" and ERROR_TAG not in tags:
                yield f"Code cell {number} stores the error {output.ename}."
            if output.output_type == "stream" and output.name == "stderr":
                yield f"Code cell {number} stores text from stderr, which no two machines have alike."


def _waivers(code: Sequence[Any]) -> Iterator[str]:
    waived = [(number, cell) for number, cell in enumerate(code, 1) if WAIVER_TAGS & set(cell.metadata.get("tags", []))]
    if len(waived) > WAIVERS:
        yield f"{len(waived)} cells are kept from comparison; at most {WAIVERS} may be."
    for number, cell in waived:
        if not cell.metadata.get("reason", "").strip():
            yield f"Code cell {number} is kept from comparison without a reason in its metadata."
    for number, cell in enumerate(code, 1):
        if re.search(r"^\s*#.*(NBVAL_|PYTEST_VALIDATE_)", cell.source, re.MULTILINE):
            yield f"Code cell {number} has an nbval comment; use a tag and a reason."


def _sizes(path: Path, notebook: Any, code: Sequence[Any]) -> Iterator[str]:
    words = sum(len(cell.source.split()) for cell in notebook.cells if cell.cell_type == "markdown")
    lines = sum(len(cell.source.splitlines()) for cell in code)
    size = path.stat().st_size / 2**20
    for what, is_, limit in (
        ("words", words, WORDS),
        ("code cells", len(code), CODE_CELLS),
        ("lines of code", lines, CODE_LINES),
        ("MiB", size, MEGABYTES),
    ):
        if is_ > limit:
            yield f"It has {is_:.4g} {what}; at most {limit:g} are allowed."
    if "widgets" in notebook.metadata:
        yield "It stores widget state (metadata.widgets): refresh drops it."


def _names(code: Sequence[Any]) -> Iterator[str]:
    """Imports of private names, and reading of private attributes."""
    for number, cell in enumerate(code, 1):
        source = "\n".join(line for line in cell.source.splitlines() if not line.lstrip().startswith(("%", "!")))
        for node in ast.walk(ast.parse(source)):
            for name in _private(node):
                yield f"Code cell {number} uses the private name {name}."


def _private(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES:
        names = [*str(node.module).split("."), *(alias.name for alias in node.names)]
    elif isinstance(node, ast.Import):
        names = [part for alias in node.names for part in alias.name.split(".") if alias.name.startswith(PACKAGES)]
    elif isinstance(node, ast.Attribute):
        names = [node.attr]
    else:
        names = []
    return [name for name in names if name.startswith("_") and not name.endswith("__")]


def _links(path: Path, notebook: Any) -> Iterator[str]:
    """Links to files beside the notebook that are not there."""
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target and not (path.parent / target).exists():
            yield f"The link to {target} leads nowhere."


def find(names: Sequence[str] = (), folder: Path = FOLDER) -> list[Path]:
    """The notebooks of these names (with or without the suffix, or paths); all of ``folder`` without names."""
    if not names:
        return sorted(folder.glob("*.ipynb"))
    paths = [path if (path := Path(name)).suffix == ".ipynb" else folder / f"{name}.ipynb" for name in names]
    for path in paths:
        if not path.exists():
            raise InputError(f"There is no notebook {path}. Run from the repository's root, or pass a path.")
    return paths


def main(arguments: Sequence[str]) -> int:
    """The command. Returns the exit code: 0 done, 1 a notebook failed or breaks a rule, 2 bad input."""
    if not arguments or arguments[0] not in ("refresh", "check"):
        print(__doc__, file=sys.stderr)
        return 2
    try:
        paths = find(arguments[1:])
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return max([_one(arguments[0], path) for path in paths], default=0)


def _one(command: str, path: Path) -> int:
    try:
        if command == "refresh":
            refresh(path)
    except (CellControlSignal, DeadKernelError) as error:
        print(f"{path}: not changed, because a cell did not finish:\n{error}", file=sys.stderr)
        return 1
    found = problems(path)
    print(f"{path}: " + ("fine" if not found else "\n  ".join(["", *found])))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
