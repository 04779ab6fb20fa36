"""What the docstrings promise: examples run, and the API reference has a page for every module and a text for all."""

import doctest
import inspect
import subprocess
import sys
from importlib import import_module

import pytest

import smi
import smi_kernels
from smi.dev.reference import build, modules

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


def test_the_reference_is_built_by_one_command(tmp_path):
    pytest.importorskip("pdoc")
    command = [sys.executable, "-m", "smi.dev.reference", tmp_path / "api"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for name in modules():
        page = tmp_path / "api" / (name.replace(".", "/") + ".html")
        assert page.is_file(), name
    invert = (tmp_path / "api/smi/inversion.html").read_text()
    assert "without any in-distribution data" in invert
    assert "http://" not in invert.replace("http://www.w3.org", "")


def test_the_reference_needs_its_folder(tmp_path):
    done = subprocess.run([sys.executable, "-m", "smi.dev.reference"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "usage" in done.stderr
    assert callable(build)
