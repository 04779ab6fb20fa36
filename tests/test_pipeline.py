"""The composition: the one call, the roles, and the demo's record."""

from __future__ import annotations

import json

import pytest
import torch
from small_runs import ERASURE
from tiny import TinyPrior, tiny_domain, tiny_model

import smi
from smi.attacks import BadNets
from smi.demo import Demo, DemoConfig, run_demo
from smi.domains import Domain, PublicImages
from smi.inversion import Stabilized, invert
from smi.models.classifiers import TrainConfig
from smi.pipeline import HELD_OUT, held_out_samples
from smi.runtime.progress import Clock
from smi.sources import pseudo_labelled

INVERSION = smi.Stabilized(steps=4, lr=0.05)
SELECTION = smi.Selection(oversample=2, k=2)


def remove(domain: Domain) -> smi.Cleaned:
    return smi.remove_backdoor(
        tiny_model(), TinyPrior(), domain.public, inversion=INVERSION, selection=SELECTION, defense=ERASURE,
        per_class=4, seed=3,
    )  # fmt: skip


def test_removal_is_the_same_with_the_private_data_deleted() -> None:
    domain = tiny_domain()
    before = remove(domain)
    domain.private.forget()
    with pytest.raises(smi.InputError, match="no private data"):
        domain.private.train  # noqa: B018
    after = remove(domain)
    assert torch.equal(before.samples.images, after.samples.images)
    for one, other in zip(before.model.parameters(), after.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_images_of_the_prior_stand_in_where_there_are_no_public_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, real = [], type(ERASURE)._repair

    def repair(self, model, samples, public, seed):  # type: ignore[no-untyped-def]
        shown.append(public)
        return real(self, model, samples, public, seed)

    monkeypatch.setattr(type(ERASURE), "_repair", repair)
    given = {"inversion": INVERSION, "selection": SELECTION, "defense": ERASURE, "per_class": 4}
    for seed in (3, 3, 4):
        smi.remove_backdoor(tiny_model(), TinyPrior(), **given, seed=seed)  # type: ignore[arg-type]
    first, again, other = (one.images for one in shown)
    assert first.shape == (2000, 1, 8, 8)
    assert 0 <= first.min() < first.max() <= 1
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_another_seed_gives_another_model() -> None:
    domain = tiny_domain()
    other = smi.remove_backdoor(
        tiny_model(), TinyPrior(), domain.public, inversion=INVERSION, selection=SELECTION, defense=ERASURE,
        per_class=4, seed=4,
    )  # fmt: skip
    pairs = zip(remove(domain).model.parameters(), other.model.parameters(), strict=True)
    assert not all(torch.equal(one, two) for one, two in pairs)


def test_misfits_are_found_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*args: object, **kwargs: object) -> None:
        raise AssertionError("inversion began")

    monkeypatch.setattr(smi.Stabilized, "optimise", work)
    with pytest.raises(smi.InputError, match="Resize"):
        smi.remove_backdoor(tiny_model(), TinyPrior(), PublicImages(torch.rand(3, 1, 16, 16)))
    with pytest.raises(smi.InputError, match="PublicImages"):
        smi.remove_backdoor(tiny_model(), TinyPrior(), tiny_domain().private.test)  # type: ignore[arg-type]
    with pytest.raises(smi.InputError, match="GeneratorPrior"):
        smi.remove_backdoor(tiny_model(), torch.nn.Linear(3, 3))  # type: ignore[arg-type]
    with pytest.raises(smi.InputError, match="shape"):
        smi.remove_backdoor(tiny_model(size=8), TinyPrior(size=16))


@pytest.fixture(scope="module")
def demo() -> Demo:
    config = DemoConfig(
        train=TrainConfig(epochs=3, batch_size=20, augment="none"), attack=BadNets(target=1, size=2), per_class=4,
        inversion=INVERSION, latent=smi.Latent(steps=2), selection=SELECTION, defense=ERASURE,
    )  # fmt: skip
    return run_demo(tiny_domain(), TinyPrior(), config, seed=2)


def test_the_demo_compares_sources_of_the_same_size(demo: Demo) -> None:
    assert [row.source for row in demo.rows] == ["public", "latent", "smi", "clean"]
    assert [row.defense for row in demo.rows] == ["erasure"] * 4
    assert len(demo.samples) == 12
    assert demo.samples.labels.tolist() == sorted([0, 1, 2] * 4)


def test_the_record_is_complete_and_plain_json(demo: Demo) -> None:
    record = json.loads(json.dumps(demo.summary()))
    assert {"seed", "n", "before", "after", "controls", "stages", "settings", "versions", "threads"} <= set(record)
    assert set(record["before"]) == {"acc", "asr"}
    assert set(record["controls"]) == {"clean", "latent", "public"}
    for rates in (record["after"], *record["controls"].values()):
        assert set(rates) == {"acc", "asr", "ra", "der"}
        assert all(0 <= value <= 1 for value in rates.values())
    assert {"train", "invert", "repair"} <= set(record["stages"])
    assert record["settings"]["defense"]["tuning"]["steps"] == 2
    assert record["n"] == 12


def test_pseudo_labels_are_the_models_own() -> None:
    model, public = tiny_model(), tiny_domain().public
    samples = pseudo_labelled(model, public, 7, seed=1)
    assert len(samples) == 7
    assert torch.equal(samples.labels, model(samples.images).argmax(1))
    assert len(pseudo_labelled(model, public, 99)) == len(public)


def test_the_clock_adds_up_and_survives_errors() -> None:
    clock = Clock()
    with clock("a"):
        pass
    with pytest.raises(RuntimeError), clock("a"):
        raise RuntimeError
    assert list(clock.seconds) == ["a"]


@pytest.mark.slow
def test_the_digits_demo_removes_the_backdoor() -> None:
    """The main job, on a seed used for nothing else. Minutes."""
    result = run_demo(smi.load_domain("digits"), smi.load_prior("digits"), seed=200)
    row = result.row("smi").result
    assert result.before.acc >= 0.97
    assert result.before.asr >= 0.99
    assert row.before.acc - row.after.acc <= 0.05
    assert row.after.asr <= 0.10


def test_held_out_reconstructions_are_others_than_the_removals():
    model, prior = tiny_model(), TinyPrior()
    held = held_out_samples(model, prior, seed=2)
    assert held.source == "held out"
    assert held.labels.tolist() == sorted([0, 1, 2] * HELD_OUT)
    own = invert(model, prior, Stabilized(), per_class=HELD_OUT, seed=2)
    assert not torch.equal(held.images, own.images)
    assert torch.equal(held.images, held_out_samples(model, prior, seed=2).images)
