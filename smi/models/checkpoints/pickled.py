"""What ``torch.save`` writes, by torch's own unpickler for weights only, which runs nothing."""

from __future__ import annotations

import copy
import io
import pickletools
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smi.errors import InputError
from smi.models.checkpoints.base import Checkpoint, broken

WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "weights", "params")
DEEPEST = 3
HARMLESS = ("torch._utils._rebuild_", "collections.OrderedDict")


def read_pickled(file: Path, raw: bytes) -> Checkpoint:
    """The weights of a checkpoint.

    Args:
        file: The checkpoint.
        raw: Its pickle, to say what it asks for where torch refuses it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            whole = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that is made to break the reader breaks it in any way
        asked = [name for name in dict.fromkeys(asked_for(raw)) if not name.startswith(HARMLESS)]
        asked = [name for name in asked if not (name.startswith("torch.") and name.endswith("Storage"))]
        if not asked:
            raise broken(file, error) from error
        raise InputError(
            f"{file} is a pickle that asks for {', '.join(asked[:5])}: code, not weights. Nothing in it was run. "
            "Ask for the state dict, best as safetensors: save_file(model.state_dict(), ...)."
        ) from error
    where, found = _weights(whole)
    if found is None:
        raise InputError(
            f"{file} holds {_kind(whole)}, not a state dict. Allowed: a dict from names to tensors, at the top or "
            f"under {', '.join(WRAPPERS)}."
        )

    def pack(stored: dict[str, Tensor]) -> bytes:
        buffer = io.BytesIO()
        torch.save(_put(whole, where, stored), buffer)
        return buffer.getvalue()

    return Checkpoint(file, found, pack)


def asked_for(raw: bytes) -> Iterator[str]:
    """What pickles ask to import, read off their instructions; none is carried out. Ends where they break off."""
    strings: list[str] = []
    memo: dict[int, str] = {}
    try:
        for code, argument, _ in _instructions(raw):
            if code.name in ("GLOBAL", "INST"):
                yield str(argument).replace(" ", ".")
            elif code.name == "STACK_GLOBAL":
                yield ".".join(strings[-2:])
            elif isinstance(argument, str):
                strings.append(argument)
            elif code.name in ("MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT") and strings:
                memo[len(memo) if argument is None else int(argument)] = strings[-1]
            elif code.name in ("BINGET", "LONG_BINGET", "GET") and argument in memo:
                strings.append(memo[argument])
    except Exception:  # broken, on purpose or not: what was asked for up to here is known
        return


def _instructions(raw: bytes) -> Iterator[tuple[Any, Any, int | None]]:
    """Of the pickles that follow each other in a file; torch's old format has several."""
    stream = io.BytesIO(raw)
    while stream.tell() < len(raw):
        yield from pickletools.genops(stream)


def _weights(whole: Any, where: tuple[str, ...] = ()) -> tuple[tuple[str, ...], dict[str, Tensor] | None]:
    """Where in a loaded object the weights are, and the weights; None where there are none."""
    if not isinstance(whole, dict) or len(where) > DEEPEST:
        return where, None
    for key in WRAPPERS:
        if isinstance(whole.get(key), dict):
            found = _weights(whole[key], (*where, key))
            if found[1] is not None:
                return found
    tensors = {name: value for name, value in whole.items() if isinstance(name, str) and isinstance(value, Tensor)}
    return where, tensors or None


def _put(whole: Any, where: tuple[str, ...], tensors: Mapping[str, Tensor]) -> Any:
    """A copy of ``whole`` with ``tensors`` where the weights were."""
    copied = copy.copy(whole)  # an OrderedDict by `state_dict` carries versions as an attribute
    copied.update({where[0]: _put(whole[where[0]], where[1:], tensors)} if where else tensors)
    return copied


def _kind(whole: Any) -> str:
    if not isinstance(whole, dict):
        return f"one {type(whole).__name__}"
    return f"a dict with {', '.join(map(repr, list(whole)[:4])) or 'nothing in it'}"
