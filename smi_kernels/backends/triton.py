"""Scores by fused Triton kernels: K perturbed copies of the network run at once.

For each group of draws, layer by layer: `perturb_weight` writes the group's weights of one layer, BatchNorm folded,
into a scratch that the next layer uses again, and one convolution or product with the draws in its grid applies them,
with bias, residual and activation. So never more than one layer's weights of one group exist, whatever K is.
Rademacher noise needs no scratch where its signs are expanded inside the product, unless writing the weights was
measured to be faster. Then one kernel makes scores of logits.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smi_kernels import ops  # noqa: F401  registers torch.ops.smi_kernels
from smi_kernels.backends.loop import score_draws
from smi_kernels.backends.torch import Runner, plan_or_warn
from smi_kernels.divergences import divergences
from smi_kernels.epilogues import Epilogue, epilogues
from smi_kernels.graph.folding import fold
from smi_kernels.graph.layers import zero_padding
from smi_kernels.graph.plan import Call, Layer, Plan, plan_of, reads_of
from smi_kernels.graph.tracing import NotTraceable
from smi_kernels.noise import INDEPENDENT, PARAMETERS, families
from smi_kernels.ops.launch import interpreting
from smi_kernels.ops.perturbed_conv.shape import ConvShape, Geometry, conv_shape, geometry
from smi_kernels.precision import plain
from smi_kernels.request import Request, check_logits
from smi_kernels.tune.choices import fits_kernel, prefers_library, prefers_scratch

SCRATCH = 32 << 20
"""Bytes of one layer's weights of a group of draws: what stays in the second-level cache of a large GPU."""

ACTIVATIONS = 2 << 30
"""Bytes of activations of a group of draws, about: a few of the largest values live at once."""


MOST_DRAWS = 1 << 15
"""Draws of a group at most: a grid of CUDA has 65535 programs along its third axis."""


def supports(model: nn.Module, request: Request) -> bool:
    """Models with a plan, on CUDA (or in the interpreter), in 32 bits at most, with noise that has Triton twins."""
    if not _runs_triton(request.images.device) or request.dtype == torch.float64:
        return False
    twins = (request.family.kernel, request.input_family.kernel, request.divergence.kernel)
    if None in twins or request.input_family.structure != INDEPENDENT:
        return False
    try:
        plan_of(model, request.images)
    except NotTraceable:
        return False
    return True


def _runs_triton(device: torch.device) -> bool:
    """Whether Triton is installed (it is for Linux alone) and compiles for the device: from compute capability 8.0."""
    if importlib.util.find_spec("triton") is None:
        return False
    return interpreting() or (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0))


def scores(model: nn.Module, request: Request) -> Tensor:
    """Scores ``[N]``, or ``[N, K]`` if the request wants no reduction; the gradient is computed in torch."""
    plan = plan_or_warn(model, request)
    assert plan is not None
    runner = _KernelRunner(model, plan, request)
    if request.images.requires_grad and torch.is_grad_enabled():
        return score_draws(runner.torch, request, lambda: runner.scores("none"))
    with torch.no_grad():
        return runner.scores(request.reduce)


@dataclass(frozen=True)
class _Job:
    """One layer of a group of draws, ready to be multiplied."""

    step: Layer
    module: nn.Module
    x: Tensor
    residual: Tensor | None
    scale: Tensor | None
    bias: Tensor | None
    first: int
    draws: int
    shared: bool
    out_dtype: torch.dtype
    epilogue: str
    moves: bool


class _NotBatchFirst(Exception):
    """A value's first dimension is not the images': draws cannot be run as further images."""


class _KernelRunner:
    def __init__(self, model: nn.Module, plan: Plan, request: Request) -> None:
        self.torch = Runner(model, plan, request)
        self.plan, self.request, self.modules = plan, request, self.torch.modules
        self.perturbed = self.torch.perturbed
        self.clean = self.perturbed.with_shared(self.perturbed.clean)
        self._seed = (request.seed & 0xFFFFFFFF, request.seed >> 32)
        self._family = families.name_of(request.family)
        self._scratch: Tensor | None = None
        steps = [step for step, _ in plan.steps]
        self._shares_images = all(isinstance(s, Layer) for s in steps if plan.image in reads_of(s))
        self._of_images = _dependents(plan)
        self._rows: dict[str, int] = {}
        self._together = not any(isinstance(s, Call) and s.reads_parameters and not self._by_image(s) for s in steps)

    def scores(self, reduce: str) -> Tensor:
        request = self.request
        images = request.images.detach().float().contiguous()
        labels = request.labels.long().contiguous() if request.labels is not None else None
        name = divergences.name_of(request.divergence)
        parts = []
        for start in range(0, len(images), request.chunk):
            part = images[start : start + request.chunk]
            clean = self._logits(part, 0, 1, moves=False)
            check_logits(clean, request, len(part), perturbed=False)
            clean = clean.float().contiguous()
            noisy = self._noisy(part) if self._moves else clean.expand(request.k, *clean.shape).contiguous()
            own = labels[start : start + request.chunk] if labels is not None else None
            parts.append(torch.ops.smi_kernels.score_logits(clean, noisy, own, name, reduce))
        return torch.cat(parts)

    @property
    def _moves(self) -> bool:
        return self.perturbed.has_noise or self.request.sigma_x > 0

    def _noisy(self, images: Tensor) -> Tensor:
        """Logits of all draws, ``[K, N, C]``."""
        n, k = len(images), self.request.k
        try:
            group = self._group(n)
            logits = [self._logits(images, first, min(group, k - first), moves=True) for first in range(0, k, group)]
        except _NotBatchFirst:
            self._together = False
            return self._noisy(images)
        for part in logits:  # only now, because it waits for the device
            check_logits(part, self.request, len(part), perturbed=True)
        return torch.cat(logits).float().unflatten(0, (k, n))

    def _group(self, n: int) -> int:
        """Draws that are run at once."""
        if not self._together:
            return 1
        sizes = [self.clean[f"{s.module}.weight"].numel() for s, _ in self.plan.steps if isinstance(s, Layer)]
        by_weight = SCRATCH // (2 * max(sizes, default=1))
        by_activation = ACTIVATIONS // (4 * 3 * n * self.plan.largest)
        # Even numbers keep the two draws of an antithetic pair together.
        return max(1, min(self.request.k, by_weight // 2 * 2, by_activation // 2 * 2, MOST_DRAWS))

    def _logits(self, images: Tensor, first: int, draws: int, *, moves: bool) -> Tensor:
        """Logits ``[draws·N, C]`` of draws ``first`` on, or of the unperturbed model."""
        vectors = self._vectors(first, draws) if moves else {}
        n = len(images)
        if moves and self.request.sigma_x > 0:
            family = families.name_of(self.request.input_family)
            x = torch.ops.smi_kernels.perturb_input(
                images, self.request.sigma_x, family, first, draws, *self._seed, self.request.antithetic, torch.float32
            )
        else:
            x = images if self._shares_images else images.repeat(draws, 1, 1, 1)
            x = x.contiguous(memory_format=torch.channels_last)

        def layer(step: Layer, x: Tensor, residual: Tensor | None) -> Tensor:
            return self._layer(step, x, residual, vectors, first, draws, n, moves)

        def call(step: Call, values: Mapping[str, Any]) -> Any:
            return self._call(step, values, first, draws, n, moves)

        with plain(images.device):
            return self.plan.run(x, layer, call)

    def _vectors(self, first: int, draws: int) -> dict[str, Tensor]:
        """Parameters of one dimension in a group of draws, ``[draws, rows]``, drawn in one launch."""
        names = [name for name in self.perturbed.names if self.clean[name].ndim == 1]
        if not names:
            return {}
        if self.request.family.structure != INDEPENDENT:
            ks = range(first, first + draws)
            return {name: torch.stack([self.perturbed.parameter(name, k) for k in ks]) for name in names}
        each = self.request.family.elements
        counts = [-(-self.clean[name].numel() // each) for name in names]
        device = self.request.images.device
        index = torch.cat([torch.arange(count, device=device) for count in counts])
        ids = torch.tensor([self.perturbed.tensor_id(name) for name in names], device=device)
        noise = torch.ops.smi_kernels.unit_noise(
            index, ids.repeat_interleave(torch.tensor(counts, device=device)), self._family, first, draws, *self._seed,
            PARAMETERS, self.request.antithetic,
        )  # fmt: skip
        parts = noise.flatten(1).split([count * each for count in counts], dim=1)
        return {
            name: self.clean[name] + self.perturbed.std(name) * part[:, : self.clean[name].numel()]
            for name, part in zip(names, parts, strict=True)
        }

    def _layer(
        self, step: Layer, x: Tensor, residual: Tensor | None, vectors: dict[str, Tensor], first: int, draws: int,
        n: int, moves: bool,
    ) -> Tensor:  # fmt: skip
        module, dtype = self.modules[step.module], self.torch.layer_dtype(step)
        own = vectors | {name: vectors[old] for name, old in self.perturbed.shared_names.items() if old in vectors}
        norm = self.modules[step.norm] if step.norm is not None else None
        scale, bias = (_per_draw(v, draws) for v in fold(step, norm, self.clean | own))
        shared = x.shape[0] == n and draws > 1
        out_dtype = dtype if isinstance(module, nn.Linear) else self.request.dtype
        memory = torch.channels_last if x.ndim == 4 else torch.contiguous_format
        x = x.to(dtype).contiguous(memory_format=memory)
        if residual is not None:
            if residual.shape[0] == n and draws > 1:  # the images themselves, which the draws share
                residual = residual.repeat(draws, *[1] * (residual.ndim - 1))
            residual = residual.to(out_dtype).contiguous(memory_format=memory)
        epilogue = step.epilogue if epilogues[step.epilogue].kernel is not None else "identity"
        job = _Job(step, module, x, residual, scale, bias, first, draws, shared, out_dtype, epilogue, moves)
        y = self._product(job)
        return y if epilogue == step.epilogue else epilogues[step.epilogue].compute(y)

    def _product(self, job: _Job) -> Tensor:
        name = f"{job.step.module}.weight"
        theta, std = self.clean[name], self.perturbed.std(name) if job.moves else 0.0
        if self._family == "rademacher" and std > 0 and self._expands_signs(job, theta):
            return self._signs(job, theta, std, name)
        weight = self._weights(job, theta, std, name)
        if isinstance(job.module, nn.Linear):
            return torch.ops.smi_kernels.perturbed_linear(
                job.x, weight.squeeze(2), job.bias, job.residual, job.draws, job.epilogue, job.shared, job.out_dtype
            )
        read = _geometry(job.module)
        if not fits_kernel(job.module) or prefers_library(job.x.device, _shape(job, theta)):
            folded = weight.unflatten(2, read.kernel).permute(0, 1, 4, 2, 3)
            return library_conv(
                job.x, folded, job.bias, job.residual, draws=job.draws, geometry=read,
                epilogue=epilogues[job.epilogue], shared=job.shared, out_dtype=job.out_dtype,
            )  # fmt: skip
        return torch.ops.smi_kernels.perturbed_conv(
            job.x, weight, job.bias, job.residual, job.draws, read.kernel, *read.of_conv2d, job.epilogue,
            job.shared, job.out_dtype,
        )  # fmt: skip

    @staticmethod
    def _expands_signs(job: _Job, theta: Tensor) -> bool:
        """Whether Rademacher signs are expanded inside the product, and no perturbed weights are written."""
        if isinstance(job.module, nn.Linear):
            return True
        if not fits_kernel(job.module) or job.x.dtype == torch.float32:  # what was measured is 16 bits
            return fits_kernel(job.module)
        return not prefers_scratch(job.x.device, _shape(job, theta))

    def _signs(self, job: _Job, theta: Tensor, std: float, name: str) -> Tensor:
        noise = (std, self.perturbed.tensor_id(name), job.first, job.draws, *self._seed, self.request.antithetic)
        end = (job.epilogue, job.shared, job.out_dtype)
        args = (job.x, theta, job.scale, job.bias, job.residual, *noise)
        if isinstance(job.module, nn.Linear):
            return torch.ops.smi_kernels.perturbed_linear_signs(*args, *end)
        return torch.ops.smi_kernels.perturbed_conv_signs(*args, *_geometry(job.module).of_conv2d, *end)

    def _weights(self, job: _Job, theta: Tensor, std: float, name: str) -> Tensor:
        """The group's weights of one layer, ``[draws, rows, taps, channels]``, in the scratch."""
        rows, channels = theta.shape[:2]
        taps = theta[0, 0].numel()
        out = self._room(job.draws * theta.numel(), job.x).view(job.draws, rows, taps, channels)
        left = right = None
        family = self._family
        if std == 0:
            family = "gaussian"  # of which nothing is added
        elif self.request.family.structure != INDEPENDENT:
            pairs = (self.perturbed.factors(name, k) for k in range(job.first, job.first + job.draws))
            left, right = (torch.stack(values) for values in zip(*pairs, strict=True))
        tensor = self.perturbed.tensor_id(name) if std > 0 else 0
        torch.ops.smi_kernels.perturb_weight(
            theta, out, std, job.scale, tensor, family, job.first, job.draws, *self._seed, self.request.antithetic,
            left, right,
        )  # fmt: skip
        return out

    def _room(self, elements: int, like: Tensor) -> Tensor:
        """Scratch of so many elements; the next layer uses it again."""
        size = elements * like.element_size()
        if self._scratch is None or self._scratch.numel() < size:
            self._scratch = torch.empty(size, dtype=torch.uint8, device=like.device)
        return self._scratch[:size].view(like.dtype)

    def _call(self, step: Call, values: Mapping[str, Any], first: int, draws: int, n: int, moves: bool) -> Any:
        if draws > 1 and self._by_image(step):
            outputs = []
            for j in range(draws):
                state = self.perturbed.with_shared(self.perturbed.state(first + j)) if moves else self.clean
                mine = {name: values[name].chunk(draws)[j] for name in reads_of(step)}
                outputs.append(self.torch.run_call(step, mine, state))
            result = torch.cat(outputs)
        else:
            state = self.clean
            if moves and step.reads_parameters:
                state = self.perturbed.with_shared(self.perturbed.state(first))
            result = self.torch.run_call(step, values, state)
        if isinstance(result, Tensor) and step.output in self._of_images:
            rows = result.shape[0] if result.ndim else 0
            if draws == 1:
                self._rows[step.output] = rows
            elif rows == 0 or rows != draws * self._rows[step.output]:
                raise _NotBatchFirst
        return result

    def _by_image(self, step: Call) -> bool:
        """Whether a call is of a module that takes images along the first dimension, and must see one draw at a time.

        Because its parameters move, or because it normalises by the batch.
        """
        module = self.modules[step.target] if step.op == "call_module" else None
        if type(module) not in (nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            return False  # also for subclasses, which may do anything
        return step.reads_parameters or getattr(module, "running_mean", module) is None


def _dependents(plan: Plan) -> set[str]:
    """Names of the values that depend on the images."""
    found = {plan.image}
    for step, _ in plan.steps:
        if found & reads_of(step):
            found.add(step.output)
    return found


def library_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *, draws: int, geometry: Geometry,
    epilogue: Epilogue, shared: bool, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """What `smi_kernels.ops.perturbed_conv` computes by the vendor's library, draw by draw.

    Its arguments, but for the weight, which is ``[draws, O, C / groups, KH, KW]``. Sums leave the library in x's dtype.
    """
    inputs = [x] * draws if shared else x.chunk(draws)
    y = torch.cat([F.conv2d(part, w, None, *geometry.of_conv2d) for part, w in zip(inputs, weight, strict=True)])
    if bias is not None:
        y = (y.unflatten(0, (draws, -1)) + bias[:, None, :, None, None]).flatten(0, 1)
    y = epilogue.compute(y if residual is None else y + residual)
    return y.to(out_dtype, memory_format=torch.channels_last)


def _shape(job: _Job, theta: Tensor) -> ConvShape:
    flat = torch.Size((theta.shape[0], theta[0, 0].numel(), theta.shape[1]))
    return conv_shape(job.x, flat, job.draws, _geometry(job.module), job.shared)


def _geometry(module: nn.Module) -> Geometry:
    assert isinstance(module, nn.Conv2d)
    padding = zero_padding(module)
    assert padding is not None
    return geometry(module.kernel_size, module.stride, padding, module.dilation, module.groups)


def _per_draw(values: Tensor | None, draws: int) -> Tensor | None:
    return None if values is None else values.expand(draws, values.shape[-1]).contiguous()
