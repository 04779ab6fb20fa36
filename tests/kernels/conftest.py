import os

import pytest
import torch
from kernel_reference import toy_images, trained_cnn

# Files of other processes: `test_kernels_interpreter` runs the ones, `test_kernels_extension` the others.
collect_ignore = ["example_plugin"] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted", "example_plugin"]


@pytest.fixture(scope="session")
def cnn():
    """A small trained classifier, never changed by a test."""
    with torch.random.fork_rng():
        return trained_cnn()


@pytest.fixture(scope="session")
def images():
    return toy_images(24, seed=1000)[0]


@pytest.fixture(scope="session")
def labels():
    return toy_images(24, seed=1000)[1]
