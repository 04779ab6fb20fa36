"""A study analysed from its files, by function and by command, and the figures of the analysis."""

import csv
import itertools
import math

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from matplotlib.backends.backend_agg import FigureCanvasAgg
from tiny import noise

from smi.analysis import (
    ANALYSIS_COLUMNS,
    Path,
    analyse,
    rank_correlation,
)
from smi.analysis.study import sample_sets, stored_analysis
from smi.cli.main import cli
from smi.errors import InputError
from smi.models.classifiers import build_classifier
from smi.plotting import analysis as figures
from smi.runtime.files import save_tensors
from smi.study import Store, load_study
from smi.study.records import append
from smi.study.stages import names_of


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


# A study, from its files

STUDY = """
seeds = [1]
attacks = ["badnets", "blended"]
per_class = 4

[domain."{domain}"]

[train]
epochs = 1
augment = "none"

[[grid]]
sources = ["clean", "latent", "smi"]
defenses = ["erasure", "ft"]

[[grid]]
sources = ["none"]
defenses = ["clp"]
"""


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """A study of untrained victims on noise, as files: quick, and every number can still be checked."""
    folder = tmp_path_factory.mktemp("study")
    labels = np.arange(90) % 3
    np.savez(folder / "noise.npz", x_train=(noise(90, 16, 16) * 255).byte().numpy(), y_train=labels)
    (folder / "small.toml").write_text(STUDY.format(domain=folder / "noise.npz"))
    study, store = load_study(folder / "small.toml"), Store(folder / "out", folder / "cache")
    store.results.mkdir()
    before = {"acc": 0.9, "asr": 1.0, "ra": 0.0}
    for index, cell in enumerate(study.cells):
        model = build_classifier("small_cnn", 1, 3, seed=1)
        meta = {"kind": "victim", "arch": "small_cnn", "channels": 1, "num_classes": 3, "before": before}
        tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
        save_tensors(store.kept("victims", cell.victim_key), tensors, meta | {"fitted": False, "seconds": 1.0})
        if cell.source == "latent":
            continue  # its samples are not there
        images = noise(12, 1, 16, 16, seed=5)
        images = cell.attack.stamp(images) if cell.source == "smi" else images
        if cell.source != "none":
            save_tensors(store.kept("samples", cell.samples_key), {"images": images, "labels": torch.arange(12) % 3},
                         {"kind": "samples", "num_classes": 3, "seconds": 1.0})  # fmt: skip
        after = {"acc": 0.8 + index / 100, "asr": 0.1, "ra": 0.5, "der": 0.9}
        record = names_of(cell) | {"n": 12, "before": before, "after": after,
                                   "seconds": {"samples": 1.0, "repair": 1.0}}  # fmt: skip
        done = not (cell.source == "clean" and cell.defense_name == "erasure" and cell.attack_name == "blended")
        if done:
            append(store.found(study), record)
    return study, store, folder


def test_a_study_is_analysed_from_what_is_there(studied):
    study, store, folder = studied
    found = sample_sets(study, store)
    assert (len(found.ready), found.missing) == (
        3,
        3,
    )  # no samples of `latent`, twice; one without erasure
    rows = analyse(study, store)
    assert [(row["attack"], row["source"], row["defense"]) for row in rows] == [
        (attack, source, defense) for attack, source in (("badnets", "clean"), ("badnets", "smi"), ("blended", "smi"))
        for defense in ("erasure", "ft")
    ]  # fmt: skip
    assert all(set(row) == set(ANALYSIS_COLUMNS) for row in rows)
    clean, _, stamped, *_ = rows
    assert stamped["residual_target"] == pytest.approx(0, abs=1e-5)
    assert clean["residual_target"] > 0.5
    assert stamped["presence"] == stamped["presence_if_stamped"] == clean["presence_if_stamped"]
    assert rows[-1]["residual_target"] is None
    assert clean["acc"] == 0.8
    made = list((store.cache / "detectors").iterdir())
    assert len(made) == 2
    assert len(list((store.cache / "judges").iterdir())) == 1  # one seed, one scenario
    elsewhere = Store(store.results, folder / "another cache")
    assert analyse(study, elsewhere) == rows, "what was measured needs no samples again"
    assert sorted(map(str, stored_analysis(store.found(study)))) == sorted(map(str, rows)), "nor the study's file"
    for name in ("score_joint", "score_input", "score_parameter", "frechet", "nearest"):
        assert all(math.isfinite(row[name]) and row[name] >= 0 for row in rows), name
    assert {row["score_input"] for row in rows} != {row["score_joint"] for row in rows}


def test_the_command(studied, tmp_path):
    _, store, folder = studied
    where = ["study", "analyse", str(folder / "small.toml"), "--cache", str(store.cache)]
    table, picture = tmp_path / "a.csv", tmp_path / "a.png"
    wanted = [*where, "--out", str(store.results), "--csv", str(table), "--plot", str(picture)]
    found = CliRunner().invoke(cli, wanted)
    assert found.exit_code == 0, found.output
    assert "6 rows; 3 sample sets were not ready" in found.output
    rows = list(csv.DictReader(table.open()))
    assert tuple(rows[0]) == ANALYSIS_COLUMNS
    assert [row["residual_target"] for row in rows].count("") == 2
    assert picture.stat().st_size > 10_000
    assert CliRunner().invoke(cli, wanted).exit_code == 2  # nothing is overwritten
    assert CliRunner().invoke(cli, [*wanted, "--force"]).exit_code == 0
    nothing = CliRunner().invoke(cli, [*where, "--out", str(tmp_path / "none"), "--csv", str(tmp_path / "b.csv")])
    assert nothing.exit_code == 2
    assert "No sample set of small is ready" in nothing.output


# Figures


def rows(sources=("clean", "pixel", "latent", "smi"), attacks=("badnets", "sig"), seeds=(1, 2)):
    draw, made = np.random.default_rng(0), []
    for attack in attacks:
        for seed in seeds:
            for place, source in enumerate(sources):
                row = dict.fromkeys(ANALYSIS_COLUMNS, 0.5) | {
                    "domain": "digits", "attack": attack, "source": source, "defense": "erasure", "seed": seed,
                }  # fmt: skip
                made.append(row | {"frechet": 1.0 + place, "score_joint": 10.0**-place, "der": draw.uniform()})
    return made


def texts(figure):
    return " ".join(t.get_text() for axes in figure.axes for t in (axes.title, axes.xaxis.label, axes.yaxis.label))


@pytest.mark.parametrize("decades", [0.5, 1.5, 3, 4, 6])
def test_tick_labels_do_not_run_into_each_other(decades):
    drawn = rows()
    for row, exponent in zip(drawn, np.linspace(-decades, 0, len(drawn)), strict=True):
        row["score_joint"] = float(10**exponent)
    figure = figures.overview(drawn)
    FigureCanvasAgg(figure).draw()
    axes = next(a for part in figure.subfigs for a in part.axes if "stability score" in a.get_xlabel())
    low, high = axes.get_xlim()
    labels = [label for label in axes.get_xticklabels() if label.get_text() and low <= label.get_position()[0] <= high]
    boxes = sorted((label.get_window_extent() for label in labels), key=lambda box: box.x0)
    assert len(boxes) >= 2
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


def test_figures_have_labels_a_mark_a_source_and_the_correlation():
    drawn = rows()
    found = rank_correlation([r["frechet"] for r in drawn], [r["der"] for r in drawn])
    figure = figures.similarity_and_outcome(drawn)
    assert f"ρ = {found.rho:.2f}".replace("-", "−") in texts(figure)
    assert "DER" in texts(figure)
    assert "ρ is not defined" in texts(figure)  # the columns that are constant here
    marks = {(line.get_color(), line.get_marker()) for line in figure.axes[0].lines}
    assert len(marks) == 4
    assert len(set(figures.MARKS.values())) == len(figures.MARKS)
    for make in (figures.stability_and_outcome, figures.presence_by_source, figures.overview):
        make(drawn).canvas.draw()
    assert "ρ = " in texts(figures.overview([row for row in drawn if row["seed"] == 1 and row["attack"] == "sig"]))


def test_figures_refuse_what_they_cannot_draw():
    with pytest.raises(InputError, match="no row of the defense 'nad'"):
        figures.presence_by_source(rows(), defense="nad")
    with pytest.raises(InputError, match="Did you mean 'acc'"):
        figures.similarity_and_outcome(rows(), outcome="ac")
    path = Path(torch.rand(4, 20), torch.rand(4, 3), ("a", "b", "c"))
    with pytest.raises(InputError, match="3 scores for 20 probes"):
        figures.path_figure(path, torch.rand(3))


def test_the_path_figure_tells_stable_from_unstable():
    scores = torch.linspace(1e-5, 1e-2, 50)
    loss = torch.stack([scores * 0.1, scores * 100, scores * 10])
    figure = figures.path_figure(Path(loss, torch.rand(3, 4), ("a", "b", "c", "d")), scores)
    assert "ρ = 1.00" in texts(figure)
    stable, unstable = (line.get_ydata() for line in figure.axes[0].lines[:2])
    assert (torch.as_tensor(stable) < torch.as_tensor(unstable)).all()
    figure.canvas.draw()


def test_with_labels_the_tenths_are_those_of_each_class():
    labels = torch.arange(40) % 2
    scores = torch.linspace(0.1, 1, 40, dtype=torch.float64) + 10 * labels  # class 1 is less stable throughout
    before = scores.clone()
    figure = figures.path_figure(Path(torch.rand(3, 40) + 1, torch.rand(3, 1), ("w",)), scores, labels)
    assert torch.equal(scores, before)
    _, stable, unstable, *_ = (list(line.get_xdata()) for line in figure.axes[1].lines)
    for drawn, chosen in ((stable, slice(2)), (unstable, slice(18, 20))):
        assert sorted(drawn) == sorted([*scores[labels == 0][chosen].tolist(), *scores[labels == 1][chosen].tolist()])
    assert "inside each class ρ" in texts(figure)


def test_the_theorem_figure_marks_where_it_speaks():
    figure = figures.theorem_figure()
    left, right = (np.asarray(line.get_ydata()) for line in figure.axes[0].lines[:2])
    assert (left < right).any()
    assert (left > right).any()
    figure.canvas.draw()
