"""What an import of a module that moved says."""

import importlib
import importlib.util
import re
import sys

import pytest

from smi_kernels.moved import moved


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package whose modules `old` and `deep.old` moved to `new`."""
    (tmp_path / "house").mkdir()
    (tmp_path / "house" / "__init__.py").touch()
    (tmp_path / "house" / "new.py").write_text("name = 'new'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    moved("house", {"old": "house.new", "new": "nowhere"})
    yield "house"
    for name in [name for name in sys.modules if name.partition(".")[0] == "house"]:
        del sys.modules[name]


@pytest.mark.parametrize("line", ["import house.old", "from house import old", "from house.old import name"])
def test_the_old_name_says_the_new_place(package, line):
    with pytest.raises(ModuleNotFoundError, match=r"^house\.old has moved\. It is now in house\.new\.$"):
        exec(line)


def test_what_is_there_is_found_before_the_table(package):
    assert importlib.import_module("house.new").name == "new"


def test_other_names_fail_as_ever(package):
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'house\.other'"):
        importlib.import_module("house.other")
    with pytest.raises(ImportError, match="cannot import name 'other'"):
        exec("from house import other")


@pytest.mark.parametrize(
    "old",
    [
        "configs", "folding", "layers", "manifest", "perturbed", "philox", "plan", "reductions", "tracing", "triton",
        "twins",
    ],
)  # fmt: skip
def test_the_places_of_this_package_are_there(old):
    with pytest.raises(ModuleNotFoundError, match=rf"^smi_kernels\.{old} has moved\.") as raised:
        importlib.import_module(f"smi_kernels.{old}")
    place = re.search(r"now in ([\w.]+\w)", str(raised.value))[1]
    assert importlib.util.find_spec(place)
