"""The removal that finds triggers and erases them: what it looks at, what it decides, what it does and what it says."""

import copy
import json
import math
from dataclasses import replace

import fake_run
import pytest
import torch
from tiny import noise, tiny_model
from torch import nn

import smi
from smi.compute import fingerprint_of, frozen, predict
from smi.defenses import Erasure, Repair, defenses
from smi.defenses.base import Evidence
from smi.detection import Detection, Detector
from smi.erasure.directions import directions, erase_found, kept_without
from smi.erasure.families import families
from smi.erasure.head import features, head_of
from smi.erasure.natural import SHOWN, joined, natural_images, spread_of
from smi.erasure.scan import SPREAD_ANYWHERE, Scan, drift, look, sent
from smi.erasure.search import ANYWHERE, REACHED, Found, Search, _losses
from smi.erasure.tune import Tuning
from smi.models import load_classifier
from smi.report import detection_verdict, removal_page, removal_verdict
from smi.sections import reason

SHAPE = torch.Size((1, 32, 32))


def found(sizes, reach=0.9, family="additive", targets=None, seed=0):
    """Triggers whose sizes are given and whose pattern means nothing."""
    count = len(sizes)
    targets = torch.arange(count) if targets is None else torch.tensor(targets)
    numbers = families[family].start(count, SHAPE, torch.Generator().manual_seed(seed))
    reached = torch.full((count,), reach) if isinstance(reach, float) else torch.tensor(reach)
    return Found(family, targets, numbers, torch.tensor(sizes), reached)


# Which classes are unusual ------------------------------------------------------------------------------------------


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


# Directions ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def brightened():
    """A model, samples that it labels itself, and a pattern that brightens them."""
    model, images = tiny_model(), noise(60, 1, 8, 8)
    labels = model(images).argmax(1)
    triggers = Found("additive", torch.tensor([1]), torch.full((1, 64), 0.4), torch.ones(1), torch.ones(1))
    return model, smi.Samples(images, labels, 3, "clean"), triggers


def test_a_direction_is_the_mean_shift_of_other_classes_features(brightened):
    model, samples, triggers = brightened
    head = head_of(model, samples.images[:2])
    others = samples.images[samples.labels != 1]
    expected = (features(model, head, triggers.stamp(others)[0]) - features(model, head, others)).mean(0)
    torch.testing.assert_close(directions(model, head, samples, [triggers])[0], expected)
    weak = replace(triggers, reach=torch.tensor([REACHED / 2]))
    assert directions(model, head, samples, [weak]).shape == (0, len(expected))


def test_a_trigger_to_anywhere_has_a_direction_a_class_that_it_moves(brightened):
    model, samples, triggers = brightened
    head, anywhere = head_of(model, samples.images[:2]), replace(triggers, targets=torch.tensor([ANYWHERE]))
    rows = directions(model, head, samples, [anywhere])
    stamped = triggers.stamp(samples.images)[0]
    moved = model(stamped).argmax(1) != samples.labels
    shift = features(model, head, stamped) - features(model, head, samples.images)
    expected = [
        shift[moved & (samples.labels == label)].mean(0)
        for label in range(3)
        if moved[samples.labels == label].float().mean() > REACHED
    ]
    assert expected, "the pattern moves nothing; make it stronger"
    torch.testing.assert_close(rows, torch.stack(expected))


def test_where_a_trigger_leads_is_a_share_of_what_it_moves(brightened):
    model, samples, triggers = brightened
    said = model(triggers.stamp(samples.images)[0]).argmax(1)
    moved = said[said != samples.labels]
    assert len(moved), "the pattern moves nothing; make it stronger"
    share = max((moved == label).float().mean() for label in range(3))
    assert sent(model, samples.images, samples.labels, 3, triggers) == share


def test_what_is_kept_without_a_direction_is_seen_on_a_copy(brightened):
    model, samples, triggers = brightened
    before, erased = fingerprint_of(model), copy.deepcopy(model)
    erase_found(erased, samples, samples.images, [triggers])
    share = (erased(samples.images).argmax(1) == samples.labels).float().mean()
    assert kept_without(model, samples, samples.images, [triggers]) == share
    assert fingerprint_of(model) == before
    assert kept_without(nn.Sequential(model, nn.Softmax(1)), samples, samples.images, [triggers]) is None


# The removal --------------------------------------------------------------------------------------------------------

LOOK = Detector(search=Search(families=("additive", "masked"), steps=20, restarts=1))
QUICK = Erasure(detector=LOOK, tuning=Tuning(steps=20), rounds=1)


def looking(targets, **search):
    """A removal of these classes that hardly looks."""
    return replace(QUICK, detector=Detector(search=Search(**search)), targets=targets)


@pytest.fixture(scope="module")
def repair(digits, few_digits):
    return QUICK.repair(load_classifier("digits-badnets"), few_digits, digits.public, seed=3)


def test_it_finds_the_target_and_removes_the_backdoor(digits, few_digits, repair):
    victim, evaluator = load_classifier("digits-badnets"), smi.Evaluator(digits.private.test, smi.attacks.BadNets())
    before, after = evaluator.measure(victim), evaluator.measure(repair.model)
    assert 0 in repair.evidence.treated
    assert repair.evidence.detection.scan.excess().amax(0).argmax() == 0
    assert before.asr > 0.9
    assert after.asr < 0.1
    assert before.acc - after.acc < 0.02
    assert repair.evidence.excess_after()[0] < repair.evidence.detection.scan.excess()[:, 0].max() / 2
    assert json.loads(json.dumps(repair.log))["treated"] == repair.evidence.treated


def test_the_same_seed_gives_the_same_weights(brightened):
    model, samples, _ = brightened
    quick = looking((1,), steps=3, restarts=2, probe=2)
    model.requires_grad_(False)  # a flag is no reason to leave a weight as it was
    once, again, other = (quick.repair(model, samples, seed=seed).model.state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(value, again[name]) for name, value in once.items())
    assert not all(torch.equal(value, other[name]) for name, value in once.items())


def test_what_was_searched_is_not_searched_again(brightened, tmp_path, monkeypatch):
    model, samples, _ = brightened
    quick = looking((1,), steps=2, restarts=1)
    whole = quick.repair(model, samples)

    def stopped(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("smi.defenses.erasure.tune", stopped)
        with pytest.raises(KeyboardInterrupt):
            quick.repair(model, samples, checkpoint=tmp_path / "state")
    monkeypatch.setattr(Detector, "scan", stopped)
    resumed = quick.repair(model, samples, checkpoint=tmp_path / "state")
    assert resumed.log == whole.log
    after = whole.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in resumed.model.state_dict().items())


def test_what_detect_found_is_not_searched_again(few_digits, digits, repair, monkeypatch):
    victim = load_classifier("digits-badnets")
    once, of_five = smi.detect(victim, few_digits, digits.public, LOOK, seed=3), found([4.0] * 5)
    monkeypatch.setattr(Detector, "scan", None)
    given = replace(QUICK, detection=once)
    again = given.repair(victim, few_digits, digits.public, seed=3)
    assert again.evidence.detection is once
    after = repair.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in again.model.state_dict().items())
    assert given.settings() == QUICK.settings() == again.settings
    with pytest.raises(smi.InputError, match="detection is of 5 classes, the samples of 10"):
        replace(QUICK, detection=Detector().judge(Scan([of_five]))).repair(victim, few_digits)


def test_where_nothing_stands_out_nothing_is_erased_and_answers_are_kept(digits, few_digits, repair, monkeypatch):
    monkeypatch.setattr(Detector, "scan", lambda *args, **options: repair.evidence.detection.scan)
    victim, tuned = load_classifier("digits-badnets"), []
    monkeypatch.setattr("smi.erasure.directions.erase", None)
    monkeypatch.setattr("smi.defenses.erasure.tune", lambda *given: tuned.append(given[3]) or [1.0] * 20)
    done = replace(QUICK, detector=replace(LOOK, unusual=1e6), least=1e6).repair(victim, few_digits)
    after = done.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in victim.state_dict().items())
    assert done.evidence.treated == done.evidence.left == done.evidence.after == []
    assert [len(one.targets) for one in tuned[0]] == [0, 0], "tuned all the same, without a trigger"
    assert done.log["rounds"] == 1


def test_less_than_a_sign_is_enough_to_be_treated():
    scan = Scan([found([4.0, 2.8] + [4.0] * 8)])  # 1.8 standard deviations
    assert Detector().judge(scan).reached == []
    assert Detector().candidates(scan, 1.5) == [1]
    assert Detector().candidates(scan, 2.0) == []


def test_less_than_a_sign_is_treated_where_natural_images_hardly_notice(brightened, monkeypatch):
    model, samples, _ = brightened
    scan = Scan([found([4.0, 1.0, 2.7] + [4.0] * 7)])  # excess of 6.9, a sign, and 2.0, less than one
    weak = Scan([found([4.0, 2.8, 2.9] + [4.0] * 7)])  # 1.8 and 1.6
    costs = {(2,): 0.99, (1,): 0.98, (1, 2): 0.9}

    def share(model, images, spread, shown):
        return torch.tensor(costs[tuple(sorted(torch.cat([one.targets for one in shown]).tolist()))])

    monkeypatch.setattr("smi.defenses.erasure.kept_without", share)
    erasure = replace(QUICK, detector=replace(LOOK, others=1.7))

    def treated(scan):
        return erasure._treated(model, samples, samples.images, erasure.detector.judge(scan))

    assert treated(scan) == [1, 2], "a sign whatever it costs"
    assert treated(weak) == [1], "both together cost too much: the more unusual one"
    costs[(1,)] = 0.9
    assert treated(weak) == [2]
    costs[(2,)] = 0.9
    assert (treated(weak), treated(scan)) == ([], [1])


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


def test_what_stays_unusual_is_tuned_on_with_what_is_found_then(brightened, monkeypatch):
    model, samples, _ = brightened
    suspect, tuned, erased = [value.clone() for value in model.state_dict().values()], [], []
    monkeypatch.setattr(
        Erasure, "_left", staticmethod(lambda detection, triggers, treated: treated)
    )  # whatever is done
    monkeypatch.setattr(Erasure, "_kinds", lambda self, scan, triggers: triggers)

    def erase(repaired, samples, public, triggers):
        assert all(map(torch.equal, repaired.state_dict().values(), suspect)), "begun from the suspect"
        erased.append([len(one.targets) for one in triggers])

    def tune(repaired, samples, public, triggers, config, rng):
        tuned.append(triggers)
        with torch.no_grad():
            next(repaired.parameters()).add_(0.01)
        return [1.0] * config.steps

    monkeypatch.setattr("smi.defenses.erasure.erase_found", erase)
    monkeypatch.setattr("smi.defenses.erasure.tune", tune)
    repair = replace(looking((1,), families=("additive", "masked"), steps=2, restarts=1), rounds=3).repair(
        model, samples
    )
    assert erased == [[1, 1]]
    assert [[len(one.targets) for one in triggers] for triggers in tuned] == [[1, 1], [2, 2], [3, 3]]
    first, *later = tuned[2][0].numbers
    assert torch.equal(first, tuned[0][0].numbers[0])
    assert not any(torch.equal(first, other) for other in later), "found on the repaired model"
    assert repair.log["rounds"] == 3
    assert repair.evidence.left == [1]
    assert all(map(torch.equal, model.state_dict().values(), suspect))


def test_with_public_images_triggers_are_searched_on_them_and_erased_by_their_spread(brightened, monkeypatch):
    model, samples, triggers = brightened
    public, seen = smi.PublicImages(0.5 * noise(50, 1, 8, 8, seed=5)), []
    monkeypatch.setattr("smi.detection.look", lambda model, *given, **options: seen.append(given) or [triggers])
    for given, expected in ((public, public.images), (None, samples.images)):
        shown = natural_images(model, samples, given)
        assert sorted(shown.images.sum((1, 2, 3)).tolist()) == sorted(expected.sum((1, 2, 3)).tolist())
        assert torch.equal(shown.labels, predict(model, shown.images).argmax(1)) or given is None
        Detector().scan(model, shown, spread_of(samples, given))
        assert torch.equal(seen[-1][0], shown.images)
        assert torch.equal(spread_of(samples, given), expected)
        both = joined(samples, shown)
        assert len(both) == len(samples) + (len(public) if given else 0)


def test_public_images_are_as_many_as_are_needed(brightened):
    model, samples, _ = brightened
    many = smi.PublicImages(noise(3 * SHOWN, 1, 8, 8))
    first, again, other = (natural_images(model, samples, many, seed=seed).images for seed in (0, 0, 1))
    assert len(first) == SHOWN
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_triggers_are_erased_of_the_two_families_that_reach_their_class_the_most_easily():
    sizes = ([4.0, 1.0, 4.0, 4.0, 3.0], [4.0, 1.5, 4.0, 4.0, 4.0], [4.0, 3.0, 4.0, 4.0, 4.1], [4.0, 2.9, 4.0, 4.0, 4.1])
    names = ("additive", "masked", "smooth", "warped")
    scan = Scan([found(one, family=name) for one, name in zip(sizes, names, strict=True)])
    assert scan.excess()[:, 1].tolist() == pytest.approx([6.93, 2.80, 1.15, 1.61], abs=0.01)
    assert scan.excess()[:, 4].tolist() == pytest.approx([1.44, 0.0, -0.10, -0.12], abs=0.01)
    kept = Erasure()._kinds(scan, scan.of([1, 4]))
    assert [one.targets.tolist() for one in kept] == [[1, 4], [1], [], []]


def test_of_a_trigger_to_anywhere_the_most_unusual_family_is_erased():
    targets = [0, 1, 2, 3, ANYWHERE]
    scan = Scan(
        [found([4.0] * 4 + [size], targets=targets, family=name) for name, size in (("additive", 2.0), ("masked", 1.0))]
    )
    kept = Erasure()._kinds(scan, scan.of([ANYWHERE]))
    assert [len(one.targets) for one in kept] == [0, 1]


def test_classes_may_be_named(few_digits, repair, monkeypatch):
    monkeypatch.setattr(Detector, "scan", lambda *args, **options: repair.evidence.detection.scan)
    quick = replace(QUICK, detector=replace(LOOK, search=replace(LOOK.search, steps=2)), targets=(4,))
    done = quick.repair(load_classifier("digits-badnets"), few_digits)
    assert done.evidence.treated == [4]
    with pytest.raises(smi.InputError, match=r"targets holds 10\. Allowed: 0 to 9"):
        replace(quick, targets=(10,)).repair(load_classifier("digits-badnets"), few_digits)


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


def test_a_model_without_a_linear_head_is_refused_before_any_work(few_digits, monkeypatch):
    monkeypatch.setattr("smi.detection.look", None)
    odd = nn.Sequential(load_classifier("digits-badnets"), nn.Softmax(1))
    with pytest.raises(smi.InputError, match="not the output of its last linear layer"):
        QUICK.repair(odd, few_digits)
    monkeypatch.setattr("smi.pipeline.invert", None)
    with pytest.raises(smi.InputError, match="not the output of its last linear layer"):
        smi.remove_backdoor(odd, smi.load_prior("digits"))


def test_it_goes_by_its_name_and_by_another_than_ibau():
    assert defenses["erasure"] is Erasure
    assert Erasure().settings()["defense"] == "erasure"
    with pytest.raises(smi.InputError, match="rounds"):
        Erasure(rounds=0)


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


# What the report says -----------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(("asked", "why"), [(True, "because that was asked for"), (False, "all the same")])
def test_no_signs_are_claimed_where_a_class_was_treated_without_one(asked, why):
    said = removal_verdict(seen([1], [], reached=[], asked=asked))
    assert said.startswith("No sign of a backdoor was found")
    assert f"The triggers to class “<b>1” were erased {why}" in said
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
