"""The inner level of stabilised inversion: bounds, known directions, and the objective that it serves."""

import pytest
import torch
from tiny import TinyPrior, noise, runner, same_state, state_of, tiny_model
from torch import nn
from torch.nn import functional as F

from smi.inversion import Stabilized
from smi.inversion.base import Task
from smi.inversion.perturbation import slopes_at, worst_input, worst_parameters
from smi.runtime.seeding import stream


@pytest.fixture
def setting():
    model = tiny_model(seed=1)
    return model, runner(model), 0.3 + 0.4 * noise(12, 1, 8, 8), torch.arange(12) % 3


@pytest.mark.parametrize("radius", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("steps", [1, 3])
def test_worst_input_respects_its_bounds(setting, radius, steps):
    _, run, _, labels = setting
    images = noise(12, 1, 8, 8)  # reaches the border of [0, 1]
    before = images.clone()
    delta = worst_input(run, images, labels, radius=radius, steps=steps)
    assert (delta.flatten(1).norm(dim=1) <= radius * (1 + 1e-5)).all()
    assert (images + delta).min() >= -1e-6
    assert (images + delta).max() <= 1 + 1e-6
    assert not delta.requires_grad
    assert torch.equal(images, before)


def test_worst_input_is_worse_than_random(setting):
    _, run, images, labels = setting
    delta = worst_input(run, images, labels, radius=0.3, steps=2)
    random = torch.randn(delta.shape, generator=torch.Generator().manual_seed(0))
    random *= (delta.flatten(1).norm(dim=1) / random.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
    assert delta.flatten(1).norm(dim=1).min() > 0.25

    def losses(x):
        return F.cross_entropy(run(x), labels, reduction="none").detach()

    assert (losses(images + delta) > losses(images)).all()
    assert (losses(images + delta) > losses((images + random).clamp(0, 1))).all()


def test_worst_input_of_a_linear_model_is_along_its_gradient():
    """Two classes: the gradient of the loss is a multiple of w_other − w_own, so the best δ is known."""
    linear = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    images, labels = torch.full((2, 1, 4, 4), 0.5), torch.tensor([0, 1])
    delta = worst_input(runner(linear), images, labels, radius=0.2, steps=3).flatten(1)
    direction = F.normalize(linear[1].weight[1] - linear[1].weight[0], dim=0).detach()
    assert torch.allclose(delta, 0.2 * torch.stack([direction, -direction]), atol=1e-5)


def test_worst_input_treats_each_image_alone(setting):
    _, run, images, labels = setting
    together = worst_input(run, images, labels, radius=0.5, steps=2)
    alone = worst_input(run, images[3:4], labels[3:4], radius=0.5, steps=2)
    assert torch.allclose(together[3:4], alone, atol=1e-5)


def test_worst_parameters_have_exact_norms_and_the_analytic_direction(setting):
    model, run, images, labels = setting
    before = state_of(model)
    worst = worst_parameters(run, model, images, labels, radius=0.05)
    assert same_state(before, state_of(model))
    own = dict(model.named_parameters())
    gradients = torch.autograd.grad(F.cross_entropy(model(images), labels), list(own.values()))
    assert worst.keys() == own.keys()
    for (name, w), gradient in zip(own.items(), gradients, strict=True):
        v = worst[name] - w.detach()
        assert not worst[name].requires_grad
        assert v.norm().item() == pytest.approx(0.05 * w.norm().item(), rel=1e-3, abs=1e-7), name
        if w.norm() > 0 and gradient.norm() > 1e-6:
            assert F.cosine_similarity(v.flatten(), gradient.flatten(), dim=0) > 0.999, name
    assert F.cross_entropy(run(images, worst), labels) > F.cross_entropy(run(images), labels)


def test_worst_parameters_are_worse_than_random(setting):
    model, run, images, labels = setting
    rng = torch.Generator().manual_seed(0)

    def noisy(w):
        v = torch.randn(w.shape, generator=rng)
        return w.detach() + 0.05 * w.detach().norm() / v.norm() * v

    worst = F.cross_entropy(run(images, worst_parameters(run, model, images, labels, radius=0.05)), labels)
    for _ in range(5):
        random = {name: noisy(w) for name, w in model.named_parameters()}
        assert F.cross_entropy(run(images, random), labels) < worst


def test_a_parameter_that_the_output_does_not_depend_on(setting):
    model, run, images, labels = setting
    model.spare = nn.Parameter(torch.ones(3))
    worst = worst_parameters(run, model, images, labels, radius=0.05)
    assert torch.equal(worst["spare"], torch.ones(3))


def test_one_pass_serves_the_outer_and_both_inner_problems(setting):
    model, run, images, labels = setting
    value, slope, slopes = slopes_at(run, model, images, labels)
    pictures = images.clone().requires_grad_()
    loss = F.cross_entropy(model(pictures), labels)
    assert torch.allclose(value, loss)
    assert torch.allclose(slope, torch.autograd.grad(loss, pictures)[0], atol=1e-7)
    for kwargs in ({"radius": 0.5, "steps": 1}, {"radius": 0.5, "steps": 3}):
        alone, shared = (worst_input(run, images, labels, **kwargs, slope=given) for given in (None, slope))
        assert torch.allclose(alone, shared, atol=1e-5)
    alone, shared = (worst_parameters(run, model, images, labels, radius=0.1, slopes=given) for given in (None, slopes))
    assert all(torch.allclose(alone[name], shared[name], atol=1e-6) for name in alone)


@pytest.mark.parametrize("weights", [(0.3, 0.3), (0.3, 0.0), (0.0, 0.3)])
def test_the_stabilised_objective_and_its_gradient_are_the_sum_of_its_terms(setting, weights):
    model, run, images, labels = setting
    method = Stabilized(lambda_x=weights[0], lambda_w=weights[1], warmup=0, epsilon=0.5, rho=0.05, lambda_prior=0)
    task = Task(model, run, TinyPrior(), labels, stream(0, "objective"))
    delta = worst_input(run, images, labels, radius=0.5, steps=1)
    worst = worst_parameters(run, model, images, labels, radius=0.05)
    pictures = images.clone().requires_grad_()
    terms = [
        F.cross_entropy(run(x, w), labels) for x, w in ((pictures, None), (pictures + delta, None), (pictures, worst))
    ]
    by_hand = terms[0] + weights[0] * terms[1] + weights[1] * terms[2]
    value = method.objective(pictures, pictures, task)
    assert torch.allclose(value, by_hand, atol=1e-6)
    expected, given = (torch.autograd.grad(one, pictures)[0] for one in (by_hand, value))
    assert torch.allclose(given, expected, atol=1e-6)
