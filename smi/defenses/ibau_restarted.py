"""I-BAU's min-max problem, its outer level started from a model that has forgotten most of its weights.

What no δ resembles, a warp or labels from all to all, survives `Robust`: no stamped image asks for it, and distillation
holds it. From a fresh start it must be learned again to be there at all, and what is learned from keeps it out as far
as it can (`smi/defenses/restart.py`). The price is accuracy, more of it the less the samples resemble the suspect's own
data, since little but what they show comes back.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from smi.checks import check_number
from smi.defenses.base import LEAST_STEPS, Schedule
from smi.defenses.ibau_robust import Robust
from smi.defenses.restart import forget
from smi.domains.base import PublicImages
from smi.seeding import stream


@dataclass(frozen=True, kw_only=True)
class Restarted(Robust):
    """`Robust` from a fresh start.

    forget: how much of the weights is chance at the start, in [0, 1), see `smi.defenses.restart.forget`. Clean
    behaviour is held by labels alone. The δ's wait until there is something to fool.

    The more is forgotten, the less is left of a warp, and of accuracy: with SMI's samples, over WaNet, BadNets and a
    smooth trigger of development seeds 100 and 101, 0.8 keeps 94.4 % accuracy and leaves 29 % of WaNet, 0.7 95.8 and
    33, 0.6 96.4 and 48, and 2 to 5 % of the other two. Neither the suspect's larger probabilities for its labels, nor
    a first layer kept or one forgotten more than the others, nor more public images improved on that line.
    """

    schedule: Schedule = field(default_factory=lambda: Schedule(rounds=100, lr=3e-3, distill=40.0))
    trial: float = 0.0  # there is little yet that a step could wreck
    reach: float = 1.0
    begin: float = 0.2
    renew: int = 3
    temperature: float = 0.0
    only_trusted: bool = True
    forget: float = 0.7

    name = "restarted"
    hold_stream: ClassVar[str] = "hold"
    least_steps: ClassVar[int] = LEAST_STEPS

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("forget", self.forget, low=0, high=0.999)

    def _start(self, model: nn.Module, images: Tensor, public: PublicImages | None, seed: int) -> nn.Module:
        """The suspect with most of its weights forgotten."""
        rng = stream(seed, "forget")
        if public is not None:
            images = torch.cat([images, public.images[torch.randperm(len(public), generator=rng)[: len(images)]]])
        return forget(model, self.forget, images, rng)
