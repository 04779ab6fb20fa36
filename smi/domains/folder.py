"""A domain from a folder of images: ``train/CLASS/*.png`` and ``test/CLASS/*.png``, ``CLASS/*.png``, or images alone.

Classes are the folder names in alphabetical order, as in torchvision's `ImageFolder`. Other files are passed over.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from smi.domains import npz
from smi.domains.base import Domain, PrivateData, PublicImages, as_float, not_there
from smi.errors import InputError
from smi.runtime.checks import check_number
from smi.runtime.progress import track

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


def load(path: str | Path, *, size: int = 32) -> Domain:
    """The domain in the folder ``path``, every image resized to ``size`` × ``size`` pixels.

    With ``train/`` and ``test/`` these are the two private parts; with class folders alone a fixed fifth of every class
    is held out for testing. Images alone make a public source without private data. Grey if every image is.

    Raises:
        InputError: For an unreadable image or a layout that is none of these, naming the file or folder.
    """
    check_number("size", size, low=1, integer=True)
    root = Path(path)
    if not root.is_dir():
        raise not_there("folder", root)
    if (root / "train").is_dir() and (root / "test").is_dir():
        return _split(root, size)
    loose, folders = _files(root), _class_folders(root)
    if loose and folders:
        raise InputError(f"{root} mixes images and folders of images. Allowed: one folder a class, or images alone.")
    if folders:
        return _unsplit(root, folders, size)
    if loose:
        return Domain(root.resolve().name, (), PrivateData(), PublicImages(as_float(_stack(loose, size))))
    raise InputError(f"{root} holds no images. Allowed: {', '.join(sorted(SUFFIXES))}, alone or in one folder a class.")


def decode(file: Path, size: int) -> np.ndarray:
    """One image as uint8 ``[size, size]`` (grey) or ``[size, size, 3]``.

    16 bits become 8, palettes colours, and what is transparent black.

    Raises:
        InputError: Where it cannot be read, naming the file.
    """
    try:
        with Image.open(file) as image:
            upright = _plain(ImageOps.exif_transpose(image))
    except Exception as error:  # on damaged files Pillow's decoders raise nearly anything
        raise InputError(f"The image {file} cannot be read ({error}). Remove it or write it again.") from error
    return np.asarray(upright.resize((size, size), Image.Resampling.BILINEAR))


def _plain(image: Image.Image) -> Image.Image:
    """In mode L or RGB."""
    if image.mode.startswith("I") or image.mode == "F":
        return _from_wide(image)
    if "A" in image.getbands() or "transparency" in image.info:
        grey = image.mode in ("L", "LA")
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
        return image.convert("L" if grey else "RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _from_wide(image: Image.Image) -> Image.Image:
    """16-bit grey, which Pillow's own conversion would clip instead of scale."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise InputError("its pixels are neither 8 nor 16 bits deep")
    return Image.fromarray((values.astype(np.float32) / 257).round().astype(np.uint8))


def _split(root: Path, size: int) -> Domain:
    train, test = _class_folders(root / "train"), _class_folders(root / "test")
    classes = [folder.name for folder in train]
    if not (train and test):
        raise InputError(f"{root} has train/ and test/, but not both hold images in one folder a class.")
    unknown = sorted({folder.name for folder in test} - set(classes))
    if unknown:
        raise InputError(f"{root} has test images of {', '.join(unknown)} but no training images of them.")
    (files, labels), (test_files, test_labels) = _listing(train, classes), _listing(test, classes)
    images = _stack(files + test_files, size)
    first, second = images[: len(files)], images[len(files) :]
    return npz.domain(root.resolve(), classes, (first, labels), (second, test_labels))


def _unsplit(root: Path, folders: list[Path], size: int) -> Domain:
    classes = [folder.name for folder in folders]
    files, labels = _listing(folders, classes)
    images = _stack(files, size)
    out = npz.hold_out([file.name.encode() for file in files], labels.tolist())
    return npz.domain(root.resolve(), classes, (images[~out], labels[~out]), (images[out], labels[out]))


def _files(folder: Path) -> list[Path]:
    visible = (f for f in folder.iterdir() if f.is_file() and not f.name.startswith("."))
    return sorted(f for f in visible if f.suffix.lower() in SUFFIXES)


def _class_folders(root: Path) -> list[Path]:
    folders = sorted(f for f in root.iterdir() if f.is_dir() and not f.name.startswith("."))
    filled = [folder for folder in folders if _files(folder)]
    if filled and len(filled) < len(folders):  # passing over one would shift the labels of those after it
        empty = next(folder for folder in folders if folder not in filled)
        raise InputError(f"The class folder {empty} holds no images. Fill it or remove it.")
    return filled


def _listing(folders: Iterable[Path], classes: list[str]) -> tuple[list[Path], Tensor]:
    pairs = [(file, classes.index(folder.name)) for folder in folders for file in _files(folder)]
    return [file for file, _ in pairs], torch.tensor([label for _, label in pairs], dtype=torch.int64)


def _stack(files: list[Path], size: int) -> Tensor:
    """uint8 ``[N, C, size, size]``; one image in colour makes all of them RGB."""
    arrays = [decode(file, size) for file in track(files, "reading images", len(files))]
    if any(a.ndim == 3 for a in arrays):
        arrays = [a if a.ndim == 3 else np.stack([a] * 3, axis=2) for a in arrays]
    stacked = np.stack(arrays)
    return torch.from_numpy(stacked[:, None] if stacked.ndim == 3 else stacked.transpose(0, 3, 1, 2).copy())
