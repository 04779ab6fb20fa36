"""``torch.ops.smi_kernels.perturb_weight``."""

# No "from __future__ import annotations": torch reads the operator's schema from the annotations.

from torch import Tensor
from torch.library import custom_op

from smi_kernels.noise import families
from smi_kernels.ops.launch import Draws, launched
from smi_kernels.ops.perturb_weight import reference


@custom_op("smi_kernels::perturb_weight", mutates_args={"out"})
def perturb_weight(
    theta: Tensor, out: Tensor, std: float, scale: Tensor | None, tensor: int, family: str, first: int, draws: int,
    seed_low: int, seed_high: int, antithetic: bool, left: Tensor | None, right: Tensor | None,
) -> None:  # fmt: skip
    """See `smi_kernels.ops.perturb_weight.kernel`; left and right are its factors, or None."""
    launched(reference.perturb_weight, theta)(
        theta, out, std=std, scale=scale, tensor=tensor, family=families[family],
        which=Draws.of(first, draws, seed_low, seed_high, antithetic),
        factors=(left, right) if left is not None and right is not None else None,
    )  # fmt: skip


@perturb_weight.register_fake
def _(*arguments: object) -> None:
    return None
