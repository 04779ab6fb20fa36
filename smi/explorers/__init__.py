"""Explorers: widgets of the notebooks. One file each; see `smi/explorers/base.py` for what an explorer is."""

from smi.explorers.base import Explorer
from smi.explorers.latent import LatentExplorer
from smi.explorers.noise import NoiseExplorer
from smi.explorers.pictures import BLUE, VERMILLION, Picture, image_row
from smi.explorers.pixels import PixelExplorer
from smi.explorers.score import ScoreExplorer
from smi.explorers.stabilise import StabiliseExplorer
from smi.explorers.stability import StabilityExplorer
from smi.explorers.study import StudyExplorer
from smi.explorers.trigger import TriggerExplorer
from smi.explorers.universal import UniversalExplorer
from smi.explorers.world import WorldExplorer

__all__ = [
    "BLUE",
    "VERMILLION",
    "Explorer",
    "LatentExplorer",
    "NoiseExplorer",
    "Picture",
    "PixelExplorer",
    "ScoreExplorer",
    "StabiliseExplorer",
    "StabilityExplorer",
    "StudyExplorer",
    "TriggerExplorer",
    "UniversalExplorer",
    "WorldExplorer",
    "image_row",
]
