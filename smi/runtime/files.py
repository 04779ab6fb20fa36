"""Files: atomic writes, output folders that are never overwritten silently, and tensors as safetensors.

Nothing here unpickles. A suspect model is a hostile file; safetensors holds tensors and strings and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from smi.errors import InputError

if sys.platform != "win32":
    import fcntl

LEFTOVERS = ".*.partial"
ROOM = 100_000_000  # bytes that a result may take


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

    Args:
        folder: Where files were written.
        older: In seconds; a younger file may be one that another process is writing now.
    """
    for pattern in (LEFTOVERS, f"*/{LEFTOVERS}"):
        for file in folder.glob(pattern):
            with suppress(FileNotFoundError):  # another process has finished or removed it
                if time.time() - file.stat().st_mtime > older:
                    file.unlink()


def output_folder(path: str | Path, *, force: bool = False) -> Path:
    """A folder that results may be written to: new, or empty.

    The folder itself is not made here, so that a run that fails on bad input leaves nothing behind.

    Args:
        path: The folder.
        force: Files of the same names may be replaced; others in the folder stay.

    Raises:
        InputError: For anything else.
    """
    folder = Path(path)
    if folder.is_dir() and any(folder.iterdir()) and not force:
        raise InputError(f"{folder} exists and is not empty. Choose another folder, or replace its files: --force.")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file. Choose a folder that is new or empty.")
    parent = next(p for p in folder.absolute().parents if p.exists())
    if not parent.is_dir():
        raise InputError(f"{folder} cannot be made: {parent} is a file. Choose another folder.")
    if not os.access(folder if folder.exists() else parent, os.W_OK):
        raise InputError(f"{folder} cannot be written to. Choose a folder in which you may create files.")
    return folder


def check_room(place: str | Path, room: int) -> None:
    """Raise `InputError` unless the disk of ``place`` has ``room`` bytes left."""
    free = shutil.disk_usage(next(p for p in Path(place).absolute().parents if p.exists())).free
    if free < room:
        left, least = free / 1e6, room / 1e6
        raise InputError(f"The disk of {place} has {left:.0f} MB left; at least {least:.0f} MB are needed.")


@contextmanager
def claimed(path: str | Path, *, folder: bool = False, force: bool = False, room: int = ROOM) -> Iterator[Path]:
    """``path`` for this process alone while it works; checked as `output_file` or `output_folder` do, before any work.

    A lock file lies beside ``path`` meanwhile; one that a killed process left does not bar the way.

    Args:
        path: Of the results.
        folder: Whether that is a folder; else it is a file.
        force: What is there may be replaced.
        room: Bytes that must be free.

    Raises:
        InputError: Where another process has claimed it, or where nothing can be written.
    """
    check = output_folder if folder else output_file
    place = check(path, force=force)
    parent = next(p for p in place.absolute().parents if p.exists())
    try:
        check_room(place, room)
        name = "-".join(place.absolute().relative_to(parent).parts)
        handle, lock = _lock(parent / f".{name}.smi-lock", place)
    except OSError as error:
        raise InputError(f"{place} cannot be written ({error.strerror}). Choose another place.") from error
    try:
        yield check(path, force=force)  # another process may have finished it between the first look and the lock
    finally:
        lock.unlink(missing_ok=True)
        os.close(handle)


def _lock(file: Path, place: Path) -> tuple[int, Path]:
    """An open, locked ``file``. The lock goes with the process, however it ends."""
    while True:
        handle = os.open(file, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            if sys.platform == "win32":  # no such locks there; writes are atomic all the same
                return handle, file
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if file.exists() and os.fstat(handle).st_ino == file.stat().st_ino:
                return handle, file
        except BlockingIOError as error:
            os.close(handle)
            raise InputError(f"Another process is writing {place}. Wait for it, or choose another place.") from error
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # whoever held it has just removed it


def output_file(path: str | Path, *, force: bool = False) -> Path:
    """A file that may be created: it must not exist yet, but for ``force``, and its folder must.

    Args:
        path: The file.
        force: A file that is there may be replaced.

    Raises:
        InputError: Otherwise.
    """
    file = Path(path)
    if file.exists() and not (force and file.is_file()):
        raise InputError(f"{file} exists. Choose another name, or replace it: --force.")
    if not file.absolute().parent.is_dir():
        raise InputError(f"The folder of {file} does not exist. Create {file.absolute().parent} first.")
    return file


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Save named tensors and JSON metadata as one safetensors file with a checksum, atomically."""
    data = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    described = json.dumps(metadata, sort_keys=True)
    write_atomic(Path(path), save(data, {"smi": described, "sha256": _checksum(data, described)}))


def load_tensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote.

    Args:
        path: The file.
        kind: "prior", "classifier", ...; must match the metadata's.

    Returns:
        The tensors by name, and the metadata.

    Raises:
        InputError: For a missing, truncated, damaged or foreign file.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"There is no file {file}. Check the path.")
    try:
        with safe_open(file, framework="pt") as content:
            head = content.metadata() or {}
            metadata = json.loads(head.get("smi", "{}"))
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise InputError(f"{file} is not an intact safetensors file ({error}). Copy or make it again.") from error
    found = metadata.get("kind") if isinstance(metadata, dict) else None
    if found != kind:
        raise InputError(
            f"{file} holds no {kind} of smi (its metadata says {found!r}). Pass a file that smi saved as a {kind}."
        )
    if "sha256" in head and head["sha256"] != _checksum(tensors, head["smi"]):
        raise InputError(f"{file} is damaged: its checksum is not that of its content. Copy or make it again.")
    return tensors, metadata


def _checksum(tensors: Mapping[str, Tensor], described: str) -> str:
    total = hashlib.sha256(described.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


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
