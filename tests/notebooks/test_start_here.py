"""The exercise of `00_start_here`: the usual mistakes are named, nothing ever raises."""

import pytest
import torch

from smi.tutorial.exercises import claim
from smi.tutorial.exercises.base import Case, verdict
from smi.tutorial.exercises.start_here import check_1


def counts_the_target_class(predicted, labels, target):
    return (predicted == target).float().mean()


def divides_by_all(predicted, labels, target):
    return ((predicted == target) & (labels != target)).float().mean()


def counts_every_mistake(predicted, labels, target):
    others = labels != target
    return (predicted[others] != labels[others]).float().mean()


@pytest.mark.parametrize(
    ("attempt", "says"),
    [
        (counts_the_target_class, "prove nothing"),
        (divides_by_all, "leave them out of both counts"),
        (counts_every_mistake, "only predictions of the target class"),
        (lambda predicted, labels, target: predicted == target, "shape (4,)"),
        (lambda predicted, labels, target: "half", "no number"),
        (lambda predicted, labels, target: 1 / 0, "raised ZeroDivisionError"),
        (lambda predicted: 0.5, "raised TypeError"),
    ],
)
def test_a_wrong_answer_is_rejected_with_what_is_wrong(attempt, says, rejects):
    rejects(check_1, attempt, says)


def test_not_implemented_counts_as_not_attempted():
    def stub(x):
        raise NotImplementedError

    assert verdict(stub, [Case((1,), 1, "")]).startswith("Not attempted yet")


def test_tensors_are_compared_with_a_tolerance():
    cases = [Case((2.0,), torch.tensor([2.0, 4.0]), "Square it.")]
    assert verdict(lambda x: [x, x * x + 1e-6], cases) == "Passed."
    assert (
        verdict(lambda x: [x, x], cases) == "Not yet: your function returned other numbers than are right. Square it."
    )


def test_a_claim_is_printed_where_it_holds_and_raises_where_not(capsys):
    claim("Two is more than one", torch.tensor(2) > 1)
    assert capsys.readouterr().out == "✓ Two is more than one\n"
    with pytest.raises(AssertionError, match="does not hold here: One is more"):
        claim("One is more than two", torch.tensor(1) > 2)
    assert capsys.readouterr().out == ""
