"""What a few tiny runs give: every removal, inversion and way to score, a detection, a step of a prior.

    python tests/fingerprints.py record FILE    # before a change that must change nothing
    python tests/fingerprints.py check FILE     # after it, on the same machine: to the bit

All in float32, one thread. Processors round differently, so the numbers that are committed are compared roughly
(`test_fingerprints.py`), and to the bit on one machine.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from small_runs import METHODS, PUBLIC, REMOVALS, SAMPLES
from tiny import TinyPrior, noise, tiny_model
from torch import Tensor, nn

from smi.defenses import Defense
from smi.detection import Detector, detect
from smi.domains import PublicImages
from smi.erasure.search import Search
from smi.inversion import Inversion, invert
from smi.inversion.selection import Selection
from smi.priors.gan import PriorConfig, fit_prior
from smi.runtime.precision import precision
from smi_kernels import stability_scores
from smi_kernels.noise import families

COMMITTED = Path(__file__).with_suffix(".json")
KEPT = 6  # numbers a run
SCORERS = ("reference", "torch")

Print = dict[str, str | list[float]]


def fingerprints() -> dict[str, Print]:
    """By name of the run: its bits, hashed, and a few numbers that depend on all of them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with precision("float32"):
            return {name: _print(run()) for name, run in _runs()}
    finally:
        torch.set_num_threads(threads)


def _runs() -> Iterator[tuple[str, Callable[[], list[Tensor]]]]:
    for name, defense in REMOVALS.items():
        for public, images in (("public images", PUBLIC), ("samples alone", None)):
            yield f"removal/{name}/{public}", lambda d=defense, p=images: _repaired(d, p)
    for name, method in METHODS.items():
        yield f"inversion/{name}", lambda m=method: _inverted(m)
    for backend in SCORERS:
        for family in families:
            yield f"score/{backend}/{family}", lambda b=backend, f=family: [_scores(b, f)]
    yield "detection", _detected
    yield "prior", lambda: _weights(fit_prior(PublicImages(noise(12, 1, 32, 32)), PriorConfig(steps=2, batch_size=4)))


def _weights(model: nn.Module) -> list[Tensor]:
    return list(model.state_dict().values())


def _repaired(defense: Defense, public: PublicImages | None) -> list[Tensor]:
    return _weights(defense.repair(tiny_model(), SAMPLES, public, seed=3).model)


def _inverted(method: Inversion) -> list[Tensor]:
    chosen = Selection(oversample=2, k=2)
    found = invert(tiny_model(), TinyPrior(), method, per_class=2, selection=chosen, seed=1)
    return [found.images, found.labels, found.scores]


def _scores(backend: str, family: str) -> Tensor:
    images = noise(5, 1, 8, 8)
    noises = {"sigma_x": 0.1, "sigma_w": 0.1, "family": family}
    return stability_scores(tiny_model(), images, k=4, **noises, seed=7, dtype="float32", backend=backend)


def _detected() -> list[Tensor]:
    quick = Detector(search=Search(steps=3, restarts=2, probe=1))
    scan = detect(tiny_model(), SAMPLES, PUBLIC, quick, seed=2).scan
    return list(scan.tensors().values())


def _print(tensors: list[Tensor]) -> Print:
    bits, values = hashlib.sha256(), torch.cat([tensor.detach().double().flatten() for tensor in tensors])
    for tensor in tensors:
        bits.update(tensor.detach().contiguous().numpy().tobytes())
    signs = torch.randint(2, (KEPT, len(values)), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    return {
        "bits": bits.hexdigest()[:16],
        "numbers": [round(number, 7) for number in (signs.double() @ values / len(values) ** 0.5).tolist()],
    }


def main(act: str, file: Path) -> None:
    """Record, or compare and say what is different."""
    found = fingerprints()
    if act == "record":
        file.write_text(json.dumps(found, indent=1) + "\n")
        return
    before = json.loads(file.read_text())
    names = sorted(before.keys() | found.keys())
    other = [name for name in names if before.get(name, {}).get("bits") != found.get(name, {}).get("bits")]
    print(f"{len(names) - len(other)} of {len(names)} are the same to the bit.", *other, sep="\n")
    sys.exit(bool(other))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
