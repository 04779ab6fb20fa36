"""The API reference as static pages: ``python -m smi.dev.reference FOLDER`` (needs pdoc: the extra "docs")."""

from __future__ import annotations

import pkgutil
import sys
import warnings
from importlib import import_module
from pathlib import Path

PACKAGES = ("smi", "smi_kernels")
SKIPPED = {"__main__", "assets", "exercises", "native", "results"}
"""Programs, data, and what is no interface."""


def modules() -> list[str]:
    """Names of the modules that the reference has a page for."""
    names = list(PACKAGES)
    for package in PACKAGES:
        found = pkgutil.walk_packages(import_module(package).__path__, f"{package}.")
        names += [module.name for module in found if not SKIPPED & set(module.name.split("."))]
    return sorted(names)


def build(folder: Path) -> None:
    """Write the pages to ``folder``."""
    import pdoc

    pdoc.render.configure(docformat="google", footer_text="smi", math=False)
    with warnings.catch_warnings():
        # pdoc finds some modules by itself as well, and cannot resolve the inherited annotations of a dataclass.
        warnings.filterwarnings("ignore", "The module specification|Error parsing type annotation")
        pdoc.pdoc(*modules(), output_directory=folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m smi.dev.reference FOLDER")
    build(Path(sys.argv[1]))
    print(f"wrote {Path(sys.argv[1]) / 'index.html'}")
