"""The exercise of `00_start_here`: its printed solution passes, the usual mistakes are named, nothing ever raises."""

import re
from pathlib import Path

import nbformat
import pytest
import torch

from smi.exercises.base import Case, verdict
from smi.exercises.start_here import check_1

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "00_start_here.ipynb"


def cells(kind):
    return [cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == kind]


def solution():
    """The function in the notebook's own solution."""
    (block,) = re.findall(r"<summary>Solution</summary>\s*```python\n(.*?)```", "\n".join(cells("markdown")), re.DOTALL)
    names = {"torch": torch}
    exec(block, names)
    return names["attack_success_rate"]


def test_the_solution_passes(capsys):
    check_1(solution())
    assert capsys.readouterr().out == "Passed.\n"


def test_the_stub_is_not_attempted_yet(capsys):
    (stub,) = [source for source in cells("code") if "def attack_success_rate" in source]
    exec(stub, {"check_1": check_1})
    assert "Not attempted yet" in capsys.readouterr().out


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
def test_a_wrong_answer_is_rejected_with_what_is_wrong(attempt, says, capsys):
    check_1(attempt)
    out = capsys.readouterr().out
    assert out.startswith("Not yet:")
    assert says in out


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
