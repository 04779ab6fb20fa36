"""Classifiers: the project's own, those of strangers, and their files. Nothing is ever unpickled."""

from smi.models.classifiers import Classifier, TrainConfig, build_classifier, train_classifier
from smi.models.store import load_classifier, save_classifier
from smi.models.suspects import load_suspect

__all__ = [
    "Classifier",
    "TrainConfig",
    "build_classifier",
    "load_classifier",
    "load_suspect",
    "save_classifier",
    "train_classifier",
]
