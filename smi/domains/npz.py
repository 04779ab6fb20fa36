"""A domain from an ``.npz``: ``x_train`` and, where there are any, ``y_train``, ``x_test``, ``y_test``, ``classes``.

Images are uint8 ``[N, H, W, C]``, or ``[N, H, W]`` for grey, and keep their size. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from smi.domains.base import Domain, PrivateData, PublicImages, as_float, not_there, private_set
from smi.errors import InputError

TEST_SHARE = 0.2
NAMES = ("x_train", "y_train", "x_test", "y_test", "classes")


def load(path: str | Path) -> Domain:
    """The domain in the file ``path``.

    Without ``y_train`` it is a public source: ``x_train`` are its public images and there is no private data. Without a
    test part a fixed fifth of every class is held out. ``classes`` are the names, by default the numbers.

    Raises:
        InputError: For anything that does not fit, naming the file.
    """
    file = Path(path)
    arrays = _read(file)
    if "x_train" not in arrays:
        raise InputError(f"{file} has no x_train (it has: {', '.join(arrays) or 'nothing'}). Add uint8 images.")
    train = _images(arrays["x_train"], f"x_train of {file}")
    if "y_train" not in arrays:
        if "x_test" in arrays or "y_test" in arrays:
            raise InputError(f"{file} has a test part but no y_train. Add y_train, or leave x_train alone in the file.")
        return Domain(file.stem, (), PrivateData(), PublicImages(as_float(train)))
    if ("x_test" in arrays) != ("y_test" in arrays):
        raise InputError(f"{file} has only one of x_test and y_test. Allowed: both, or neither.")
    labels = _labels(arrays["y_train"], len(train), f"y_train of {file}")
    if "x_test" not in arrays:
        held_out = hold_out([image.tobytes() for image in train.numpy()], labels.tolist())
        return domain(
            file, arrays.get("classes"), (train[~held_out], labels[~held_out]), (train[held_out], labels[held_out])
        )
    test = _images(arrays["x_test"], f"x_test of {file}")
    if test.shape[1:] != train.shape[1:]:
        raise InputError(f"{file}: x_test is {tuple(test.shape[1:])} an image, x_train {tuple(train.shape[1:])}.")
    test_labels = _labels(arrays["y_test"], len(test), f"y_test of {file}")
    return domain(file, arrays.get("classes"), (train, labels), (test, test_labels))


def domain(
    source: Path,
    classes: Sequence[object] | np.ndarray | None,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
) -> Domain:
    """A labelled domain without public images.

    Args:
        source: The file or folder, which gives the name.
        classes: Their names; None for their numbers.
        train: Images uint8 ``[N, C, H, W]`` and labels int64 ``[N]``.
        test: The same.

    Raises:
        InputError: For an empty part, fewer than two classes or labels without a class, naming ``source``.
    """
    if not (len(train[0]) and len(test[0])):
        raise InputError(f"{source} leaves no images to train or to test on. Give at least two images of every class.")
    count = 1 + int(max(train[1].max(), test[1].max()))
    names = tuple(str(c) for c in (range(count) if classes is None else classes))
    if len(names) < 2:
        raise InputError(f"{source} has fewer than two classes. For public images, give no labels (no class folders).")
    try:
        private = PrivateData(*(private_set(images, labels, names) for images, labels in (train, test)))
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    return Domain(source.stem, names, private)


def hold_out(keys: Sequence[bytes], labels: Sequence[int]) -> Tensor:
    """Which items are held out for testing, bool ``[N]``: of every class the fifth whose keys have the lowest hashes.

    The choice depends on the items alone: not on their order, a seed or the machine. A class of two or more items
    has at least one on either side.
    """
    held_out = torch.zeros(len(keys), dtype=torch.bool)
    by_class: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        by_class.setdefault(label, []).append(index)
    for members in by_class.values():
        count = max(round(TEST_SHARE * len(members)), min(len(members) - 1, 1))
        members.sort(key=lambda i: hashlib.sha256(keys[i]).digest())
        held_out[members[:count]] = True
    return held_out


def _read(file: Path) -> dict[str, np.ndarray]:
    if not file.is_file():
        raise not_there("file", file)
    try:
        with np.load(file, allow_pickle=False) as content:
            return {name: content[name] for name in NAMES if name in content.files}
    except Exception as error:  # a damaged zip, a pickled array and an .npy in disguise all raise something else
        raise InputError(
            f"{file} is not an intact .npz of plain arrays ({error}). Write it with numpy.savez(file, x_train=...)."
        ) from error


def _images(array: np.ndarray, what: str) -> Tensor:
    array = array[..., None] if array.ndim == 3 else array
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] not in (1, 3) or 0 in array.shape:
        raise InputError(
            f"{what} is {array.dtype} {array.shape}. Allowed: uint8 [N, H, W, C] with C = 1 or 3, or [N, H, W]. "
            "Try (x * 255).round().astype('uint8') for floats, x.transpose(0, 2, 3, 1) for channels-first."
        )
    return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))


def _labels(array: np.ndarray, n: int, what: str) -> Tensor:
    if array.dtype.kind not in "iu" or array.shape not in ((n,), (n, 1)):
        raise InputError(f"{what} is {array.dtype} {array.shape}. Allowed: {n} whole numbers, one an image.")
    return torch.from_numpy(array.reshape(-1).astype(np.int64))
