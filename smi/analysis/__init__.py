"""The paper's questions as functions: what the evaluator measures on samples, removals and the prior, and figures.

`similarity` (do samples look real), `presence` (do they carry the trigger), `path` (what removal does to their loss),
`theorem` (why a prior keeps triggers out, and where that argument is vacuous), `correlation` (what goes with what),
`study` (all of it for the samples of a study), `figures` (the pictures).
"""

from smi.analysis.correlation import Correlation, rank_correlation
from smi.analysis.path import Path, loss_along_path
from smi.analysis.presence import Detector, patch_residual, train_detector, trigger_presence
from smi.analysis.similarity import Similarity, frechet_distance, nearest_distance, similarity
from smi.analysis.study import ANALYSIS_COLUMNS, analyse
from smi.analysis.theorem import Bound, TwoPixels, bound, check_world, gaussian_ball_mass, range_distance, where_vacuous

__all__ = [
    "ANALYSIS_COLUMNS",
    "Bound",
    "Correlation",
    "Detector",
    "Path",
    "Similarity",
    "TwoPixels",
    "analyse",
    "bound",
    "check_world",
    "frechet_distance",
    "gaussian_ball_mass",
    "loss_along_path",
    "nearest_distance",
    "patch_residual",
    "range_distance",
    "rank_correlation",
    "similarity",
    "train_detector",
    "trigger_presence",
    "where_vacuous",
]
