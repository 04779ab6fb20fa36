"""The ahead-of-time gate: compiles every shipped kernel without a GPU, and holds it to what it may cost."""

from smi_kernels.aot.record import empty, recorded
from smi_kernels.aot.variant import ARCHS, BF16, FP16, FP32, SHORT, Expects, Variant, pairs, sizes

__all__ = ["ARCHS", "BF16", "FP16", "FP32", "SHORT", "Expects", "Variant", "empty", "pairs", "recorded", "sizes"]
