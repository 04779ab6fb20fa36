"""A model from a stranger: its weights from a checkpoint, its architecture by name, its idea of pixels by what is said.

`load_suspect` gives a classifier of images in [0, 1], and keeps what is needed to write a repaired one back in the
layout that it came in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smi.errors import InputError, unknown_name
from smi.models.checkpoints import Checkpoint, read_checkpoint
from smi.models.classifiers import Classifier, architectures
from smi.models.own_code import own_function
from smi.models.store import MAX_CLASSES, is_ours, read_classifier, save_classifier

Factory = Callable[[int, int], nn.Module]
"""Channels and classes to a body: normalised images to logits."""

PROBE = 977  # a number of classes that no layer of an architecture has by chance
COUNTERS = "num_batches_tracked"  # of BatchNorm: not needed, and old checkpoints have none


class Adapted(nn.Module):
    """A classifier behind what its images need: resizing, channels in the other order, grey as three channels.

    Attributes:
        classifier: What runs in the end.
        size: (H, W) that ``classifier`` takes; images of another size are resized. None: they stay as they are.
        bgr: It takes blue first.
        grey: It takes grey images with their one channel three times.
    """

    def __init__(self, classifier: nn.Module, size: tuple[int, int] | None, *, bgr: bool, grey: bool) -> None:
        super().__init__()
        self.classifier, self.size, self.bgr, self.grey = classifier, size, bgr, grey

    def extra_repr(self) -> str:
        """What it does."""
        return f"size={self.size}, bgr={self.bgr}, grey={self.grey}"

    def forward(self, images: Tensor) -> Tensor:
        """Images ``[N, C, H, W]`` in [0, 1], red first or grey, to logits ``[N, classes]``."""
        if self.grey:
            if images.shape[1] != 1:
                raise InputError(f"The images have {images.shape[1]} channels, the classifier takes grey ones.")
            images = images.expand(-1, 3, -1, -1)
        if self.size is not None and images.shape[2:] != self.size:
            images = F.interpolate(images, self.size, mode="bilinear", align_corners=False, antialias=True)
        return self.classifier(images.flip(1) if self.bgr else images)


@dataclass(frozen=True, eq=False)
class Suspect:
    """A loaded model, and how to save a repaired one.

    Attributes:
        model: Images ``[N, C, H, W]`` in [0, 1] to logits, in eval mode.
        arch: Name of the architecture, as `load_suspect` takes it.
        channels: That the model takes, 1 or 3.
        classes: Names in the order of the labels.
        suffix: Of a file in the layout that it came in.
    """

    model: nn.Module
    arch: str
    channels: int
    classes: tuple[str, ...]
    suffix: str
    _write: Callable[[nn.Module, Path, Mapping[str, Any]], None] = field(repr=False)

    @property
    def size(self) -> int:
        """Bytes of its weights."""
        return sum(value.numel() * value.element_size() for value in self.model.state_dict().values())

    def to(self, device: str | torch.device) -> Suspect:
        """The suspect with its model on ``device``."""
        self.model.to(device)
        return self

    def write(self, repaired: nn.Module, path: str | Path, record: Mapping[str, Any]) -> None:
        """Save a repaired copy of ``model`` in the layout that it came in, atomically.

        Args:
            repaired: The copy.
            path: The file.
            record: How it was repaired; kept where the layout has a place for it, which a stranger's has not.
        """
        self._write(repaired, Path(path), record)


def load_suspect(
    path: str | Path,
    *,
    arch: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    classes: Sequence[str] | None = None,
    size: tuple[int, int] | None = None,
    bgr: bool = False,
    grey: bool = False,
) -> Suspect:
    """Load a classifier from a file that nobody vouches for; nothing in the file is run.

    Args:
        path: A file or a name that `smi.load_classifier` takes (everything else is then known), or a state dict in
            safetensors or by ``torch.save``, at the top or under the usual keys, with any common prefix, or a
            ``torch.export`` program, of which the weights are read and the program is not.
        arch: One of this project's architectures or torchvision's; "timm/NAME" (needs timm); "FILE.py:factory", which
            **runs that file**. The number of classes is read off the weights.
        mean: Of the normalisation that the model was trained behind, one value or one a channel, in units of [0, 1]
            pixels; 0 where it saw pixels in [0, 1]. It has to be said: a wrong guess would look like a bad model.
        std: The same; 1 where it saw pixels in [0, 1].
        classes: Names. Default: the numbers, or what the file says.
        size: (H, W) to which images are resized.
        bgr: The model takes blue first.
        grey: It takes grey images, as three equal channels.

    Raises:
        InputError: For what does not fit.

    >>> import os, tempfile
    >>> from smi.models.classifiers import small_cnn
    >>> file = os.path.join(tempfile.mkdtemp(), "theirs.pth")
    >>> state = small_cnn(3, 10).state_dict()
    >>> torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, file)
    >>> suspect = load_suspect(file, arch="small_cnn", mean=[0.5], std=[0.25])
    >>> suspect.channels, len(suspect.classes), suspect.suffix
    (3, 10, '.pth')
    """
    if is_ours(path):
        if arch or mean or std or size or bgr or grey:
            raise InputError(f"{path} says itself what model it holds. Leave out all but classes.")
        return _ours(path, classes)
    checkpoint = read_checkpoint(path)
    if arch is None:
        raise InputError(
            f"{path} holds weights and does not say of what. Say the architecture: {', '.join(architectures)}, a name "
            "of torchvision, timm/NAME, or FILE.py:factory for your own."
        )
    if mean is None or std is None:
        raise InputError(
            f"{path} does not say how the images were normalised. Say mean and std: one value a channel in units of "
            "[0, 1] pixels, or 0 and 1 where the model saw the pixels as they are."
        )
    body, channels, count, names = _fit(checkpoint, arch, size)
    classifier = Classifier(body, _per_channel(mean, channels, "mean"), _per_channel(std, channels, "std"))
    if grey and channels != 3:
        raise InputError(f"The model takes {channels} channel, so grey images are what it takes. Leave out grey.")
    adapted = size is not None or bgr or grey
    model: nn.Module = Adapted(classifier, size, bgr=bgr, grey=grey) if adapted else classifier

    def write(repaired: nn.Module, target: Path, record: Mapping[str, Any]) -> None:
        found = repaired.classifier if isinstance(repaired, Adapted) else repaired
        state = found.get_submodule("body").state_dict()
        checkpoint.write(target, {theirs: state[ours] for ours, theirs in names.items()})

    return Suspect(
        model.eval(), arch, 1 if grey else channels, _names(classes, count, path), checkpoint.file.suffix, write
    )


def _ours(path: str | Path, classes: Sequence[str] | None) -> Suspect:
    model, card = read_classifier(path)
    names = card.classes if classes is None else _names(classes, card.num_classes, path)

    def write(repaired: nn.Module, target: Path, record: Mapping[str, Any]) -> None:
        save_classifier(repaired, target, arch=card.arch, record=record)

    return Suspect(model, card.arch, card.channels, names, ".safetensors", write)


def _fit(checkpoint: Checkpoint, arch: str, size: tuple[int, int] | None) -> tuple[nn.Module, int, int, dict[str, str]]:
    """The body with the checkpoint's weights, its channels and classes, and its tensors' names in the checkpoint."""
    reason = ""
    for factory in _factories(arch):
        for channels in (3, 1):
            found = _matches(factory, channels, checkpoint)
            if isinstance(found, str):
                reason = reason or found
                continue
            count, names = found
            body = _build(factory, channels, count)
            state = {ours: checkpoint.tensors[theirs] for ours, theirs in names.items()}
            body.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()}, strict=False)
            first = next((value.shape[1] for value in body.state_dict().values() if value.ndim == 4), channels)
            if first not in (1, 3):
                raise InputError(f"{arch!r} takes {first} channels. Allowed: grey or colour images, 1 or 3 channels.")
            return body.eval(), first, _outputs(body, first, size) if count == PROBE else count, names
    raise InputError(f"{checkpoint.file} does not hold the weights of {arch!r}: {reason}. Check the architecture.")


def _matches(factory: Factory, channels: int, checkpoint: Checkpoint) -> tuple[int, dict[str, str]] | str:
    """The class count and the model's names to the checkpoint's, or why they do not belong together."""
    expected = {name: value.shape for name, value in _skeleton(factory, channels).state_dict().items()}
    tensors, names = checkpoint.tensors, checkpoint.names_for(expected)
    missing = [name for name in expected if name not in names and not name.endswith(COUNTERS)]
    more = sorted(tensors.keys() - names.values())
    if missing:
        return f"there is no {missing[0]!r}" + (f", but {more[0]!r}" if more else "")
    if more:
        return f"the architecture has no {more[0]!r}"
    count = PROBE
    for ours, theirs in names.items():
        wanted, held = expected[ours], tensors[theirs].shape
        if wanted == held:
            continue
        if len(wanted) != len(held) or wanted[1:] != held[1:] or wanted[0] != PROBE or count not in (PROBE, held[0]):
            return f"{theirs!r} has the shape {tuple(held)} where it has {tuple(wanted)}".replace(str(PROBE), "classes")
        count = held[0]
    if not 2 <= count <= MAX_CLASSES:
        return f"it would have {count} classes, and a classifier has at least 2"
    return count, names


@torch.no_grad()
def _outputs(body: nn.Module, channels: int, size: tuple[int, int] | None) -> int:
    """The classes of a body whose function does not take their number: what it gives for an image of some size."""
    reason = ""
    for shape in [size] if size else [(32, 32), (64, 64), (224, 224), (28, 28)]:
        try:
            given = body(torch.zeros(1, channels, *shape))
        except Exception as error:
            reason = reason or str(error).partition("\n")[0]
            continue
        if isinstance(given, Tensor) and given.ndim == 2 and given.shape[1] >= 2:
            return given.shape[1]
        raise InputError("The model does not return logits [N, classes], or for a single class. It is no classifier.")
    raise InputError(f"The model accepts no image of any usual size: {reason}. Say the size.")


def _factories(arch: str) -> Iterator[Factory]:
    """What ``arch`` may mean, in this order: a file's function, timm's, this project's, torchvision's."""
    if ".py:" in arch:
        yield _from_file(arch)
        return
    if arch.startswith("timm/"):
        yield _from_timm(arch.removeprefix("timm/"))
        return
    from torchvision import models

    name = arch.removeprefix("torchvision/")
    theirs = models.list_models(module=models)
    if name not in theirs and arch not in architectures:
        raise unknown_name("architecture", arch, [*architectures, *theirs])
    if arch in architectures:
        yield architectures[arch]
    if name in theirs:
        yield lambda channels, count: models.get_model(name, weights=None, num_classes=count)


def _from_timm(name: str) -> Factory:
    try:
        import timm
    except ImportError as error:
        raise InputError("Architectures of timm need the package: pip install timm.") from error
    if not timm.is_model(name):
        raise unknown_name("timm architecture", name, timm.list_models())
    return lambda channels, count: timm.create_model(name, pretrained=False, num_classes=count, in_chans=channels)


def _from_file(arch: str) -> Factory:
    """The function of the user's own file, called with the class count and channels where it takes them."""
    make = own_function(arch)
    return lambda channels, count: make(num_classes=count, channels=channels, in_channels=channels)


def _skeleton(factory: Factory, channels: int) -> nn.Module:
    """A body without memory for its weights where it can be had."""
    try:
        with torch.device("meta"):
            return _build(factory, channels, PROBE)
    except InputError:  # a constructor that looks at values
        return _build(factory, channels, PROBE)


def _build(factory: Factory, channels: int, count: int) -> nn.Module:
    """A new body; whatever it draws at random leaves the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        try:
            body = factory(channels, count)
        except Exception as error:
            raise InputError(f"The architecture cannot be built: {type(error).__name__}: {error}.") from error
    if not isinstance(body, nn.Module):
        raise InputError(f"The architecture's function returns a {type(body).__name__}. Allowed: a torch.nn.Module.")
    return body


def _per_channel(values: Sequence[float], channels: int, what: str) -> list[float]:
    if len(values) not in (1, channels):
        raise InputError(f"{what} has {len(values)} values, the model {channels} channels. Give one, or one each.")
    return list(values) * (channels // len(values))


def _names(classes: Sequence[str] | None, count: int, path: str | Path) -> tuple[str, ...]:
    if classes is None:
        return tuple(str(label) for label in range(count))
    if len(classes) != count:
        raise InputError(f"There are {len(classes)} class names, but {path} has {count} classes.")
    return tuple(classes)
