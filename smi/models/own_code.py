"""A function from the user's own file, "FILE.py:function": the only code that this package runs besides its own."""

from __future__ import annotations

import inspect
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from smi.errors import InputError


def own_function(spec: str) -> Callable[..., Any]:
    """**Runs the file** and returns its function.

    The function may be called with more keywords than it takes: it gets those that it names. The file may import its
    neighbours.

    Args:
        spec: "FILE.py:function".

    Raises:
        InputError: Where there is no such file or function, or where running it fails.
    """
    path, _, name = spec.rpartition(":")
    if not Path(path).is_file():
        raise InputError(f"There is no file {path}. A function of your own is FILE.py:function.")
    if (folder := str(Path(path).resolve().parent)) not in sys.path:
        sys.path.append(folder)
    try:
        made = runpy.run_path(path).get(name)
    except Exception as error:
        raise InputError(f"{path} fails: {type(error).__name__}: {error}. Run it alone first.") from error
    if not callable(made):
        raise InputError(f"{path} has no function {name!r}. A function of your own is FILE.py:function.")
    taken = inspect.signature(made).parameters
    return lambda **given: made(**{key: value for key, value in given.items() if key in taken})
