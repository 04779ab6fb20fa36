"""Training the prior: a spectrally normalised GAN with differentiable augmentation, on public images alone.

Hinge loss (Lim & Ye, 2017) and spectral normalisation (Miyato et al., ICLR 2018); augmentation of real and generated
images alike (Zhao et al., NeurIPS 2020), which is what makes two thousand images enough; the generator that is kept is
an exponential moving average.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from smi.domains.augment import gan_augment, random_affine
from smi.domains.base import PublicImages
from smi.errors import InputError
from smi.priors.base import GAN, SIZE, Critic, blank_gan
from smi.runtime.checks import check_number, evaluating
from smi.runtime.compute import fast, versions
from smi.runtime.files import fingerprint
from smi.runtime.precision import asked_precision
from smi.runtime.progress import track
from smi.runtime.seeding import derive, stream
from smi.runtime.threads import threads_of
from smi.runtime.unfinished import EVERY, Tensors, Unfinished, named, optimizer_state, part, restore_optimizer


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """How a prior is trained.

    The public images go through small random maps (``degrees``, ``shift``, ``zoom``, ``flip``), which widen a small
    public set.

    Attributes:
        steps: Generator steps.
        batch_size: Images a step, real ones and as many generated ones.
        lr: Learning rate of generator and critic.
        ema: Decay of the averaged generator.
        degrees: Largest rotation, to either side.
        shift: Largest shift, in pixels.
        zoom: Largest relative change of size.
        flip: Whether images are mirrored at random; mirror only what stays itself when mirrored.
    """

    steps: int = 4000
    batch_size: int = 64
    lr: float = 4e-4
    ema: float = 0.995
    degrees: float = 10.0
    shift: float = 2.0
    zoom: float = 0.12
    flip: bool = False

    def __post_init__(self) -> None:
        check_number("steps", self.steps, low=1, integer=True)
        check_number("batch_size", self.batch_size, low=4, integer=True)
        check_number("ema", self.ema, low=0, high=0.99999)
        for name in ("lr", "degrees", "shift", "zoom"):
            check_number(name, getattr(self, name), low=0)


class _Training:
    """The state of a run: everything that a checkpoint must hold for a resumed run to end with the same bits."""

    def __init__(self, public: PublicImages, config: PriorConfig, seed: int, device: str | torch.device) -> None:
        self.images, self.config, self.device = public.images, config, device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, "prior"))
            self.live = GAN(public.images.shape[1])
            for layer in _layers(self.live.critic):
                spectral_norm(layer)
        self.live.to(device).generator.to(memory_format=torch.channels_last)  # 1.5 times as fast
        self.average = copy.deepcopy(self.live.generator)
        self.g_opt = torch.optim.Adam(self.live.generator.parameters(), config.lr, betas=(0.0, 0.99))
        self.d_opt = torch.optim.Adam(self.live.critic.parameters(), config.lr, betas=(0.0, 0.99))
        self.rng = stream(seed, "prior")
        self.step = 0

    def advance(self) -> None:
        """One critic step and one generator step."""
        gan, n = self.live, self.config.batch_size
        real = self._real(n)
        with fast(gan.generator) as generate, fast(gan.critic) as criticise:
            fake = generate(torch.randn(n, gan.latent_dim, generator=self.rng).to(self.device))
            both = torch.cat([gan_augment(real, self.rng), gan_augment(fake.detach(), self.rng)])
            on_real, on_fake = criticise(both).split(n)
            self._update(self.d_opt, torch.relu(1 - on_real).mean() + torch.relu(1 + on_fake).mean())
            self._update(self.g_opt, -criticise(gan_augment(fake, self.rng)).mean())
        with torch.no_grad():
            decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
            for kept, new in zip(self.average.state_dict().values(), gan.generator.state_dict().values(), strict=True):
                kept.lerp_(new, 1 - decay) if kept.is_floating_point() else kept.copy_(new)
        self.step += 1

    def _real(self, n: int) -> Tensor:
        chosen = self.images[torch.randint(len(self.images), (n,), generator=self.rng)].to(self.device)
        c = self.config
        # Photographs go on beyond their border: zeros there would teach the prior black frames.
        return random_affine(
            chosen, self.rng, degrees=c.degrees, shift=c.shift, zoom=c.zoom, flip=c.flip, outside="reflection"
        )

    @staticmethod
    def _update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def finished(self, record: dict[str, Any]) -> GAN:
        """The averaged generator and the critic with its normalisation baked in, in eval mode."""
        gan = blank_gan(self.images.shape[1], record=record)
        gan.generator.load_state_dict({name: value.cpu() for name, value in self.average.state_dict().items()})
        # In eval mode reading a weight does not move its power iteration.
        with evaluating(self.live.critic), torch.no_grad():
            for kept, live in zip(_layers(gan.critic), _layers(self.live.critic), strict=True):
                kept.load_state_dict({"weight": live.weight.cpu(), "bias": live.bias.cpu()})
        return gan.eval()

    def state(self) -> Tensors:
        """Every tensor of the state, by name."""
        found = named("live", self.live.state_dict()) | named("average", self.average.state_dict())
        found |= named("g_opt", optimizer_state(self.g_opt)) | named("d_opt", optimizer_state(self.d_opt))
        return found | {"rng": self.rng.get_state(), "step": torch.tensor(self.step)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state` gave."""
        self.live.load_state_dict(part("live", state))
        self.average.load_state_dict(part("average", state))
        restore_optimizer(self.g_opt, part("g_opt", state))
        restore_optimizer(self.d_opt, part("d_opt", state))
        self.rng.set_state(state["rng"])
        self.step = int(state["step"])


def _layers(critic: Critic) -> list[nn.Module]:
    """The layers that are spectrally normalised."""
    return [layer for layer in critic.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]


def fit_prior(
    public: PublicImages,
    config: PriorConfig = PriorConfig(),
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    checkpoint: str | Path | None = None,
    every: float = EVERY,
) -> GAN:
    """Train a generator and critic on public images.

    Args:
        public: 32×32, 1 or 3 channels.
        config: Default: `PriorConfig`.
        seed: Of everything random.
        device: Where it is trained.
        checkpoint: A file for the state, written atomically every ``every`` seconds. Where it exists already, training
            goes on from it and ends with the same weights as an uninterrupted run. Ctrl-C and SIGTERM end it after a
            last such writing.
        every: Seconds between two writings.

    Returns:
        The prior on the CPU, in eval mode.

    Raises:
        InputError: Where the images do not fit, or the state is of other images, another configuration, precision or
            seed.

    >>> import torch
    >>> public = PublicImages(torch.rand(64, 1, 32, 32))
    >>> prior = fit_prior(public, PriorConfig(steps=1))  # thousands, for images that resemble something
    >>> prior.generate(torch.randn(2, prior.latent_dim)).shape
    torch.Size([2, 1, 32, 32])
    """
    if not isinstance(public, PublicImages):
        raise InputError(f"fit_prior takes PublicImages, not {type(public).__name__}. Wrap them: PublicImages(images).")
    if public.images.shape[2:] != (SIZE, SIZE):
        raise InputError(
            f"The GAN works at {SIZE}×{SIZE}; these images are {tuple(public.images.shape[2:])}. Resize them."
        )
    record = {"config": asdict(config), "seed": seed, "public": fingerprint(public.images), "images": len(public)}
    record["precision"] = asked_precision()
    run = _Training(public, config, seed, device)
    unfinished = Unfinished(checkpoint, "prior", record, every=every)
    if unfinished.tensors:
        run.restore(unfinished.tensors)
    with unfinished.working() as after_step:
        for _ in track(range(run.step, config.steps), "training the prior", before=run.step, total=config.steps):
            run.advance()
            after_step(run.state)
    unfinished.save(run.state())
    return run.finished(record | {"versions": versions(), "threads": threads_of(run.live.generator)})
