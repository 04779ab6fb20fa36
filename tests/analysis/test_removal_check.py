"""Removals on fresh victims: a row a cell, none made twice, the floor that of a model nobody attacked."""

import csv
from dataclasses import replace

import pytest
from click.testing import CliRunner
from small_runs import ERASURE
from tiny import tiny_domain

import smi
from smi.analysis import removal_check
from smi.analysis.removal_check import COLUMNS, SOURCES, main, rows_of


@pytest.fixture
def few(monkeypatch):
    """Three classes, clean samples for each source, and a removal that hardly looks; what was made is listed."""
    made = []

    def make(source, given):
        made.append(source)
        assert given.per_class == 4
        return smi.clean_control(given.private, per_class=4, seed=given.seed)

    monkeypatch.setattr(removal_check, "load_domain", lambda name, **options: tiny_domain(32))
    monkeypatch.setattr(removal_check, "make_samples", make)
    monkeypatch.setattr(removal_check, "Erasure", lambda detection: replace(ERASURE, detection=detection))
    return made


def test_every_source_has_its_row_and_none_is_made_twice(few, tmp_path):
    model = ["tiny", "small_cnn", "5", "--epochs", "1", "--augment", "none"]
    command = [*model, "--per-class", "4", "--csv", str(tmp_path / "check.csv")]
    done = CliRunner().invoke(main, [*command, "--attack", "badnets"])
    assert done.exit_code == 0, done.output
    rows = rows_of(tmp_path / "check.csv")
    assert [row["source"] for row in rows] == list(SOURCES) == few
    with (tmp_path / "check.csv").open() as file:
        assert tuple(next(csv.reader(file))) == COLUMNS
    for row in rows:
        assert row["domain"] == "tiny"
        assert 0 <= float(row["floor"]) <= 100
        lost, gained = (float(row[f"{rate}_before"]) - float(row[f"{rate}_after"]) for rate in ("acc", "asr"))
        assert float(row["der"]) == pytest.approx((max(0, gained) - max(0, lost) + 100) / 2, abs=0.02)
        assert row["found"] == "1"
    done = CliRunner().invoke(main, [*command, "--attack", "badnets", "--attack", "none"])
    assert done.exit_code == 0, done.output
    assert few == list(SOURCES) * 2  # those of the clean model alone
    assert [row["attack"] for row in rows_of(tmp_path / "check.csv")] == ["badnets"] * 4 + ["none"] * 4
    assert rows_of(tmp_path / "check.csv")[-1]["asr_after"] == ""
