"""How models are run: channels-last and bfloat16 where the CPU has it, in batches, always with float32 logits."""

from __future__ import annotations

import copy
import hashlib
import platform
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from importlib.metadata import version
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from smi.errors import unknown_name
from smi.runtime.checks import device_of, evaluating
from smi.runtime.files import fingerprint
from smi.runtime.memory import Chunk, halving
from smi.runtime.threads import suited, threads_of


def bf16_is_fast() -> bool:
    """Whether this CPU multiplies bfloat16 natively (AVX512-BF16 or AMX); elsewhere float32 is as fast and exact."""
    return (
        torch.backends.mkldnn.is_available()
        and "AVX512" in torch.backends.cpu.get_cpu_capability()
        and (torch.ops.mkldnn._is_mkldnn_bf16_supported() and torch.cpu._is_avx512_bf16_supported())
    )


class Runner(Protocol):
    """Runs a model on images, with its own parameters or with those given by name."""

    def __call__(self, images: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """Float32 outputs."""


PRECISIONS = ("auto", "float32", "bfloat16", "float16")
_asked: ContextVar[str] = ContextVar("precision", default="auto")


@contextmanager
def precision(name: str) -> Iterator[None]:
    """Inside the block models run in this number format.

    Weights, logits and losses are float32 whatever it is.

    Args:
        name: "auto" (bfloat16 where that is quick), "float32", "bfloat16" or "float16" (without loss scaling: small
            gradients vanish).

    Raises:
        InputError: For another name.

    >>> with precision("float32"):
    ...     asked_precision()
    'float32'
    """
    if name not in PRECISIONS:
        raise unknown_name("precision", name, PRECISIONS)
    token = _asked.set(name)
    try:
        yield
    finally:
        _asked.reset(token)


def asked_precision() -> str:
    """What the innermost `precision` asked for."""
    return _asked.get()


def mixed(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast to what `precision` asks for on ``device``; nothing where torch has no autocast for it."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    name = asked_precision()
    if name == "auto":
        low = device.type == "cuda" or (device.type == "cpu" and bf16_is_fast())
        return torch.autocast(device.type, torch.bfloat16, enabled=low, cache_enabled=False)
    kind = torch.float16 if name == "float16" else torch.bfloat16
    return torch.autocast(device.type, kind, enabled=name != "float32", cache_enabled=False)


@contextmanager
def fast(model: nn.Module) -> Iterator[Runner]:
    """Yields a function from images to float32 outputs that runs ``model`` the quick way, and differentiates.

    The body runs in bfloat16 under autocast where that is quick; outputs are float32, because a log-softmax in
    bfloat16 is useless. On a CPU torch has as many threads as suit the model inside the block.
    """
    device = device_of(model)

    def run(images: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        layout = torch.channels_last if images.ndim == 4 else torch.preserve_format
        images = images.to(device, memory_format=layout)
        with mixed(device):
            out = model(images) if parameters is None else functional_call(model, dict(parameters), (images,))
        return out.float()

    with suited(model) if device.type == "cpu" else nullcontext():
        yield run


def frozen(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose parameters ask for no gradient: what inversion and inner problems run.

    Channels-last, which makes a generator 1.5 times as fast on a CPU, unless it has kernels that cannot be.
    """
    copied = copy.deepcopy(model).eval().requires_grad_(False)
    if any(tensor.ndim == 5 for tensor in copied.state_dict().values()):
        return copied
    return copied.to(memory_format=torch.channels_last)


def unfrozen(model: nn.Module) -> nn.Module:
    """A copy in eval mode to train, every parameter of it, whatever was frozen in the model."""
    return copy.deepcopy(model).eval().requires_grad_(True).to(memory_format=torch.contiguous_format)


def fingerprint_of(model: object) -> str:
    """A short hash of a module's tensors and of what it prints as, its settings that is; of anything else, its type."""
    if not isinstance(model, nn.Module):
        return type(model).__name__
    tensors = repr(model) + "".join(f"{name}={fingerprint(tensor)};" for name, tensor in model.state_dict().items())
    return hashlib.sha256(tensors.encode()).hexdigest()[:16]


def versions(device: str | torch.device = "cpu") -> dict[str, str]:
    """Versions of what numbers depend on, the processor's way of multiplying, the name of a ``device`` beside it."""
    found = {name: version(name) for name in ("torch", "numpy")} | {
        "python": platform.python_version(),
        "cpu": torch.backends.cpu.get_cpu_capability() + (" bf16" if bf16_is_fast() else ""),
    }
    kind = torch.device(device).type
    if kind != "cpu":
        found["device"] = torch.cuda.get_device_name(device) if kind == "cuda" else kind
    return found


def circumstances(model: nn.Module) -> dict[str, Any]:
    """How numbers come about that ``model`` gives here, for a record: precision, device, versions, threads."""
    device = device_of(model)
    return {
        "precision": asked_precision(),
        "device": device.type,
        "versions": versions(device),
        "threads": threads_of(model),
    }


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, *, batch_size: int = 512) -> Tensor:
    """Logits float32 ``[N, classes]`` on the CPU, in eval mode, in batches."""
    with evaluating(model), fast(model) as run:
        return torch.cat(list(halving(lambda batch: run(batch).cpu(), images, Chunk(batch_size))))
