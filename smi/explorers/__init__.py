"""Explorers: widgets of the notebooks. One file each; see `smi/explorers/base.py` for what an explorer is."""

from smi.explorers.base import Explorer
from smi.explorers.pictures import BLUE, VERMILLION, Picture, image_row
from smi.explorers.stability import StabilityExplorer
from smi.explorers.trigger import TriggerExplorer

__all__ = ["BLUE", "VERMILLION", "Explorer", "Picture", "StabilityExplorer", "TriggerExplorer", "image_row"]
