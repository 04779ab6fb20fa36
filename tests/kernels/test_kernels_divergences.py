import pytest
import torch
from hypothesis import given, settings, strategies as st
from kernel_reference import naive_divergence

from smi_kernels.divergences import divergences

NAMES = ["cross_entropy", "flip", "kl", "margin", "total_variation"]


def logits_and_labels(seed, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    clean, noise = torch.randn(2, 20, 7, generator=generator, dtype=torch.float64) * scale
    return clean, clean + 0.3 * noise, torch.randint(7, (20,), generator=generator)


def test_all_are_registered():
    assert list(divergences) == NAMES


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.floats(0.1, 8))
def test_agree_with_the_definition(name, seed, scale):
    clean, perturbed, labels = logits_and_labels(seed, scale)
    ours = divergences[name].compute(clean, perturbed, labels)
    torch.testing.assert_close(ours, naive_divergence(name, clean, perturbed, labels), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("name", ["kl", "total_variation", "margin", "flip"])
def test_equal_predictions_give_zero(name):
    clean, _, labels = logits_and_labels(0)
    assert torch.equal(divergences[name].compute(clean, clean, labels), torch.zeros(20, dtype=torch.float64))


@pytest.mark.parametrize("size", [1e-1, 1e-2, 1e-3])
def test_kl_keeps_its_digits_in_float32_near_zero(size):
    clean, perturbed, _ = logits_and_labels(5)
    clean = clean.float()
    perturbed = clean + size * (perturbed - clean).float()
    ours = divergences["kl"].compute(clean, perturbed, None).double()
    exact = naive_divergence("kl", clean.double(), perturbed.double(), None)
    assert (ours >= 0).all()
    assert ((ours - exact).abs() <= 3e-3 * exact).all()


def test_kl_of_extreme_logits_is_finite_with_finite_gradient():
    clean = torch.tensor([[300.0, 0.0, -300.0], [0.0, 500.0, 0.0]], requires_grad=True)
    perturbed = torch.tensor([[-300.0, 0.0, 300.0], [500.0, 0.0, 0.0]], requires_grad=True)
    kl = divergences["kl"].compute(clean, perturbed, None)
    torch.testing.assert_close(kl, torch.tensor([600.0, 500.0]))
    kl.sum().backward()
    assert clean.grad.isfinite().all()
    assert perturbed.grad.isfinite().all()


@pytest.mark.parametrize("name", ["kl", "total_variation", "margin", "cross_entropy"])
def test_gradients(name):
    clean, perturbed, labels = logits_and_labels(7)
    clean, perturbed = clean[:4].requires_grad_(), (3 * perturbed[:4]).requires_grad_()
    assert torch.autograd.gradcheck(lambda p, q: divergences[name].compute(p, q, labels[:4]), (clean, perturbed))
