"""Tiny runs give what they gave before: a change of how the code is laid out changes no result.

A change of a method changes its numbers: `python tests/fingerprints.py record tests/fingerprints.json` writes new ones.
"""

import json

import pytest
from fingerprints import COMMITTED, fingerprints

BEFORE = json.loads(COMMITTED.read_text())


@pytest.fixture(scope="module")
def now():
    return fingerprints()


def test_the_same_is_run(now):
    assert now.keys() == BEFORE.keys()


@pytest.mark.parametrize("name", BEFORE)
def test_a_run_gives_what_it_gave(now, name):
    # Other instruction sets (AVX2, AVX512, none) change them by 6e-6 at most.
    assert now[name]["numbers"] == pytest.approx(BEFORE[name]["numbers"], rel=3e-5, abs=3e-5)
