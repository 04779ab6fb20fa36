"""What notebooks say and ask: claims that are checked as they are printed, and checks of the reader's own functions."""

from smi.tutorial.exercises.base import claim

__all__ = ["claim"]
