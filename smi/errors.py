"""Bad input raises `InputError`: what was wrong, what is allowed, what to try."""

from smi_kernels import InputError, unknown_name

__all__ = ["InputError", "unknown_name"]
