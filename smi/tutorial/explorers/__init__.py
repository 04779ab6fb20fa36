"""Explorers: widgets of the notebooks. One file each; see `smi/tutorial/explorers/base.py` for what an explorer is."""

from smi.plotting.pictures import BLUE, VERMILLION, Picture, image_row
from smi.tutorial.explorers.base import Explorer
from smi.tutorial.explorers.latent import LatentExplorer
from smi.tutorial.explorers.noise import NoiseExplorer
from smi.tutorial.explorers.pixels import PixelExplorer
from smi.tutorial.explorers.score import ScoreExplorer
from smi.tutorial.explorers.stabilise import StabiliseExplorer
from smi.tutorial.explorers.stability import StabilityExplorer
from smi.tutorial.explorers.study import StudyExplorer
from smi.tutorial.explorers.trigger import TriggerExplorer
from smi.tutorial.explorers.universal import UniversalExplorer
from smi.tutorial.explorers.world import WorldExplorer

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
