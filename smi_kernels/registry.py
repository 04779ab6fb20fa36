"""Things that users extend are kept by name: noise families and divergences here, attacks and defenses in `smi`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from smi_kernels.errors import InputError, unknown_name

T = TypeVar("T")

Kernel = Any | None
"""A ``@triton.jit`` function, "module:name" of one, or None. A name, so that triton is not imported before its use."""


def load_kernel(kernel: Kernel) -> Any:
    """The ``@triton.jit`` function itself."""
    if not isinstance(kernel, str):
        return kernel
    module, _, name = kernel.partition(":")
    return getattr(importlib.import_module(module), name)


class Registry(Generic[T]):
    """A mapping from name to object, filled by a decorator.

    >>> shapes: Registry[int] = Registry("shape")
    >>> shapes.add("square", 4)
    4
    >>> shapes["square"], list(shapes)
    (4, ['square'])

    Reading an unknown name raises `InputError` with the nearest names; adding a name twice raises it too, so that
    one plug-in cannot silently replace another.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, T] = {}

    def add(self, name: str, item: T) -> T:
        """Register ``item`` as ``name`` and return it."""
        if name in self._items:
            raise InputError(f"The {self.kind} {name!r} is registered already. Choose another name.")
        self._items[name] = item
        return item

    def register(self, name: str) -> Callable[[T], T]:
        """A decorator that registers what it decorates."""
        return lambda item: self.add(name, item)

    def __getitem__(self, name: str) -> T:
        if name not in self._items:
            raise unknown_name(self.kind, name, self._items)
        return self._items[name]

    def name_of(self, item: T) -> str:
        """The name under which an object was registered.

        Raises:
            InputError: for one that was not.
        """
        for name, other in self._items.items():
            if other is item:
                return name
        raise InputError(f"This {self.kind} is not registered. Register it with add(name, ...) first.")

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._items))

    def __len__(self) -> int:
        return len(self._items)
