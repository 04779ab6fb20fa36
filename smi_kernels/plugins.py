"""Noise families, divergences, epilogues and layers from other packages.

A package names a module, or a function to call, that registers them, under the entry point group ``smi_kernels``:

    [project.entry-points.smi_kernels]
    laplace = "my_package.laplace"
"""

from __future__ import annotations

import functools
import warnings
from importlib.metadata import entry_points

GROUP = "smi_kernels"
"""Entry point group."""


@functools.cache
def load_plugins() -> tuple[str, ...]:
    """Load every plug-in that is installed, once; one that fails is left out with a warning. Returns their names."""
    loaded = []
    for entry in sorted(entry_points(group=GROUP), key=lambda e: e.name):
        try:
            plugin = entry.load()
            if callable(plugin):
                plugin()
        except Exception as error:  # a plug-in's own fault must not stop those who do not use it
            warnings.warn(f"The smi_kernels plug-in {entry.name!r} ({entry.value}) failed: {error}", stacklevel=2)
        else:
            loaded.append(entry.name)
    return tuple(loaded)
