"""Where the notebooks are, a copy of them where they come with an installed package, and JupyterLab to open them."""

from __future__ import annotations

import shutil
import sys
from importlib import resources
from pathlib import Path

from smi.errors import InputError

FIRST = "00_start_here.ipynb"
OWN = Path("smi-notebooks")


def notebooks_folder(into: Path | None = None) -> tuple[Path, list[Path]]:
    """The folder to work in, and the files that were copied there.

    In a checkout it is the checkout's own ``notebooks``, unless ``into`` is given. What is there already stays as it
    is: it may hold the reader's work.

    Args:
        into: Folder that the notebooks are copied to. Default: from an installed package ``smi-notebooks``.

    Raises:
        InputError: Where it is a file.
    """
    checkout = Path(__file__).resolve().parents[2] / "notebooks"
    if (checkout / FIRST).exists() and into is None:
        return checkout, []
    folder = into or OWN
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file. Give a folder, new or with the notebooks of an earlier start.")
    packaged = resources.files("smi").joinpath("assets", "notebooks")
    with resources.as_file(packaged) as installed:
        source = checkout if (checkout / FIRST).exists() else Path(installed)
        copied = []
        for file in sorted(
            path for path in source.rglob("*") if path.is_file() and ".ipynb_checkpoints" not in path.parts
        ):
            target = folder / file.relative_to(source)
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
                copied.append(target)
    return folder, copied


def lab_command(folder: Path, *, port: int, browser: bool) -> list[str]:
    """The command that starts JupyterLab at the first notebook, for this machine only and with its token."""
    command = [
        sys.executable, "-m", "jupyter", "lab", f"--ServerApp.root_dir={folder.resolve()}", "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.port={port}", f"--LabApp.default_url=/lab/tree/{FIRST}",
    ]  # fmt: skip
    return command if browser else [*command, "--no-browser"]
