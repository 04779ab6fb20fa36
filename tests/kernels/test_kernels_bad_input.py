import math

import pytest
import torch
from torch import nn

from smi_kernels import InputError, stability_scores

IMAGES = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
SOUND = {"k": 2, "sigma_x": 0.1, "sigma_w": 0.1}


def model():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.Dropout()).eval()


def with_pixel(value):
    images = IMAGES.clone()
    images[1, 0, 2, 2] = value
    return images


def refused(match, images=IMAGES, labels=None, net=None, **options):
    with pytest.raises(InputError, match=match):
        stability_scores(model() if net is None else net, images, labels, **(SOUND | options))


@pytest.mark.parametrize(
    ("images", "match"),
    [
        (IMAGES[0], r"shape \(1, 4, 4\).*images\[None\]"),
        (IMAGES[:, :, :, :, None], r"shape \(3, 1, 4, 4, 1\)"),
        (IMAGES[:0], r"shape \(0, 1, 4, 4\)"),
        ((IMAGES * 255).to(torch.uint8), r"torch.uint8.*/ 255"),
        (IMAGES.long(), "torch.int64"),
        (IMAGES.numpy(), "ndarray"),
        (with_pixel(1.5), r"to 1\.5.*clamp"),
        (with_pixel(-0.25), r"from -0\.25"),
        (with_pixel(math.nan), "NaN"),
        (with_pixel(math.inf), "inf"),
    ],
)
def test_images(images, match):
    refused(match, images)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"k": 0}, "k is 0.*at least 1|k is 0.*from 1"),
        ({"k": -3}, "k is -3"),
        ({"k": 2.0}, "k is 2.0.*integer"),
        ({"k": True}, "k is True"),
        ({"k": 3, "antithetic": True}, "k is 3.*even.*k=4"),
        ({"sigma_x": -0.1}, "sigma_x is -0.1"),
        ({"sigma_w": -0.1}, "sigma_w is -0.1"),
        ({"sigma_x": math.nan}, "sigma_x is nan"),
        ({"sigma_w": math.inf}, "sigma_w is inf"),
        ({"sigma_w": "big"}, "sigma_w is 'big'"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"chunk": 0}, "chunk is 0"),
        ({"chunk": "large"}, "chunk is 'large'.*'auto'"),
        ({"family": "gausian"}, "noise family 'gausian'.*gaussian, rademacher.*mean 'gaussian'"),
        ({"input_family": "rademacer"}, "noise family.*mean 'rademacher'"),
        ({"divergence": "lk"}, "divergence 'lk'.*cross_entropy.*mean 'kl'"),
        ({"backend": "torh"}, "backend 'torh'.*auto.*mean 'torch'"),
        ({"reduce": "men"}, "reduction 'men'.*mean 'mean'"),
        ({"dtype": "bfloat"}, "dtype 'bfloat'.*mean 'bfloat16'"),
        ({"dtype": torch.int32}, "dtype 'int32'.*bfloat16"),
        ({"parameters": ["1.wieght"]}, "parameter '1.wieght'.*mean '1.weight'"),
        ({"parameters": lambda name: False}, "selects no parameter.*sigma_w=0"),
    ],
)
def test_options(options, match):
    refused(match, **options)


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        (None, "needs labels.*argmax"),
        (torch.tensor([0, 1]), r"shape \(2,\).*\(3,\)"),
        (torch.zeros(3, 5, dtype=torch.int64), r"shape \(3, 5\)"),
        (torch.tensor([0.0, 1.0, 2.0]), "torch.float32.*long"),
        (torch.tensor([True, False, True]), "torch.bool"),
        ([0, 1, 2], "a list"),
        (torch.tensor([0, 1, 5]), "from 0 to 5.*0 to 4"),
        (torch.tensor([-1, 1, 4]), "from -1 to 4"),
    ],
)
@pytest.mark.parametrize("divergence", ["cross_entropy", "margin"])
def test_labels(labels, match, divergence):
    refused(match, labels=labels, divergence=divergence)


def test_environment_with_an_unknown_backend(monkeypatch):
    monkeypatch.setenv("SMI_KERNELS_BACKEND", "tritn")
    refused("backend 'tritn'")


def test_train_mode():
    refused("train mode.*model.eval", net=model().train())
    partly = model()
    partly[2].train()
    refused(r"train mode \(2\)", net=partly)


def test_not_a_module():
    refused("a function.*Module", net=lambda x: x)


def test_device_mismatch():
    refused("images are on cpu and the model's 1.weight on meta", net=model().to("meta"))
    refused("labels are on meta", labels=torch.zeros(3, dtype=torch.int64, device="meta"))


def test_nan_logits():
    broken = model()
    with torch.no_grad():
        broken[1].weight[0, 0] = math.nan
    refused("logits without any noise hold NaN", net=broken, sigma_w=0)


def test_logits_that_overflow_under_noise_only():
    class Brittle(nn.Module):
        def forward(self, x):
            return torch.stack([1 / (x.sum((1, 2, 3)) == IMAGES.sum((1, 2, 3))), x.sum((1, 2, 3))], dim=1)

    refused("logits under noise hold NaN or infinity.*smaller", net=Brittle().eval(), dtype="float32")


@pytest.mark.parametrize(
    ("net", "match"),
    [
        (nn.Flatten(0), r"shape \(48,\) for 3 images"),
        (nn.Identity(), r"shape \(3, 1, 4, 4\)"),
        (nn.Sequential(nn.Flatten(), nn.Linear(16, 1)), r"shape \(3, 1\).*2 classes"),
    ],
)
def test_output_that_is_no_logits(net, match):
    refused(match, net=net.eval())
