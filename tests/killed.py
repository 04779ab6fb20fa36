"""A process that does long work many times over, killed at another place each time, and checks how it ends.

``python killed.py STAGE FOLDER TIMES``: first the work is done once without a checkpoint; then, TIMES times, a child is
killed (SIGKILL) at an optimizer step drawn uniformly from all of them, or in the middle of writing a checkpoint, or
finds its disk full there; another child goes on from what was left. Prints one JSON line for each. Children are forked:
importing torch takes longer than the work.
"""

import errno
import json
import os
import random
import signal
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["SMI_PROGRESS"] = "0"

import torch
from tiny import TinyPrior, noise, tiny_model
from torch.optim.optimizer import register_optimizer_step_post_hook

from smi.defenses import FineTune, Schedule
from smi.domains import PublicImages, Samples
from smi.inversion import Stabilized, invert
from smi.priors.gan import PriorConfig, fit_prior
from smi.runtime import files
from smi.runtime.compute import fingerprint_of
from smi.runtime.files import fingerprint

FAULTS = ("step", "step", "write", "rename", "full")


def prior(checkpoint):
    public = PublicImages(noise(20, 1, 32, 32))
    return fingerprint_of(
        fit_prior(public, PriorConfig(steps=12, batch_size=4), seed=1, checkpoint=checkpoint, every=0)
    )


def inversion(checkpoint):
    method = Stabilized(steps=12, pool=2)
    found = invert(tiny_model(), TinyPrior(), method, per_class=4, seed=2, checkpoint=checkpoint, every=0)
    return fingerprint(found.images)


def removal(checkpoint):
    tune = FineTune(schedule=Schedule(rounds=10, batch_size=2, distill=10.0))
    samples = Samples(noise(24, 1, 8, 8, seed=8), torch.arange(24) % 3, 3, "smi")
    public = PublicImages(noise(40, 1, 8, 8, seed=9))
    repair = tune.repair(tiny_model(), samples, public, seed=3, checkpoint=checkpoint, every=0)
    return fingerprint_of(repair.model) + json.dumps(repair.log)


WORK = {"prior": prior, "inversion": inversion, "removal": removal}


def child(work, checkpoint, arrange=lambda steps: None):
    """Does the work in a forked process. Returns its exit status, the optimizer steps it made and what came out."""
    readable, writable = os.pipe()
    pid = os.fork()
    if not pid:
        steps = []

        def step(*_):
            steps.append(1)
            arrange(steps)

        register_optimizer_step_post_hook(step)
        try:
            found, code = work(checkpoint), 0
        except OSError as error:
            found, code = str(error.errno), 3
        os.write(writable, json.dumps([len(steps), found]).encode())
        os._exit(code)
    os.close(writable)
    with os.fdopen(readable) as pipe:
        told = pipe.read()
    return os.waitpid(pid, 0)[1], *(json.loads(told) if told else [None, None])


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def fault(kind, at):
    """What to call after each step: at step ``at`` it kills the process, or sees to it that its next writing fails."""

    def arrange(steps):
        if len(steps) != at:
            return
        if kind == "step":
            die()
        real = os.fdopen

        class Half:
            """A file that takes half of what is written."""

            def __init__(self, *args):
                self.file = real(*args)

            def __enter__(self):
                return self

            def __exit__(self, *_):
                self.file.close()

            def write(self, data):
                self.file.write(data[: len(data) // 2])
                self.file.flush()
                if kind == "write":
                    die()
                raise OSError(errno.ENOSPC, "full")

        if kind == "rename":
            files.os.replace = lambda *_: die()
        else:
            files.os.fdopen = Half

    return arrange


def main(stage, folder, times):
    """Prints a JSON line for each time."""
    work, draw = WORK[stage], random.Random(stage)
    _, total, whole = child(work, None)
    for index in range(times):
        checkpoint = Path(folder) / f"{index}.safetensors"
        kind, at = FAULTS[index % len(FAULTS)], draw.randint(1, total)
        status, *_ = child(work, checkpoint, fault(kind, at))
        left = checkpoint.exists()
        after, again, found = child(work, checkpoint)
        line = {"kind": kind, "at": at, "total": total, "status": status, "left": left, "again": again}
        print(json.dumps(line | {"ended": after, "same": found == whole}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
