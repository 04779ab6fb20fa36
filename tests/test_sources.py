"""Sources of samples: each gives the same number, labelled as it says, and only the control sees private data."""

import pytest
import torch
from tiny import TinyPrior, coded_set, noise, tiny_model

from smi.domains import PublicImages
from smi.errors import InputError
from smi.sources import SourceInputs, make_samples, sources


@pytest.fixture
def given(monkeypatch):
    for name in ("Latent", "Pixel", "DeepInversion", "Stabilized"):
        monkeypatch.setattr(f"smi.inversion.{name}.optimise", few_steps)
    return SourceInputs(
        model=tiny_model(), prior=TinyPrior(), public=PublicImages(noise(20, 1, 8, 8)), per_class=2, seed=3
    )


def few_steps(self, task):
    return self.render(self.start(task), task).detach().clamp(0, 1)


WITHOUT_PRIVATE = [name for name in sources if name != "clean"]


def test_the_nine_sources():
    names = ["clean", "deepinversion", "input", "latent", "parameter", "pixel", "public", "random", "smi"]
    assert sorted(sources) == names


@pytest.mark.parametrize("name", WITHOUT_PRIVATE)
def test_number_shape_and_name(given, name):
    samples = make_samples(name, given)
    assert samples.images.shape == (6, 1, 8, 8)
    assert (samples.source, samples.num_classes) == (name, 3)
    assert torch.equal(samples.images, make_samples(name, given).images)
    if name not in ("public", "random"):
        assert samples.labels.bincount(minlength=3).tolist() == [2, 2, 2]


@pytest.mark.parametrize("name", ["public", "random"])
def test_pseudo_labels_are_the_suspect_models(given, name):
    samples = make_samples(name, given)
    with torch.no_grad():
        assert torch.equal(given.model(samples.images).argmax(1), samples.labels)


def test_public_samples_are_public_images(given):
    rows = {image.numpy().tobytes() for image in given.public.images}
    assert all(image.numpy().tobytes() in rows for image in make_samples("public", given).images)


def test_random_samples_are_the_generators(given):
    class Grey(TinyPrior):
        def generate(self, z):
            return torch.full((len(z), 1, 8, 8), 0.25)

    samples = make_samples("random", SourceInputs(model=given.model, prior=Grey(), public=given.public, per_class=2))
    assert (samples.images == 0.25).all()


def test_the_clean_control_comes_from_the_private_set_alone(given):
    with pytest.raises(InputError, match="only the evaluator has"):
        make_samples("clean", given)
    private = coded_set([i % 3 for i in range(12)], classes=3)
    samples = make_samples("clean", SourceInputs(model=given.model, prior=given.prior, public=given.public, per_class=2,
                                          private=private))  # fmt: skip
    rows = {image.numpy().tobytes() for image in private.images}
    assert all(image.numpy().tobytes() in rows for image in samples.images)


def test_the_ablations_leave_one_side_out(monkeypatch, given):
    seen = {}

    def spy(model, prior, method, *, selection, **options):
        seen[selection] = method
        raise InputError("enough")

    monkeypatch.setattr("smi.sources.invert", spy)
    for name in ("input", "parameter", "smi"):
        with pytest.raises(InputError, match="enough"):
            make_samples(name, given)
    found = [(m.lambda_x > 0, m.lambda_w > 0, s.sigma_x > 0, s.sigma_w > 0) for s, m in seen.items()]
    assert found == [(True, False, True, False), (False, True, False, True), (True, True, True, True)]


def test_an_unknown_source(given):
    with pytest.raises(InputError, match="Did you mean 'latent'"):
        make_samples("latnt", given)
