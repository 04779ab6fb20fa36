"""The exercises of `10_use_your_own_model`: the usual mistakes are named."""

import pytest

from smi.tutorial.exercises.use_your_own_model import check_1, check_2


@pytest.mark.parametrize(
    ("attempt", "says"),
    [
        (lambda model, images, mean, std: model(images), "of its own"),
        (lambda model, images, mean, std: model((images - mean) / std), "of its own"),
        (lambda model, images, mean, std: model(images - mean[:, None, None]), "of its own"),
        (lambda model, images, mean, std: model(2 * images - 1), "nothing changes"),
    ],
)
def test_logits(attempt, says, rejects):
    rejects(check_1, attempt, says)


@pytest.mark.parametrize(
    ("attempt", "says"),
    [
        (lambda rates: int(rates.argmax()), "none stands out"),
        (lambda rates: int(rates.argmax()) if rates.max() > rates.mean() + 3 * rates.std() else -1, "far above"),
        (lambda rates: int(rates.argmax()) if rates.max() > 0.5 else -1, "all classes are easy"),
    ],
)
def test_stands_out(attempt, says, rejects):
    rejects(check_2, attempt, says)
