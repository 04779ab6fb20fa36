"""The ahead-of-time gate: compiles every shipped kernel without a GPU, and holds it to what it may cost."""

from smi_kernels.aot.record import empty, recorded
from smi_kernels.aot.variant import Expects, Variant

__all__ = ["Expects", "Variant", "empty", "recorded"]
