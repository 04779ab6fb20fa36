"""Checkpoints of strangers: weights read without running anything, and written back as they lay in the file.

safetensors; state dicts by ``torch.save``; the weights, and no more, of ``torch.export`` programs.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from smi.errors import InputError
from smi.models.checkpoints.archive import opened
from smi.models.checkpoints.base import Checkpoint, broken, check_tensors
from smi.models.checkpoints.exported import is_export, read_export
from smi.models.checkpoints.pickled import read_pickled

__all__ = ["Checkpoint", "read_checkpoint"]

KNOWN = {b"\x89HDF": "HDF5 (Keras)", b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\x93NUM": "NumPy", b"{": "JSON text"}


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read the weights of ``path`` without running anything in it.

    A pickle that asks for anything but tensors and containers is refused, and told what it asked for; so are whole
    pickled modules and TorchScript, which are code.

    Raises:
        InputError: With what was wrong.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(
            f"{file} is no regular file." if file.exists() else f"There is no file {file}. Check the path."
        )
    try:
        with file.open("rb") as content:
            head = content.read(16)
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}). Check its permissions.") from error
    checkpoint = _read(file, head)
    check_tensors(checkpoint)
    return checkpoint


def _read(file: Path, head: bytes) -> Checkpoint:
    if head.startswith(b"PK\x03\x04"):
        with opened(file) as archive:
            if is_export(archive):
                return read_export(file, archive)
            pickles = [name for name in archive.namelist() if name.endswith("data.pkl")]
            if len(pickles) != 1:
                raise InputError(f"{file} is a zip archive, but not one that torch.save wrote. Save the state dict.")
            raw = archive.read(pickles[0])
        return read_pickled(file, raw)
    if head.startswith(b"\x80"):
        return read_pickled(file, file.read_bytes())
    if head[8:9] == b"{":
        return _read_safetensors(file)
    if not head:
        raise InputError(f"{file} is empty. Copy it again.")
    found = next((f" It looks like {name}." for magic, name in KNOWN.items() if head.startswith(magic)), "")
    raise InputError(
        f"{file} is not a checkpoint that can be read.{found} Allowed: safetensors, a state dict by torch.save, or a "
        "torch.export program."
    )


def _read_safetensors(file: Path) -> Checkpoint:
    try:
        with safe_open(file, framework="pt") as content:
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
            metadata = content.metadata()
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError, MemoryError) as error:
        raise broken(file, error, "safetensors file") from error
    return Checkpoint(file, tensors, lambda stored: save(stored, metadata))
