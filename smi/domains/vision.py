"""torchvision's data sets as domains: private images and torchvision's own train and test split; no public images.

All come as 32×32: the 28×28 ones are padded with black, as `digits` is; traffic signs are resized. `gtsrb` is
torchvision's training part alone, split by recording track (see `_on_test_tracks`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from smi.domains.base import Domain, PrivateData, private_set
from smi.errors import InputError
from smi.runtime.progress import track

Part = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Source:
    """A data set of torchvision.

    Attributes:
        dataset: Torchvision's name.
        read: Gives its images uint8 ``[N, C, 32, 32]`` and labels.
        classes: Their names, where it has none itself.
        by_split: Whether it takes ``split="train"`` rather than ``train=True``.
        held_out: Which images of torchvision's training part are the test part, bool ``[N]``; without it torchvision's
            own test part is.
    """

    dataset: str
    read: Callable[[Any], Part]
    classes: Sequence[str] | None = None
    by_split: bool = False
    held_out: Callable[[Any], Tensor] | None = None


def load(name: str, root: str | Path = "data", *, download: bool = False) -> Domain:
    """The domain ``name`` of `SOURCES`, from files under ``root``.

    Nothing is downloaded unless ``download`` says so.

    Raises:
        InputError: Where the files are missing or damaged.
    """
    source = SOURCES[name]
    try:
        dataset = _open(source, Path(root), True, download)
        parts = _parts(source, dataset, lambda: _open(source, Path(root), False, download))
    except Exception as error:  # a missing file, a failed download and each kind of damage raise something else
        if download:
            raise InputError(f"{name} could not be downloaded to {root} or read ({error}). Try again later.") from error
        raise InputError(
            f"{name} is not in {root}, or is damaged. Nothing is downloaded unasked: pass download=True to allow it, "
            f"or root=FOLDER where torchvision's {source.dataset} lies already."
        ) from error
    classes = tuple(source.classes or dataset.classes)
    private = PrivateData(*(private_set(images, labels, classes) for images, labels in parts))
    return Domain(name, classes, private)


def _open(source: Source, root: Path, train: bool, download: bool) -> Any:
    from torchvision import datasets

    which: dict[str, Any] = {"split": "train" if train else "test"} if source.by_split else {"train": train}
    return getattr(datasets, source.dataset)(str(root), download=download, **which)


def _parts(source: Source, dataset: Any, open_test: Callable[[], Any]) -> tuple[Part, Part]:
    images, labels = source.read(dataset)
    if source.held_out is None:
        return (images, labels), source.read(open_test())
    out = source.held_out(dataset)
    return (images[~out], labels[~out]), (images[out], labels[out])


def _cifar(part: Any) -> Part:
    return torch.from_numpy(part.data.transpose(0, 3, 1, 2).copy()), torch.as_tensor(part.targets)


def _svhn(part: Any) -> Part:
    return torch.from_numpy(np.ascontiguousarray(part.data)), torch.as_tensor(part.labels)


def _mnist(part: Any) -> Part:
    return F.pad(part.data[:, None], (2, 2, 2, 2)), part.targets


def _gtsrb(part: Any) -> Part:
    images, labels = [], []
    for image, label in track((part[i] for i in range(len(part))), "reading images", len(part)):
        images.append(np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR)))
        labels.append(label)
    return torch.from_numpy(np.stack(images).transpose(0, 3, 1, 2).copy()), torch.tensor(labels)


def _on_test_tracks(part: Any) -> Tensor:
    """Which traffic signs are tested on, bool ``[N]``: every fifth recording track of a class.

    A track is one sign filmed from a passing car, 30 frames that are nearly alike, so frames of one track on either
    side would make the test a test of memory. Files are ``CLASS/TRACK_FRAME.ppm``.
    """
    from torchvision.datasets.folder import make_dataset

    folder = Path(part.root, "gtsrb", "GTSRB", "Training")
    files = make_dataset(str(folder), extensions=(".ppm",))  # in the order of ``part``, which does not give its names
    return torch.tensor([int(Path(file).stem.split("_")[0]) % 5 == 2 for file, _ in files])


DIGITS = tuple(str(digit) for digit in range(10))
SIGNS = tuple(f"sign {number}" for number in range(43))  # the benchmark numbers them and gives no names

SOURCES = {
    "cifar10": Source("CIFAR10", _cifar),
    "cifar100": Source("CIFAR100", _cifar),
    "gtsrb": Source("GTSRB", _gtsrb, SIGNS, by_split=True, held_out=_on_test_tracks),
    "svhn": Source("SVHN", _svhn, DIGITS, by_split=True),
    "mnist": Source("MNIST", _mnist, DIGITS),
    "fashion_mnist": Source("FashionMNIST", _mnist),
}
