"""The exercises of `07_remove_without_data`: the usual mistakes are named."""

import pytest
import torch

from smi.tutorial.exercises.remove_without_data import check_1, check_2


@pytest.mark.parametrize(
    ("attempt", "says"),
    [
        (lambda a, s, acc, asr: s - asr, "a half"),
        (lambda a, s, acc, asr: (max(0, s - asr) + 1) / 2, "0.99"),
        (lambda a, s, acc, asr: (s - asr - (a - acc) + 1) / 2, "no merit"),
        (lambda a, s, acc, asr: (s - asr - max(0, a - acc) + 1) / 2, "rise of ASR"),
    ],
)
def test_der(attempt, says, rejects):
    rejects(check_1, attempt, says)


def surest_in_each_column(probabilities, per_class):
    return probabilities.argsort(0, descending=True)[:per_class].T.flatten()


def in_the_order_given(probabilities, per_class):
    label = probabilities.argmax(1)
    return torch.cat([(label == c).nonzero()[:per_class, 0] for c in range(probabilities.shape[1])])


@pytest.mark.parametrize(
    ("attempt", "says"),
    [
        (surest_in_each_column, "here none is of class 1"),
        (in_the_order_given, "images 2 and 4"),
        (
            lambda probabilities, per_class: probabilities.max(1).values.argsort(descending=True)[: 2 * per_class],
            "2 and 4",
        ),
    ],
)
def test_surest(attempt, says, rejects):
    rejects(check_2, attempt, says)
