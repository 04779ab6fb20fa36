"""Domains by name: private images for attacker and evaluator, public images for the defender."""

from smi.domains.base import Domain, PrivateData, PrivateSet, PublicImages, Samples

__all__ = ["Domain", "PrivateData", "PrivateSet", "PublicImages", "Samples"]
