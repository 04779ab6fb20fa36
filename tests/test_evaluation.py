import pytest
import torch
from tiny import Lookup, coded_set, read_label, tiny_model

from smi.attacks import BadNets
from smi.domains import Samples
from smi.errors import InputError
from smi.evaluation import Comparison, Evaluator, Measurement, clean_control

LABELS = [0, 0, 0, 1, 1, 2, 2, 2, 2, 3]


def is_stamped(images):
    return images[:, 0, -2, -2] == 1


def backdoored(*, classes=(0, 1, 2, 3), target=0):
    """Right on clean images; sends stamped images of ``classes`` to ``target``."""

    def predict(images):
        label = read_label(images)
        hit = is_stamped(images) & torch.isin(label, torch.tensor(classes))
        return torch.where(hit, target, label)

    return Lookup(predict, 4)


def measure(model, **attack):
    return Evaluator(coded_set(LABELS, 4), BadNets(size=2, **attack)).measure(model)


def test_a_clean_model():
    assert measure(Lookup(read_label, 4), target=0) == Measurement(acc=1.0, asr=0.0, ra=1.0)


def test_a_backdoored_model():
    assert measure(backdoored(), target=0) == Measurement(acc=1.0, asr=1.0, ra=0.0)


def test_asr_leaves_the_target_class_out():
    """4 of the 7 images that are not of class 0 fall for it; with class 0 counted, ASR would be 7 of 10."""
    found = measure(backdoored(classes=(2,)), target=0)
    assert (found.acc, found.asr, found.ra) == pytest.approx((1.0, 4 / 7, 3 / 7))


def test_what_is_neither_the_target_nor_right_counts_for_neither():
    found = measure(backdoored(classes=(1, 2), target=3), target=0)
    assert (found.acc, found.asr, found.ra) == pytest.approx((1.0, 0.0, 1 / 7))


def test_a_constant_model():
    constant = Lookup(lambda images: torch.zeros(len(images), dtype=torch.int64), 4)
    found = measure(constant, target=0)
    assert (found.acc, found.asr, found.ra) == pytest.approx((0.3, 1.0, 0.0))


def test_all_to_all_counts_the_next_class():
    shifted = Lookup(lambda x: torch.where(is_stamped(x), (read_label(x) + 1) % 4, read_label(x)), 4)
    assert measure(shifted, mode="all_to_all") == Measurement(acc=1.0, asr=1.0, ra=0.0)
    found = measure(backdoored(target=0), mode="all_to_all")  # only class 3 has class 0 as its next
    assert (found.asr, found.ra) == pytest.approx((0.1, 0.3))


@pytest.mark.parametrize(
    ("before", "after", "der"),
    [
        ((0.98, 1.0, 0.0), (0.96, 0.03, 0.9), (0.97 - 0.02 + 1) / 2),
        ((0.98, 1.0, 0.0), (0.98, 1.0, 0.0), 0.5),
        ((0.90, 0.5, 0.0), (0.95, 0.0, 0.0), 0.75),  # accuracy gained is not credited
        ((0.90, 0.0, 0.0), (0.60, 0.8, 0.0), 0.35),  # nor is a backdoor that got worse charged
        ((1.00, 1.0, 0.0), (0.00, 0.0, 0.0), 0.5),  # a model that is destroyed has not been defended
    ],
)
def test_der(before, after, der):
    comparison = Comparison(Measurement(*before), Measurement(*after))
    assert comparison.der == pytest.approx(der)
    assert comparison.as_dict() == pytest.approx({"acc": after[0], "asr": after[1], "ra": after[2], "der": der})


def test_compare_measures_both():
    evaluator = Evaluator(coded_set(LABELS, 4), BadNets(size=2, target=0))
    comparison = evaluator.compare(backdoored(), Lookup(read_label, 4))
    assert (comparison.before.asr, comparison.after.asr, comparison.der) == (1.0, 0.0, 1.0)


def test_images_are_not_stamped_in_place():
    data = coded_set(LABELS, 4)
    before = data.images.clone()
    Evaluator(data, BadNets(size=2)).measure(backdoored())
    assert torch.equal(data.images, before)


def test_wrong_input_to_the_evaluator():
    data = coded_set(LABELS, 4)
    with pytest.raises(InputError, match="takes a PrivateSet, not Samples"):
        Evaluator(Samples(data.images, data.labels, 4, "smi"), BadNets())
    with pytest.raises(InputError, match="target is 7"):
        Evaluator(data, BadNets(target=7))
    with pytest.raises(InputError, match="ASR is not defined"):
        Evaluator(coded_set([1, 1], 4), BadNets(target=1))
    with pytest.raises(InputError, match="3 classes, but 4 were expected"):
        Evaluator(data, BadNets()).measure(tiny_model(classes=3))


def test_clean_control():
    data = coded_set([i % 3 for i in range(30)], 3)
    control, again, other = (clean_control(data, per_class=4, seed=s) for s in (0, 0, 1))
    assert (control.source, len(control)) == ("clean", 12)
    assert control.labels.bincount().tolist() == [4, 4, 4]
    assert torch.equal(read_label(control.images), control.labels)
    assert torch.equal(control.images, again.images)
    assert clean_control(data, per_class=10).labels.bincount().tolist() == [10] * 3
    with pytest.raises(InputError, match="Class 0 has 10 images"):
        clean_control(data, per_class=11)
    assert other.num_classes == 3


def test_clean_control_draws_without_repeats_and_by_seed():
    data = coded_set([0] * 20 + [1] * 20, 2)
    data.images[:, 0, 0, 1] = torch.arange(40) / 100  # tell the images apart
    first, other = (clean_control(data, per_class=10, seed=s).images[:, 0, 0, 1].tolist() for s in (0, 1))
    assert len(set(first)) == 20
    assert first != other
