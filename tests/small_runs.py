"""Every removal and every inversion, as small as they can be, that several test files run."""

import os
import signal

import torch
from tiny import noise

from smi.defenses import ANP, CLP, FTSAM, IBAU, NAD, Erasure, FinePrune, FineTune, Schedule
from smi.detection import Detector
from smi.domains import PublicImages, Samples
from smi.erasure.search import Search
from smi.erasure.tune import Tuning
from smi.inversion import DeepInversion, Latent, Pixel, Stabilized

METHODS = {
    "smi": Stabilized(steps=4, pool=2),
    "smi/random": Stabilized(steps=4, pool=2, inner="random", warmup=0.0),
    "latent": Latent(steps=4, pool=2),
    "pixel": Pixel(steps=4),
    "deepinversion": DeepInversion(steps=4),
}
PUBLIC = PublicImages(noise(40, 1, 8, 8, seed=9))
SAMPLES = Samples(noise(24, 1, 8, 8, seed=8), torch.arange(24) % 3, 3, "smi")
TUNE = FineTune(schedule=Schedule(rounds=5, batch_size=8, distill=1.0))
FAST = Schedule(rounds=2, batch_size=8, distill=1.0)
REMOVALS = {
    "ft": TUNE,
    "fp": FinePrune(schedule=FAST),
    "nad": NAD(epochs=2, teacher_epochs=1),
    "anp": ANP(schedule=FAST),
    "ftsam": FTSAM(epochs=2, batch_size=8),
    "clp": CLP(u=0.5),
    "erasure": Erasure(
        detector=Detector(search=Search(steps=3, restarts=2, probe=1)),
        tuning=Tuning(steps=3),
        targets=(1, 2),
    ),
    "ibau": IBAU(rounds=2),
}
ERASURE = Erasure(
    detector=Detector(search=Search(families=("additive", "warped"), steps=2, restarts=1)),
    tuning=Tuning(steps=2),
    targets=(1,),
)


def stop_at(monkeypatch, method, call):
    """The objective's ``call``-th evaluation sends SIGTERM; None: no evaluation does. Returns the list of calls."""
    calls, real = [], type(method).objective

    def objective(self, *args):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args)

    monkeypatch.setattr(type(method), "objective", objective)
    return calls
