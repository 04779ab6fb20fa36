"""Find triggers, erase their directions from the features, tune a little."""

from smi.erasure.scan import Scan
from smi.erasure.search import ANYWHERE, Found, Search
from smi.erasure.tune import Tuning

__all__ = ["ANYWHERE", "Found", "Scan", "Search", "Tuning"]
