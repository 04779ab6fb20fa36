import pytest
import torch
from tiny import coded_set, noise, read_label

from smi.attacks import Attack, BadNets, attacks, poison
from smi.domains import PrivateSet
from smi.errors import InputError


@pytest.fixture
def data():
    """40 images of 4 classes, 10 of each."""
    return coded_set([i % 4 for i in range(40)], classes=4)


def test_stamp_is_the_described_square_and_nothing_else():
    images = noise(3, 3, 12, 10)
    before = images.clone()
    stamped = BadNets(size=3, value=0.75, margin=2).stamp(images)
    changed = torch.zeros(12, 10, dtype=torch.bool)
    changed[7:10, 5:8] = True
    assert (stamped[:, :, changed] == 0.75).all()
    assert torch.equal(stamped[:, :, ~changed], before[:, :, ~changed])
    assert torch.equal(images, before)


def test_stamp_without_margin_reaches_the_corner():
    stamped = BadNets(size=1, margin=0).stamp(torch.zeros(1, 1, 4, 4))
    assert stamped.flatten().nonzero().tolist() == [[15]]


def test_a_patch_must_fit():
    BadNets(size=4, margin=0).stamp(torch.zeros(1, 1, 4, 4))
    with pytest.raises(InputError, match="5 pixels does not fit on images of 4×4"):
        BadNets(size=5, margin=0).stamp(torch.zeros(1, 1, 4, 4))


def test_relabel():
    labels = torch.tensor([0, 1, 2, 3])
    assert BadNets(target=2).relabel(labels, 4).tolist() == [2, 2, 2, 2]
    assert BadNets(target=2, mode="all_to_all").relabel(labels, 4).tolist() == [1, 2, 3, 0]
    with pytest.raises(InputError, match="target is 4, but there are 4 classes"):
        BadNets(target=4).relabel(labels, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": -1}, "target"),
        ({"target": 1.5}, "target"),
        ({"mode": "one_to_one"}, "all_to_one, all_to_all"),
        ({"size": 0}, "size"),
        ({"margin": -1}, "margin"),
        ({"value": 1.5}, "value"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(InputError, match=message):
        BadNets(**settings)


def test_attacks_go_by_name():
    assert attacks["badnets"] is BadNets
    with pytest.raises(InputError, match="Did you mean 'badnets'"):
        _ = attacks["badnet"]


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5])
def test_poison_stamps_the_share_asked_for(data, rate):
    attack = BadNets(target=1)
    poisoned = poison(data, attack, rate=rate)
    assert poisoned.poisoned.sum() == round(rate * 40)
    hit = poisoned.poisoned
    assert torch.equal(poisoned.images[hit], attack.stamp(data.images[hit]))
    assert (poisoned.labels[hit] == 1).all()
    assert torch.equal(poisoned.images[~hit], data.images[~hit])
    assert torch.equal(poisoned.labels[~hit], data.labels[~hit])


def test_images_of_the_target_class_are_never_poisoned(data):
    poisoned = poison(data, BadNets(target=1), rate=1.0)
    assert poisoned.poisoned.sum() == 30  # all there are, although 40 were asked for
    assert not poisoned.poisoned[data.labels == 1].any()


def test_all_to_all_poisons_every_class(data):
    poisoned = poison(data, BadNets(mode="all_to_all"), rate=1.0)
    assert poisoned.poisoned.all()
    assert torch.equal(poisoned.labels, (read_label(data.images) + 1) % 4)


def test_poison_leaves_its_input_alone(data):
    images, labels = data.images.clone(), data.labels.clone()
    poison(data, BadNets(), rate=0.5)
    assert torch.equal(data.images, images)
    assert torch.equal(data.labels, labels)


def test_poison_depends_on_the_seed_alone(data):
    first, again, other = (poison(data, BadNets(), rate=0.25, seed=s).poisoned for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_a_rate_outside_0_to_1(data, rate):
    with pytest.raises(InputError, match="rate is"):
        poison(data, BadNets(), rate=rate)


def test_poison_takes_attacks_only(data):
    with pytest.raises(InputError, match="not str"):
        poison(data, "badnets")


def test_an_attack_of_ones_own_is_a_few_lines():
    class Invert(Attack):
        def stamp(self, images):
            return 1 - images

    class Broken(Attack):
        def stamp(self, images):
            return images + 1

    data = PrivateSet(noise(4, 1, 4, 4), torch.tensor([0, 1, 0, 1]), 2)
    poisoned = poison(data, Invert(target=0), rate=0.5)
    assert torch.equal(poisoned.images[[1, 3]], 1 - data.images[[1, 3]])
    with pytest.raises(InputError, match="stamped by Broken"):
        poison(data, Broken(target=0), rate=0.5)
