"""Weights of a ``torch.export`` program, without the program.

``torch.export.load`` unpickles what it finds and evaluates expressions, so a stranger's file is not given to it. The
weights lie in the archive as plain bytes beside a JSON list of names, types and shapes; those two are read here, the
graph never is. Written back, the program is the same bytes with other weights.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smi.errors import InputError
from smi.models.checkpoints.base import Checkpoint, broken

CONFIG = "model_weights_config.json"
CODES = {
    1: torch.uint8, 4: torch.int32, 5: torch.int64, 6: torch.float16, 7: torch.float32, 8: torch.float64,
    12: torch.bool, 13: torch.bfloat16,
}  # fmt: skip  # the numbers of torch._export.serde.schema.ScalarType


def is_export(archive: zipfile.ZipFile) -> bool:
    """Whether an archive is a ``torch.export`` program."""
    return any(name.endswith("archive_format") for name in archive.namelist())


def read_export(file: Path, archive: zipfile.ZipFile) -> Checkpoint:
    """The weights of the one program in ``archive``."""
    configs = [name for name in archive.namelist() if name.rpartition("/")[2].endswith("weights_config.json")]
    if len(configs) != 1 or not configs[0].endswith(f"/{CONFIG}"):
        raise InputError(f"{file} is a torch.export program without weights, or several programs. Export one model.")
    folder = configs[0].removesuffix(CONFIG)
    try:
        entries = json.loads(archive.read(configs[0]))["config"]
        places = {str(name): folder + str(entry["path_name"]) for name, entry in entries.items()}
        tensors = {name: _tensor(file, archive.read(places[name]), name, entries[name]) for name in places}
    except InputError:
        raise
    except Exception as error:  # JSON of any other shape
        raise broken(file, error, "torch.export program") from error

    rest = {name: archive.read(name) for name in archive.namelist() if name not in places.values()}

    def pack(stored: dict[str, Tensor]) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as made:
            for name, content in (rest | {places[name]: _bytes(value) for name, value in stored.items()}).items():
                made.writestr(name, content)
        return buffer.getvalue()

    return Checkpoint(file, tensors, pack)


def _tensor(file: Path, raw: bytes, name: str, entry: dict[str, Any]) -> Tensor:
    meta = entry["tensor_meta"]
    shape = [int(size["as_int"]) for size in meta["sizes"]]
    strides, expected = [int(stride["as_int"]) for stride in meta["strides"]], [1] * len(shape)
    for place in range(len(shape) - 1, 0, -1):
        expected[place - 1] = expected[place] * shape[place]
    real = [place for place, size in enumerate(shape) if size > 1]
    dense = all(strides[place] == expected[place] for place in real) and not int(meta["storage_offset"]["as_int"])
    if entry.get("use_pickle") or meta["dtype"] not in CODES or not dense or min(shape, default=1) < 1:
        raise InputError(f"{file} holds {name!r} in a way that is not read here. Save its state dict as safetensors.")
    dtype = CODES[meta["dtype"]]
    if len(raw) != math.prod(shape) * dtype.itemsize:
        raise InputError(f"{file} claims the shape {tuple(shape)} for {name!r}, which has {len(raw)} bytes.")
    return torch.frombuffer(bytearray(raw), dtype=dtype).view(shape)


def _bytes(value: Tensor) -> bytes:
    return value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
