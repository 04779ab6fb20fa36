"""Attacks by name. One file a member; see `smi/attacks/base.py` for what an attack is."""

from smi.attacks.badnets import BadNets
from smi.attacks.base import Attack, PoisonedSet, attacks, plant, poison

__all__ = ["Attack", "BadNets", "PoisonedSet", "attacks", "plant", "poison"]
