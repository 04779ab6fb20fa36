"""The one exception for bad input: it says what was wrong, what is allowed and what to try."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something the caller passed cannot be used.

    The message has up to three sentences: what was wrong, what is allowed, what to try. The command line turns it
    into exit code 2; in Python it is an ordinary ``ValueError``.
    """


def unknown_name(kind: str, name: object, allowed: Iterable[str]) -> InputError:
    """An error for a name that is not registered, with the nearest names first.

    >>> print(unknown_name("attack", "badnet", ["badnets", "sig"]))
    Unknown attack 'badnet'. Allowed: badnets, sig. Did you mean 'badnets'?
    """
    names = sorted(allowed)
    near = difflib.get_close_matches(str(name).lower(), names, n=3, cutoff=0.5)
    hint = " Did you mean " + " or ".join(f"'{n}'" for n in near) + "?" if near else ""
    return InputError(f"Unknown {kind} {name!r}. Allowed: {', '.join(names)}.{hint}")
