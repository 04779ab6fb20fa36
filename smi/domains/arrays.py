"""Images as ``.npz`` files: what `smi invert` writes and `smi score` reads. Nothing is unpickled."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smi.domains.base import Samples, as_float
from smi.errors import InputError
from smi.runtime.checks import check_images
from smi.runtime.files import write_atomic


def save_samples(path: str | Path, samples: Samples) -> None:
    """Write ``images`` (uint8 ``[N, H, W, C]``), ``labels`` (int64 ``[N]``) and, where known, ``scores`` (float32)."""
    pixels = (samples.images * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    arrays: dict[str, Any] = {"images": pixels.numpy(), "labels": samples.labels.numpy()}
    if samples.scores is not None:
        arrays["scores"] = samples.scores.numpy()
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomic(Path(path), buffer.getvalue())


def load_images(path: str | Path) -> tuple[Tensor, Tensor | None]:
    """Images float32 ``[N, C, H, W]`` in [0, 1] and, where the file has them, labels int64 ``[N]``.

    Args:
        path: A file that holds ``images`` as ``[N, H, W, C]`` or ``[N, H, W]``, uint8 or floats in [0, 1], and may hold
            whole ``labels``.

    Raises:
        InputError: For anything else. It names the file.
    """
    file = Path(path)
    images, labels = _read(file)
    images = images[..., None] if images.ndim == 3 else images
    if images.ndim != 4 or images.shape[3] not in (1, 3) or (images.dtype != np.uint8 and images.dtype.kind != "f"):
        raise InputError(
            f"The images of {file} are {images.dtype} {images.shape}. Allowed: [N, H, W, C] with C = 1 or 3, or "
            "[N, H, W], as uint8 or as floats in [0, 1]."
        )
    tensor = as_float(torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))))
    check_images(tensor, f"the images of {file}")
    if labels is None:
        return tensor, None
    if labels.dtype.kind not in "iu" or labels.shape != (len(images),):
        raise InputError(f"The labels of {file} are {labels.dtype} {labels.shape}. Allowed: one whole number an image.")
    return tensor, torch.from_numpy(labels.astype(np.int64))


def _read(file: Path) -> tuple[np.ndarray, np.ndarray | None]:
    if not file.is_file():
        raise InputError(f"There is no file {file}. Check the path.")
    try:
        with np.load(file, allow_pickle=False) as content:
            found = {name: content[name] for name in ("images", "labels") if name in content.files}
    except Exception as error:  # a damaged zip, a pickled array and an .npy in disguise all raise something else
        raise InputError(
            f"{file} is not an .npz of plain arrays ({error}). Write it with numpy.savez(file, images=...)."
        ) from error
    if "images" not in found:
        raise InputError(f"{file} has no array called images. Write it with numpy.savez(file, images=...).")
    return found["images"], found.get("labels")
