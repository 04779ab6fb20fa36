"""Layer types with parameters: how to run one with given values of them.

A type that is not here is run by ``torch.func.functional_call``, with a warning that names the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch.nn import functional as F

from smi_kernels.errors import InputError

Apply = Callable[..., Tensor]
"""``apply(module, tensors, *inputs, **kwargs)``: the module's output with ``tensors`` (its own parameters and buffers
by name, float32 or float64) in place of its own. It reads everything else from the module, and changes nothing."""

layers: dict[type[nn.Module], Apply] = {}
"""Known layer types. A subclass of a known type is another type: it may compute something else."""


def register_layer(kind: type[nn.Module], apply: Apply) -> None:
    """Add a layer type.

    Args:
        kind: the module class itself; its forward pass is then not looked into.
        apply: see `Apply`; differentiable in the inputs.

    Raises:
        InputError: if the type is known already, or is not a module class.
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise InputError(f"{kind!r} is not a layer type. Allowed: a subclass of torch.nn.Module.")
    if kind in layers:
        raise InputError(f"The layer type {kind.__name__} is registered already. Make a subclass to compute otherwise.")
    layers[kind] = apply


def zero_padding(module: nn.Conv2d) -> tuple[int, int] | None:
    """Rows and columns of zeros that a convolution adds on either side; None if it pads in another way."""
    if module.padding_mode != "zeros":
        return None
    if not isinstance(module.padding, str):
        return module.padding  # type: ignore[return-value]
    total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    if module.padding == "valid":
        return (0, 0)
    return None if total[0] % 2 or total[1] % 2 else (total[0] // 2, total[1] // 2)


def _conv2d(module: nn.Conv2d, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    # The module's own method, because it knows every padding mode.
    return module._conv_forward(x, tensors["weight"], tensors.get("bias"))


def _linear(module: nn.Linear, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return F.linear(x, tensors["weight"], tensors.get("bias"))


def _batch_norm(module: nn.BatchNorm2d, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    mean, var = tensors.get("running_mean"), tensors.get("running_var")
    batch = mean is None  # without running statistics, those of the batch are used in eval mode too
    return F.batch_norm(x, mean, var, tensors.get("weight"), tensors.get("bias"), batch, 0.0, module.eps)


register_layer(nn.Conv2d, _conv2d)
register_layer(nn.Linear, _linear)
for _kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
    register_layer(_kind, _batch_norm)
