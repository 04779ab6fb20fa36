"""Studies: what a file stands for, its files, what the tables say, and a small one in earnest."""

import json
import re
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

import pytest
import study_pieces
import torch
from click.testing import CliRunner
from study_pieces import SMALL
from tiny import noise, tiny_model

from smi.cli.main import cli
from smi.defenses import defenses
from smi.domains import Domain, PrivateData, PrivateSet, PublicImages, load_domain, public_classes
from smi.errors import InputError
from smi.plotting.study import plot_rates
from smi.runtime.files import load_tensors
from smi.runtime.precision import asked_precision
from smi.sources import sources
from smi.study import Store, load_study, read_rows, run_study, stages, summarise
from smi.study.results import as_csv, as_markdown, compare, from_csv, stored
from smi.study.spec import shipped


def test_a_file_stands_for_its_cells_each_once(small):
    study = load_study(small)
    assert len(study) == 2 * 2 * 4  # seeds × attacks × {clean ft, smi ft, smi ibau, none clp}
    assert len({cell.key for cell in study.cells}) == len(study)
    assert len({cell.victim_key for cell in study.cells}) == 4
    assert len({cell.samples_key for cell in study.cells}) == 4 * 3
    badnets = next(cell for cell in study.cells if cell.attack_name == "badnets")
    assert badnets.attack.size == 3
    assert badnets.scenario.train.epochs == 2
    assert next(cell for cell in study.cells if cell.defense_name == "ft").defense.schedule.rounds == 2
    json.dumps([cell.config for cell in study.cells])


def test_keys_depend_on_the_configuration_alone(small, tmp_path):
    keys = {cell.key for cell in load_study(small).cells}
    other = tmp_path / "other.toml"
    other.write_text(SMALL.replace('"badnets", "blended"', '"blended", "badnets"'))
    assert {cell.key for cell in load_study(other).cells} == keys
    other.write_text(SMALL.replace("epochs = 2", "epochs = 3"))
    assert not {cell.key for cell in load_study(other).cells} & keys


def keys(file):
    return [(cell.victim_key, cell.samples_key, cell.key) for cell in load_study(file).cells]


def test_a_new_setting_that_is_off_makes_no_other_cells_and_one_that_is_on_does(small, monkeypatch):
    before = keys(small)

    @dataclass(frozen=True, kw_only=True)
    class More(defenses["ft"]):
        extra: float = 0.0

    monkeypatch.setitem(defenses._items, "ft", More)
    assert keys(small) == before
    small.write_text(small.read_text() + "\n[defense.ft]\nextra = 1.0\n")
    after = keys(small)
    with_ft = [cell.defense_name == "ft" for cell in load_study(small).cells]
    assert [new[2] != old[2] for old, new in zip(before, after, strict=True)] == with_ft
    assert [pair[:2] for pair in after] == [pair[:2] for pair in before]


def test_a_setting_that_says_the_default_is_the_default(small):
    before = keys(small)
    small.write_text(small.read_text().replace("[train]", '[train]\naugment = "affine"\nlr = 0.1'))
    assert keys(small) == before
    small.write_text(small.read_text().replace("lr = 0.1", "lr = 0.2"))
    assert not set(sum(keys(small), ())) & set(sum(before, ()))


def test_a_version_that_is_raised_makes_other_cells_of_what_depends_on_it(small, monkeypatch):
    cells, before = load_study(small).cells, keys(small)

    def changed():
        return [[new != old for old, new in zip(*pair, strict=True)] for pair in zip(before, keys(small), strict=True)]

    with monkeypatch.context() as patch:
        patch.setattr(defenses["ft"], "version", 2)
        assert changed() == [[False, False, cell.defense_name == "ft"] for cell in cells]
        assert load_study(small).cells[0].config["defense"]["version"] == 2
    with monkeypatch.context() as patch:
        patch.setattr(type(cells[0].attack), "version", 2)
        assert changed() == [[cell.attack_name == cells[0].attack_name] * 3 for cell in cells]
    with monkeypatch.context() as patch:
        patch.setitem(sources._items, "smi", replace(sources["smi"], version=2))
        assert changed() == [[False, cell.source == "smi", cell.source == "smi"] for cell in cells]
    assert keys(small) == before


def test_the_shipped_studies_load():
    assert shipped() == ["cifar10", "digits", "gtsrb", "quick", "resnet18"]
    digits = load_study("digits")
    assert len(digits) == 12 * 3 * (9 + 6 + 1)
    assert min(cell.seed for cell in digits.cells) == 20
    assert max(cell.seed for cell in digits.cells) < 100, "seeds from 100 up are for development"
    assert {cell.defense_name for cell in digits.cells} == {"erasure", "ibau", "ft", "anp", "clp"}
    for name, domain, cells, per_class in (
        ("gtsrb", "gtsrb", 4 * 3 * (6 + 1), 12), ("cifar10", "cifar10", 4 * 3 * (6 + 1), 50),
        ("resnet18", "cifar10", 4 * (2 + 1), 50),
    ):  # fmt: skip
        colour = load_study(name)
        assert len(colour) == cells
        (scenario,) = {cell.scenario for cell in colour.cells}
        assert (scenario.domain, scenario.prior) == (f"data/{domain}.npz", "fit")
        labels = public_classes(scenario.public)
        assert labels is None if domain == "cifar10" else (len(labels) == 14 and 0 not in labels)
        assert {cell.per_class for cell in colour.cells} == {per_class}


def test_a_place_keeps_its_paths_as_they_are_written(small, tmp_path, monkeypatch):
    """A study is the same study in another folder or on another machine."""
    small.write_text(SMALL.replace("[domain.digits]", '[domain."data/a.npz"]\npublic = "data/b.npz"'))
    keys = []
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        study = load_study(small)
        keys.append([cell.key for cell in study.cells])
    assert keys[0] == keys[1]
    scenario = study.cells[0].scenario
    assert (scenario.domain, scenario.public) == ("data/a.npz", "data/b.npz")
    for name in ("a", "b"):
        with pytest.raises(InputError, match=rf"no file data/{name}.npz in {tmp_path}/there"):
            scenario.check_present()
        (tmp_path / "there" / "data").mkdir(exist_ok=True)
        (tmp_path / "there" / "data" / f"{name}.npz").touch()
    scenario.check_present()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds = [1, 2]", "", "missing keys .'seeds'."),
        ("seeds = [1, 2]", "seeds = [1]\nsedes = 2", "unknown keys .'sedes'."),
        ('"badnets", "blended"', '"badnet"', "Did you mean 'badnets'"),
        ('["clean", "smi"]', '["clean", "sim"]', "Did you mean 'smi'"),
        ('prior = "digits"', "prior = 3", "prior of 'digits' is 3"),
        ('prior = "digits"', 'public = ["a"]', "public of 'digits' is .'a'."),
        ('prior = "digits"', 'public = "classes:x"', "names no classes"),
        ("size = 3", "sizes = 3", "attack.badnets has no setting 'sizes'"),
        ("rounds = 2", "rounds = 0", "rounds is 0"),
        ('["none"]', '["smi"]', "clp takes no samples"),
        ('sources = ["clean", "smi"]', 'sources = ["none"]', "ft needs samples"),
        ("seeds = [1, 2]", "seeds = [1", "is not TOML"),
    ],
)
def test_mistakes_in_a_file_are_named(small, old, new, message):
    assert old in SMALL
    small.write_text(SMALL.replace(old, new))
    with pytest.raises(InputError, match=message):
        load_study(small)


def test_an_unknown_study(tmp_path):
    with pytest.raises(InputError, match="Did you mean 'digits'"):
        load_study("digit")
    with pytest.raises(InputError, match="There is no file"):
        load_study(tmp_path / "none.toml")


def test_damaged_files_of_the_cache_are_made_again(small, store, monkeypatch):
    data = PrivateSet(noise(40, 1, 32, 32), torch.arange(40) % 10, 10)
    domain = Domain("tiny", [str(i) for i in range(10)], PrivateData(data, data), PublicImages(data.images))
    monkeypatch.setattr(stages, "_domain", lambda *_: domain)
    cell = next(c for c in load_study(small).cells if c.source == "clean")

    def made():
        victim = stages.make_victim(cell, store)
        files = {"victim": Path(victim), "samples": Path(stages.make_cell_samples(cell, store, victim, "digits"))}
        return files, [load_tensors(file, kind)[0] for kind, file in files.items()]

    files, before = made()
    for file in files.values():
        content = file.read_bytes()
        file.unlink()  # the tensors that were read are views of the old file
        file.write_bytes(content[:-100])
    with pytest.warns(UserWarning, match="is damaged: it is removed") as warned:
        again, after = made()
    assert again == files
    assert len(warned) == 2
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0)
    stamps = [file.stat().st_mtime_ns for file in files.values()]
    made()
    assert [file.stat().st_mtime_ns for file in files.values()] == stamps, "what is whole stays"


def rows():
    base = {"domain": "d", "source": "smi", "defense": "ibau", "n": 3, "acc_before": 0.98, "asr_before": 1.0,
            "seconds": 1.0}  # fmt: skip
    values = [("a", 0, 0.9, 0.1, 0.9), ("a", 1, 0.8, 0.3, 0.7), ("b", 0, 0.95, 0.0, 1.0)]
    names = ("attack", "seed", "acc", "asr", "der")
    return [base | dict(zip(names, value, strict=True)) for value in values]


def test_summary_gives_mean_and_worst():
    first, second = summarise(rows())
    assert (first["attack"], first["cells"], first["worst_acc"], first["worst_asr"], first["worst_der"]) == (
        "a", 2, 0.8, 0.3, 0.7,
    )  # fmt: skip
    assert first["acc"] == pytest.approx(0.85)
    assert second["cells"] == 1
    assert len(summarise(rows(), by=("source",))) == 1
    assert "| a | smi | ibau | 2 | 85.0 (80.0) | 20.0 (30.0) | 80.0 (70.0) |" in as_markdown(summarise(rows()))
    assert as_csv(rows()).splitlines()[0] == (
        "domain,attack,source,defense,seed,n,acc_before,asr_before,acc,asr,der,seconds"
    )


def test_rows_come_back_from_their_csv_and_other_tables_are_refused():
    assert from_csv(as_csv(rows())) == rows()
    assert from_csv("") == []
    with pytest.raises(InputError, match=r"Row 1 .*'domain'"):
        from_csv("a,b\n1,2\n")
    with pytest.raises(InputError, match=r"Row 2 .*'much'"):
        from_csv(as_csv([rows()[0], rows()[1] | {"acc": "much"}]))


def test_the_picture_shows_means_and_what_is_missing():
    made = [*rows(), rows()[2] | {"source": "clean", "asr": 0.2, "acc": 0.93}]
    left, lost = plot_rates(made, ["pixel", "clean"]).axes
    shown = {(t.get_position(), t.get_text()) for t in left.texts}
    assert [label.get_text() for label in left.get_xticklabels()] == ["no removal", "clean, 1 of 3", "smi"]
    assert [label.get_text() for label in left.get_yticklabels()] == ["a", "b", "mean"]
    assert shown == {
        ((0, 0), "100.0"), ((0, 1), "100.0"), ((0, 2), "100.0"), ((1, 1), "20.0"), ((1, 2), "20.0"),
        ((2, 0), "20.0"), ((2, 1), "0.0"), ((2, 2), "13.3"),
    }  # fmt: skip
    assert {(t.get_position(), t.get_text()) for t in lost.texts} == {
        ((0, 1), "5.0"), ((0, 2), "5.0"), ((1, 0), "13.0"), ((1, 1), "3.0"), ((1, 2), "9.7"),
    }  # fmt: skip


def test_sources_are_compared_where_both_have_a_cell():
    base = {"domain": "d", "defense": "ibau"}
    rows = [
        base | {"attack": f"a{attack}", "source": source, "seed": seed, "der": 0.5 + 0.1 * (source == "smi") * attack}
        for attack in range(6)
        for seed in range(2)
        for source in ("smi", "latent")
    ]
    found = compare(rows, "smi", "latent")
    assert (found.mean, found.cells) == (pytest.approx(0.25), 12)
    assert 0.1 < found.low < 0.25 < found.high < 0.4  # standard error 0.07
    back = compare(rows, "latent", "smi")
    assert (back.mean, back.low, back.high) == pytest.approx((-found.mean, -found.high, -found.low), abs=0.01)
    alone = {"attack": "a0", "source": "smi", "seed": 7, "der": 0.0}
    assert compare([*rows, base | alone], "smi", "latent") == found, "a cell that the other lacks does not count"
    assert compare([row | {"der": 0.3} for row in rows], "smi", "latent").high == 0
    with pytest.raises(InputError, match="no cell with 'clean'"):
        compare(rows, "clean", "smi")


def test_the_commands(small, store, tmp_path):
    run_study(load_study(small), store, pieces=study_pieces)
    where = [str(small), "--out", str(store.results), "--cache", str(store.cache)]
    runner = CliRunner()
    assert runner.invoke(cli, ["study", "status", *where]).output.strip() == "16 done, 0 failed, 0 missing"
    found = runner.invoke(cli, ["study", *where])  # run is what it does unless told otherwise
    assert found.exit_code == 0, found.output
    assert "0 cells computed, 16 were there, 0 failed" in found.output
    csv = tmp_path / "all.csv"
    found = runner.invoke(cli, ["study", "table", *where, "--csv", str(csv), "--by", "source"])
    assert "| smi | 8 |" in found.output
    assert len(csv.read_text().splitlines()) == 17
    assert runner.invoke(cli, ["study", "table", *where, "--csv", str(csv)]).exit_code == 2
    picture = tmp_path / "picture.png"
    assert runner.invoke(cli, ["study", "plot", *where, str(picture), "--defense", "ibau"]).exit_code == 0
    assert picture.stat().st_size > 1000
    assert runner.invoke(cli, ["study", "plot", *where, str(tmp_path / "b.png"), "--defense", "nad"]).exit_code == 2
    rows = read_rows(load_study(small), store)
    assert len(rows) == 16
    small.unlink()
    found = store.results / "small.jsonl"
    found.write_text(found.read_text() + '{"key": ')
    assert sorted(map(str, rows)) == sorted(str(row) for _, row in stored(found)), "without the study's file"
    picture.unlink()
    assert runner.invoke(cli, ["study", "plot", str(found), str(picture), "--defense", "ibau"]).exit_code == 0
    assert picture.stat().st_size > 1000
    shown = runner.invoke(cli, ["study", "table", str(found), "--by", "source"])
    assert "| smi | 8 |" in shown.output
    refused = runner.invoke(cli, ["study", "table", str(store.results)])
    assert refused.exit_code == 2
    assert f"Name a study, or a file {store.results}/NAME.jsonl" in refused.output


def test_the_quick_study_from_victims_to_table(tmp_path):
    """The real thing, small: every stage as in a study of hours, of one attack."""
    quick, one = resources.files("smi").joinpath("study", "shipped", "quick.toml").read_text(), tmp_path / "one.toml"
    one.write_text(re.sub(r"^attacks = .*$", 'attacks = ["badnets"]', quick, flags=re.MULTILINE))
    where = [str(one), "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    runner = CliRunner()
    found = runner.invoke(cli, ["study", *where, "--workers", "2"])
    assert found.exit_code == 0, found.output
    assert "3 cells computed, 0 were there, 0 failed" in found.output
    store = Store(tmp_path / "out", tmp_path / "cache")
    done = {(row["attack"], row["source"]): row for row in read_rows(load_study(one), store)}
    assert len(done) == 3
    for row in done.values():
        assert row["asr_before"] > 0.9
        assert row["n"] == (0 if row["source"] == "none" else 100)
    # Ten images a class are few; what must hold is that a removal removes, and that one without samples is measured.
    assert all(row["asr"] < 0.5 for (_, source), row in done.items() if source == "clean")
    assert len(list((tmp_path / "cache" / "victims").iterdir())) == 1


def test_a_precision_that_is_asked_for_makes_other_cells_and_is_recorded(small):
    auto, low = load_study(small), load_study(small, precision="float32")
    assert [cell.key for cell in load_study(small, precision="auto").cells] == [cell.key for cell in auto.cells]
    for name in ("key", "victim_key", "samples_key"):
        assert not {getattr(cell, name) for cell in auto.cells} & {getattr(cell, name) for cell in low.cells}
    assert all("precision" not in cell.config for cell in auto.cells)
    assert all(cell.config["precision"] == cell.scenario.precision == "float32" for cell in low.cells)
    small.write_text('precision = "bfloat16"\n' + small.read_text())
    assert {cell.scenario.precision for cell in load_study(small, precision="float32").cells} == {"bfloat16"}
    small.write_text(small.read_text().replace("bfloat16", "int8"))
    with pytest.raises(InputError, match=r"precision 'int8'.*Allowed: auto, bfloat16, float16, float32"):
        load_study(small)


def test_every_piece_is_made_in_the_precision_that_is_asked_for(small, store, monkeypatch):
    cell = load_study(small, precision="float16").cells[0]
    seen = []

    class SeenError(Exception):
        pass

    def made(*args, **options):
        seen.append(asked_precision())
        raise SeenError

    for name in ("plant", "make_samples", "fit_prior", "train_classifier"):
        monkeypatch.setattr(stages, name, made)
    monkeypatch.setattr(type(cell.defense), "repair", made)
    monkeypatch.setattr(stages, "load_victim", lambda *args: (tiny_model(), cell.attack, None))
    for piece in (
        lambda: stages.make_victim(cell, store),
        lambda: stages.make_cell_samples(cell, store, "victim", None),
        lambda: stages.make_prior(replace(cell.scenario, prior="fit"), store),
        lambda: stages.clean_classifier(cell, store, load_domain("digits")),
        lambda: stages.run_cell(cell, store, "victim", ""),
    ):
        with pytest.raises(SeenError):
            piece()
    assert seen == ["float16"] * 5
    assert asked_precision() == "auto"
