"""Zip archives, looked at before anything is read from them: torch's are zips whose members are not compressed."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from smi.errors import InputError
from smi.models.checkpoints.base import broken


@contextmanager
def opened(file: Path) -> Iterator[zipfile.ZipFile]:
    """The archive, for reading members into memory. Nothing is unpacked to disk.

    Raises:
        InputError: For a broken archive, paths that lead out of it, and members that unpack to more than the file.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            names = [name.replace("\\", "/") for name in archive.namelist()]
            if any(name.startswith("/") or ".." in name.split("/") for name in names):
                raise InputError(f"{file} has paths that lead out of it. torch writes none: do not trust it.")
            if any("/code/" in name or name.endswith("constants.pkl") for name in names):
                raise InputError(f"{file} is a TorchScript program: code. Ask for the state dict, best as safetensors.")
            members = archive.infolist()
            stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
            if not stored or sum(member.file_size for member in members) > file.stat().st_size:
                raise InputError(f"{file} unpacks to more than its size. torch does not compress: do not trust it.")
            yield archive
    except InputError:
        raise
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise broken(file, error) from error
