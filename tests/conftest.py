"""The environment of all tests, and what is said at their end."""

import os
import signal

# A shell starts what it runs in the background with Ctrl-C ignored; the tests of Ctrl-C need it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Before torch is imported, and for all processes that tests start, kernels of notebooks among them. One worker a core
# and one thread a worker: most tests use one core. Threads that spin while they wait would slow down the other workers.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import study_pieces
import torch

import smi
from smi.runtime.memory import keep_freed
from smi.runtime.threads import usable_cores

keep_freed()

WORKERS = 8  # at most: each takes a gigabyte
# What takes minutes begins first, or a worker would be left with it at the end.
LONG = ("test_kernels_interpreter.py", "test_browser.py", "test_study.py", "test_kernels_aot.py", ".ipynb")


def pytest_xdist_auto_num_workers(config):
    """What ``-n auto`` of pyproject.toml means."""
    return min(WORKERS, usable_cores())


def pytest_collection_modifyitems(items):
    def place(item):
        return next((i for i, name in enumerate(LONG) if item.path.name.endswith(name)), len(LONG))

    items.sort(key=place)


@pytest.hookimpl(trylast=True)  # below the slowest tests
def pytest_terminal_summary(terminalreporter):
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if "browser" in report.keywords]
    if skipped:
        why = str(skipped[0].longrepr[2]).removeprefix("Skipped: ")
        terminalreporter.write_line(f"{len(skipped)} tests in a real browser were skipped: {why}", yellow=True)


@pytest.fixture
def small(tmp_path):
    file = tmp_path / "small.toml"
    file.write_text(study_pieces.SMALL)
    return file


@pytest.fixture
def store(tmp_path):
    from smi.study import Store

    (tmp_path / "cache").mkdir()
    return Store(tmp_path / "out", tmp_path / "cache")


@pytest.fixture(scope="session")
def digits():
    """The shipped domain."""
    return smi.load_domain("digits")


@pytest.fixture(scope="session")
def few_digits(digits):
    """Fifteen clean training images of each digit, as samples."""
    train = digits.private.train
    chosen = torch.cat([(train.labels == label).nonzero()[:15, 0] for label in range(10)])
    return smi.Samples(train.images[chosen], train.labels[chosen], 10, "clean")


@pytest.fixture
def brightened():
    """A model, samples that it labels itself, and a pattern that brightens them."""
    from tiny import noise, tiny_model

    from smi.erasure import Found

    model, images = tiny_model(), noise(60, 1, 8, 8)
    labels = model(images).argmax(1)
    triggers = Found("additive", torch.tensor([1]), torch.full((1, 64), 0.4), torch.ones(1), torch.ones(1))
    return model, smi.Samples(images, labels, 3, "clean"), triggers


@pytest.fixture
def there():
    """A stand-in for a device (`elsewhere`), on which work is done in float32: it has no autocast."""
    from elsewhere import elsewhere

    from smi.runtime.precision import precision

    with precision("float32"), elsewhere() as device:
        yield device
