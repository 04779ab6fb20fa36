"""Inversion: images of every class from the suspect model alone. One loop (`base`), one file a method."""

from smi.inversion.base import Inversion, inversions, invert
from smi.inversion.deepinversion import DeepInversion
from smi.inversion.latent import Latent
from smi.inversion.pixel import Pixel
from smi.inversion.stabilized import Stabilized

__all__ = ["DeepInversion", "Inversion", "Latent", "Pixel", "Stabilized", "inversions", "invert"]
