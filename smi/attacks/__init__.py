"""Attacks by name. One file a member; see `smi/attacks/base.py` for what an attack is."""

from smi.attacks.badnets import BadNets
from smi.attacks.badnets_all2all import BadNetsAllToAll
from smi.attacks.base import Attack, PoisonedSet, attacks, plant, poison
from smi.attacks.blended import Blended
from smi.attacks.input_aware import InputAware
from smi.attacks.l0_inv import L0Inv
from smi.attacks.l2_inv import L2Inv
from smi.attacks.label_consistent import LabelConsistent
from smi.attacks.sig import SIG
from smi.attacks.smooth import Smooth
from smi.attacks.trojan_square import TrojanSquare
from smi.attacks.trojan_watermark import TrojanWatermark
from smi.attacks.wanet import WaNet

__all__ = [
    "SIG",
    "Attack",
    "BadNets",
    "BadNetsAllToAll",
    "Blended",
    "InputAware",
    "L0Inv",
    "L2Inv",
    "LabelConsistent",
    "PoisonedSet",
    "Smooth",
    "TrojanSquare",
    "TrojanWatermark",
    "WaNet",
    "attacks",
    "plant",
    "poison",
]
