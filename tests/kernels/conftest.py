import beside
import pytest
import torch
from kernel_reference import toy_images, trained_cnn


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
