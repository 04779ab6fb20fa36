"""Activations that follow a layer, in torch and in Triton."""

from smi_kernels.epilogues.torch import Epilogue, epilogues

__all__ = ["Epilogue", "epilogues"]
