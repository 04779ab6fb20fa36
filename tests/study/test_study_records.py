"""The lines that a study keeps: what survives, and what former versions left."""

import errno
import json
import os
from dataclasses import replace

import pytest
import study_pieces
from click.testing import CliRunner

import smi.study.run
from smi.analysis.study import MEASURED, stored_analysis
from smi.cli.main import cli
from smi.errors import InputError
from smi.study import load_study, run_study, status
from smi.study.convert import convert
from smi.study.records import append, once, read, tidy, waiting
from smi.study.results import stored
from smi.study.spec import digest
from smi.study.stages import names_of


def a_cell(attack, seed, **more):
    config = {"domain": "d", "attack": {"name": attack}, "source": "smi", "defense": {"name": "ft"}, "seed": seed}
    return {"key": f"{attack}{seed}", "config": config} | more


def test_a_line_that_was_cut_does_not_count_and_does_not_spoil_the_next(tmp_path):
    file = tmp_path / "a.jsonl"
    assert read(file) == {}
    whole = a_cell("badnets", 1, rate=0.1 + 0.2)
    append(file, whole)
    line = file.read_bytes()
    assert line == json.dumps(whole, sort_keys=True, separators=(",", ":")).encode() + b"\n"
    for length in range(len(line) - 1):
        file.write_bytes(line + line[:length].replace(b"badnets1", b"badnets2"))
        assert read(file) == {"badnets1": whole}
        append(file, a_cell("badnets", 3))
        assert read(file) == {"badnets1": whole, "badnets3": a_cell("badnets", 3)}
    file.write_bytes(line + b"\xff\xfe\n[1]\n{}\n" + b"null\n\n")
    assert read(file) == {"badnets1": whole}


def test_the_last_line_of_a_key_counts_and_lines_are_put_in_order(tmp_path):
    file = tmp_path / "a.jsonl"
    for record in (a_cell("wanet", 10), a_cell("wanet", 9, error="no"), a_cell("badnets", 10), a_cell("wanet", 9, n=1)):
        append(file, record)
    assert read(file)["wanet9"] == a_cell("wanet", 9, n=1)
    tidy(file)
    assert [json.loads(line)["key"] for line in file.read_text().splitlines()] == ["badnets10", "wanet9", "wanet10"]
    before = file.stat()
    tidy(file)
    assert file.stat() == before, "what is in order is not written again"


def test_what_a_worker_finished_before_the_run_was_killed_gets_its_line_from_the_next(small, store):
    study = load_study(small)
    first, other = study.cells[0], replace(study.cells[0], seed=77)
    for cell in (first, other):
        once(store.running, cell.key, lambda cell=cell: names_of(cell) | {"n": 77})
    (store.running / "damaged.json").write_text("{")
    assert status(study, store) == {"done": 1, "failed": 0, "missing": 15}
    ran = run_study(study, store, pieces=study_pieces)
    assert (ran.before, ran.finished) == (1, 15)
    assert read(store.found(study))[first.key]["n"] == 77
    assert set(waiting(store.running)) == {other.key}, "a cell of another study waits for that"
    (store.running / "damaged.json").unlink()
    (store.running / f"{other.key}.json").unlink()
    run_study(study, store, pieces=study_pieces)
    assert [path.name for path in store.results.iterdir()] == ["small.jsonl"]


def test_a_cell_is_seen_whenever_one_looks_while_it_gets_its_line(small, store, monkeypatch):
    study = load_study(small)
    record = once(store.running, study.cells[0].key, lambda: names_of(study.cells[0]) | {"n": 1})
    monkeypatch.setattr("smi.study.results.read", lambda file: smi.study.run._add(record, study, store) or read(file))
    assert status(study, store)["done"] == 1
    monkeypatch.undo()
    once(store.running, "gone", lambda: {"key": "gone"})
    glob = type(store.running).glob
    monkeypatch.setattr(type(store.running), "glob", lambda *a: [(f, f.unlink())[0] for f in list(glob(*a))])
    assert status(study, store)["done"] == 1


def test_a_cell_that_lies_in_its_file_is_not_computed_again(tmp_path):
    made = once(tmp_path / "running", "a", lambda: {"key": "a", "n": 1})
    assert once(tmp_path / "running", "a", lambda: pytest.fail("again")) == made == {"key": "a", "n": 1}


def test_a_full_disk_ends_the_study_also_where_a_line_cannot_be_written(small, store, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    study = load_study(small)
    monkeypatch.setattr(smi.study.run, "append", full)
    with pytest.raises(InputError, match=r"No space left on device\. Make room in"):
        run_study(study, store, pieces=study_pieces)
    assert status(study, store)["failed"] == 0
    assert status(study, store)["done"] > 0, "what was computed is still there"


def former(folder, study):
    """A file a cell, as versions up to 0.1 wrote them, one analysis, and what must come of it."""
    (folder / "analyses").mkdir(parents=True)
    made = {}
    for number, cell in enumerate(study.cells):
        record = {"config": cell.config, "n": number, "seconds": {"repair": 2}}
        record |= {"before": {"acc": 0.1 + 0.2, "asr": 1.0}, "after": {"acc": 0.5, "asr": 0.25, "der": 0.75}}
        if number == 3:
            record = {"config": cell.config, "error": "ValueError: no"}
        made[digest(cell.config)] = record
        (folder / f"{digest(cell.config)}.json").write_text(json.dumps(record, indent=1))
    samples = digest({name: value for name, value in study.cells[0].config.items() if name != "defense"})
    analysis = dict.fromkeys(MEASURED, 0.125)
    name = digest({"samples": samples, "columns": MEASURED})
    (folder / "analyses" / f"{name}.json").write_text(json.dumps(analysis))
    return made, analysis


def test_a_folder_of_a_former_version_is_refused_and_converted(small, store):
    study, runner = load_study(small), CliRunner()
    made, analysis = former(store.results, study)
    where = ["--out", str(store.results), "--cache", str(store.cache)]
    for command in (["run", str(small), *where], ["status", str(small), *where], ["table", str(store.results)]):
        refused = runner.invoke(cli, ["study", *command])
        assert refused.exit_code == 2, refused.output
        assert f"`smi study convert {store.results}`" in refused.output
    done = runner.invoke(cli, ["study", "convert", str(store.results)])
    assert done.exit_code == 0, done.output
    file = store.results.with_suffix(".jsonl")
    assert f"wrote {file}: 16 cells, 1 analyses" in done.output
    found = read(file)
    added = {key: {"key": key, "samples_key": record["samples_key"]} for key, record in found.items()}
    assert found == {key: record | added[key] for key, record in made.items()}
    assert len(stored(file)) == 15, "but for the one that failed"
    (row,) = [row for row in stored_analysis(file) if row["defense"] == study.cells[0].defense_name][:1]
    assert {name: row[name] for name in MEASURED} == analysis
    assert not found.keys() & {cell.key for cell in study.cells}, "none is taken for a cell of this version"
    assert runner.invoke(cli, ["study", "convert", str(store.results)]).exit_code == 2  # nothing is overwritten
    assert "| smi |" in runner.invoke(cli, ["study", "table", str(file), "--by", "source"]).output


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: [file.unlink() for file in folder.glob("*.json")], "has no files KEY.json"),
        (lambda folder: next(folder.glob("*.json")).write_text("{"), "is not whole"),
        (lambda folder: (folder / "analyses" / "strange.json").write_text("{}"), r"analyses of no cell here: strange"),
    ],
)
def test_what_cannot_be_converted_is_named(small, store, spoil, message):
    former(store.results, load_study(small))
    spoil(store.results)
    with pytest.raises(InputError, match=message):
        convert(store.results, store.results.with_suffix(".jsonl"))
