"""Studies: attacks × sources × defenses × domains × seeds, one line of results a cell, resumable, on Dask.

`spec` reads what is to be run, `stages` computes one piece of it, `run` hands the pieces to workers, `records` keeps
what they found, `results` reads it.
"""

from smi.study.results import read_rows, status, summarise
from smi.study.run import run_study
from smi.study.spec import Cell, Study, load_study
from smi.study.stages import Store

__all__ = ["Cell", "Store", "Study", "load_study", "read_rows", "run_study", "status", "summarise"]
