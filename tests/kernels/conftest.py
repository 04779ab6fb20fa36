import os

import beside
import pytest
import torch
from kernel_reference import toy_images, trained_cnn

# Files of other processes: `test_kernels_interpreter` runs the ones, `test_kernels_extension` the others.
collect_ignore = ["example_plugin"] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted", "example_plugin"]


def pytest_collection_modifyitems(items):
    """Tests that wait for a process come last."""
    items.sort(key=lambda item: item.get_closest_marker("beside") is not None)


def pytest_collection_finish(session):
    if session.config.option.collectonly:
        return
    for item in session.items:
        marker = item.get_closest_marker("beside")
        if marker is not None:
            beside.begin(*marker.args)


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
