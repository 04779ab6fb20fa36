"""A checkpoint in memory: the weights under the file's own names, and how to put others in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from smi.errors import InputError
from smi.runtime.files import write_atomic

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
DTYPES = (*FLOATS, torch.int64, torch.int32, torch.uint8, torch.bool)
MOST_SHARED = 4  # tied weights count twice in a state dict; one number that a view repeats counts as often as it shows


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a file.

    Attributes:
        file: Where they were read from.
        tensors: The file's names to tensors, on the CPU, as stored.
        pack: Such tensors to the bytes of a file like this.
    """

    file: Path
    tensors: dict[str, Tensor]
    pack: Callable[[dict[str, Tensor]], bytes] = field(repr=False)

    def names_for(self, expected: Iterable[str]) -> dict[str, str]:
        """A model's names to the file's, with the prefix that all of the file's share ("module.", ...) taken off."""
        expected, prefix = list(expected), ""
        while True:
            found = {name: prefix + name for name in expected if prefix + name in self.tensors}
            heads = {name[len(prefix) :].partition(".")[0] for name in self.tensors}
            if found or len(heads) != 1 or not all("." in name[len(prefix) :] for name in self.tensors):
                return found
            prefix += heads.pop() + "."

    def write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """The same file with other weights: same names, same types, same things beside them. Atomic.

        Args:
            path: Where it is written.
            tensors: What to put in the place of those of the same name; the others stay.

        Raises:
            InputError: Where there is no such name, or a type, float16 say, cannot hold a value.
        """
        if more := sorted(tensors.keys() - self.tensors.keys()):
            raise InputError(f"{self.file} has no {more[0]!r} that weights could be put in.")
        write_atomic(path, self.pack({name: _like(tensors.get(name, old), old) for name, old in self.tensors.items()}))


def check_tensors(checkpoint: Checkpoint) -> None:
    """Refuse what no classifier's weights are, and tensors that claim to be larger than their file."""
    if not checkpoint.tensors:
        raise InputError(f"{checkpoint.file} holds no tensors. Save the model's state dict in it.")
    size, claimed = checkpoint.file.stat().st_size, 0
    for name, value in checkpoint.tensors.items():
        if value.layout != torch.strided or value.is_quantized or value.dtype not in DTYPES or value.is_meta:
            what = "quantised" if value.is_quantized else f"{value.dtype}, {value.layout}".replace("torch.", "")
            raise InputError(f"{checkpoint.file} has {name!r}, which is {what}. Allowed: dense floats or integers.")
        claimed += value.numel() * value.element_size()
        if claimed > MOST_SHARED * size:
            shape = tuple(value.shape)
            raise InputError(f"{checkpoint.file} claims more than it holds, with {name!r} of shape {shape}.")
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise InputError(f"{checkpoint.file} has NaN or infinite values in {name!r}. Use an intact checkpoint.")


def broken(file: Path, error: BaseException, what: str = "checkpoint") -> InputError:
    """The error for a file that a reader chokes on."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    reason = (lines[0] if lines else type(error).__name__)[:160]
    return InputError(f"{file} is not an intact {what} ({reason}). Copy it again.")


def _like(new: Tensor, old: Tensor) -> Tensor:
    """``new`` as ``old`` is stored; refused where the type cannot hold it."""
    stored = new.detach().cpu().to(old.dtype).contiguous()
    if old.is_floating_point() and not torch.isfinite(stored).all():
        raise InputError(f"The repaired weights do not fit into {old.dtype}. Convert the checkpoint to float32 first.")
    return stored.clone()
