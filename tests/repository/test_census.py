"""The counts of `census`, on a few lines of code whose counts are known."""

import ast
import subprocess

from census import census, circles, files_of, rooms

TREE = {
    "smi/__init__.py": "",
    "smi/a.py": "from contextvars import ContextVar\nfrom functools import cache\nimport smi.b\n"
    "x: ContextVar[int] = ContextVar[int]('x')\n@cache\ndef f():\n    return 1\n",
    "smi/b/__init__.py": "from smi.b import c\n",
    "smi/b/c.py": "from smi.a import f\n",
    "smi/d.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import smi.e\ndef f():\n    import smi.e\n",
    "smi/e.py": "import smi.d\ndef f(a, b, c, /, d, e, *, f, g, h):\n    1\ndef g(a, b, c, d, *, e, f, g):\n    1\n",
    "smi_kernels/long.py": "def f():\n    '''Text\n" + "\n" * 60 + "'''\n" + "    x = 1\n" * 51,
    "smi_kernels/short.py": "def f():\n    '''Text\n" + "\n" * 60 + "'''\n" + "    x = 1\n" * 49,
    "tests/test_a.py": "one = 1\ntwo = 2\n",
    "results/a.json": "{\n}\n",
}


def test_each_count():
    found = census(TREE)
    assert rooms(TREE, "smi") == {"a", "b", "d", "e"}
    assert found["rooms at the top of smi_kernels"] == 2
    assert found["context variables"] == 1
    assert found["functions that cache for the process"] == 1
    assert found["functions over 50 lines"] == 1, "docstrings do not count"
    assert found["functions over 7 parameters"] == 1
    assert found["modules in import circles"] == 3
    assert (found["lines of tests"], found["lines of JSON"]) == (2, 2)


def test_a_circle_is_of_what_is_imported_at_once():
    parsed = {path: ast.parse(text) for path, text in TREE.items() if path.startswith("smi/")}
    assert circles(parsed) == [{"smi.a", "smi.b", "smi.b.c"}]


def test_a_commit_is_read_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr("census.ROOT", tmp_path)
    files = {"smi/a.py": "text = 'ö'\n", "empty.py": "", "data.json": "{}", "README.md": "not counted\n"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for command in ("init -q", "add -A", "-c user.name=a -c user.email=a@b commit -qm first"):
        subprocess.run(["git", "-C", tmp_path, *command.split()], check=True)
    (tmp_path / "smi/a.py").write_text("changed = 1\n")
    del files["README.md"]
    assert files_of("HEAD") == files
