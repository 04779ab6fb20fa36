"""I-BAU (Zeng et al., "Adversarial Unlearning of Backdoors via Implicit Hypergradient", ICLR 2022).

Unlearn whatever one δ on all images can do: ``min_θ max_{‖δ‖≤C} CE(f_θ(x + δ), y)``. Three solvers of that problem:
`Robust`, the default; `Restarted`, for triggers that no δ resembles; and `Published`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from smi.defenses.base import Defense, Repair, defenses
from smi.defenses.ibau_published import Published
from smi.defenses.ibau_restarted import Restarted
from smi.defenses.ibau_robust import Robust
from smi.domains.base import PublicImages, Samples


@defenses.register("ibau")
@dataclass(frozen=True, kw_only=True)
class IBAU(Defense):
    """I-BAU with a `Robust`, a `Restarted` or a `Published` solver.

    >>> import smi
    >>> suspect, prior = smi.load_classifier("digits-badnets"), smi.load_prior("digits")
    >>> samples = smi.invert(suspect, prior, smi.Latent(steps=1), per_class=2)
    >>> few = Published(rounds=1)  # the default, Robust(), takes the better part of a minute
    >>> IBAU(solver=few).repair(suspect, samples)
    Repair(by ibau/published on latent samples)
    """

    solver: Robust | Restarted | Published = field(default_factory=Robust)

    name = "ibau"

    def _repair(self, model: nn.Module, samples: Samples, public: PublicImages | None, seed: int) -> Repair:
        repaired, log, delta = self.solver.solve(model, samples, public, seed)
        return Repair(repaired, f"ibau/{self.solver.name}", samples.source, self.settings(), log, delta)

    def settings(self) -> dict[str, Any]:
        """The configuration, for the record."""
        return {"defense": self.name, "solver": self.solver.name} | asdict(self.solver)


@defenses.register("ibau_restarted")
@dataclass(frozen=True, kw_only=True)
class RestartedIBAU(IBAU):
    """I-BAU with the `Restarted` solver, under a name of its own for studies."""

    solver: Robust | Restarted | Published = field(default_factory=Restarted)

    name = "ibau_restarted"
