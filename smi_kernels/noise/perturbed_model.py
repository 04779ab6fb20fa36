"""A model as a function of its parameters: clean, or with noise of draw k on every parameter tensor.

The noise on tensor l has standard deviation σ_w ‖θ_l‖ / √(elements of l), so that σ_w is the expected size of the
noise relative to the tensor, whatever its scale. A tensor that is all zero therefore gets none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from smi_kernels import native
from smi_kernels.errors import InputError, unknown_name
from smi_kernels.noise import FLIPOUT, INDEPENDENT, PARAMETERS, Draw, Family, base, combine, draw, factors
from smi_kernels.precision import has_float64

if TYPE_CHECKING:
    from smi_kernels.request import Request

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
        request: σ_w, which is noise relative to each tensor's root mean square, family, draws, and which parameters
            get noise. States are in its working dtype; noise is drawn in float32.
    """

    def __init__(self, model: nn.Module, request: Request) -> None:
        self._family, self._seed, self._antithetic = request.family, request.seed, request.antithetic
        sigma, dtype = request.sigma_w, request.working_dtype
        chosen = select_parameters(model, request.parameters) if sigma > 0 else {}
        own = {name: p.detach() for name, p in model.named_parameters()}
        self._std = {name: sigma * root_mean_square(own[name]) for name in chosen}
        self._ids = {name: i for name, i in chosen.items() if self._std[name] > 0}
        # Buffers are copied: a model that counts its calls in a buffer would write to them even in eval mode.
        buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
        self.clean = {
            name: t.to(dtype).contiguous() if t.is_floating_point() else t for name, t in (own | buffers).items()
        }
        self._bases: dict[str, Tensor] = {}
        names = {id(p): name for name, p in model.named_parameters()}
        self.shared_names = {
            name: names[id(p)] for name, p in model.named_parameters(remove_duplicate=False) if name not in own
        }

    @property
    def has_noise(self) -> bool:
        """Whether any parameter gets noise."""
        return bool(self._ids)

    def std(self, name: str) -> float:
        """Standard deviation of the noise on a parameter, in its own units; 0 if it gets none."""
        name = self.first_name(name)
        return self._std[name] if name in self._ids else 0.0

    def tensor_id(self, name: str) -> int:
        """Word 1 of a parameter's counters."""
        return self._ids[self.first_name(name)]

    def first_name(self, name: str) -> str:
        """The name under which a parameter that several modules share is kept; other names as they are."""
        return self.shared_names.get(name, name)

    def with_shared(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state with every name of a parameter that several modules share."""
        return state | {name: state[first] for name, first in self.shared_names.items()}

    @property
    def names(self) -> list[str]:
        """Parameters that get noise."""
        return list(self._ids)

    @property
    def family(self) -> Family:
        """The noise family."""
        return self._family

    def which(self, k: int) -> Draw:
        """Draw k of the parameters."""
        return Draw(seed=self._seed, k=k, stream=PARAMETERS, antithetic=self._antithetic)

    def counters(self, tensor: int, k: int) -> native.Stream:
        """Words 1 to 3 of a tensor's counters in draw k, and the key, for `smi_kernels.native`."""
        return native.Stream(tensor, self.which(k).number, PARAMETERS, self._seed & 0xFFFFFFFF, self._seed >> 32)

    def sign(self, k: int) -> float:
        """Factor +1 or −1 of the noise of draw k."""
        return self.which(k).sign

    def state(self, k: int) -> dict[str, Tensor]:
        """Parameters θ + v_k and buffers by name, for ``torch.func.functional_call``."""
        return self.clean | {name: self.parameter(name, k) for name in self._ids}

    def parameter(self, name: str, k: int) -> Tensor:
        """One parameter of draw k."""
        name = self.first_name(name)
        if name not in self._ids:
            return self.clean[name]
        noise, clean = self._noise(name, k).mul_(self._std[name]), self.clean[name]
        return noise.add_(clean) if clean.dtype == noise.dtype else clean + noise

    def _noise(self, name: str, k: int) -> Tensor:
        """Unit noise of draw k, float32, of the parameter's shape."""
        clean, tensor = self.clean[name], self._ids[name]
        if self._family.structure == INDEPENDENT:
            return draw(self._family, {tensor: clean.shape}, device=clean.device, **vars(self.which(k)))[tensor]
        rows, *rest = self.factors(name, k)
        return combine(rows, rest, clean.shape, base=self.base(name))

    def factors(self, name: str, k: int) -> list[Tensor]:
        """Values that a structured family draws for a parameter, see `smi_kernels.noise.factors`."""
        name = self.first_name(name)
        clean = self.clean[name]
        return factors(self._family, clean.shape, self._ids[name], self.which(k), clean.device)

    def base(self, name: str) -> Tensor | None:
        """B of a flipout family for a parameter, drawn once; None for other families."""
        if self._family.structure != FLIPOUT:
            return None
        name = self.first_name(name)
        if name not in self._bases:
            clean = self.clean[name]
            self._bases[name] = base(self._family, clean.shape, self._ids[name], self.which(0), clean.device)
        return self._bases[name]


def root_mean_square(tensor: Tensor) -> float:
    """‖θ‖ / √(elements), summed in float64; 0 for an empty tensor."""
    exact = tensor if has_float64(tensor.device) else tensor.cpu()
    return torch.linalg.vector_norm(exact, dtype=torch.float64).item() / math.sqrt(max(tensor.numel(), 1))
