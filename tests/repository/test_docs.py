"""What the docstrings promise: examples run, and the API reference has a page for every module and a text for all."""

import doctest
import inspect
import subprocess
import sys
from importlib import import_module

import pytest

import smi
import smi_kernels
from smi.dev.site import build, modules, sources

OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.IGNORE_EXCEPTION_DETAIL
FINDER = doctest.DocTestFinder(exclude_empty=True)


def examples():
    for name in modules():
        module = import_module(name)
        for test in FINDER.find(module, name, module=module):
            if test.examples:
                yield pytest.param(test, id=test.name)


@pytest.mark.parametrize("example", list(examples()))
def test_an_example_in_a_docstring_runs(example):
    failed, tried = doctest.DocTestRunner(optionflags=OPTIONS).run(example)
    assert tried
    assert not failed
    assert not any(option for line in example.examples for option in line.options), "an example that is skipped is none"


def test_what_one_calls_first_has_an_example():
    for name in (
        "load_domain",
        "fit_prior",
        "invert",
        "remove_backdoor",
        "load_suspect",
        "Evaluator",
        "GeneratorPrior",
    ):
        assert ">>>" in inspect.getdoc(getattr(smi, name)), name
    assert ">>>" in inspect.getdoc(smi_kernels.stability_scores)


def test_the_site_has_the_pages_and_one_for_every_module(tmp_path):
    sources(tmp_path)
    index = (tmp_path / "index.md").read_text()
    for name in modules():
        assert f"automodule:: {name}\n" in (tmp_path / "reference" / f"{name}.rst").read_text()
        assert f"\nreference/{name}\n" in index
    for name in ("README.md", "notebooks/results/README.md", "notebooks/00_start_here.ipynb", "CONTRIBUTING.md"):
        assert (tmp_path / name).is_file()
        assert f"\n{name.rpartition('.')[0]}\n" in index


@pytest.mark.slow
def test_the_site_is_built_by_one_command_without_a_warning(tmp_path):
    pytest.importorskip("sphinx")
    command = [sys.executable, "-m", "smi.dev.site", tmp_path / "site"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    assert "ERROR" not in done.stderr
    assert "Stabilized" in (tmp_path / "site/notebooks/06_stabilise_the_inversion.html").read_text()
    invert = (tmp_path / "site/reference/smi.inversion.base.html").read_text()
    assert "without any in-distribution data" in invert


def test_the_site_needs_its_folder():
    done = subprocess.run([sys.executable, "-m", "smi.dev.site"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "usage" in done.stderr
    assert callable(build)
