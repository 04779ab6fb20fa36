"""The prior: a generator trained on public images, and its critic. Inversion searches the generator's latent space.

`Prior` is the protocol; a user's own generator fits through `GeneratorPrior`. `GAN` is the project's own small
network, trained by `smi.fit_prior` (see `smi/priors/gan.py`).
"""

from __future__ import annotations

import itertools
import math
import warnings
from importlib import resources
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from smi.domains.base import fitted
from smi.errors import InputError, unknown_name
from smi.models.checkpoints import read_checkpoint
from smi.models.own_code import own_function
from smi.runtime.checks import check_number, device_of, evaluating
from smi.runtime.files import load_tensors, save_tensors, to_half, to_single

LATENT_DIM = 64
SIZE = 32
TOLERANCE = 0.01  # of the output range, by which a generator may overshoot it
MAX_LATENT_DIM = 4096  # a file that claims more is not one of ours, and must not make us build such a layer


@runtime_checkable
class Prior(Protocol):
    """A generator over public images: what inversion needs and nothing more.

    Latents are typical under N(0, I).

    Attributes:
        latent_dim: Length d of a latent.
        image_shape: ``(C, H, W)``.
    """

    latent_dim: int
    image_shape: tuple[int, int, int]

    def generate(self, z: Tensor) -> Tensor:
        """Latents ``[N, d]`` to images float32 ``[N, C, H, W]`` in [0, 1], differentiable.

        Latents are where the model is; a prior that is a Module is moved there.
        """

    def criticise(self, images: Tensor) -> Tensor | None:
        """Realism ``[N]`` (higher is more like the public images), differentiable; None without a critic."""


def check_prior(prior: object) -> None:
    """``prior`` must satisfy `Prior`."""
    if not isinstance(prior, Prior):
        raise InputError(
            f"{type(prior).__name__} is no prior. Wrap your generator: smi.GeneratorPrior(net, latent_dim)."
        )


def sample_latents(prior: Prior, n: int, rng: torch.Generator) -> Tensor:
    """``[n, d]`` standard normal latents."""
    return torch.randn(n, prior.latent_dim, generator=rng)


@torch.no_grad()
def random_images(prior: Prior, n: int, rng: torch.Generator) -> Tensor:
    """``[n, C, H, W]`` in [0, 1] for random latents, on the CPU."""
    parts = sample_latents(prior, n, rng).split(256)
    module = prior if isinstance(prior, nn.Module) else nn.Module()
    with evaluating(module):
        return torch.cat([prior.generate(z.to(device_of(module))).float().cpu() for z in parts]).clamp(0, 1)


class Generator(nn.Module):
    """Latent ``[N, d]`` to image ``[N, C, 32, 32]`` in [0, 1]: three doublings by transposed convolution from 4×4."""

    def __init__(
        self, channels: int, latent_dim: int = LATENT_DIM, widths: tuple[int, ...] = (128, 80, 48, 24)
    ) -> None:
        super().__init__()
        self.widths = widths
        self.stem = nn.Sequential(nn.Linear(latent_dim, widths[0] * 16, bias=False), nn.BatchNorm1d(widths[0] * 16))
        blocks: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            blocks += [
                nn.ReLU(),
                nn.ConvTranspose2d(inputs, outputs, 4, 2, 1, bias=False),
                nn.BatchNorm2d(outputs),
            ]
        self.blocks = nn.Sequential(*blocks, nn.ReLU(), nn.Conv2d(widths[-1], channels, 3, 1, 1))

    def forward(self, z: Tensor) -> Tensor:
        """Latents to images."""
        return torch.sigmoid(self.blocks(self.stem(z).view(len(z), self.widths[0], 4, 4)))


class Critic(nn.Module):
    """Image to realism ``[N]``: three strided convolutions and a linear map.

    Spectral normalisation (Miyato et al., ICLR 2018) is put on while training, by `smi.priors.gan`, and baked in after.
    """

    def __init__(self, channels: int, widths: tuple[int, ...] = (32, 64, 128)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in zip((channels, *widths), widths, strict=False):
            layers += [nn.Conv2d(inputs, outputs, 4, 2, 1), nn.LeakyReLU(0.1)]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * 16, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Images in [0, 1] to realism ``[N]``."""
        return self.body(images * 2 - 1)[:, 0]


class GAN(nn.Module):
    """The project's own prior: `Generator` and `Critic`, 32×32, 1 or 3 channels. Satisfies `Prior`."""

    def __init__(self, channels: int, latent_dim: int = LATENT_DIM, record: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.image_shape = (channels, SIZE, SIZE)
        self.record = record or {}
        self.generator = Generator(channels, latent_dim)
        self.critic = Critic(channels)

    def generate(self, z: Tensor) -> Tensor:
        """Latents ``[N, d]`` to images."""
        return self.generator(z)

    def criticise(self, images: Tensor) -> Tensor:
        """Realism ``[N]``."""
        return self.critic(images)

    def __repr__(self) -> str:
        return f"GAN(latent_dim={self.latent_dim}, image_shape={self.image_shape})"


def blank_gan(channels: int, latent_dim: int = LATENT_DIM, record: dict[str, Any] | None = None) -> GAN:
    """A GAN whose weights are to be replaced. Unlike the constructor it leaves the global random generator alone."""
    with torch.random.fork_rng(devices=[]):
        return GAN(channels, latent_dim, record)


class GeneratorPrior(nn.Module):
    """A user's own pre-trained generator as a `Prior`.

    Attributes:
        generator: Latents ``[N, latent_dim]``, or ``[N, latent_dim, 1, 1]`` as in DCGAN, to images.
        latent_dim: Length of a latent.
        output_range: The values it puts out; they are mapped to [0, 1].
        image_shape: ``(C, H, W)`` to which its images are brought, resized and grey or in colour. Default: as they are.
        record: The generator's type, for records.

    Raises:
        InputError: Where one trial batch does not come out as ``[N, C, H, W]`` within that range. There is a warning
            where it keeps to the upper half of it.

    >>> dcgan = nn.Sequential(nn.ConvTranspose2d(100, 3, 32), nn.Tanh())
    >>> GeneratorPrior(dcgan, latent_dim=100).generate(torch.zeros(2, 100)).shape
    torch.Size([2, 3, 32, 32])
    """

    record: dict[str, Any]

    def __init__(
        self,
        generator: nn.Module,
        latent_dim: int,
        *,
        output_range: tuple[float, float] = (-1.0, 1.0),
        image_shape: tuple[int, int, int] | None = None,
    ) -> None:
        super().__init__()
        check_number("latent_dim", latent_dim, low=1, integer=True)
        low, high = output_range
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise InputError(f"output_range is {output_range}. Allowed: two finite numbers, the lower one first.")
        self.latent_dim, self.output_range = latent_dim, output_range
        self.generator, self.record = generator.eval(), {"generator": type(generator).__name__}
        self._flat = True
        latents = torch.randn(16, latent_dim, generator=torch.Generator().manual_seed(0))
        trial = self._try(latents.to(device_of(generator)))
        if trial.ndim != 4 or trial.shape[1] not in (1, 3) or not trial.is_floating_point() or not trial.numel():
            kind, shape = str(trial.dtype).removeprefix("torch."), tuple(trial.shape)
            raise InputError(f"The generator puts out {kind} of shape {shape}. Allowed: floats [N, C, H, W], C 1 or 3.")
        smallest, largest = (value.item() for value in trial.aminmax())
        told, slack = f"values from {smallest:.3g} to {largest:.3g}", TOLERANCE * (high - low)
        if not (low - slack <= smallest and largest <= high + slack):  # NaN, too
            raise InputError(
                f"The generator puts out {told}, outside of its output range {low:g} to {high:g}. Say the range that "
                "it was trained for."
            )
        if smallest > (low + high) / 2 - slack:
            warnings.warn(f"The generator puts out {told}. Is its range really {low:g} to {high:g}?", stacklevel=2)
        self.image_shape = image_shape or (trial.shape[1], trial.shape[2], trial.shape[3])

    def extra_repr(self) -> str:
        """Its settings."""
        return f"latent_dim={self.latent_dim}, output_range={self.output_range}, image_shape={self.image_shape}"

    def as_channels(self, channels: int) -> GeneratorPrior:
        """The same prior with images of ``channels`` channels."""
        self.image_shape = (channels, *self.image_shape[1:])
        return self

    def _try(self, z: Tensor) -> Tensor:
        """Raw images of a trial batch, the latents in whichever form the generator takes."""
        reason: Exception | None = None
        for self._flat in (True, False):
            try:
                with torch.no_grad():
                    trial = self._raw(z)
            except Exception as error:  # whatever a generator raises on an input that is not for it
                reason = reason or error
                continue
            if not isinstance(trial, Tensor):
                raise InputError(f"The generator returns a {type(trial).__name__}. Allowed: a tensor of images.")
            return trial
        raise InputError(
            f"The generator does not take latents of length {self.latent_dim}: {reason}. Allowed: a module from "
            "latents [N, latent_dim] to images. Check latent_dim."
        ) from reason

    def _raw(self, z: Tensor) -> Tensor:
        return self.generator(z if self._flat else z[:, :, None, None])

    def generate(self, z: Tensor) -> Tensor:
        """Latents ``[N, d]`` to images in [0, 1]."""
        low, high = self.output_range
        return fitted(((self._raw(z).float() - low) / (high - low)).clamp(0, 1), self.image_shape)

    def criticise(self, images: Tensor) -> None:
        """No critic: inversion then keeps the latent typical and leaves realism to the generator."""
        return


def load_generator(
    path: str | Path,
    architecture: str,
    latent_dim: int,
    *,
    output_range: tuple[float, float] = (-1.0, 1.0),
    image_shape: tuple[int, int, int] | None = None,
) -> GeneratorPrior:
    """A generator's weights from a file that nobody vouches for, as a prior; nothing in the file is run.

    Args:
        path: A state dict, as `smi.load_suspect` takes it.
        architecture: "FILE.py:function", a function of your own that makes the module, which **runs that file**; it is
            called with ``latent_dim`` where it takes that.
        latent_dim: As for `GeneratorPrior`.
        output_range: As for `GeneratorPrior`.
        image_shape: As for `GeneratorPrior`.

    Raises:
        InputError: For what does not fit.
    """
    checkpoint = read_checkpoint(path)
    with torch.random.fork_rng(devices=[]):
        try:
            module = own_function(architecture)(latent_dim=latent_dim)
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"The generator cannot be built: {type(error).__name__}: {error}.") from error
    if not isinstance(module, nn.Module):
        raise InputError(f"{architecture} returns a {type(module).__name__}. Allowed: a torch.nn.Module.")
    names = checkpoint.names_for(module.state_dict())
    state = {ours: checkpoint.tensors[theirs] for ours, theirs in names.items()}
    if more := sorted(checkpoint.tensors.keys() - names.values()):
        raise InputError(f"{path} does not hold the weights of {architecture}: that has no {more[0]!r}.")
    try:
        module.load_state_dict(to_single(state))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{path} does not hold the weights of {architecture}: {reason}.") from error
    return GeneratorPrior(module, latent_dim, output_range=output_range, image_shape=image_shape)


def save_prior(prior: GAN, path: str | Path) -> None:
    """Save a GAN as safetensors (float16 weights: half the size, no visible difference)."""
    meta = {"kind": "prior", "channels": prior.image_shape[0], "latent_dim": prior.latent_dim, "record": prior.record}
    save_tensors(path, to_half(prior.state_dict()), meta)


def load_prior(name: str | Path) -> GAN:
    """The prior that ships under ``name`` ("digits"), or the one saved in a file. Returned in eval mode.

    >>> load_prior("digits")
    GAN(latent_dim=64, image_shape=(1, 32, 32))
    """
    if str(name) == "digits":
        with resources.as_file(resources.files("smi") / "assets" / "digits_prior.safetensors") as file:
            return _read(file)
    if not Path(name).exists() and "/" not in str(name) and "." not in str(name):
        raise unknown_name("prior", name, ["digits"])
    return _read(Path(name))


def _read(file: Path) -> GAN:
    try:
        tensors, meta = load_tensors(file, "prior")
    except InputError as error:
        raise InputError(f"{error} A generator of your own: smi.load_generator, or --generator.") from error
    channels, latent_dim = meta.get("channels"), meta.get("latent_dim")
    if channels not in (1, 3) or not isinstance(latent_dim, int) or not 1 <= latent_dim <= MAX_LATENT_DIM:
        raise InputError(f"{file} describes no prior of smi: {channels!r} channels, latents of length {latent_dim!r}.")
    prior = blank_gan(channels, latent_dim, meta.get("record"))
    try:
        prior.load_state_dict(to_single(tensors))
    except RuntimeError as error:
        raise InputError(f"{file} does not match this version's GAN. Train the prior again: smi fit-prior.") from error
    return prior.eval()
