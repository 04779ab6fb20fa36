"""The documentation as static pages: ``python -m smi.dev.site FOLDER`` (needs the extra "docs").

README, notebooks as they are stored, the evidence, what contributors read, and a page for every module. The sources
are the repository's own files, at the same paths, so that their links hold in both places.
"""

from __future__ import annotations

import pkgutil
import shutil
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

from smi.errors import InputError

PACKAGES = ("smi", "smi_kernels")
SKIPPED = {"__main__", "assets", "exercises", "native", "results"}
"""Programs, data, and what is no interface."""

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "notebooks/results/README.md",
         "notebooks/results/DECISIONS.md")  # fmt: skip
SETTINGS: dict[str, Any] = {
    "project": "smi",
    "html_title": "smi: backdoor removal without clean data",
    "html_theme": "furo",
    "extensions": ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"],
    "default_role": "py:obj",  # `name` in a docstring is a name where there is one
    "napoleon_custom_sections": [("Columns", "params_style")],
    "napoleon_use_ivar": True,  # else a field is described twice
    "autodoc_member_order": "bysource",
    "autodoc_typehints": "signature",
    "autodoc_preserve_defaults": True,
    "add_module_names": False,
    "nb_execution_mode": "off",
    "myst_heading_anchors": 3,
    "myst_enable_extensions": ["dollarmath"],
    # Links to files of the repository that are no pages; outputs of widgets; names that several modules have.
    "suppress_warnings": ["myst.xref_missing", "mystnb.unknown_mime_type", "ref.python"],
}
INDEX = """# smi

```{{toctree}}
:maxdepth: 1
README
```

```{{toctree}}
:caption: Notebooks
:maxdepth: 1
{notebooks}
```

```{{toctree}}
:caption: Evidence
:maxdepth: 1
notebooks/results/README
notebooks/results/DECISIONS
```

```{{toctree}}
:caption: For contributors
:maxdepth: 1
CONTRIBUTING
CHANGELOG
SECURITY
```

```{{toctree}}
:caption: Reference
:maxdepth: 1
{reference}
```
"""


def modules() -> list[str]:
    """Names of the modules that the reference has a page for."""
    names = list(PACKAGES)
    for package in PACKAGES:
        found = pkgutil.walk_packages(import_module(package).__path__, f"{package}.")
        names += [module.name for module in found if not SKIPPED & set(module.name.split("."))]
    return sorted(names)


def sources(folder: Path) -> None:
    """Write what the pages are made of to ``folder``."""
    for name in PAGES:
        _copy(ROOT / name, folder / name)
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    for file in [*notebooks, *(ROOT / "notebooks").rglob("*.png")]:
        _copy(file, folder / file.relative_to(ROOT))
    (folder / "reference").mkdir()
    for name in modules():
        text = f"{name}\n{'=' * len(name)}\n\n.. automodule:: {name}\n   :members:\n   :show-inheritance:\n"
        if hasattr(import_module(name), "__path__"):
            text += "   :no-index:\n"  # names of a package are indexed where they are defined
        (folder / "reference" / f"{name}.rst").write_text(text, encoding="utf-8")
    index = INDEX.format(
        notebooks="\n".join(f"notebooks/{file.stem}" for file in notebooks),
        reference="\n".join(f"reference/{name}" for name in modules()),
    )
    (folder / "index.md").write_text(index, encoding="utf-8")


def build(folder: Path) -> list[str]:
    """Write the pages to ``folder``. Returns the warnings.

    Raises:
        InputError: Outside of a checkout, which has the notebooks.
    """
    from io import StringIO

    from sphinx.application import Sphinx

    if not (ROOT / "notebooks").is_dir():
        raise InputError(f"{ROOT} is no checkout of the repository. Clone it, and install it with pip install -e.")
    warnings = StringIO()
    with tempfile.TemporaryDirectory() as made:
        sources(Path(made))
        app = Sphinx(
            made, None, str(folder), f"{made}/.doctrees", "html", SETTINGS, status=None, warning=warnings,
            freshenv=True,
        )  # fmt: skip
        app.connect("autodoc-process-docstring", _as_rst)
        app.build()
    return warnings.getvalue().splitlines()


def _as_rst(app: object, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Make of a docstring what Sphinx reads: bars that are no substitutions, code where a colon announces it."""
    lines[:] = [line.replace("|", "\\|") for line in lines]
    for index, (line, empty, code) in enumerate(zip(lines, lines[1:], lines[2:], strict=False)):
        if line.endswith(":") and not empty.strip() and _indent(code) >= _indent(line) + 4:
            lines[index] = line + ":"


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _copy(file: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, place)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m smi.dev.site FOLDER")
    for line in build(Path(sys.argv[1])):
        print(line, file=sys.stderr)
    print(f"wrote {Path(sys.argv[1]) / 'index.html'}")
