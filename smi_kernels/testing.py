"""Agreement tests for what a user adds: a noise family, a divergence or an epilogue, in torch and in Triton.

    from smi_kernels.testing import check_family
    check_family("laplace", module="my_package.laplace")

The Triton twin runs on the GPU if there is one, else in Triton's interpreter, in a process of its own: the interpreter
must be chosen before triton is imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smi_kernels.divergences import divergences
from smi_kernels.epilogues import epilogues
from smi_kernels.errors import InputError
from smi_kernels.noise import INDEPENDENT, INPUT, PARAMETERS, families
from smi_kernels.ops.launch import Draws, interpreting
from smi_kernels.ops.score_logits import reference as score_reference
from smi_kernels.ops.unit_noise import reference as noise_reference
from smi_kernels.plugins import load_plugins
from smi_kernels.registry import Registry
from smi_kernels.scores import stability_scores

SAMPLE = 1 << 16
"""Values on which moments are checked. Bounds are five standard errors: a sound family fails once in a million."""


def check_family(name: str, *, module: str | None = None, tolerance: float = 1e-6) -> None:
    """Check a noise family: moments, independence, and that both twins draw the same.

    Args:
        name: as registered in `smi_kernels.noise.families`.
        module: importable name, or path of the file, of the module that registers it; None if a plug-in does.
        tolerance: largest difference between the twins' values.

    Raises:
        AssertionError: saying what does not hold.
        InputError: for an unknown name.
    """
    _load(module)
    family = families[name]
    index = torch.arange(-(-SAMPLE // family.elements))

    def values(tensor: int, k: int, stream: int = PARAMETERS, index: Tensor = index) -> Tensor:
        which = Draws(first=k, count=1, seed=2**40 + 7)
        ids = torch.full_like(index, tensor)
        return noise_reference.unit_noise(index, ids, family=family, which=which, stream=stream)[0]

    noise = values(3, 1)
    _expect(noise.shape == (len(index), family.elements), f"values have shape {tuple(noise.shape)}, not [B, elements]")
    _expect(noise.dtype == torch.float32 and bool(noise.isfinite().all()), "values are not finite float32")
    order = torch.randperm(len(index), generator=torch.Generator().manual_seed(0))
    _expect(
        torch.equal(values(3, 1, index=index[order]), noise[order]), "a row depends on other rows than its own words"
    )
    _check_moments(noise.flatten().double())
    for other, what in (
        (values(3, 2), "draws"), (values(4, 1), "tensors"), (values(3, 1, INPUT), "streams"),
        (noise.roll(1, 0), "neighbouring counters"),
    ):  # fmt: skip
        correlation = (noise * other).mean().item()
        _expect(abs(correlation) < 5 * SAMPLE**-0.5, f"{what} are correlated: {correlation:.3f}")
    pairs = (noise.T @ noise / len(noise)).fill_diagonal_(0).abs().max().item()
    _expect(pairs < 6 * len(noise) ** -0.5, f"elements of a counter are correlated: {pairs:.3f}")
    _check_twin("family", name, module, tolerance)


def check_divergence(name: str, *, module: str | None = None, tolerance: float = 1e-4) -> None:
    """Check a divergence: float32 against float64, and that both twins agree, within tolerance · (|value| + 0.05).

    Args:
        name: as registered in `smi_kernels.divergences.divergences`.
        module: see `check_family`.
        tolerance: relative.

    Raises:
        AssertionError: saying what does not hold.
        InputError: for an unknown name.
    """
    _load(module)
    divergence = divergences[name]
    clean, perturbed, labels = _logits()
    low = score_reference.score_logits(clean, perturbed, labels, divergence=divergence, reduce="none")
    shape = tuple(low.shape)
    _expect(shape == (len(clean), len(perturbed)), f"the results of the draws have shape {shape}, not [N, draws]")
    high = score_reference.score_logits(
        clean.double(), perturbed.double(), labels, divergence=divergence, reduce="none"
    )
    _close(low, high.float(), tolerance, 0.05, "float32 and float64")
    _check_twin("divergence", name, module, tolerance)


def check_epilogue(name: str, *, module: str | None = None, tolerance: float = 1e-5) -> None:
    """Check an epilogue: elementwise, differentiable, and that both twins agree, within tolerance · (|value| + 1).

    Args:
        name: as registered in `smi_kernels.epilogues.epilogues`.
        module: see `check_family`.
        tolerance: relative.

    Raises:
        AssertionError: saying what does not hold.
        InputError: for an unknown name.
    """
    _load(module)
    compute = epilogues[name].compute
    x = torch.linspace(-12, 12, 203)
    y = compute(x)
    _expect(y.shape == x.shape and y.dtype == x.dtype, "the result has another shape or dtype than its argument")
    # Not to the last bit: torch computes the last elements, which do not fill a vector register, by other instructions.
    _expect(torch.allclose(compute(x.flip(0)), y.flip(0), rtol=1e-5, atol=1e-6), "an element depends on others")
    smooth = x.double()[x.abs() > 0.05].requires_grad_()
    _expect(torch.autograd.gradcheck(compute, (smooth,), raise_exception=False), "the gradient is wrong")
    _check_twin("epilogue", name, module, tolerance)


def _load(module: str | None) -> None:
    load_plugins()
    if module is None:
        return
    if not module.endswith(".py"):
        importlib.import_module(module)
        return
    path = Path(module)
    if not path.is_file():
        raise InputError(f"There is no file {module}. Allowed: an importable module name, or the path of a .py file.")
    name = "_smi_kernels_extension_" + re.sub(r"\W", "_", str(path.resolve()))
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        loaded = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(loaded)
        except BaseException:
            del sys.modules[name]  # so that the next call does not take it for loaded
            raise


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)


def _close(found: Tensor, expected: Tensor, relative: float, floor: float, what: str) -> None:
    worst = ((found - expected).abs() / (expected.abs() + floor)).max().item()
    _expect(worst <= relative, f"{what} differ: by {worst:.2e} of the value, allowed {relative:.2e}")


def _check_moments(noise: Tensor) -> None:
    n, variance = len(noise), noise.var().item()
    mean, error = noise.mean().item(), (variance / n) ** 0.5
    _expect(abs(mean) < 5 * error, f"the mean is {mean:.4f}, not 0")
    error = ((noise**4).mean().item() / n) ** 0.5 + 1e-6
    _expect(abs(variance - 1) < 5 * error, f"the variance is {variance:.4f}, not 1")


def _logits() -> tuple[Tensor, Tensor, Tensor]:
    """Clean ``[N, C]`` and perturbed ``[K, N, C]`` logits, close and far, and labels."""
    generator = torch.Generator().manual_seed(0)
    clean = 4 * torch.randn(37, 11, generator=generator)
    size = torch.logspace(-3, 0.5, 5)[:, None, None]
    perturbed = clean + size * torch.randn(5, 37, 11, generator=generator)
    return clean, perturbed, torch.randint(0, 11, (37,), generator=generator)


def _check_twin(kind: str, name: str, module: str | None, tolerance: float) -> None:
    """Run the Triton twin here on the GPU or in this interpreter, else in a process of its own."""
    registries: dict[str, Registry[Any]] = {"family": families, "divergence": divergences, "epilogue": epilogues}
    _expect(registries[kind][name].kernel is not None, f"the {kind} {name!r} has no Triton twin: give it kernel=")
    if torch.cuda.is_available() or interpreting():
        _TWINS[kind](name, tolerance)
        return
    command = [sys.executable, "-m", "smi_kernels.testing", kind, name, module or "", repr(tolerance)]
    # What this process can import, although it may have extended sys.path while it ran, as pytest does.
    environment = {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    run = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    _expect(run.returncode == 0, f"the Triton twin of {name!r} fails:\n{run.stdout}{run.stderr}".strip())


def _device() -> str:
    return "cpu" if interpreting() else "cuda"


def _family_twin(name: str, tolerance: float) -> None:
    from smi_kernels.ops.unit_noise.kernel import unit_noise

    family, index = families[name], torch.tensor([5, 0, 1, 2, 3, 2**32 - 1, 77], device=_device())
    ids = torch.arange(len(index), device=_device())
    which = Draws(first=3, count=3, seed=2**63 + 5, antithetic=True)
    ours, theirs = (
        run(index, ids, family=family, which=which, stream=PARAMETERS)
        for run in (unit_noise, noise_reference.unit_noise)
    )
    worst = (ours - theirs).abs().max().item()
    _expect(worst <= tolerance, f"the twins' values differ by {worst:.2e}, allowed {tolerance:.2e}")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4)).eval()
    images = torch.rand(3, 1, 5, 5, device=_device())
    input_family = name if family.structure == INDEPENDENT else "gaussian"
    scores = [
        stability_scores(
            model.to(_device()), images, k=2, sigma_x=0.1, sigma_w=0.1, family=name, input_family=input_family,
            dtype="float32", backend=backend,
        )
        for backend in ("torch", "triton")
    ]  # fmt: skip
    _close(scores[1], scores[0], max(2e-3, 10 * tolerance), 1e-3, "scores of the torch and the triton backend")


def _divergence_twin(name: str, tolerance: float) -> None:
    from smi_kernels.ops.score_logits.kernel import score_logits

    clean, perturbed, labels = (t.to(_device()) for t in _logits())
    for reduce in ("none", "mean", "max"):
        ours, theirs = (
            score(clean, perturbed, labels, divergence=divergences[name], reduce=reduce)
            for score in (score_logits, score_reference.score_logits)
        )
        _close(ours, theirs, tolerance, 0.05, f"the twins (reduce={reduce!r})")


def _epilogue_twin(name: str, tolerance: float) -> None:
    from smi_kernels.ops.perturbed_linear.kernel import perturbed_linear

    values = torch.linspace(-12, 12, 17 * 19, device=_device()).reshape(17, 19)
    identity = torch.eye(19, device=_device())[None]
    ours = perturbed_linear(values, identity, draws=1, epilogue=epilogues[name])
    _close(ours, epilogues[name].compute(values), tolerance, 1.0, "the twins")


_TWINS: dict[str, Callable[[str, float], None]] = {
    "family": _family_twin,
    "divergence": _divergence_twin,
    "epilogue": _epilogue_twin,
}

if __name__ == "__main__":
    _kind, _name, _module, _tolerance = sys.argv[1:]
    try:
        _load(_module or None)
        _TWINS[_kind](_name, float(_tolerance))
    except AssertionError as failure:
        sys.exit(str(failure))
    except InputError as failure:
        sys.exit(f"{failure} In a process of its own nothing is registered but by plug-ins and by module=.")
