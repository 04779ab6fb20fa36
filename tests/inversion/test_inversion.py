import math
from dataclasses import replace

import pytest
import torch
from tiny import TinyPrior, noise, runner, same_state, state_of, tiny_model
from torch import nn
from torch.nn import functional as F

from smi.domains import Samples
from smi.errors import InputError
from smi.inversion import DeepInversion, Latent, Pixel, Stabilized, inversions, invert, stabilized
from smi.inversion.base import Task
from smi.inversion.deepinversion import statistics_gap
from smi.inversion.latent import CLEAR
from smi.inversion.pixel import total_variation
from smi.inversion.selection import Selection, score_samples
from smi.runtime.precision import precision
from smi.runtime.seeding import stream

STEPS = {"steps": 4, "lr": 0.1}
METHODS = [
    Pixel(**STEPS), DeepInversion(**STEPS), Latent(**STEPS), Stabilized(**STEPS),
    Stabilized(**STEPS, inner="random", k=2),
]  # fmt: skip


# every method


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name}-{getattr(m, 'inner', '')}")
def test_invert(method):
    """Shape, range, order, provenance; the same seed gives the same bits; model, prior and global randomness rest."""
    model, prior = tiny_model(), TinyPrior()
    model.train()
    model.body[1].eval()
    before, prior_before, state = state_of(model), state_of(prior), torch.get_rng_state()
    samples, again = (invert(model, prior, method, per_class=2, seed=3) for _ in range(2))
    assert samples.images.shape == (6, 1, 8, 8)
    assert samples.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert (samples.source, samples.num_classes, samples.scores) == (method.name, 3, None)
    assert not samples.images.requires_grad
    assert torch.equal(samples.images, again.images)
    assert not torch.equal(samples.images, invert(model, prior, method, per_class=2, seed=4).images)
    assert same_state(before, state_of(model))
    assert same_state(prior_before, state_of(prior))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name}-{getattr(m, 'inner', '')}")
def test_more_steps_fit_the_class_better(method):
    model, prior = tiny_model(), TinyPrior()

    def loss(steps):
        samples = invert(model, prior, replace(method, steps=steps), per_class=4)
        with torch.no_grad():
            return F.cross_entropy(model(samples.images), samples.labels)

    assert loss(25) < 0.8 * loss(0)


def test_selection_makes_more_candidates_and_keeps_the_most_stable():
    model, prior = tiny_model(), TinyPrior()
    model.train()
    before = state_of(model)
    selection = Selection(oversample=3, k=4, diversity=0)
    samples = invert(model, prior, Latent(steps=1), per_class=2, selection=selection)
    assert samples.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert (samples.scores.view(3, 2).diff(dim=1) >= 0).all()
    everything = invert(model, prior, Latent(steps=1), per_class=6)
    rows = {image.numpy().tobytes() for image in everything.images}
    assert all(image.numpy().tobytes() in rows for image in samples.images)
    assert same_state(before, state_of(model))


def test_the_most_stable_are_chosen_when_the_class_is_found_and_they_alone_go_on(monkeypatch):
    model, prior, sizes = tiny_model(), TinyPrior(), []
    method, selection = Stabilized(steps=6, warmup=0.5), Selection(oversample=3, k=4, diversity=0)
    real = Stabilized.objective

    def objective(self, images, variable, task):
        sizes.append(len(images))
        return real(self, images, variable, task)

    monkeypatch.setattr(Stabilized, "objective", objective)
    with precision("float32"):
        samples = invert(model, prior, method, per_class=2, selection=selection)
    assert sizes == [6, 2, 2, 2, 2, 2] * 3
    assert samples.labels.tolist() == [0, 0, 1, 1, 2, 2]
    # By hand: six candidates of the first class after a third of the warm-up, the two most stable of them, five steps.
    task = Task(model, runner(model), prior, torch.zeros(6, dtype=torch.int64), stream(0, "invert/0"))
    kept = []

    def choose(images, labels):
        kept[:] = score_samples(model, Samples(images, labels, 3, "smi"), selection).argsort()[:2].tolist()
        return torch.tensor(kept)

    task.choose = choose
    with precision("float32"):
        by_hand = method.optimise(task)
    assert sorted(kept) != [0, 1]
    difference = (by_hand[:, None] - samples.images[None, :2]).abs().amax((2, 3, 4))
    assert (difference.amin(1) < 1e-4).all()
    assert (difference.amax(1) > 1e-2).all()


def test_methods_go_by_name():
    names = ["deepinversion", "latent", "pixel", "smi"]
    assert {name: inversions[name].name for name in inversions} == dict(zip(names, names, strict=True))


# wrong input


@pytest.mark.parametrize(
    ("model", "prior", "more", "message"),
    [
        (tiny_model(), TinyPrior(size=16), {}, r"does not accept images of shape \(1, 16, 16\)"),
        (tiny_model(), TinyPrior(channels=3), {}, r"does not accept images of shape \(3, 8, 8\)"),
        (tiny_model(), TinyPrior(), {"classes": 10}, "3 classes, but 10 were expected"),
        (tiny_model(), TinyPrior(), {"per_class": 0}, "per_class"),
        (tiny_model(), nn.Linear(6, 64), {}, "Linear is no prior"),
        ("model.pt", TinyPrior(), {}, "a str"),
    ],
)
def test_wrong_input(model, prior, more, message):
    with pytest.raises(InputError, match=message):
        invert(model, prior, Latent(steps=1), **{"per_class": 1} | more)


def test_weights_that_are_nan():
    model = tiny_model()
    with torch.no_grad():
        model.body[0].weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(InputError, match=r"'body\.0\.weight' has NaN"):
        invert(model, TinyPrior(), Latent(steps=1), per_class=1)


def test_a_method_must_be_one():
    with pytest.raises(InputError, match="method is a str"):
        invert(tiny_model(), TinyPrior(), "latent")


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (Latent, {"steps": -1}),
        (Latent, {"lr": -0.1}),
        (Latent, {"lambda_prior": float("nan")}),
        (Latent, {"norm_ball": 0.0}),
        (Latent, {"pool": 0}),
        (Pixel, {"lambda_tv": -1.0}),
        (Stabilized, {"epsilon": -1.0}),
        (Stabilized, {"rho": float("inf")}),
        (Stabilized, {"ascent_steps": 0}),
        (Stabilized, {"warmup": 1.5}),
        (Stabilized, {"inner": "worst"}),
    ],
)
def test_settings_are_checked(cls, settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        cls(**settings)


# latent inversion


class Recorded(TinyPrior):
    """Notes every latent that it is asked for."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def generate(self, z):
        self.seen.append(z.detach().clone())
        return super().generate(z)

    def __deepcopy__(self, memo):
        return Recorded(self.seen)


@pytest.mark.parametrize("norm_ball", [0.5, 1.0])
def test_latents_stay_in_the_ball(norm_ball):
    seen = []
    method = Latent(steps=15, lr=0.5, lambda_prior=0.0, norm_ball=norm_ball)
    invert(tiny_model(), Recorded(seen), method, per_class=4)
    norms, radius = torch.cat(seen).norm(dim=1), norm_ball * math.sqrt(6)
    assert norms.max() <= radius * (1 + 1e-5)
    assert (norms > 0.999 * radius).any()  # and the bound is reached, so it is the ball that holds them


def test_the_search_starts_from_clear_cases_of_the_pool():
    model, prior = tiny_model(), TinyPrior()

    def loss(pool):
        samples = invert(model, prior, Latent(steps=0, pool=pool), per_class=10)
        with torch.no_grad():
            return F.cross_entropy(model(samples.images), samples.labels, reduction="none")

    assert loss(20).mean() < loss(1).mean() / 2
    assert loss(1).max() > CLEAR


def test_the_critic_pulls_towards_what_it_likes():
    """The tiny critic likes grey."""
    model, prior = tiny_model(), TinyPrior()
    plain, pulled = (
        invert(model, prior, Latent(steps=20, lambda_prior=weight), per_class=4).images for weight in (0.0, 100.0)
    )
    assert (pulled - 0.5).abs().mean() < 0.8 * (plain - 0.5).abs().mean()


def test_a_prior_without_a_critic_will_do():
    class Silent(TinyPrior):
        def criticise(self, images):
            return None

    model = tiny_model()
    with_none = invert(model, Silent(), Latent(**STEPS, lambda_prior=1.0), per_class=2)
    without = invert(model, TinyPrior(), Latent(**STEPS, lambda_prior=0.0), per_class=2)
    assert torch.equal(with_none.images, without.images)


# pixel inversion


def test_pixels_use_the_shape_of_the_prior_only():
    class Shape(TinyPrior):
        def generate(self, z):
            raise AssertionError

        criticise = generate

    assert invert(tiny_model(), Shape(), Pixel(steps=2), per_class=1).images.shape == (3, 1, 8, 8)


def test_pixels_stay_in_range_on_the_way():
    seen = []

    class Recorded(Pixel):
        def render(self, variable, task):
            seen.append(variable.detach().clone())
            return super().render(variable, task)

    invert(tiny_model(), TinyPrior(), Recorded(steps=5, lr=0.5), per_class=1)
    assert (torch.stack(seen).aminmax().min, torch.stack(seen).aminmax().max) == (0, 1)


def test_total_variation():
    images = torch.zeros(2, 1, 4, 5)
    images[1, 0, :, 2:] = 0.5  # one vertical edge: 4 of 16 neighbours to the right differ by a half
    assert total_variation(images).tolist() == pytest.approx([0.0, 4 * 0.5 / 16])


def test_the_weight_on_total_variation_makes_smoother_images():
    model, prior = tiny_model(), TinyPrior()
    rough, smooth = (
        total_variation(invert(model, prior, Pixel(steps=20, lambda_tv=w), per_class=3).images) for w in (0.0, 20.0)
    )
    assert smooth.mean() < rough.mean() / 2


# stabilised inversion


@pytest.mark.parametrize("inner", ["adversarial", "random"])
def test_without_its_terms_it_is_latent_inversion_to_the_bit(inner):
    model, prior = tiny_model(), TinyPrior()
    latent = invert(model, prior, Latent(**STEPS), per_class=2)
    ablated = invert(model, prior, Stabilized(**STEPS, lambda_x=0, lambda_w=0, warmup=0, inner=inner), per_class=2)
    assert torch.equal(latent.images, ablated.images)


@pytest.mark.parametrize("inner", ["adversarial", "random"])
@pytest.mark.parametrize("weights", [{"lambda_w": 0.0}, {"lambda_x": 0.0}])
def test_each_term_alone_changes_the_outcome(inner, weights):
    model, prior = tiny_model(), TinyPrior()
    latent = invert(model, prior, Latent(**STEPS), per_class=2)
    one = invert(model, prior, Stabilized(**STEPS, warmup=0, inner=inner, rho=0.3, **weights), per_class=2)
    assert not torch.equal(latent.images, one.images)


def test_warmup_leaves_the_first_steps_to_latent_inversion():
    model, prior = tiny_model(), TinyPrior()
    latent, warm, half = (
        invert(model, prior, m, per_class=2).images
        for m in (Latent(**STEPS), Stabilized(**STEPS, warmup=1), Stabilized(**STEPS, warmup=0.5))
    )
    assert torch.equal(latent, warm)
    assert not torch.equal(latent, half)


def test_random_mode_scores_through_the_kernels(monkeypatch):
    calls, scores = [], stabilized.stability_scores

    def recorded(model, images, labels, **settings):
        calls.append(settings)
        return scores(model, images, labels, **settings)

    monkeypatch.setattr(stabilized, "stability_scores", recorded)
    method = Stabilized(steps=4, inner="random", k=3, epsilon=2.0, rho=0.1, warmup=0.5)
    invert(tiny_model(), TinyPrior(), method, per_class=1)
    assert len(calls) == 3 * 2 * 2  # classes, the steps after the warm-up, the two terms
    assert {(c["sigma_x"], c["sigma_w"]) for c in calls} == {(2.0 / 8, 0.0), (0.0, 0.1)}
    assert {(c["k"], c["divergence"]) for c in calls} == {(3, "cross_entropy")}
    assert len({c["seed"] for c in calls}) == len(calls)


def test_adversarial_mode_does_not_use_the_kernels(monkeypatch):
    monkeypatch.setattr(stabilized, "stability_scores", None)
    invert(tiny_model(), TinyPrior(), Stabilized(steps=2, warmup=0), per_class=1)


# DeepInversion


def test_the_gap_is_the_distance_of_statistics_and_zero_on_the_images_that_a_layer_remembers():
    model, images = tiny_model(), noise(50, 1, 8, 8)
    norm = model.body[1]
    seen = model.body[0]((images - model.mean) / model.std)
    with torch.no_grad():
        norm.running_mean.copy_(seen.mean((0, 2, 3)))
        norm.running_var.copy_(seen.var((0, 2, 3), unbiased=False))
    with statistics_gap(model) as gaps:
        model(images)
        model(images.sqrt())
    moved = model.body[0]((images.sqrt() - model.mean) / model.std)
    expected = (moved.mean((0, 2, 3)) - norm.running_mean).norm()
    expected = expected + (moved.var((0, 2, 3), unbiased=False) - norm.running_var).norm()
    assert gaps[0].item() == pytest.approx(0, abs=1e-4)
    assert gaps[1].item() == pytest.approx(expected.item(), rel=1e-4)
    model(images)
    assert len(gaps) == 2, "the hooks must be gone"


def test_deepinversion_brings_the_statistics_closer_than_pixel_inversion_does():
    model, options = tiny_model(), {"steps": 40, "lr": 0.05, "lambda_tv": 0.0}

    def gap(method):
        samples = invert(model, TinyPrior(), method, per_class=6)
        with torch.no_grad(), statistics_gap(model) as gaps:
            model(samples.images)
        return gaps[0].item()

    assert gap(DeepInversion(**options)) < 0.5 * gap(Pixel(**options))


def test_deepinversion_needs_batch_norm():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(InputError, match="needs BatchNorm layers"):
        invert(model, TinyPrior(), DeepInversion(**STEPS), per_class=2)


def test_a_joint_method_sees_all_classes_in_a_batch_and_returns_them_in_order(monkeypatch):
    monkeypatch.setattr("smi.inversion.base.JOINT", 4)
    seen = []

    class Spy(DeepInversion):
        def optimise(self, task):
            seen.append(task.labels.tolist())
            return task.labels.view(-1, 1, 1, 1).expand(-1, 1, 8, 8) / 10

    samples = invert(tiny_model(), TinyPrior(), Spy(), per_class=3)
    assert seen == [[0, 1, 2, 0], [1, 2, 0, 1], [2]]
    assert samples.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert torch.equal((10 * samples.images[:, 0, 0, 0]).round().long(), samples.labels)
