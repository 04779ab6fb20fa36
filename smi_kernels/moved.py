"""Modules that moved: importing one by its old name says where it is now."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib.abc import MetaPathFinder


class _Moved(MetaPathFinder):
    def __init__(self, places: Mapping[str, str]) -> None:
        self._places = places

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name in self._places:
            # Without name=, which would make "from package import old" drop this message for one of its own.
            raise ModuleNotFoundError(f"{name} has moved. It is now in {self._places[name]}.")


def moved(package: str, places: Mapping[str, str]) -> None:
    """Have imports of a package's former modules fail with a message that names the new place.

    Args:
        package: its name.
        places: former name of a module, relative to the package, to the name of what holds its contents now.

    >>> moved("smi_kernels", {"old": "smi_kernels.new"})
    >>> import smi_kernels.old
    Traceback (most recent call last):
    ModuleNotFoundError: smi_kernels.old has moved. It is now in smi_kernels.new.
    """
    # The last finder is asked only for what no other finds.
    sys.meta_path.append(_Moved({f"{package}.{old}": new for old, new in places.items()}))
