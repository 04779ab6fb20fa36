"""A model's forward pass as a graph, recorded by calling it once on stand-ins for its tensors.

`torch.fx` records the calls. Its stand-ins know no shapes, so that a forward as ordinary as ``if x.shape[1] != 3`` or
``n, c, h, w = x.shape`` fails; ours carry the tensor that they stand for, of a small batch, and answer for every
dimension but the first, the batch, which stays symbolic. A size that was baked in nevertheless differs between two
traces of different batches, and such a model is not traced.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from smi_kernels.graph.layers import layers


class NotTraceable(Exception):
    """Why a model's forward pass cannot be recorded as a graph."""


def trace(model: nn.Module, images: Tensor) -> fx.Graph:
    """Record the forward pass of a model in eval mode; the model is not changed.

    Every node has the tensor it stands for, of a batch of 3, in ``node.meta["value"]``, and in
    ``node.meta["by_image"]`` whether that has a row for each image which depends on that image alone.

    Args:
        model: from images ``[N, C, H, W]`` to logits.
        images: ``[N, C, H, W]``, for their shape and device alone.

    Raises:
        NotTraceable: if control flow depends on values or the batch size, a size is baked in, or a hook would be lost.
    """
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise NotTraceable(f"{name or 'the model'} has forward hooks")
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    try:
        # What a forward writes to its module, it writes to a copy; parameters and buffers are shared and not written.
        small, large = (_trace_copy(copy.deepcopy(model, dict(shared)), _example(model, images, n)) for n in (2, 3))
    except NotTraceable:
        raise
    except Exception as error:  # whatever a stranger's forward raises when it meets a stand-in
        raise NotTraceable(f"{type(error).__name__}: {error}".splitlines()[0]) from error
    if _text(small) != _text(large):
        raise NotTraceable("a size that depends on the number of images is baked into the forward pass")
    for a, b in zip(small.nodes, large.nodes, strict=True):
        b.meta["by_image"] = _same_rows(a.meta.get("value"), b.meta.get("value"))
    return large


def _same_rows(small: Any, large: Any) -> bool:
    """Whether the values for two images are those for three without the last."""
    if not isinstance(small, Tensor):
        return True
    if small.ndim == 0 or (len(small), len(large)) != (2, 3):
        return False
    few, many = small.float(), large[:2].float()
    return torch.allclose(few, many, rtol=1e-3, atol=1e-4 * max(1.0, many.abs().max().item()))


def _trace_copy(structure: nn.Module, images: Tensor) -> fx.Graph:
    return _Tracer(structure, images).trace(structure)


def _example(model: nn.Module, images: Tensor, n: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    example = torch.rand((n, *images.shape[1:]), generator=generator)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), images.dtype)
    return example.to(device=images.device, dtype=dtype)


def _text(graph: fx.Graph) -> list[str]:
    return [f"{n.op} {n.target} {n.args} {n.kwargs}" for n in graph.nodes]


class _Stand(fx.Proxy):
    """A stand-in that knows the shape of its tensor."""

    @property
    def value(self) -> Any:
        return self.node.meta["value"]

    @property
    def shape(self) -> Any:
        if not isinstance(self.value, Tensor) or self.value.ndim == 0:
            return fx.Proxy.__getattr__(self, "shape")
        if self.node.op == "get_attr":
            return self.value.shape
        batch = self.tracer.create_proxy("call_method", "size", (self, 0), {})
        return (batch, *self.value.shape[1:])

    def size(self, dim: int | None = None) -> Any:
        shape = self.shape
        return shape if dim is None else shape[dim]

    def dim(self) -> int:
        return int(self.value.ndim)

    @property
    def ndim(self) -> int:
        return self.dim()

    @property
    def dtype(self) -> torch.dtype:
        return self.value.dtype

    @property
    def device(self) -> torch.device:
        return self.value.device

    def __len__(self) -> int:
        raise NotTraceable("the forward pass depends on the number of images")


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # so that a forward that writes to a buffer is seen, and does not write to it

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        super().__init__()
        self._images = images
        self._evaluating = False
        self._state = {n: t.detach() for n, t in (*model.named_parameters(), *model.named_buffers())}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in layers or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Stand(node, self)

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, name: Any = None, type_expr: Any = None,
        proxy_factory_fn: Any = None,
    ) -> fx.Proxy:  # fmt: skip
        made = super().create_proxy(kind, target, args, kwargs, name, type_expr)
        if kind != "output":
            self._evaluating = True
            made.node.meta["value"] = self._evaluate(kind, target, made.node.args, made.node.kwargs)
            self._evaluating = False
        return made

    # While values are computed, torch.fx still intercepts calls of modules and reading of their parameters.

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        return forward(*args, **kwargs) if self._evaluating else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Any) -> Any:
        return attr_val if self._evaluating else super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter):
            raise NotTraceable("the forward pass makes tensors that are neither parameters nor buffers")
        return super().create_arg(a)

    @torch.no_grad()
    def _evaluate(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = fx.node.map_arg((args, dict(kwargs)), lambda node: node.meta["value"])
        if kind == "placeholder":
            return self._images
        if kind == "get_attr":
            return self._state[target].clone()
        if kind == "call_module":
            module = self.root.get_submodule(target)
            state = {n: t.clone() for n, t in (*module.named_parameters(), *module.named_buffers())}
            return functional_call(module, state, args, kwargs)
        if kind == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        return target(*args, **kwargs)
