"""Classifiers as files: safetensors with the architecture's name beside the weights. Nothing is ever unpickled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from smi.errors import InputError, unknown_name
from smi.models.classifiers import Classifier, architectures, build_classifier
from smi.runtime.files import load_tensors, save_tensors, to_half, to_single

SHIPPED = {"digits-badnets": "digits_victim.safetensors", "digits-judge": "digits_judge.safetensors"}
MAX_CLASSES = 100_000  # a file that claims more is not one of ours, and must not make us build such a layer


@dataclass(frozen=True)
class Card:
    """What a classifier's file says about it.

    Attributes:
        arch: Its name in `architectures`.
        channels: Of its images, 1 or 3.
        num_classes: Number of classes.
        record: How it was made; whoever wrote the file wrote that too.
    """

    arch: str
    channels: int
    num_classes: int
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names of the record where it has one for each class, else the numbers."""
        names = self.record.get("classes")
        if isinstance(names, list) and len(names) == self.num_classes and all(isinstance(n, str) for n in names):
            return tuple(names)
        return tuple(str(label) for label in range(self.num_classes))


def save_classifier(
    model: nn.Module,
    path: str | Path,
    *,
    arch: str,
    record: Mapping[str, Any] | None = None,
    half: bool = False,
) -> None:
    """Save a `Classifier` as safetensors, in float32, or in float16 with ``half`` (for small files that ship).

    Args:
        model: The classifier.
        path: The file.
        arch: The name in `architectures` that its body was built with.
        record: Anything JSON can hold about how it was made; ``"classes"``, a list of names, is used by reports.
        half: Whether the weights are saved in float16.

    Raises:
        InputError: Where the model is not of that architecture or has weights that are not finite (in float16, with
            ``half``).
    """
    if not isinstance(model, Classifier):
        raise InputError(
            f"save_classifier takes a smi.Classifier, not {type(model).__name__}. Wrap it: smi.Classifier."
        )
    state = model.state_dict()
    card = Card(arch, model.mean.shape[1], _outputs(model), dict(record or {}))
    tensors = to_half(state) if half else to_single(state)
    _fill(card, tensors, "The model")
    save_tensors(path, tensors, {"kind": "classifier", **vars(card)})


def load_classifier(name_or_path: str | Path) -> Classifier:
    """The classifier saved in a file, or a shipped one, in eval mode.

    Args:
        name_or_path: A file, or the name of a shipped one: "digits-badnets" carries a backdoor; "digits-judge", trained
            on the same digits without one, is an evaluator's.

    Raises:
        InputError: For a missing, truncated or foreign file, an unknown architecture, and weights that do not fit it or
            are not finite.

    >>> import torch
    >>> load_classifier("digits-badnets")(torch.zeros(1, 1, 32, 32)).shape
    torch.Size([1, 10])
    """
    return read_classifier(name_or_path)[0]


def read_classifier(name_or_path: str | Path) -> tuple[Classifier, Card]:
    """`load_classifier`, with the file's `Card`."""
    name = str(name_or_path)
    if name in SHIPPED:
        with resources.as_file(resources.files("smi") / "assets" / SHIPPED[name]) as file:
            return _read(file)
    if not Path(name).exists() and "/" not in name and "." not in name:
        raise unknown_name("classifier", name, SHIPPED)
    return _read(Path(name))


def is_ours(name_or_path: str | Path) -> bool:
    """Whether this names a classifier that ships, or a file with this project's metadata. Looks at the header alone."""
    name = str(name_or_path)
    if not Path(name).exists():
        return "/" not in name and "." not in name  # meant as a name
    if not Path(name).is_file():  # a pipe would be waited for
        return False
    try:
        with safe_open(name, framework="pt") as content:
            return "smi" in (content.metadata() or {})
    except (SafetensorError, OSError):
        return False


def _read(file: Path) -> tuple[Classifier, Card]:
    tensors, meta = load_tensors(file, "classifier")
    card = _card(meta, file)
    return _fill(card, to_single(tensors), str(file)), card


def _card(meta: Mapping[str, Any], file: Path) -> Card:
    card = Card(*(meta.get(key, 0) for key in ("arch", "channels", "num_classes", "record")))
    counts = type(card.channels) is int and type(card.num_classes) is int
    if not (isinstance(card.arch, str) and counts and isinstance(card.record, dict)):
        raise InputError(f"{file} does not say what classifier it holds. Save it again: smi.save_classifier.")
    if card.channels not in (1, 3) or not 1 <= card.num_classes <= MAX_CLASSES:
        raise InputError(
            f"{file} claims {card.channels} channels and {card.num_classes} classes. Allowed: 1 or 3 channels."
        )
    return card


def _fill(card: Card, tensors: Mapping[str, Tensor], what: str) -> Classifier:
    """A classifier as the card says with these weights, in eval mode; `InputError` where that cannot be."""
    if card.arch not in architectures:
        raise unknown_name("architecture", card.arch, architectures)
    for name, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise InputError(f"{what} has NaN or infinite values in {name!r}. Use an intact checkpoint.")
    model = build_classifier(card.arch, card.channels, card.num_classes)
    try:
        model.load_state_dict(dict(tensors))
    except RuntimeError as error:
        raise InputError(f"{what} does not have the weights of a {card.arch!r}. Check the architecture.") from error
    if not (model.std > 0).all():
        raise InputError(f"{what} normalises by a standard deviation that is not above zero. Save it again.")
    return model.eval()


def _outputs(model: nn.Module) -> int:
    linear = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    if not linear:
        raise InputError("The model has no linear layer, so it is of no architecture that can be saved.")
    return linear[-1].out_features
