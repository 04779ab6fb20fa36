"""A model as a function of its parameters: clean, or with noise of draw k on every parameter tensor.

The noise on tensor l has standard deviation σ_w ‖θ_l‖ / √(elements of l), so that σ_w is the expected size of the
noise relative to the tensor, whatever its scale. A tensor that is all zero therefore gets none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from smi_kernels.errors import InputError, unknown_name
from smi_kernels.noise import PARAMETERS, Family, draw

ParameterFilter = Callable[[str], bool] | Iterable[str] | None
"""Which parameters get noise: all (None), those a function accepts, or names and prefixes such as ``"features.0"``."""


def select_parameters(model: nn.Module, parameters: ParameterFilter = None) -> dict[str, int]:
    """Name to tensor id of the floating-point parameters that get noise.

    A tensor's id is its position in ``model.named_parameters()``, so that the noise on it does not depend on the
    filter. Shared parameters count once.

    Raises:
        InputError: if a name or prefix matches no parameter, or a filter selects none.
    """
    ids = {name: i for i, (name, p) in enumerate(model.named_parameters()) if p.is_floating_point()}
    if parameters is None:
        return ids
    chosen = {name: ids[name] for name in ids if _accepts(parameters, ids)(name)}
    if not chosen:
        raise InputError(
            "The filter `parameters` selects no parameter. Allowed: None for all, a function of a name, or names and "
            "prefixes. To leave all parameters without noise, pass sigma_w=0."
        )
    return chosen


def _accepts(parameters: Callable[[str], bool] | Iterable[str], names: Iterable[str]) -> Callable[[str], bool]:
    if callable(parameters):
        return parameters
    wanted = [parameters] if isinstance(parameters, str) else list(parameters)
    prefixes = {name.rsplit(".", depth)[0] for name in names for depth in range(name.count(".") + 1)}
    for entry in wanted:
        if entry not in prefixes:
            raise unknown_name("parameter", entry, prefixes)
    return lambda name: any(name == entry or name.startswith(f"{entry}.") for entry in wanted)


class PerturbedModel:
    """The states of a model under parameter noise; the model itself is never written to.

    Args:
        model: any module, in eval mode.
        sigma: σ_w ≥ 0, noise relative to each tensor's root mean square.
        family: noise family.
        seed: in [0, 2⁶⁴).
        antithetic: draws 2j and 2j + 1 are +E and −E.
        parameters: which parameters get noise, see `select_parameters`.
        dtype: float32 or float64, of the states; noise is drawn in float32 for both.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        sigma: float,
        family: Family,
        seed: int,
        antithetic: bool = False,
        parameters: ParameterFilter = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._family, self._seed, self._antithetic = family, seed, antithetic
        chosen = select_parameters(model, parameters) if sigma > 0 else {}
        own = {name: p.detach() for name, p in model.named_parameters()}
        self._std = {name: sigma * root_mean_square(own[name]) for name in chosen}
        self._ids = {name: i for name, i in chosen.items() if self._std[name] > 0}
        # Buffers are copied: a model that counts its calls in a buffer would write to them even in eval mode.
        buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
        self.clean = {name: _prepared(t, dtype) for name, t in (own | buffers).items()}

    @property
    def has_noise(self) -> bool:
        """Whether any parameter gets noise."""
        return bool(self._ids)

    def state(self, k: int) -> dict[str, Tensor]:
        """Parameters θ + v_k and buffers by name, for ``torch.func.functional_call``."""
        noisy: dict[str, Tensor] = {}
        for device in {self.clean[name].device for name in self._ids}:
            names = {i: name for name, i in self._ids.items() if self.clean[name].device == device}
            noise = draw(
                self._family,
                {i: self.clean[name].shape for i, name in names.items()},
                seed=self._seed,
                k=k,
                stream=PARAMETERS,
                antithetic=self._antithetic,
                device=device,
            )
            noisy |= {name: self.clean[name] + self._std[name] * noise[i] for i, name in names.items()}
        return self.clean | noisy


def _prepared(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In the working dtype, and channels_last for a convolution, which hands that layout on: oneDNN prefers it."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.to(dtype, memory_format=torch.channels_last if tensor.ndim == 4 else torch.preserve_format)


def root_mean_square(tensor: Tensor) -> float:
    """‖θ‖ / √(elements), summed in float64; 0 for an empty tensor."""
    return tensor.double().norm().item() / math.sqrt(max(tensor.numel(), 1))
