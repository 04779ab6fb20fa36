"""Freed memory that is kept is not asked for again; what does not fit is done in parts."""

import os
import signal
import subprocess
import sys
import warnings

import pytest
import torch
from small_runs import SAMPLES, TUNE, stop_at
from tiny import TinyPrior, noise, tiny_model
from torch import nn

from smi.defenses import FineTune, Schedule
from smi.defenses.universal import universal
from smi.inversion import Latent, Pixel, Stabilized, invert
from smi.runtime.compute import fast, predict
from smi.runtime.memory import keep_freed
from smi.runtime.precision import precision
from smi.runtime.signals import Stopped, stoppable

FAULTS = """
import resource, torch
from smi.runtime.memory import keep_freed
if {keep}:
    assert keep_freed()
torch.ones(10_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(100):
    torch.ones(10_000_000)  # 40 MB, freed at once
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(keep):
    command = [sys.executable, "-c", FAULTS.format(keep=keep)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(not keep_freed(), reason="needs glibc")
def test_what_was_freed_is_used_again_with_few_page_faults():
    returned, kept = faults(keep=False), faults(keep=True)
    assert returned > 100_000  # or this shows nothing
    assert kept < returned / 5  # a first use of fresh memory may still come late


class Small(nn.Module):
    """A model for whose device more than ``most`` images at a time are too many."""

    def __init__(self, most, error=None):
        super().__init__()
        self.net, self.most, self.seen = tiny_model(), most, []
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    def forward(self, images):
        if len(images) > self.most:
            raise self.error
        self.seen.append(len(images))
        return self.net(images)


def test_what_does_not_fit_is_halved_and_said():
    images, model = noise(37, 1, 8, 8), Small(5)
    with pytest.warns(RuntimeWarning, match="out of memory with 37 at a time; going on with 18"):
        found = predict(model, images)
    assert torch.allclose(found, predict(tiny_model(), images), atol=1e-5)
    assert model.seen == [4] * 9 + [1]


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1")],
)
def test_other_words_for_it(error):
    with pytest.warns(RuntimeWarning, match="going on with 2"):
        assert len(predict(Small(2, error), noise(4, 1, 8, 8))) == 4


def test_other_errors_and_what_cannot_be_halved_are_raised():
    with pytest.raises(ZeroDivisionError), warnings.catch_warnings(action="error"):
        predict(Small(2, ZeroDivisionError()), noise(4, 1, 8, 8))
    with pytest.raises(RuntimeError, match="shape"), warnings.catch_warnings(action="error"):
        predict(Small(2, RuntimeError("shape")), noise(4, 1, 8, 8))
    with pytest.warns(RuntimeWarning), pytest.raises(torch.OutOfMemoryError):
        predict(Small(0), noise(4, 1, 8, 8))


@pytest.mark.filterwarnings("ignore:out of memory")
@pytest.mark.parametrize("method", [Latent(steps=2, pool=1), Stabilized(steps=2, pool=1), Pixel(steps=2)])
def test_inversion_in_smaller_parts_never_mixes_classes_and_goes_on(method, tmp_path, monkeypatch):
    model, file = Small(3), tmp_path / "state"
    found = invert(model, TinyPrior(), method, per_class=7, seed=1)
    assert found.labels.tolist() == sorted([0, 1, 2] * 7)
    assert max(model.seen) <= 3
    apart = [invert(Small(3), TinyPrior(), method, per_class=7, seed=1).images for _ in range(2)]
    assert torch.equal(*apart)
    for call in (8, 11, 14):  # in the second and third parts of a class
        stop_at(monkeypatch, method, call)
        file.unlink(missing_ok=True)
        with stoppable(), pytest.raises(Stopped):
            invert(Small(3), TinyPrior(), method, per_class=7, seed=1, checkpoint=file)
        monkeypatch.undo()
        resumed = invert(Small(3), TinyPrior(), method, per_class=7, seed=1, checkpoint=file)
        assert torch.equal(resumed.images, found.images), call


@pytest.mark.filterwarnings("ignore:out of memory")
def test_memory_that_runs_out_in_the_search_that_is_gone_on_with(tmp_path, monkeypatch):
    method, file = Latent(steps=4, pool=1), tmp_path / "state"
    stop_at(monkeypatch, method, 2)
    with stoppable(), pytest.raises(Stopped):
        invert(Small(100), TinyPrior(), method, per_class=7, seed=1, checkpoint=file)
    monkeypatch.undo()
    resumed = invert(Small(3), TinyPrior(), method, per_class=7, seed=1, checkpoint=file)
    assert torch.equal(resumed.images, invert(Small(3), TinyPrior(), method, per_class=7, seed=1).images)


@pytest.mark.filterwarnings("ignore:out of memory")
def test_a_removal_in_smaller_parts_goes_on_to_the_same_weights(tmp_path):
    whole = TUNE.repair(Small(6), SAMPLES, seed=3)

    def stop(model, index):
        if index == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with stoppable(), pytest.raises(Stopped):
        TUNE.repair(Small(6), SAMPLES, seed=3, checkpoint=tmp_path / "state", on_round=stop)
    resumed = TUNE.repair(Small(6), SAMPLES, seed=3, checkpoint=tmp_path / "state")
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key
    assert resumed.log == whole.log


def test_a_few_samples_and_one_that_does_not_fit():
    few = SAMPLES.select(torch.arange(4))
    assert len(TUNE.repair(tiny_model(), few, seed=1).log["loss"]) == 5
    with pytest.warns(RuntimeWarning), pytest.raises(torch.OutOfMemoryError):
        TUNE.repair(Small(1), SAMPLES, seed=1)


@pytest.mark.filterwarnings("ignore:out of memory")
def test_removal_in_smaller_parts_is_the_same_removal():
    defense = FineTune(schedule=Schedule(rounds=2, batch_size=8, distill=0.0))
    with precision("float32"):  # in bfloat16 each part is rounded
        whole, parts = (defense.repair(model, SAMPLES, seed=1) for model in (Small(100), Small(3)))
    for name, value in whole.model.state_dict().items():
        assert torch.allclose(value, parts.model.state_dict()[name], atol=1e-5), name
    assert whole.log["loss"] == pytest.approx(parts.log["loss"], abs=1e-5)


@pytest.mark.filterwarnings("ignore:out of memory")
def test_the_search_for_perturbations_in_smaller_parts_is_the_same_search():
    def search(model):
        rng = torch.Generator().manual_seed(0)
        with fast(model.eval()) as run:
            return universal(run, SAMPLES.images, SAMPLES.labels, torch.tensor([0, 1, 2]), radius=1.0, steps=3, rng=rng)

    assert torch.allclose(search(Small(1000)), search(Small(50)), atol=1e-5)
