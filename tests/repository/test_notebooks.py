"""The guard around nbval: notebooks store outputs, and a wrong one is noticed."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from smi.dev import notebooks

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "notebooks").glob("*.ipynb"))
CELLS = ["total = sum([20, 22])\nprint('total', total)", "object()", "total / 4"]


def save(path, *cells):
    nbformat.write(new_notebook(cells=list(cells)), path)
    return path


def edit(path, change):
    notebook = nbformat.read(path, as_version=4)
    change(notebook)
    nbformat.write(notebook, path)
    return notebooks.problems(path)


@pytest.fixture(scope="module")
def refreshed(tmp_path_factory):
    """A small notebook with its outputs stored; never changed by a test."""
    path = tmp_path_factory.mktemp("notebooks") / "small.ipynb"
    save(path, new_markdown_cell("# Small"), *map(new_code_cell, CELLS))
    assert notebooks.main(["refresh", str(path)]) == 0
    return path


@pytest.fixture
def small(refreshed, tmp_path):
    """A copy of the small notebook to spoil."""
    return Path(shutil.copy(refreshed, tmp_path))


def nbval(path):
    """nbval on one notebook, in a pytest of its own, with the options of this project."""
    options = ["--nbval", "--nbval-current-env", f"--nbval-sanitize-with={ROOT / 'tests' / 'nbval.cfg'}"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, path.name]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(
        command, cwd=path.parent, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_notebooks_keep_the_rules(path):
    assert notebooks.problems(path) == []


def test_there_are_notebooks():
    assert [path.name for path in SHIPPED][:1] == ["00_start_here.ipynb"]


def test_nbval_passes_a_refreshed_notebook_and_fails_a_wrong_number(small):
    passed = nbval(small)
    assert passed.returncode == 0, passed.stdout + passed.stderr
    assert "3 passed" in passed.stdout

    text = small.read_text()
    assert text.count("total 42") == 1
    small.write_text(text.replace("total 42", "total 43"))
    failed = nbval(small)
    assert failed.returncode == 1, failed.stdout + failed.stderr
    assert "1 failed, 2 passed" in failed.stdout


def test_nbval_alone_would_pass_a_stripped_notebook_but_the_guard_does_not(small):
    def strip(notebook):
        for cell in notebook.cells[1:]:
            cell.execution_count, cell.outputs = None, []

    (problem,) = edit(small, strip)
    assert "execution counts" in problem
    assert nbval(small).returncode == 0


def test_refresh_gives_the_same_bytes_twice(small):
    before = small.read_bytes()
    notebooks.refresh(small)
    # The address of an object is all that may differ; nbval.cfg takes it out as well.
    assert mask(small.read_bytes()) == mask(before)


def mask(content):
    return re.sub(rb"0x[0-9a-f]+", b"ADDRESS", content)


def test_refresh_leaves_a_notebook_with_an_error_alone(tmp_path, capsys):
    path = save(tmp_path / "broken.ipynb", new_code_cell("1 / 0"))
    before = path.read_bytes()
    assert notebooks.main(["refresh", str(path)]) == 1
    assert path.read_bytes() == before
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_refresh_stores_no_widget_state_or_view(tmp_path):
    source = "import ipywidgets as W\nfrom IPython.display import display\ndisplay(W.IntSlider(3))"
    path = save(tmp_path / "widget.ipynb", new_code_cell(source))
    notebooks.refresh(path)
    stored = nbformat.read(path, as_version=4)
    assert "widgets" not in stored.metadata
    assert list(stored.cells[0].outputs[0].data) == ["text/plain"]


def spoil_count(notebook):
    notebook.cells[2].execution_count = 7


def spoil_error(notebook):
    output = nbformat.v4.new_output("error", ename="ValueError", evalue="", traceback=[])
    notebook.cells[1].outputs.append(output)


def spoil_stderr(notebook):
    notebook.cells[1].outputs.append(nbformat.v4.new_output("stream", name="stderr", text="a warning"))


def spoil_waiver(notebook):
    notebook.cells[1].metadata.tags = ["nbval-ignore-output"]


def spoil_waivers(notebook):
    for cell in notebook.cells[1:]:
        cell.metadata = {"tags": ["nbval-skip"], "reason": "because"}
    extra = new_code_cell("1", execution_count=4, metadata={"tags": ["nbval-skip"], "reason": "because"})
    notebook.cells.append(extra)


def spoil_comment(notebook):
    notebook.cells[1].source += "\n# NBVAL_SKIP"


def spoil_state(notebook):
    notebook.metadata.widgets = {}


def spoil_words(notebook):
    notebook.cells[0].source = "word " * (notebooks.WORDS + 1)


def spoil_cells(notebook):
    notebook.cells += [new_code_cell("1", execution_count=4 + i) for i in range(notebooks.CODE_CELLS)]


def spoil_lines(notebook):
    notebook.cells[1].source = "\n".join(["1"] * (notebooks.CODE_LINES + 1))


def spoil_size(notebook):
    notebook.cells[0].source = "x" * int((notebooks.MEGABYTES + 0.1) * 2**20)


def spoil_import(notebook):
    notebook.cells[1].source = "from smi.inversion.base import _hidden"


def spoil_module(notebook):
    notebook.cells[1].source = "import smi._hidden"


def spoil_attribute(notebook):
    notebook.cells[1].source = "import smi\nsmi.priors._read"


def spoil_link(notebook):
    notebook.cells[0].source = "[next](99_nowhere.ipynb)"


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (spoil_count, "execution counts"),
        (spoil_error, "the error ValueError"),
        (spoil_stderr, "stderr"),
        (spoil_waiver, "without a reason"),
        (spoil_waivers, "at most 3"),
        (spoil_comment, "nbval comment"),
        (spoil_state, "widget state"),
        (spoil_words, "words"),
        (spoil_cells, "code cells"),
        (spoil_lines, "lines of code"),
        (spoil_size, "MiB"),
        (spoil_import, "private name _hidden"),
        (spoil_module, "private name _hidden"),
        (spoil_attribute, "private name _read"),
        (spoil_link, "leads nowhere"),
    ],
)
def test_the_guard_sees(small, spoil, says):
    assert notebooks.problems(small) == []
    assert any(says in problem for problem in edit(small, spoil))


def test_a_tagged_error_is_allowed(small):
    def tag(notebook):
        spoil_error(notebook)
        notebook.cells[1].metadata.tags = ["raises-exception"]

    assert edit(small, tag) == []


def test_the_command_refuses_what_it_does_not_know(capsys):
    assert notebooks.main([]) == 2
    assert notebooks.main(["refresh", "no_such_notebook"]) == 2
    assert "There is no notebook" in capsys.readouterr().err
