"""Which classes are unusual, against what that is seen, and where changes lead."""

import math
from dataclasses import replace

import pytest
import torch
from tiny import found, tiny_model
from torch import nn

from smi.detection import Detector
from smi.erasure.families import families
from smi.erasure.scan import SPREAD_ANYWHERE, Scan, drift, look, sent
from smi.erasure.search import ANYWHERE, REACHED, Search, _losses
from smi.report.verdicts import detection_verdict
from smi.runtime.compute import frozen


def test_a_class_reached_by_less_stands_out_by_its_logarithm():
    sizes = [4.0, 4.0, 1.0, 4.0, 4.0]
    excess = Scan([found(sizes)]).excess()
    assert excess.shape == (1, 5)
    torch.testing.assert_close(excess[0, 2], torch.tensor(math.log(4) / 0.2))
    assert excess[0, [0, 1, 3, 4]].abs().max() < 1e-5


def test_classes_that_differ_much_are_the_yardstick_themselves():
    alike, unlike = [4.0, 4.1, 3.9, 1.0, 4.05, 3.95], [4.0, 8.0, 2.0, 1.0, 6.0, 3.0]
    one, other = (Scan([found(sizes)]).excess()[0, 3].item() for sizes in (alike, unlike))
    assert one > 2 * other > 0
    usual = torch.tensor(unlike).log()  # their spread by hand: the median absolute deviation of log sizes
    spread = 1.4826 * (usual - usual.flip(0).sort().values[2]).abs().sort().values[2]
    assert other == pytest.approx(((usual.sort().values[3] - usual[3]) / spread).item(), rel=0.2)


def test_a_class_that_is_not_reached_is_not_unusual():
    excess = Scan([found([4.0, 4.0, 0.1, 4.0], reach=[0.9, 0.9, REACHED / 2, 0.9])]).excess()
    assert excess[0, 2] == -1


def test_where_most_classes_are_not_reached_one_that_is_stands_out():
    sizes, reach = [3.0, 2.7, 3.1, 2.9, 3.3], [0.02, 0.94, 0.35, 0.1, 0.0]  # warps of photographs on a sign model
    excess = Scan([found(sizes, reach=reach)]).excess()[0]
    most = torch.tensor([0.3, 0.94, 0.35, 0.3, 0.3]) / torch.tensor(sizes)  # by hand: what is not reached, at most
    torch.testing.assert_close(excess[1], (most[1] / most.median()).log() / 0.2)
    assert excess[1] > 6
    assert excess[2] < 1
    assert excess[[0, 3, 4]].tolist() == [-1, -1, -1]


def test_a_repaired_model_is_seen_against_the_suspect():
    scan = Scan([found([4.0, 4.0, 1.0, 4.0, 4.0])])
    for size, expected in ((1.0, math.log(4) / 0.2), (4.0, 0.0), (2.0, math.log(2) / 0.2)):
        after = scan.excess([found([size], targets=[2])])
        torch.testing.assert_close(after, torch.tensor([[expected]]))


def test_getting_anywhere_is_seen_against_the_easiest_class():
    targets, usual = [0, 1, 2, 3, ANYWHERE], families["masked"].anywhere

    def excess(size, reach=0.9):
        one = found([4.0, 2.0, 4.0, 4.0, size], reach=[0.9] * 4 + [reach], family="masked", targets=targets)
        scan = Scan([one])
        assert scan.classes == [0, 1, 2, 3]
        assert scan.excess().shape == (1, 4)
        return scan.excess_anywhere().item()

    assert excess(2.0 * math.exp(-usual)) == pytest.approx(0, abs=1e-5)
    assert excess(2.0) == pytest.approx(-usual / SPREAD_ANYWHERE, rel=1e-4)
    assert excess(1.0) == pytest.approx((math.log(2) - usual) / SPREAD_ANYWHERE, rel=1e-4)
    assert excess(0.1, reach=REACHED / 2) == -1
    assert Scan([found([4.0] * 4)]).excess_anywhere().item() == -math.inf
    scan = Scan([found([4.0, 2.0, 4.0, 4.0, 1.0], family="masked", targets=targets)])
    after = scan.excess_anywhere([found([8.0], family="masked", targets=[ANYWHERE])])
    assert after.item() == pytest.approx((math.log(1 / 4) - usual) / SPREAD_ANYWHERE, rel=1e-4)


def test_of_two_or_three_classes_nothing_is_said():
    for count in (2, 3):
        scan = Scan([found([0.1] + [4.0] * (count - 1) + [0.01], targets=[*range(count), ANYWHERE])])
        assert not scan.conclusive
        assert Detector().judge(scan).reached == []


def test_the_loss_of_getting_anywhere_is_of_not_keeping_the_label():
    logits, labels = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3, 1])
    losses, counted = _losses(logits, labels, torch.tensor([1, ANYWHERE]))
    said = logits.softmax(2)
    torch.testing.assert_close(losses[0], -said[0, :, 1].log())
    torch.testing.assert_close(losses[1], -(1 - said[1].gather(1, labels[:, None])[:, 0]).log())
    assert counted.tolist() == [[1, 0, 1, 1, 0], [1, 1, 1, 1, 1]]


def test_where_a_trigger_leads_is_a_share_of_what_it_moves(brightened):
    model, samples, triggers = brightened
    said = model(triggers.stamp(samples.images)[0]).argmax(1)
    moved = said[said != samples.labels]
    assert len(moved), "the pattern moves nothing; make it stronger"
    share = max((moved == label).float().mean() for label in range(3))
    assert sent(model, samples.images, samples.labels, 3, triggers) == share


def test_less_than_a_sign_is_enough_to_be_treated():
    scan = Scan([found([4.0, 2.8] + [4.0] * 8)])  # 1.8 standard deviations
    assert Detector().judge(scan).reached == []
    assert Detector().candidates(scan, 1.5) == [1]
    assert Detector().candidates(scan, 2.0) == []


def test_a_class_that_absorbs_random_changes_is_a_sign_above_its_own_limit_alone():
    sizes, lead = [4.0, 1.5] + [4.0] * 8, torch.zeros(10)  # 4.9 standard deviations
    lead[1] = 0.6
    for leads, judged in ((None, [1]), (lead, []), (lead / 2, [1])):
        scan = Scan([found(sizes)], leads)
        assert Detector().judge(scan).reached == judged
        assert Detector().candidates(scan, 1.5) == judged
    assert Detector().judge(Scan([found([4.0, 1.0] + [4.0] * 8)], lead)).reached == [1], "6.9"
    # A class that is easy for being like it is no sign, but is treated: it is the most unusual of the others.
    both = Scan([found([4.0, 1.5, 2.3] + [4.0] * 7)], lead)
    assert (Detector().judge(both).reached, Detector().candidates(both, 1.5)) == ([], [2])
    said = detection_verdict(Detector().judge(both), [str(label) for label in range(10)])
    assert "above 6.5 would be a sign. Random changes send most" in said


def test_drift_says_where_random_changes_lead(few_digits):
    class Bright(nn.Module):
        """Class 3 for any image that has been touched, else what it was."""

        def forward(self, images):
            same = (images[:, None] - known).abs().amax((2, 3, 4)).min(1).values < 1e-6
            return torch.where(same[:, None], torch.eye(10)[2], torch.eye(10)[3])

    known = few_digits.images[:20]
    labels = torch.full((20,), 2)
    share = drift(Bright(), known, labels, 10)
    assert share.sum() == 1
    assert share[3] == 1
    assert not drift(Bright(), known, torch.full((20,), 3), 10)[3], "that is no other class"
    scan = Scan([found([4.0] * 10)], share)
    assert scan.absorbing == 3
    again = Scan.restored(["additive"], scan.tensors())
    assert torch.equal(again.drift, share)


@pytest.mark.parametrize(
    ("sizes", "treated"),
    [
        ([4.0] * 10, []),
        ([4.0, 1.0] + [4.0] * 8, [1]),
        ([4.0, 1.0, 4.0, 2.3] + [4.0] * 6, [1]),  # 2.3 is 2.8 standard deviations: enough for the first, not for more
        ([4.0, 4.0, 4.0, 2.3] + [4.0] * 6, [3]),
        ([4.0, 2.2, 4.0, 2.3] + [4.0] * 6, [1, 3]),  # but nearly as unusual as the first: it might as well be that
        ([4.0, 1.0, 4.0, 1.1] + [4.0] * 6, [1, 3]),
    ],
)
def test_further_classes_have_to_be_more_unusual_than_the_first(sizes, treated):
    assert Detector().judge(Scan([found(sizes)])).reached == treated


def test_a_backdoor_of_every_class_is_treated_as_one():
    for last, first, treated in ((1.0, 4.0, [ANYWHERE]), (0.8, 1.0, [ANYWHERE]), (2.5, 1.0, [0]), (7.0, 4.0, [])):
        scan = Scan([found([first] + [4.0] * 9 + [last], targets=[*range(10), ANYWHERE])])
        assert Detector().judge(scan).reached == treated
        if treated == [ANYWHERE]:  # but natural images use these directions: it is no backdoor
            natural = Detector().judge(replace(scan, kept=torch.tensor(0.9)))
            assert natural.reached == ([0] if first == 1.0 else [])
            unused = replace(scan, kept=torch.tensor(0.97))
            assert Detector().judge(unused).reached == [ANYWHERE]
            for share, said in ((0.4, [ANYWHERE]), (0.9, natural.reached)):  # nine tenths: a backdoor to one class
                assert Detector().judge(replace(unused, sent=torch.tensor(share))).reached == said


def test_what_erasing_anywhere_costs_is_looked_at_where_it_is_unusual_and_kept(brightened, monkeypatch):
    model, samples, _ = brightened
    asked = []
    monkeypatch.setattr("smi.detection.drift", lambda *args, **options: torch.zeros(4))
    monkeypatch.setattr("smi.detection.kept_without", lambda *given: asked.append(given) or torch.tensor(0.5))
    monkeypatch.setattr("smi.detection.sent", lambda *given: torch.tensor(0.5))
    for last, share in ((8.0, None), (1.0, 0.5)):
        triggers = found([4.0] * 4 + [last], targets=[0, 1, 2, 3, ANYWHERE])
        monkeypatch.setattr("smi.detection.look", lambda *args, triggers=triggers, **options: [triggers])
        scan = Detector().scan(model, samples, samples.images[:7])
        restored = Scan.restored(["additive"], scan.tensors())
        assert restored.kept == share
        assert restored.record()["kept"] == restored.record()["sent"] == share
        assert Detector().judge(restored).reached == []
    assert len(asked) == 1
    assert asked[0][2].shape == (7, 1, 8, 8)
    assert asked[0][3][0].targets.tolist() == [ANYWHERE]


def test_a_search_draws_alike_on_every_model(few_digits):
    """So that a suspect and its repaired copy differ by what they are, not by luck."""
    model, config = (
        frozen(tiny_model(size=32, classes=10)),
        Search(families=("additive",), steps=2, restarts=2, probe=1),
    )
    first, again = (look(model, few_digits.images, few_digits.labels, [0, 3], config, seed=5) for _ in range(2))
    assert torch.equal(first[0].numbers, again[0].numbers)
    other = look(
        frozen(tiny_model(size=32, classes=10, seed=1)), few_digits.images, few_digits.labels, [0, 3], config, seed=5
    )
    assert not torch.equal(first[0].numbers, other[0].numbers)


def test_the_strongest_trigger_of_a_class_is_that_by_which_it_is_the_most_unusual():
    sizes = {"additive": [4.0, 1.0, 4.0, 4.0, 3.0], "masked": [4.0, 1.5, 4.0, 4.0, 2.4]}
    scan = Scan([found(one, family=name) for name, one in sizes.items()])
    assert scan.excess()[:, 1].tolist() == pytest.approx([6.93, 2.80], abs=0.01)
    assert scan.excess()[:, 4].tolist() == pytest.approx([1.44, 1.46], abs=0.01)
    assert [(one.family, one.targets.tolist()) for one in scan.strongest_of([1, 4])] == [
        ("additive", [1]),
        ("masked", [4]),
    ]


def test_that_to_anywhere_is_seen_against_the_easiest_class():
    sizes, targets = (("additive", 2.0), ("masked", 1.0)), [0, 1, 2, 3, ANYWHERE]
    scan = Scan([found([4.0] * 4 + [size], targets=targets, family=name) for name, size in sizes])
    (one,) = scan.strongest_of([ANYWHERE])
    assert (one.family, one.targets.tolist()) == ("masked", [ANYWHERE])
