"""Every exercise of every notebook: its own solution passes, and its stub counts as not attempted."""

import importlib
import re
from pathlib import Path

import nbformat
import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
SOLUTION = re.compile(r"<summary>Solution</summary>\s*```python\n(.*?)```", re.DOTALL)


def exercises():
    """Name of the notebook, number, the cell with stub and check, and the printed solution."""
    found = []
    for path in sorted(FOLDER.glob("*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        stubs = [
            cell.source for cell in cells if cell.cell_type == "code" and re.search(r"^check_\d\(", cell.source, re.M)
        ]
        text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
        solutions = SOLUTION.findall(text)
        assert len(stubs) == len(solutions) == text.count("**Exercise "), path.name
        for number, pair in enumerate(zip(stubs, solutions, strict=True), 1):
            found.append(pytest.param(path.stem[3:], number, *pair, id=f"{path.stem} {number}"))
    return found


def test_every_notebook_has_exercises():
    assert {case.values[0] for case in exercises()} == {path.stem[3:] for path in FOLDER.glob("*.ipynb")}


@pytest.mark.parametrize(("notebook", "number", "stub", "solution"), exercises())
def test_the_solution_passes_and_the_stub_is_not_attempted(notebook, number, stub, solution, capsys):
    module = importlib.import_module(f"smi.tutorial.exercises.{notebook}")
    name = f"check_{number}"
    names = {"torch": torch, name: getattr(module, name)}
    exec(stub, names)
    assert "Not attempted yet" in capsys.readouterr().out
    exec(solution, names)
    exec(stub[stub.index(f"{name}(") :], names)
    assert capsys.readouterr().out == "Passed.\n"
