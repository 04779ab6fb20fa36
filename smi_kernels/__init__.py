"""Stability scoring by perturbed forward passes. Knows nothing of `smi`."""

from smi_kernels.divergences import Divergence
from smi_kernels.epilogues import Epilogue
from smi_kernels.errors import InputError, unknown_name
from smi_kernels.graph.layers import register_layer
from smi_kernels.moved import moved
from smi_kernels.noise import Family
from smi_kernels.registry import Registry
from smi_kernels.scores import stability_scores, which_backend

__all__ = [
    "Divergence",
    "Epilogue",
    "Family",
    "InputError",
    "Registry",
    "register_layer",
    "stability_scores",
    "unknown_name",
    "which_backend",
]

moved(
    __name__,
    {
        "configs": "smi_kernels.tune.choices",
        "folding": "smi_kernels.graph.folding",
        "layers": "smi_kernels.graph.layers",
        "manifest": "smi_kernels.aot",
        "perturbed": "smi_kernels.noise.perturbed_model",
        "philox": "smi_kernels.noise.philox",
        "plan": "smi_kernels.graph.plan",
        "reductions": "smi_kernels.divergences.reductions",
        "tracing": "smi_kernels.graph.tracing",
        "triton": "smi_kernels.ops, and beside the torch twin in smi_kernels.noise, divergences and epilogues",
        "twins": "smi_kernels.ops, in each operator's reference",
    },
)
