"""Files: atomic writes, output folders that are never overwritten silently, and tensors as safetensors.

Nothing here unpickles. A suspect model is a hostile file; safetensors holds tensors and strings and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from smi.errors import InputError

LEFTOVERS = ".*.partial"


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a whole file or nothing: a temporary file in the same folder, flushed to disk, then renamed."""
    data = content.encode() if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def remove_leftovers(folder: Path, *, older: float = 3600.0) -> None:
    """Remove what `write_atomic` was writing to ``folder`` and the folders in it when its process was killed.

    older: in seconds; a younger file may be one that another process is writing now.
    """
    for pattern in (LEFTOVERS, f"*/{LEFTOVERS}"):
        for file in folder.glob(pattern):
            with suppress(FileNotFoundError):  # another process has finished or removed it
                if time.time() - file.stat().st_mtime > older:
                    file.unlink()


def output_folder(path: str | Path) -> Path:
    """A folder that results may be written to: new, or empty. Raises `InputError` for anything else.

    The folder itself is not made here, so that a run that fails on bad input leaves nothing behind.
    """
    folder = Path(path)
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{folder} exists and is not empty. Nothing is overwritten: choose another folder.")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file. Choose a folder that is new or empty.")
    parent = next(p for p in folder.absolute().parents if p.exists())
    if not parent.is_dir():
        raise InputError(f"{folder} cannot be made: {parent} is a file. Choose another folder.")
    if not os.access(folder if folder.exists() else parent, os.W_OK):
        raise InputError(f"{folder} cannot be written to. Choose a folder in which you may create files.")
    return folder


def output_file(path: str | Path) -> Path:
    """A file that may be created: it must not exist yet, its folder must. Raises `InputError` otherwise."""
    file = Path(path)
    if file.exists():
        raise InputError(f"{file} exists. Nothing is overwritten: choose another name.")
    if not file.absolute().parent.is_dir():
        raise InputError(f"The folder of {file} does not exist. Create {file.absolute().parent} first.")
    return file


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Save named tensors and JSON metadata as one safetensors file, atomically."""
    data = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_atomic(Path(path), save(data, {"smi": json.dumps(metadata, sort_keys=True)}))


def load_tensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote. ``kind`` ("prior", "classifier", ...) must match the metadata's.

    Raises `InputError` for a missing, truncated or foreign file.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"There is no file {file}. Check the path.")
    try:
        with safe_open(file, framework="pt") as content:
            metadata = json.loads((content.metadata() or {}).get("smi", "{}"))
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise InputError(f"{file} is not an intact safetensors file ({error}). Copy or make it again.") from error
    found = metadata.get("kind") if isinstance(metadata, dict) else None
    if found != kind:
        raise InputError(
            f"{file} does not hold a {kind} of smi (its metadata says {found!r}). "
            f"Pass a file that smi saved as a {kind}."
        )
    return tensors, metadata


def to_half(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Floating tensors as float16, which halves a shipped file; integers as they are."""
    return {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}


def to_single(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Floating tensors as float32; integers as they are."""
    return {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}


def fingerprint(tensor: Tensor) -> str:
    """A short hash of a tensor's shape and bytes, for records and for checking that a resumed run has the same data."""
    raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(str(tuple(tensor.shape)).encode() + raw.numpy().tobytes()).hexdigest()[:16]
