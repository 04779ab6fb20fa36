"""Defenses by name, behind one interface (`base`): a suspect model and samples in, a repaired model out."""

from smi.defenses.anp import ANP
from smi.defenses.base import Defense, Repair, defenses
from smi.defenses.clp import CLP
from smi.defenses.erasure import Erasure
from smi.defenses.fine_pruning import FinePrune
from smi.defenses.finetune import FineTune
from smi.defenses.ftsam import FTSAM
from smi.defenses.ibau import IBAU
from smi.defenses.nad import NAD
from smi.defenses.training import Schedule

__all__ = [
    "ANP",
    "CLP",
    "FTSAM",
    "IBAU",
    "NAD",
    "Defense",
    "Erasure",
    "FinePrune",
    "FineTune",
    "Repair",
    "Schedule",
    "defenses",
]
