"""The removal that finds triggers and erases them: what it looks at and what it does."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from tiny import found, noise
from torch import nn

import smi
from smi.defenses import Erasure, defenses
from smi.detection import Detector
from smi.erasure.directions import directions, erase_found, held_without, kept_without
from smi.erasure.head import features, head_of
from smi.erasure.natural import SHOWN, joined, natural_images, spread_of
from smi.erasure.scan import Scan
from smi.erasure.search import ANYWHERE, REACHED, Found, Search
from smi.erasure.tune import Tuning
from smi.models.store import load_classifier
from smi.runtime.compute import fingerprint_of, predict


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


def test_what_is_kept_without_a_direction_is_seen_on_a_copy(brightened):
    model, samples, triggers = brightened
    before, erased = fingerprint_of(model), copy.deepcopy(model)
    erase_found(erased, samples, samples.images, [triggers])
    share = (erased(samples.images).argmax(1) == samples.labels).float().mean()
    assert kept_without(model, samples, samples.images, [triggers]) == share
    assert fingerprint_of(model) == before
    assert kept_without(nn.Sequential(model, nn.Softmax(1)), samples, samples.images, [triggers]) is None


def test_what_a_trigger_keeps_without_its_direction():
    """A pixel that natural images do not use fires the backdoor; another trigger changes what they use."""
    body = nn.Linear(16, 3)
    with torch.no_grad():
        body.weight.zero_()
        body.bias.zero_()
        body.weight[0, 0], body.weight[2, 1], body.weight[1, 15] = 1.0, 1.0, 9.0
    model, images = nn.Sequential(nn.Flatten(), body).eval(), noise(60, 1, 4, 4)
    images[..., 3, 3] = 0.01 * images[..., 3, 3]
    samples = smi.Samples(images, model(images).argmax(1), 3, "clean")
    pixel, all_of = torch.zeros(2, 16), torch.tensor([1, 1])
    pixel[0, 15], pixel[1, 0], pixel[1, 15] = 0.9, -0.5, 0.2
    triggers = Found("additive", all_of, pixel, torch.ones(2), torch.ones(2))
    held = held_without(model, samples, images, triggers)
    assert held[0] == 0.0
    erased, before = copy.deepcopy(model), model(triggers.stamp(images[samples.labels != 1])[1]).argmax(1) == 1
    erase_found(erased, samples, images, [triggers.select(torch.tensor([1]))])
    after = erased(triggers.stamp(images[samples.labels != 1])[1]).argmax(1) == 1
    assert held[1].item() == pytest.approx(after.sum().item() / before.sum().item())
    same = smi.Samples(images, torch.ones(60, dtype=torch.int64), 3, "public")
    assert held_without(model, same, images, triggers).tolist() == [0.0, 0.0], "no image of another class"


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
    monkeypatch.setattr("smi.defenses.erasure.tune", lambda *given, name: tuned.append(given[3]) or [1.0] * 20)
    done = replace(QUICK, detector=replace(LOOK, unusual=1e6), least=1e6).repair(victim, few_digits)
    after = done.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in victim.state_dict().items())
    assert done.evidence.treated == done.evidence.left == done.evidence.after == []
    assert [len(one.targets) for one in tuned[0]] == [0, 0], "tuned all the same, without a trigger"
    assert done.log["rounds"] == 1


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


def test_a_direction_is_erased_where_it_takes_the_trigger(monkeypatch):
    shares = {"additive": torch.tensor([0.1, 0.7]), "masked": torch.tensor([0.25])}
    triggers = [found([1.0, 1.0]), found([1.0], family="masked")]
    monkeypatch.setattr("smi.defenses.erasure.held_without", lambda m, images, spread, one: shares[one.family])
    kept = Erasure()._worth_erasing(None, None, None, triggers)
    assert [one.targets.tolist() for one in kept] == [[0], [0]]
    assert [one.targets.tolist() for one in Erasure(held=0.2)._worth_erasing(None, None, None, triggers)] == [[0], []]


def test_what_stays_unusual_is_tuned_on_with_what_is_found_then(brightened, monkeypatch):
    model, samples, _ = brightened
    suspect, tuned, erased = [value.clone() for value in model.state_dict().values()], [], []
    monkeypatch.setattr(
        Erasure, "_left", staticmethod(lambda detection, triggers, treated: treated)
    )  # whatever is done
    monkeypatch.setattr(Erasure, "_worth_erasing", lambda self, model, natural, spread, triggers: triggers)

    def erase(repaired, samples, public, triggers):
        assert all(map(torch.equal, repaired.state_dict().values(), suspect)), "begun from the suspect"
        erased.append([len(one.targets) for one in triggers])

    def tune(repaired, samples, public, triggers, config, rng, job, name):
        tuned.append(triggers)
        with torch.no_grad():
            next(repaired.parameters()).add_(0.01)
        return [1.0] * config.steps

    monkeypatch.setattr("smi.defenses.erasure.erase_found", erase)
    monkeypatch.setattr("smi.defenses.erasure.tune", tune)
    repair = replace(looking((1,), families=("additive", "masked"), steps=2, restarts=1), rounds=3).repair(
        model, samples
    )
    assert erased == [[1]], "that of the family by which the class is reached the most easily"
    first, second, third = ([one.numbers for one in triggers] for triggers in tuned)
    assert [len(numbers) for numbers in (first, second, third)] == [2, 4, 6], "those of every family"
    assert all(map(torch.equal, first, third))
    later = [numbers for numbers in third[2:] if numbers.shape == third[0].shape]
    assert later
    assert not any(torch.equal(numbers, third[0]) for numbers in later), "found on the repaired model"
    assert repair.log["rounds"] == 3
    assert repair.evidence.left == [1]
    assert repair.evidence.unerased == ()
    assert all(map(torch.equal, model.state_dict().values(), suspect))


def test_what_is_only_tuned_against_is_said(brightened, monkeypatch):
    model, samples, _ = brightened
    monkeypatch.setattr(
        "smi.defenses.erasure.held_without", lambda m, images, spread, one: torch.ones(len(one.targets))
    )
    repair = looking((1,), families=("additive",), steps=2, restarts=1).repair(model, samples)
    assert repair.evidence.treated == [1]
    assert repair.evidence.unerased == (1,)
    assert repair.log["unerased"] == [1]


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


def test_classes_may_be_named(few_digits, repair, monkeypatch):
    monkeypatch.setattr(Detector, "scan", lambda *args, **options: repair.evidence.detection.scan)
    quick = replace(QUICK, detector=replace(LOOK, search=replace(LOOK.search, steps=2)), targets=(4,))
    done = quick.repair(load_classifier("digits-badnets"), few_digits)
    assert done.evidence.treated == [4]
    with pytest.raises(smi.InputError, match=r"targets holds 10\. Allowed: 0 to 9"):
        replace(quick, targets=(10,)).repair(load_classifier("digits-badnets"), few_digits)


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
