"""Explicit randomness: every stage draws from its own named stream of one seed, undisturbed by the others."""

from __future__ import annotations

import hashlib

import torch


def stream(seed: int, name: str) -> torch.Generator:
    """A CPU generator for the stage ``name`` of a run with ``seed``. Different names give independent streams."""
    return torch.Generator().manual_seed(derive(seed, name))


def derive(seed: int, name: str) -> int:
    """An integer seed in ``[0, 2^63)`` for the stage ``name``."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
