"""Memory does not grow with the number of draws, forward and backward."""

import pytest
import torch

from smi_kernels import stability_scores
from smi_kernels.backends import together
from smi_kernels.bench.measure import peak_bytes
from smi_kernels.bench.models import make_images, make_model


def peak(model, images, k, **options):
    def call():
        return stability_scores(model, images, k=k, sigma_x=0.05, sigma_w=0.05, **options)

    call()
    return peak_bytes(call, torch.device("cpu"))


@pytest.mark.parametrize("one_by_one", [False, True])
def test_resnet18(one_by_one, monkeypatch):
    if one_by_one:
        monkeypatch.setattr(together, "VALUES", 1)
    model, images = make_model("resnet18").eval(), make_images("resnet18", 2)
    few, many = (peak(model, images, k) for k in (8, 64))
    assert few > 1 << 20
    assert many <= 1.2 * few


@pytest.mark.parametrize("family", ["rademacher", "rank1", "flipout"])
def test_other_families(family):
    model, images = make_model("small_cnn").eval(), make_images("small_cnn", 16)
    few, many = (peak(model, images, k, family=family) for k in (16, 64))
    assert many <= 1.2 * few


def test_gradient():
    model, images = make_model("small_cnn").eval(), make_images("small_cnn", 8)

    def gradient(k):
        x = images.clone().requires_grad_()
        stability_scores(model, x, k=k, sigma_x=0.05, sigma_w=0.05).sum().backward()

    few, many = (peak_bytes(lambda k=k: gradient(k), torch.device("cpu")) for k in (4, 32))
    assert many <= 1.2 * few
