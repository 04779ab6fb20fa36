"""Perturbed weights of one layer, for several draws."""
