"""Defenses by name, behind one interface (`base`): a suspect model and samples in, a repaired model out."""

from smi.defenses.base import Defense, Repair, Schedule, defenses
from smi.defenses.finetune import FineTune
from smi.defenses.ibau import IBAU
from smi.defenses.ibau_published import Published
from smi.defenses.ibau_robust import Robust

__all__ = ["IBAU", "Defense", "FineTune", "Published", "Repair", "Robust", "Schedule", "defenses"]
