"""What the report says of a removal by erasure."""

import json

import fake_run
import pytest
from tiny import found

from smi.defenses import Repair
from smi.defenses.base import Evidence
from smi.detection import Detection
from smi.erasure.scan import Scan
from smi.erasure.search import ANYWHERE
from smi.report.removal import removal_page
from smi.report.sections import reason
from smi.report.verdicts import removal_verdict


def seen(treated, left, *, targets=None, sizes=(1.0, 4.0, 4.2, 4.1), reached=None, asked=False):
    scan = Scan([found(list(sizes), targets=targets)])
    after = [found([4.0] * len(treated), targets=treated)] if treated else []
    judged = Detection(scan, treated if reached is None else reached, 2.6, 4.0)
    evidence = Evidence(judged, treated, after, left, asked)
    names = tuple(f"<b>{label}" for label in scan.classes)
    model = fake_run.repair(classes=len(names)).model
    return fake_run.removal(
        names, Repair(model, "erasure", "smi", {"defense": "erasure"}, {"loss": [1.0]}, evidence=evidence)
    )


@pytest.mark.parametrize(
    ("treated", "left", "words"),
    [
        ([], [], "No sign of a backdoor was found"),
        ([0], [], "There are signs of a backdoor, and after the removal none is left"),
        ([0], [0], "something unusual is left"),
        ([0, 2], [2], "something unusual is left"),
    ],
)
def test_the_first_line_is_a_decision_with_its_reason(treated, left, words):
    run = seen(treated, left)
    said = removal_verdict(run)
    assert words in said.split(":")[0]
    assert ("Nothing was erased." in said) == (not treated)
    assert "L2 norm" in said
    assert "standard deviations" in said
    page = removal_page(run)
    assert "Is there a backdoor?" in page
    assert ("The triggers that were found" in page) == bool(treated)
    json.dumps(run.summary(), default=str)


def test_an_excess_is_never_printed_as_the_limit_that_it_is_compared_with():
    scan = Scan([found([1.0, 4.0, 4.2, 4.1])])
    excess = scan.excess().max().item()
    assert f"{excess:.2f} standard deviations" in reason(Detection(scan, [0], round(excess, 1), 4.0), 0)
    assert f"{excess:.1f} standard deviations" in reason(Detection(scan, [0], excess - 0.2, 4.0), 0)


def test_a_trigger_that_was_only_tuned_against_is_not_called_erased():
    run = seen([1], [])
    run.cleaned.repair.evidence.__dict__["unerased"] = (1,)
    said = removal_verdict(run)
    assert "were tuned against, without erasing those to class" in said
    assert "was erased" not in said


@pytest.mark.parametrize(("asked", "why"), [(True, "because that was asked for"), (False, "all the same")])
def test_no_signs_are_claimed_where_a_class_was_treated_without_one(asked, why):
    said = removal_verdict(seen([1], [], reached=[], asked=asked))
    assert said.startswith("No sign of a backdoor was found")
    assert (
        f"The triggers to class “<b>1” were tuned against, and the direction of each class's strongest was erased {why}"
        in said
    )
    assert "signs" not in said


def test_there_is_no_all_clear_where_nothing_can_be_said():
    for treated in ([], [1]):
        said = removal_verdict(seen(treated, [], sizes=(1.0, 4.0, 4.2), reached=[], asked=bool(treated)))
        assert said.startswith("Whether there is a backdoor cannot be said")
        assert "No sign" not in said
        assert "unusually" not in said
        assert ("because that was asked for" in said) == bool(treated)


def test_an_all_to_all_backdoor_is_told_as_one():
    run = seen([ANYWHERE], [], targets=[0, 1, 2, 3, ANYWHERE], sizes=(4.0, 4.0, 4.2, 4.1, 0.5))
    said = removal_verdict(run)
    assert "images of every class" in said
    assert "fake" not in removal_page(run)
