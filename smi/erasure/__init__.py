"""Find triggers, erase their directions from the features, tune against them and against random changes."""

from smi.erasure.scan import Scan
from smi.erasure.search import ANYWHERE, Found, Search
from smi.erasure.tune import Tuning

__all__ = ["ANYWHERE", "Found", "Scan", "Search", "Tuning"]
