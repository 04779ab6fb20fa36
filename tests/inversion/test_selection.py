import pytest
import torch
from tiny import noise, same_state, state_of, tiny_model
from torch import nn

from smi.domains import Samples
from smi.errors import InputError
from smi.inversion import selection
from smi.inversion.selection import Selection, features, select_stable

ANY = Selection(oversample=1, k=2, diversity=0)


class ReadOff(nn.Module):
    """Three classes; the logits are the first three pixels times 20, so an image says what it is taken for."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3, bias=False)
        with torch.no_grad():
            self.linear.weight.copy_(20 * torch.eye(3))

    def forward(self, images):
        return self.linear(images.flatten(1)[:, :3])


@pytest.fixture
def scored(monkeypatch):
    """Replaces the measured scores: ``scored([...])`` gives one score a candidate."""

    def use(scores):
        monkeypatch.setattr(selection, "stability_scores", lambda *args, **kwargs: torch.tensor(scores))

    return use


def candidates(labels, seen=None, spread=None):
    """Images that `ReadOff` takes for the classes ``seen``, told apart in its features by ``spread``."""
    labels = torch.tensor(labels)
    seen = labels if seen is None else torch.tensor(seen)
    spread = torch.linspace(0, 0.3, len(labels)) if spread is None else torch.tensor(spread)
    images = torch.zeros(len(labels), 1, 2, 2)
    images.view(len(labels), 4)[torch.arange(len(labels)), seen] = 0.6 + spread
    images[:, 0, 1, 1] = torch.arange(len(labels)) / 100  # the number of the candidate
    return Samples(images, labels, 3, "smi")


def kept(samples):
    return (samples.images[:, 0, 1, 1] * 100).round().int().tolist()


def test_the_most_stable_of_every_class_are_kept_in_order(scored):
    scored([0.5, 0.1, 0.3, 0.2, 0.4, 0.6, 0.9, 0.7, 0.8])
    chosen = select_stable(ReadOff(), candidates([0, 1, 2] * 3), 2, ANY)
    assert kept(chosen) == [3, 0, 1, 4, 2, 5]
    assert chosen.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert chosen.scores.tolist() == pytest.approx([0.2, 0.5, 0.1, 0.4, 0.3, 0.6])
    assert chosen.source == "smi"


@pytest.mark.parametrize("scores", [[0.1, 0.2, 0.3, 0.4], [-9.0, -7.0, -3.0, -1.0]])
def test_what_the_model_does_not_take_for_its_class_comes_last(scored, scores):
    scored([*scores, 0.0, 0.0])
    samples = candidates([0, 0, 0, 0, 1, 2], seen=[1, 0, 2, 0, 1, 2])
    assert kept(select_stable(ReadOff(), samples, 1, ANY)) == [1, 4, 5]
    more = Samples(samples.images[:4], samples.labels[:4], 1, "smi")
    scored(scores)
    assert kept(select_stable(ReadOff(), more, 3, ANY)) == [1, 3, 0]


def test_near_duplicates_are_passed_over_while_others_are_left(scored):
    scored([0.1, 0.2, 0.3, 0.4])
    samples = candidates([0] * 4, spread=[0.0, 0.001, 0.2, 0.35])
    samples = Samples(samples.images, samples.labels, 1, "smi")
    assert kept(select_stable(ReadOff(), samples, 3, Selection(diversity=0.1))) == [0, 2, 3]
    assert kept(select_stable(ReadOff(), samples, 3, Selection(diversity=0))) == [0, 1, 2]
    assert kept(select_stable(ReadOff(), samples, 4, Selection(diversity=0.1))) == [0, 2, 3, 1]  # filled up


def test_without_diversity_exact_copies_are_kept_too(scored):
    scored([0.1, 0.2, 0.3])
    samples = candidates([0] * 3, spread=[0.1, 0.1, 0.3])
    samples = Samples(samples.images, samples.labels, 1, "smi")
    assert kept(select_stable(ReadOff(), samples, 2, Selection(diversity=0))) == [0, 1]
    assert kept(select_stable(ReadOff(), samples, 2, Selection(diversity=0.05))) == [0, 2]


def test_measured_scores_prefer_what_noise_moves_least():
    """An image on the boundary between two classes against one far from it."""
    images = torch.zeros(2, 1, 2, 2)
    images.view(2, 4)[:, :2] = torch.tensor([[0.52, 0.5], [0.9, 0.1]])
    samples = Samples(images, torch.zeros(2, dtype=torch.int64), 1, "smi")
    chosen = select_stable(ReadOff(), samples, 2, Selection(k=32, diversity=0))
    assert torch.equal(chosen.images, images.flip(0))
    assert chosen.scores[0] < chosen.scores[1] / 10


def test_too_few_candidates():
    with pytest.raises(InputError, match="Class 2 has 1 candidates; 2 are to be kept"):
        select_stable(ReadOff(), candidates([0, 0, 1, 1, 2]), 2, ANY)


def test_the_model_is_left_as_it_was():
    model = tiny_model()
    model.train()
    before = state_of(model)
    select_stable(model, Samples(noise(4, 1, 8, 8), torch.tensor([0, 1, 2, 0]), 3, "smi"), 1, ANY)
    assert same_state(before, state_of(model))


def test_features_are_what_the_last_linear_layer_sees():
    model, images = tiny_model(), noise(5, 1, 8, 8)
    expected = model.body[:4]((images - 0.5) / 0.25)
    assert torch.allclose(features(model, images, batch_size=2), expected, atol=1e-6)
    assert not model.body[4]._forward_pre_hooks
    without = nn.Sequential(nn.Conv2d(1, 3, 8), nn.Flatten())
    assert torch.allclose(features(without, images), without(images), atol=0.05)  # the logits, perhaps in bfloat16


@pytest.mark.parametrize("settings", [{"oversample": 0}, {"k": 0}, {"sigma_x": -1.0}, {"diversity": 1.5}])
def test_settings_are_checked(settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        Selection(**settings)
