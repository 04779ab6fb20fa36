"""The prior: a generator trained on public images, and its critic. Inversion searches the generator's latent space.

`Prior` is the protocol; a user's own generator fits through `GeneratorPrior`. `GAN` is the project's own small
network, trained by `smi.fit_prior` (see `smi/gan.py`).
"""

from __future__ import annotations

import itertools
from importlib import resources
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from smi.checks import check_images, check_number
from smi.errors import InputError, unknown_name
from smi.files import load_tensors, save_tensors, to_half, to_single

LATENT_DIM = 64
SIZE = 32
MAX_LATENT_DIM = 4096  # a file that claims more is not one of ours, and must not make us build such a layer


@runtime_checkable
class Prior(Protocol):
    """A generator over public images: what inversion needs and nothing more.

    latent_dim: length d of a latent. image_shape: ``(C, H, W)``. Latents are typical under N(0, I).
    """

    latent_dim: int
    image_shape: tuple[int, int, int]

    def generate(self, z: Tensor) -> Tensor:
        """Latents ``[N, d]`` to images float32 ``[N, C, H, W]`` in [0, 1], differentiable."""

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


class Generator(nn.Module):
    """Latent ``[N, d]`` to image ``[N, C, 32, 32]`` in [0, 1]: three doublings by nearest upsampling or transposed
    convolution from 4×4."""

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

    Spectral normalisation (Miyato et al., ICLR 2018) is put on while training, by `smi.gan`, and baked in after.
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

    generator: latents ``[N, latent_dim]`` to images. output_range: the values it puts out; they are mapped to [0, 1].
    Raises `InputError` where one trial batch does not come out as ``[N, C, H, W]`` within that range.
    """

    def __init__(
        self, generator: nn.Module, latent_dim: int, *, output_range: tuple[float, float] = (-1.0, 1.0)
    ) -> None:
        super().__init__()
        check_number("latent_dim", latent_dim, low=1, integer=True)
        self.latent_dim, self.output_range = latent_dim, output_range
        self.generator = generator.eval()
        try:
            with torch.no_grad():
                trial = self.generate(torch.randn(2, latent_dim, generator=torch.Generator().manual_seed(0)))
        except Exception as error:  # whatever a generator raises on an input that is not for it
            raise InputError(
                f"The generator does not take latents of length {latent_dim}: {error}. Allowed: a module from latents "
                "[N, latent_dim] to images. Check latent_dim."
            ) from error
        check_images(trial, f"images from the generator, after mapping {output_range} to [0, 1],")
        self.image_shape = (trial.shape[1], trial.shape[2], trial.shape[3])

    def generate(self, z: Tensor) -> Tensor:
        """Latents ``[N, d]`` to images in [0, 1]."""
        low, high = self.output_range
        return (self.generator(z) - low) / (high - low)

    def criticise(self, images: Tensor) -> None:
        """No critic: inversion then keeps the latent typical and leaves realism to the generator."""
        return


def save_prior(prior: GAN, path: str | Path) -> None:
    """Save a GAN as safetensors (float16 weights: half the size, no visible difference)."""
    meta = {"kind": "prior", "channels": prior.image_shape[0], "latent_dim": prior.latent_dim, "record": prior.record}
    save_tensors(path, to_half(prior.state_dict()), meta)


def load_prior(name: str | Path) -> GAN:
    """The prior that ships under ``name`` ("digits"), or the one saved in a file. Returned in eval mode."""
    if str(name) == "digits":
        with resources.as_file(resources.files("smi") / "assets" / "digits_prior.safetensors") as file:
            return _read(file)
    if not Path(name).exists() and "/" not in str(name) and "." not in str(name):
        raise unknown_name("prior", name, ["digits"])
    return _read(Path(name))


def _read(file: Path) -> GAN:
    tensors, meta = load_tensors(file, "prior")
    channels, latent_dim = meta.get("channels"), meta.get("latent_dim")
    if channels not in (1, 3) or not isinstance(latent_dim, int) or not 1 <= latent_dim <= MAX_LATENT_DIM:
        raise InputError(f"{file} describes no prior of smi: {channels!r} channels, latents of length {latent_dim!r}.")
    prior = blank_gan(channels, latent_dim, meta.get("record"))
    try:
        prior.load_state_dict(to_single(tensors))
    except RuntimeError as error:
        raise InputError(f"{file} does not match this version's GAN. Train the prior again: smi fit-prior.") from error
    return prior.eval()
