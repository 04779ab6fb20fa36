"""Perturbed images, for several draws."""
