"""Explorers: widgets of the notebooks. One file each; see `smi/explorers/base.py` for what an explorer is."""

from smi.explorers.base import Explorer
from smi.explorers.pictures import BLUE, VERMILLION, Picture, image_row
from smi.explorers.stability import StabilityExplorer

__all__ = ["BLUE", "VERMILLION", "Explorer", "Picture", "StabilityExplorer", "image_row"]
