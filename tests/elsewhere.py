"""A device that is not there, to find tensors that are left on the wrong one.

Inside `elsewhere()` a tensor can be on the device "lazy": it is a wrapper around a tensor on the CPU, which does the
arithmetic. As on a real device, operands must not be mixed, random numbers are not drawn with a generator of the CPU,
and there are no float64 numbers (as on mps) and no NumPy. Of the devices that torch knows by name and this build can
name without having them, "lazy" is one.
"""

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("lazy")
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index")
MOVING = ("aten::_to_copy", "aten::copy_", "aten::_copy_from")


class Away(torch.Tensor):
    """A tensor that says it is on `DEVICE`."""

    @staticmethod
    def __new__(cls, inner):
        if inner.dtype == torch.float64:
            raise TypeError("this device has no float64")
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=DEVICE,
        )  # fmt: skip

    def __init__(self, inner):
        self.inner = inner

    def __repr__(self):
        return f"Away({self.inner})"

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert a tensor on another device to numpy")

    def tolist(self):
        return self.inner.tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def run(func, args, kwargs):
    """One operation, on the CPU, its result where it would be."""
    name, flat = func._schema.name, tree_flatten((args, kwargs))[0]
    tensors = [value for value in flat if isinstance(value, torch.Tensor)]
    there = any(isinstance(value, Away) for value in tensors)
    wanted = kwargs.get("device")
    if wanted is not None:
        there = torch.device(wanted).type == DEVICE.type
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if there and any(isinstance(value, torch.Generator) for value in flat):
        raise RuntimeError(f"{name}: a generator of the CPU for a tensor on {DEVICE}")
    if there and kwargs.get("dtype") == torch.float64:
        raise TypeError("this device has no float64")
    mixed = there and any(not isinstance(value, Away) and value.ndim for value in tensors)
    if mixed and name not in MOVING and not (name in INDEXING and isinstance(args[0], Away)):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device")
    known = {id(value.inner): value for value in tensors if isinstance(value, Away)}
    out = func(*tree_map(_inside, args), **tree_map(_inside, kwargs))
    if name == "aten::copy_":
        return args[0]

    def outside(value):
        if not there or not isinstance(value, torch.Tensor):
            return value
        return known[id(value)] if id(value) in known else Away(value)

    return tree_map(outside, out)


def _inside(value):
    return value.inner if isinstance(value, Away) else value


class Elsewhere(TorchDispatchMode):
    """Catches what makes or moves tensors; the rest reaches `Away` by itself."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


@contextmanager
def elsewhere():
    """A block in which `DEVICE` is there. Yields it."""
    kept = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with Elsewhere():
            yield DEVICE
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(kept)
