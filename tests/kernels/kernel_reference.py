"""An independent reference: Philox and the noise in numpy, and a naive float64 loop over copies of the model."""

import copy

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

MASK = np.uint64(0xFFFFFFFF)


def numpy_philox(counter, key, rounds=10):
    c = [np.asarray(word, dtype=np.uint64) for word in counter]
    k0, k1 = (np.uint64(word) for word in key)
    for _ in range(rounds):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(b >> np.uint64(32)) ^ c[1] ^ k0, b & MASK, (a >> np.uint64(32)) ^ c[3] ^ k1, a & MASK]
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & MASK, (k1 + np.uint64(0xBB67AE85)) & MASK
    return np.broadcast_arrays(*c)


def numpy_uniform(word):
    signed = word.astype(np.uint32).view(np.int32)
    signed = np.where(signed < 0, ~signed, signed)
    return signed.astype(np.float32) * np.float32(4.6566127342e-10)


def numpy_noise(family, shape, *, seed, tensor, k, stream, antithetic=False):
    """Unit noise as the contract words it, element by element of the counter layout; float64."""
    size = int(np.prod(shape, dtype=np.int64))
    element = np.arange(size, dtype=np.uint64)
    per_counter = {"gaussian": 4, "rademacher": 128}[family]
    sign = -1.0 if antithetic and k % 2 else 1.0
    number = k // 2 if antithetic else k
    counter = (element // np.uint64(per_counter), tensor, number, stream)
    words = np.stack(numpy_philox(counter, (seed & 0xFFFFFFFF, seed >> 32)))
    lane = (element % np.uint64(per_counter)).astype(int)
    if family == "rademacher":
        word = words[lane // 32, np.arange(size)]
        noise = 1.0 - 2.0 * ((word >> (lane % 32).astype(np.uint64)) & np.uint64(1)).astype(np.float64)
    else:
        pair = lane // 2 * 2
        u0 = numpy_uniform(words[pair, np.arange(size)]).astype(np.float64)
        u1 = numpy_uniform(words[pair + 1, np.arange(size)]).astype(np.float64)
        angle = 2 * np.pi * u1
        noise = np.sqrt(-2 * np.log(np.maximum(u0, 1e-7))) * np.where(lane % 2 == 0, np.cos(angle), np.sin(angle))
    return torch.from_numpy(sign * noise).reshape(tuple(shape))


def naive_divergence(name, clean, perturbed, labels):
    p, q = clean.softmax(1), perturbed.softmax(1)
    rows = torch.arange(len(clean))
    if name == "kl":
        return (p * (p / q).log()).sum(1)
    if name == "cross_entropy":
        return -q[rows, labels].log()
    if name == "total_variation":
        return (p - q).clamp(min=0).sum(1)
    if name == "flip":
        return (p.argmax(1) != q.argmax(1)).double()
    margins = []
    for logits in (clean, perturbed):
        others = [[z for j, z in enumerate(row.tolist()) if j != y] for row, y in zip(logits, labels, strict=True)]
        margins.append(logits[rows, labels] - torch.tensor([max(row) for row in others], dtype=torch.float64))
    return margins[0] - margins[1]


@torch.no_grad()
def naive_scores(
    model, images, labels=None, *, k, sigma_x, sigma_w, family="gaussian", input_family="gaussian",
    divergence="kl", antithetic=False, seed=0,
):  # fmt: skip
    """Per image and draw, ``[N, K]`` float64: a fresh copy of the model for each draw, images one at a time."""
    model = copy.deepcopy(model).double()
    images = images.double()
    clean = model(images)
    columns = []
    for draw in range(k):
        common = {"seed": seed, "k": draw, "antithetic": antithetic}
        noisy = copy.deepcopy(model)
        for tensor, parameter in enumerate(noisy.parameters()):
            std = sigma_w * parameter.norm() / parameter.numel() ** 0.5
            parameter += std * numpy_noise(family, parameter.shape, tensor=tensor, stream=0, **common)
        delta = sigma_x * numpy_noise(input_family, images.shape[1:], tensor=0, stream=1, **common)
        perturbed = torch.cat([noisy((image + delta).clamp(0, 1)[None]) for image in images])
        columns.append(naive_divergence(divergence, clean, perturbed, labels))
    return torch.stack(columns, dim=1)


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x):
        return F.relu(x + self.norm(self.conv(x)))


class SmallCNN(nn.Module):
    """Convolutions with and without bias, BatchNorm, a residual block, a functional activation and a linear head."""

    def __init__(self, channels=1, width=12, classes=10):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.block = Residual(width)
        self.down = nn.Sequential(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.BatchNorm2d(2 * width))
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x):
        return self.head(F.relu(self.down(self.block(F.relu(self.stem(x))))).mean((2, 3)))


def toy_images(n, seed):
    """Ten blurred prototypes under pixel noise, ``[n, 1, 16, 16]`` in [0, 1], and their labels."""
    generator = torch.Generator().manual_seed(seed)
    prototypes = torch.rand(10, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(10, (n,), generator=generator)
    clean = F.interpolate(prototypes[labels], size=16, mode="bilinear")
    return (0.75 * clean + 0.25 * torch.rand(n, 1, 16, 16, generator=generator)).clamp(0, 1), labels


def trained_cnn():
    torch.manual_seed(0)
    model = SmallCNN()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for step in range(150):
        images, labels = toy_images(64, seed=step + 1)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.eval()
