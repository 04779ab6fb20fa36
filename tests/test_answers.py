"""What a removal learns again from the suspect's answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from thirds import linear_thirds, rng, thirds
from torch import Tensor, nn
from torch.nn import functional as F

from smi.augment import vary
from smi.compute import fast, precision
from smi.defenses import Robust
from smi.defenses.answers import TrustedAnswers
from smi.defenses.base import Distillation
from smi.domains import PublicImages
from smi.errors import InputError

S = thirds(60)
HALF = torch.where(torch.arange(60) < 30, S.labels, (S.labels + 1) % 3)  # half of them not the suspect's labels


class Louder(nn.Module):
    """A model with other confidence and the same labels."""

    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.model(x)


def other() -> nn.Module:
    model = linear_thirds()
    with torch.no_grad():
        model[1].weight.add_(torch.randn(3, 81, generator=rng(5)))
    return model


def loss(suspect: nn.Module, labels: Tensor, public: PublicImages | None = None, **settings: float) -> float:
    with fast(other()) as run:
        return TrustedAnswers(suspect, public, rng(2), **settings)(run, S.images, labels).item()


def by_hand(suspect: nn.Module, temperature: float) -> tuple[Tensor, Tensor]:
    """The distance of each image in float64, and whether its answer is to be trusted."""
    with torch.no_grad():
        varied = vary(S.images, rng(2))
        logits, asked = suspect(varied).double(), other()(varied).double()
    trusted = logits.argmax(1) == HALF
    if not temperature:
        return F.cross_entropy(asked, HALF, reduction="none"), trusted
    p = (logits / temperature).softmax(1)
    return (p * (p.log() - asked.log_softmax(1))).sum(1), trusted


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_answers_are_sharpened_and_only_those_that_a_variation_keeps_count(temperature: float) -> None:
    suspect = linear_thirds()
    distance, trusted = by_hand(suspect, temperature)
    assert 10 < trusted.sum() < 50
    assert distance.mean().item() != pytest.approx(distance[trusted].mean().item(), rel=1e-2)
    with precision("float32"):
        only = loss(suspect, HALF, temperature=temperature)
        everything = loss(suspect, HALF, temperature=temperature, only_trusted=False)
    assert only == pytest.approx(distance[trusted].mean().item(), rel=1e-4)
    assert everything == pytest.approx(distance.mean().item(), rel=1e-4)


def test_at_zero_they_are_labels_alone_and_a_temperature_undoes_as_much_confidence() -> None:
    suspect = linear_thirds()
    louder = Louder(suspect, 2.0)
    assert loss(louder, S.labels) == loss(suspect, S.labels)
    assert loss(louder, S.labels, temperature=1.0) == pytest.approx(loss(suspect, S.labels, temperature=0.5), rel=1e-4)
    assert loss(louder, S.labels, temperature=1.0) != pytest.approx(loss(suspect, S.labels, temperature=1.0), rel=0.01)


def test_all_answers_as_they_are_is_distillation() -> None:
    suspect, public = Louder(linear_thirds(), 3.0), PublicImages(thirds(30).images)
    with fast(other()) as run:
        expected = Distillation(suspect, public, rng(2))(run, S.images).item()
    assert loss(suspect, S.labels, public, temperature=1.0, only_trusted=False) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("per_sample", "shown"), [(0.0, 60), (1.0, 120), (2.5, 210)])
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "only_trusted": False}])  # with labels, and without
def test_public_images_go_beside_samples(per_sample: float, shown: int, settings: dict[str, Any]) -> None:
    for public, expected in ((PublicImages(thirds(30).images), shown), (None, 60)):
        seen: list[int] = []
        answers = TrustedAnswers(linear_thirds(), public, rng(2), per_sample=per_sample, **settings)

        def run(images: Tensor, seen: list[int] = seen) -> Tensor:
            seen.append(len(images))
            return other()(images)

        answers(run, S.images, S.labels)
        assert seen == [expected]


@pytest.mark.parametrize("bad", [{"temperature": 1.5}, {"temperature": -0.1}])
def test_settings_out_of_range_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(bad))):
        Robust(**bad)
