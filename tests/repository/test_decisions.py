"""The page of decisions says what the defaults are: its numbers are the code's."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from smi import detection
from smi.defenses import Erasure
from smi.detection import Detector
from smi.erasure import head, scan, search
from smi.erasure.search import Search
from smi.erasure.tune import Tuning

PAGE = (Path(__file__).parents[2] / "notebooks/results/DECISIONS.md").read_text(encoding="utf-8")
CLASSES = {kind.__name__: kind() for kind in (Detector, Erasure, Search, Tuning)}
MODULES = (detection, head, scan, search)
NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?")


def default(name):
    """The number in the code that a name of the page stands for; None where it stands for none."""
    kind, _, field = name.rpartition(".")
    holders = [CLASSES[kind]] if kind in CLASSES else [] if kind else MODULES
    found = next((getattr(holder, field) for holder in holders if hasattr(holder, field)), None)
    return found if isinstance(found, int | float) else None


def entries():
    """Name and value of every default that the page has a row for: the i-th name has the i-th number."""
    for line in PAGE.splitlines():
        cells = line.split(" | ")
        names = [name for name in re.findall(r"`([\w.]+)`", cells[0]) if default(name) is not None]
        if len(cells) > 2 and line.startswith(("| `", "| ease")) and names:
            yield from zip(names, NUMBER.findall(cells[1]), strict=False)


@pytest.mark.parametrize(("name", "value"), list(entries()))
def test_a_default_is_what_the_page_says(name, value):
    assert default(name) == float(value)


def test_no_threshold_is_without_an_entry():
    named = {name for name, _ in entries()}
    for kind in (Detector, Erasure):
        own = {f"{kind.__name__}.{field.name}" for field in fields(kind)}
        assert {name for name in own if default(name) is not None} <= named
    assert {"Tuning.lr", "Tuning.steps", "Search.steps", "CERTAIN", "RIDGE", "NEAR"} <= named
