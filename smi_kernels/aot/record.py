"""Kernels as their launchers launch them: called on tensors without data, what they hand to Triton is recorded.

So tiles, warps and specializations that the gate compiles cannot differ from the real ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from smi_kernels.aot.variant import FP32, Expects, Variant


class _NoDriver:
    """Answers Triton's questions about the current GPU. Its device is nobody else's, and so are its cached kernels."""

    def get_current_device(self) -> str:
        return "ahead of time"

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 80, 32)  # any: what is recorded is the same for all


def recorded(
    name: str, call: Callable[[], object], *, expects: Expects, archs: tuple[int, ...] | None = None
) -> list[Variant]:
    """The kernels that a call launches on tensors made by `empty`, as variants of this name. Nothing runs."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    found: list[Variant] = []
    launch = JITFunction.run
    given: dict[str, Any] = {}

    def run(self: Any, *arguments: Any, **options: Any) -> Any:
        given.clear()
        given.update(options)
        return launch(self, *arguments, **options)

    def record(
        self: Any, key: str, signature: dict[str, str], device: str, constants: Any, options: Any, attrs: Any, _: bool
    ) -> None:
        names = self.arg_names
        found.append(
            Variant(
                kernel=self, name=name, expects=expects, archs=archs,
                signature={argument: kind for argument, kind in signature.items() if kind != "constexpr"},
                constants={names[place]: value for (place,), value in constants.items()},
                aligned=frozenset(names[place] for (place,), value in attrs.items() if value),
                num_warps=options.num_warps, num_stages=options.num_stages, fp_fusion=given.get("enable_fp_fusion"),
            )
        )  # fmt: skip

    with (
        FakeTensorMode(),
        mock.patch.object(FakeTensor, "data_ptr", lambda self: self.storage_offset() * self.itemsize),
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(JITFunction, "_do_compile", record),  # returns None: Triton then launches nothing
        mock.patch.object(driver, "_active", _NoDriver()),
        mock.patch("torch.cuda.device", return_value=contextlib.nullcontext()),
    ):
        call()
    return found


def empty(*shape: int, dtype: torch.dtype = FP32, channels_last: bool = False) -> Tensor:
    """A CUDA tensor without data, inside the call of `recorded`."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="cuda", memory_format=layout)
