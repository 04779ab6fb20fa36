"""A network with the example plug-in's activation, images and settings for it, and Triton's interpreter."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

EXAMPLE = Path(__file__).parent / "example_plugin"
IMAGES = torch.rand(3, 1, 6, 5, generator=torch.Generator().manual_seed(0))
OPTIONS = {"k": 2, "sigma_x": 0.2, "sigma_w": 0.3, "dtype": "float32", "seed": 3}
MINE = {"family": "laplace", "input_family": "laplace", "divergence": "hellinger"}


def in_interpreter(code, *paths):
    """Run code in a process of its own with Triton's interpreter, and return its standard output."""
    path = os.pathsep.join([*map(str, paths), *filter(None, sys.path)])
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


class Net(nn.Module):
    """The example's epilogue as a function and as a module."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(8, 3)
        self.act = nn.Hardswish()

    def forward(self, x):
        return self.head(self.act(self.b(F.hardswish(self.a(x)))).flatten(1))


def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().eval()
