"""BadNets with every class sent to the next one (Gu et al., 2017, the "all-to-all" attack)."""

from __future__ import annotations

from dataclasses import dataclass

from smi.attacks.badnets import BadNets
from smi.attacks.base import attacks


@attacks.register("badnets_all2all")
@dataclass(frozen=True, kw_only=True)
class BadNetsAllToAll(BadNets):
    """The square patch of `BadNets`; a stamped image of class y is to be called (y + 1) mod classes."""

    mode: str = "all_to_all"
