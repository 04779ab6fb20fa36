"""Work is done where the model is, with the same random numbers, and what comes back is on the CPU.

The device is a stand-in (`elsewhere`) with the arithmetic of the CPU, so that results are equal to the bit.
"""

import json

import numpy as np
import pytest
import torch
from elsewhere import Away
from small_runs import METHODS, PUBLIC, REMOVALS, SAMPLES
from tiny import TinyPrior, coded_set, noise, tiny_model

from smi.attacks import BadNets
from smi.domains import PrivateSet, PublicImages
from smi.errors import InputError
from smi.evaluation import Evaluator
from smi.inversion import invert
from smi.inversion.selection import Selection, features, score_samples
from smi.models.classifiers import TrainConfig, train_classifier
from smi.priors.gan import PriorConfig, fit_prior
from smi.runtime.checks import device_of
from smi.runtime.compute import predict
from smi.runtime.precision import precision
from smi.study import load_study, stages
from smi_kernels import stability_scores


def on_cpu(*tensors):
    return all(type(tensor) in (torch.Tensor, torch.nn.Parameter) for tensor in tensors)


def same(model, other):
    return all(torch.equal(value.cpu(), other.state_dict()[name]) for name, value in model.state_dict().items())


def assert_same_scores(away, here):
    """But for roundings: with AVX512 the CPU has a backend of its own, which sums in another order."""
    torch.testing.assert_close(away, here, rtol=1e-4, atol=1e-7)


def test_the_stand_in_tells_what_a_device_tells(there):
    away = torch.ones(2, 2).to(there)
    assert isinstance(away, Away)
    assert away.device == there
    for mistake in (
        lambda: away + torch.ones(2),
        lambda: torch.randn(2, device=there, generator=torch.Generator()),
        lambda: away.double(),
        lambda: away.numpy(),
        lambda: torch.ones(2)[away[0].long()],
    ):
        with pytest.raises((RuntimeError, TypeError)):
            mistake()
    assert on_cpu(away.cpu(), away[0].cpu())


@pytest.mark.parametrize("name", METHODS)
def test_inversion(there, name):
    here = invert(tiny_model(), TinyPrior(), METHODS[name], per_class=2, selection=Selection(oversample=2, k=2), seed=1)
    model = tiny_model().to(there)
    away = invert(model, TinyPrior(), METHODS[name], per_class=2, selection=Selection(oversample=2, k=2), seed=1)
    assert on_cpu(away.images, away.labels, away.scores)
    assert torch.equal(away.images, here.images)
    assert_same_scores(away.scores, here.scores)
    assert next(model.parameters()).device == there


@pytest.mark.parametrize("name", REMOVALS)
@pytest.mark.parametrize("public", [PUBLIC, None])
def test_removal(there, name, public, tmp_path):
    defense = REMOVALS[name]
    here = defense.repair(tiny_model(), SAMPLES, public, seed=3)
    model = tiny_model().to(there)
    away = defense.repair(model, SAMPLES, public, seed=3, checkpoint=tmp_path / "state")
    assert same(away.model, here.model)
    assert next(away.model.parameters()).device == there
    assert away.log == here.log
    assert here.delta is None or (on_cpu(away.delta) and torch.equal(away.delta, here.delta))
    again = defense.repair(model, SAMPLES, public, seed=3, checkpoint=tmp_path / "state")
    assert same(again.model, here.model)


def test_prior(there, tmp_path):
    public, config = PublicImages(noise(12, 1, 32, 32)), PriorConfig(steps=2, batch_size=4)
    here = fit_prior(public, config)
    away = fit_prior(public, config, device=there, checkpoint=tmp_path / "state")
    assert same(away, here)
    assert on_cpu(*away.state_dict().values())
    assert same(fit_prior(public, config, checkpoint=tmp_path / "state"), here)  # begun there, finished here


def test_looking_at_a_model(there):
    model, images = tiny_model().to(there), noise(5, 1, 8, 8)
    for look in (predict, features):
        found = look(model, images)
        assert on_cpu(found)
        assert torch.equal(found, look(tiny_model(), images))
    found = score_samples(model, SAMPLES)
    assert on_cpu(found)
    assert_same_scores(found, score_samples(tiny_model(), SAMPLES))
    labels = torch.arange(5) % 3
    scores = stability_scores(model, images.to(there), labels.to(there), k=2, sigma_x=0.1, sigma_w=0.1)
    assert_same_scores(scores.cpu(), stability_scores(tiny_model(), images, labels, k=2, sigma_x=0.1, sigma_w=0.1))


def test_evaluation(there):
    data = coded_set([0, 1, 2, 1], 3)
    attack = BadNets()
    assert Evaluator(data, attack).measure(tiny_model().to(there)) == Evaluator(data, attack).measure(tiny_model())


def test_training_a_classifier(there):
    data = PrivateSet(noise(12, 1, 32, 32), torch.arange(12) % 3, 3)
    config = TrainConfig(epochs=1, batch_size=4)
    away = train_classifier(data, config, device=there)
    assert same(away, train_classifier(data, config))


STUDY = """
precision = "float32"  # the stand-in has no autocast
seeds = [1]
per_class = 2
attacks = ["{attack}"]

[train]
epochs = 1
batch_size = 16
augment = "none"

[domain."{folder}/set.npz"]
public = "{folder}/public.npz"
prior = "digits"

[attack.input_aware]
mask_steps = 3

[defense.ft.schedule]
rounds = 1
batch_size = 4

[[grid]]
sources = ["{source}"]
defenses = ["ft"]
"""


@pytest.mark.parametrize(("attack", "source"), [("badnets", "clean"), ("trojan_watermark", "public"),
                                                ("label_consistent", "clean"), ("input_aware", "random")])  # fmt: skip
def test_a_study(there, tmp_path, monkeypatch, attack, source):
    """Victim, samples and removal are made on the device of the store, and are what they are on the CPU."""
    pixels = (noise(36, 8, 8) * 255).to(torch.uint8).repeat(1, 4, 4)
    data = {
        "x_train": pixels[:24],
        "y_train": torch.arange(24) % 3,
        "x_test": pixels[24:],
        "y_test": torch.arange(12) % 3,
    }
    np.savez(tmp_path / "set.npz", **{name: value.numpy() for name, value in data.items()})
    np.savez(tmp_path / "public.npz", x_train=255 - data["x_train"].numpy())
    (tmp_path / "study.toml").write_text(STUDY.format(folder=tmp_path, attack=attack, source=source))
    (cell,) = load_study(tmp_path / "study.toml").cells
    seen = []
    measure, make = Evaluator.measure, stages.make_samples
    monkeypatch.setattr(Evaluator, "measure", lambda self, m: seen.append(device_of(m).type) or measure(self, m))
    monkeypatch.setattr(stages, "make_samples", lambda s, g: seen.append(device_of(g.model).type) or make(s, g))
    made = {}
    for device in (there.type, "cpu"):
        store = stages.Store(tmp_path / device, tmp_path / device / "cache", device)
        store.results.mkdir()
        victim = stages.make_victim(cell, store)
        samples = stages.make_cell_samples(cell, store, victim, "digits" if cell.needs_prior else None)
        record = json.loads(json.dumps(stages.run_cell(cell, store, victim, samples)))
        assert (record["device"], record["precision"]) == (device, "float32")
        assert record["threads"] >= 1
        assert record["versions"].get("device") == (None if device == "cpu" else device)
        tensors = stages.load_tensors(victim, "victim")[0] | stages.load_tensors(samples, "samples")[0]
        made[device] = tensors, record["before"], record["after"]
    assert seen == [there.type] * 3 + ["cpu"] * 3
    (away, *measured_away), (here, *measured_here) = made.values()
    assert measured_away == measured_here
    assert all(torch.equal(value, here[name]) for name, value in away.items())


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_models_run_in_the_precision_that_is_asked_for(name):
    seen = []
    model, images = tiny_model(), noise(5, 1, 8, 8)
    model.body[0].register_forward_hook(lambda module, args, out: seen.append(str(out.dtype)))
    with precision(name):
        found = predict(model, images)
        scores = score_samples(tiny_model(), SAMPLES, Selection(k=2))
    assert seen == [f"torch.{name}"]
    assert found.dtype == torch.float32
    assert torch.allclose(found, predict(tiny_model(), images), atol=0.1)
    assert torch.allclose(scores, score_samples(tiny_model(), SAMPLES, Selection(k=2)), rtol=0.3, atol=1e-3)


def test_an_unknown_precision_is_refused():
    with pytest.raises(InputError, match="Allowed: auto, bfloat16, float16, float32"), precision("int8"):
        pass
