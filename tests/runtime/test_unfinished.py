"""Work that is stopped goes on to the same result, does nothing twice, and trusts no state that is not its own."""

import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import METHODS, PUBLIC, REMOVALS, SAMPLES, TUNE, stop_at
from tiny import TinyPrior, noise, tiny_model
from torch import nn

from smi.domains import PublicImages
from smi.errors import InputError
from smi.inversion import Latent, invert
from smi.inversion.selection import Selection
from smi.models.suspects import Adapted
from smi.priors.base import GeneratorPrior
from smi.priors.gan import PriorConfig, fit_prior
from smi.runtime.job import Loop
from smi.runtime.precision import precision
from smi.runtime.signals import Stopped, stoppable
from smi.runtime.unfinished import Unfinished, workplace


def reconstruct(method, checkpoint=None):
    selection = Selection(oversample=2, k=2) if method.name == "smi" else None  # which it chooses on the way
    return invert(tiny_model(), TinyPrior(), method, per_class=3, selection=selection, seed=4, checkpoint=checkpoint)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("call", [1, 2, 4, 7])
def test_an_inversion_goes_on_to_the_same_images(tmp_path, monkeypatch, name, call):
    method, file = METHODS[name], tmp_path / "state"
    with monkeypatch.context() as patch:
        whole, calls = reconstruct(method).images, stop_at(patch, method, None)
        reconstruct(method)
        total = len(calls)
    if call > total:
        pytest.skip("all classes at once have fewer steps")
    with monkeypatch.context() as patch:
        first = stop_at(patch, method, call)
        with stoppable(), pytest.raises(Stopped) as stopped:
            reconstruct(method, file)
    assert stopped.value.signal == signal.SIGTERM
    assert len(first) == call  # the step in hand was finished, and no other begun
    with monkeypatch.context() as patch:
        second = stop_at(patch, method, None)
        assert torch.equal(reconstruct(method, file).images, whole)
        assert call + len(second) == total
        assert torch.equal(reconstruct(method, file).images, whole)
        assert call + len(second) == total  # what is finished stays so


@pytest.mark.parametrize("public", [PUBLIC, None])
@pytest.mark.parametrize("at", [0, 2, 4])
def test_a_removal_goes_on_to_the_same_weights(tmp_path, public, at):
    file = tmp_path / "state"
    whole = TUNE.repair(tiny_model(), SAMPLES, public, seed=3)
    rounds = []

    def stop(model, index):
        rounds.append(index)
        if index == at:
            os.kill(os.getpid(), signal.SIGINT)

    with stoppable(), pytest.raises(Stopped):
        TUNE.repair(tiny_model(), SAMPLES, public, seed=3, checkpoint=file, on_round=stop)
    assert rounds == list(range(max(2, at + 1)))[: len(rounds)]
    again = []
    watched = {"on_round": lambda model, index: again.append(index)}
    resumed = TUNE.repair(tiny_model(), SAMPLES, public, seed=3, checkpoint=file, **watched)
    if at:
        assert again == list(range(at, 6))
    assert resumed.log == whole.log
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def stop_in_round(monkeypatch, call):
    """SIGINT during the ``call``-th round of any loop; None: never. Returns the rounds that are done."""
    rounds, real = [], Loop.run

    def run(self, job, one_round, told=lambda index: None):
        def counted(index):
            one_round(index)
            rounds.append((self.name, index))
            if len(rounds) == call:
                os.kill(os.getpid(), signal.SIGINT)

        real(self, job, counted, told)

    monkeypatch.setattr(Loop, "run", run)
    return rounds


@pytest.mark.parametrize("name", sorted(set(REMOVALS) - {"clp"}))  # which trains nothing
def test_every_removal_goes_on_to_the_same_weights_in_whichever_round_it_is_stopped(tmp_path, monkeypatch, name):
    def repair(**options):
        return REMOVALS[name].repair(tiny_model(), SAMPLES, PUBLIC, seed=3, **options)

    with monkeypatch.context() as patch:
        every = stop_in_round(patch, None)
        whole = repair()
    assert len(every) > 1
    for call in {1, len(every) // 2, len(every) - 1}:
        with monkeypatch.context() as patch:
            first = stop_in_round(patch, call)
            with stoppable(), pytest.raises(Stopped):
                repair(checkpoint=tmp_path / str(call))
        with monkeypatch.context() as patch:
            second = stop_in_round(patch, None)
            resumed = repair(checkpoint=tmp_path / str(call))
        assert first + second == every, "nothing twice"
        assert resumed.log == whole.log
        for key, value in whole.model.state_dict().items():
            assert torch.equal(resumed.model.state_dict()[key], value), key


def test_another_works_state_is_refused_and_says_what_differs(tmp_path):
    file = tmp_path / "state"
    reconstruct(METHODS["latent"], file)
    before = file.read_bytes()
    with pytest.raises(InputError, match="another inversion: seed was 4 there and is 5 here"):
        invert(tiny_model(), TinyPrior(), METHODS["latent"], per_class=3, seed=5, checkpoint=file)
    with pytest.raises(InputError, match="another inversion: model was"):
        invert(tiny_model(seed=1), TinyPrior(), METHODS["latent"], per_class=3, seed=4, checkpoint=file)
    with pytest.raises(InputError, match="another inversion: lr was"):
        invert(tiny_model(), TinyPrior(), Latent(steps=4, pool=2, lr=1.0), per_class=3, seed=4, checkpoint=file)
    with pytest.raises(InputError, match="no unfinished removal"):
        TUNE.repair(tiny_model(), SAMPLES, checkpoint=file)
    TUNE.repair(tiny_model(), SAMPLES, checkpoint=tmp_path / "removal")
    for samples, public, what in [
        (SAMPLES.select(torch.arange(20)), None, "images was"),
        (SAMPLES, PUBLIC, "public was None there"),
    ]:
        with pytest.raises(InputError, match=what):
            TUNE.repair(tiny_model(), samples, public, checkpoint=tmp_path / "removal")
    assert file.read_bytes() == before


@pytest.mark.parametrize("place", [0.02, 0.3, 0.6, 0.999])
def test_a_damaged_state_is_told_from_a_whole_one(tmp_path, place):
    file = tmp_path / "state"
    reconstruct(METHODS["latent"], file)
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"damaged|not an intact|holds no unfinished|is of another"):
        reconstruct(METHODS["latent"], file)
    file.write_bytes(content[: int(place * len(content))])
    with pytest.raises(InputError, match="not an intact"):
        reconstruct(METHODS["latent"], file)


def test_every_bit_of_the_tensors_is_under_the_checksum(tmp_path):
    file = tmp_path / "state"
    Unfinished(file, "test", {}).save({"a": torch.arange(3.0), "b": torch.tensor(True)})
    content, refused = file.read_bytes(), 0
    start = 8 + int.from_bytes(content[:8], "little")
    for index in range(start, len(content)):
        file.write_bytes(content[:index] + bytes([content[index] ^ 16]) + content[index + 1 :])
        with pytest.raises(InputError):
            Unfinished(file, "test", {})
        refused += 1
    assert refused == 13


def test_a_part_that_is_finished_does_not_take_the_state_of_the_next_along(tmp_path):
    file, first, second = tmp_path / "state", {"a": torch.ones(1)}, {"two.b": torch.zeros(2)}
    work = Unfinished(file, "test", {})
    work.finish("one", first)
    work.save(second)
    again = Unfinished(file, "test", {})
    again.finish("one", again.of("one"))  # as by a loop that finds nothing left to do
    assert again.once("one", lambda: 1 / 0) == first
    last = Unfinished(file, "test", {})
    assert torch.equal(last.of("two")["b"], second["two.b"])
    assert not last.of("three")


def test_tied_weights_can_be_kept(tmp_path):
    one = torch.ones(2)
    Unfinished(tmp_path / "state", "test", {}).save({"a": one, "b": one})
    assert sorted(load_file(tmp_path / "state")) == ["a", "b"]


def test_settings_that_are_no_weights_tell_work_apart(tmp_path):
    method = METHODS["latent"]
    net, file = nn.Sequential(nn.Linear(6, 64), nn.Unflatten(1, (1, 8, 8)), nn.Sigmoid()), tmp_path / "state"
    invert(tiny_model(), GeneratorPrior(net, 6, output_range=(0, 1)), method, per_class=1, checkpoint=file)
    for prior, model in [
        (GeneratorPrior(net, 6, output_range=(0, 1.5)), tiny_model()),
        (GeneratorPrior(net, 6, output_range=(0, 1)), Adapted(tiny_model(), (8, 8), bgr=False, grey=False)),
        (GeneratorPrior(net, 6, output_range=(0, 1)), Adapted(tiny_model(), (8, 8), bgr=True, grey=False)),
    ]:
        with pytest.raises(InputError, match="another inversion"):
            invert(model, prior, method, per_class=1, checkpoint=file)
    with pytest.raises(InputError, match="precision was 'auto' there"), precision("bfloat16"):
        invert(tiny_model(), GeneratorPrior(net, 6, output_range=(0, 1)), method, per_class=1, checkpoint=file)


def test_a_prior_is_not_gone_on_with_in_another_precision(tmp_path):
    public, config, file = PublicImages(noise(12, 1, 32, 32)), PriorConfig(steps=1, batch_size=4), tmp_path / "state"
    with precision("float32"):
        assert fit_prior(public, config, checkpoint=file).record["precision"] == "float32"
    with pytest.raises(InputError, match="another prior: precision was 'float32' there"):
        fit_prior(public, config, checkpoint=file)


def test_a_place_in_folders_that_are_not_there_and_the_current_folder(tmp_path, monkeypatch):
    with workplace(tmp_path / "a" / "b", resume=False) as work:
        Unfinished(work / "one.safetensors", "test", {}).save({"a": torch.ones(1)})
        assert work == tmp_path / "a" / "b.unfinished"
    monkeypatch.chdir(tmp_path / "a")
    with workplace(Path(), resume=False) as work:
        assert work == tmp_path / "a.unfinished"


def test_a_workplace_is_taken_up_only_when_asked_and_leaves_other_files_alone(tmp_path):
    out = tmp_path / "out"

    def fail():
        with workplace(out, resume=False) as work:
            assert not work.exists()
            Unfinished(work / "one.safetensors", "test", {}).save({"a": torch.ones(1)})
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    with pytest.raises(InputError, match=r"out\.unfinished holds work that was stopped.*--resume.*--force"), \
            workplace(out, resume=False):  # fmt: skip
        pass
    with workplace(out, resume=True) as work:
        assert Unfinished(work / "one.safetensors", "test", {}).tensors
        (work / "notes.txt").write_text("mine")
    assert [file.name for file in work.iterdir()] == ["notes.txt"]
    with workplace(out, resume=False, force=True) as work:
        assert not Unfinished(work / "one.safetensors", "test", {}).tensors
    (work / "notes.txt").unlink()
    with workplace(out, resume=True) as work:
        pass
    assert not work.exists()
