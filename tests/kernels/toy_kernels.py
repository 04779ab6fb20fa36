"""Kernels that break their manifest on purpose, and manifests of them: for the tests of the gate."""

import os
from dataclasses import replace

import triton
import triton.language as tl

from smi_kernels.aot import Expects, Variant


@triton.jit
def spilling(x, out, BLOCK: tl.constexpr):
    """Keeps 512 values alive in a thread that has 255 registers: the sum is needed before the first is stored."""
    index = tl.arange(0, BLOCK)
    values = tl.load(x + index)
    tl.store(out + index, values - tl.sum(values))


@triton.jit
def matmul(a, b, out, size, BLOCK: tl.constexpr):
    """A block of a product, with a loop that Triton pipelines."""
    index = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for start in range(0, size, BLOCK):
        inner = start + index
        left = tl.load(a + index[:, None] * size + inner[None, :])
        right = tl.load(b + inner[:, None] * size + index[None, :])
        total = tl.dot(left, right, total)
    tl.store(out + index[:, None] * size + index[None, :], total.to(tl.float16))


@triton.jit
def untypable(x, out):
    """Does not compile: a pointer has no logarithm."""
    tl.store(out, tl.log(x))


@triton.jit
def copy(x, out, BLOCK: tl.constexpr):
    """Keeps every promise."""
    index = tl.arange(0, BLOCK)
    tl.store(out + index, tl.load(x + index))


_COPY = Variant(
    kernel=copy, name="toy", signature={"x": "*fp32", "out": "*fp32"}, constants={"BLOCK": 1024},
    aligned=frozenset({"x", "out"}), num_warps=1, num_stages=1, fp_fusion=False,
)  # fmt: skip
_MATMUL = Variant(
    kernel=matmul, name="toy", signature={"a": "*fp16", "b": "*fp16", "out": "*fp16", "size": "i32"},
    constants={"BLOCK": 64}, aligned=frozenset({"a", "b", "out", "size"}),
    num_warps=4, num_stages=3, fp_fusion=True, expects=Expects(cp_async=True),
)  # fmt: skip


def kept():
    return [_COPY, _MATMUL]


def broken():
    """One of each kind, and after them one that keeps its promises."""
    return [
        replace(_COPY, name="spills", kernel=spilling, constants={"BLOCK": 16384}),
        replace(_COPY, name="wrong type", kernel=untypable, constants={}),
        replace(_COPY, name="no block", constants={}),
        replace(_COPY, name="no fp_fusion", fp_fusion=None),
        replace(_MATMUL, name="tight", expects=Expects(max_registers=40)),
        replace(_MATMUL, name="unaligned", aligned=frozenset()),
        replace(_MATMUL, name="too large", num_stages=12, expects=Expects(max_registers=255)),
        _COPY,
    ]


def crashing():
    """Kills the process that compiles, as a failed assertion inside LLVM does."""
    if os.environ.get("TRITON_DUMP_PTXAS_LOG"):
        os.abort()
    return [_COPY]
