"""The picture of the attacks: what is in it, and what is said of bad input."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import noise, tiny_model

from smi.attacks import Attack, BadNets, Blended, attacks
from smi.domains import PrivateSet
from smi.errors import InputError
from smi.plotting.attacks import draw_attacks

PICTURE = Path(__file__).parents[2] / "notebooks/results/attacks.png"


def data(channels=1):
    return PrivateSet(0.2 + 0.6 * noise(40, channels, 16, 16), torch.arange(40) % 4, 4)


def drawn(figure):
    """Per attack its name, the pixels of its three panels, and what is written below them."""
    for block in figure.subfigs:
        if block.axes:
            panels = [np.asarray(panel.images[0].get_array()) for panel in block.axes]
            yield block._suptitle.get_text(), panels, [panel.get_xlabel() for panel in block.axes]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_row_shows_clean_stamped_and_the_difference_magnified(channels):
    images = data(channels)
    (first, second) = drawn(draw_attacks(images, ["badnets", "blended"], index=5))
    assert (first[0], second[0]) == ("badnets", "blended")
    for (_, (clean, stamped, difference), texts), attack in ((first, BadNets()), (second, Blended())):
        shown = [image[0].permute(1, 2, 0).numpy() for image in (images.images[5:6], attack.stamp(images.images[5:6]))]
        assert np.allclose(clean, np.broadcast_to(shown[0], clean.shape))
        assert np.allclose(stamped, np.broadcast_to(shown[1], stamped.shape))
        assert texts[:2] == ["clean", "stamped"]
        factor = int(texts[2].removeprefix("difference × "))
        assert np.allclose(difference, factor * (shown[1] - shown[0]).mean(2), atol=1e-6)
        assert 0.3 < np.abs(difference).max() <= 1, "as strong as it may be"


def test_differences_are_signed_about_a_neutral_middle():
    panel = draw_attacks(data(), ["badnets"]).subfigs[0].axes[2]
    assert panel.images[0].get_clim() == (-1, 1)
    middle, darker, brighter = (panel.images[0].cmap(panel.images[0].norm(v))[:3] for v in (0, -0.5, 0.5))
    assert max(middle) - min(middle) < 0.02
    assert darker[0] > darker[2], "orange"
    assert brighter[2] > brighter[0], "blue"


def test_attacks_that_are_fitted_or_trained_are_drawn(monkeypatch):
    calls = []

    class Trained(BadNets):
        def train(self, data, config, rate, seed):
            calls.append((rate, seed))
            return None, BadNets(size=2)

    mapping = {"trained": Trained, "l2_inv": lambda: attacks["l2_inv"](steps=2)}
    monkeypatch.setattr("smi.plotting.attacks.attacks", mapping)
    trained, fitted = drawn(draw_attacks(data(), surrogate=tiny_model(1, 16, 4), seed=3))
    assert (trained[0], fitted[0]) == ("trained", "l2_inv")
    assert calls == [(Attack.rate, 3)]
    assert (trained[1][2] != 0).sum() == 4, "what its training made is drawn"
    assert np.abs(fitted[1][2]).max() > 0


def test_bad_input():
    with pytest.raises(InputError, match="Did you mean 'badnets'"):
        draw_attacks(data(), ["badnet"])
    with pytest.raises(InputError, match="No attacks are named"):
        draw_attacks(data(), [])
    with pytest.raises(InputError, match="Allowed: 0 to 39"):
        draw_attacks(data(), ["badnets"], index=40)


def test_the_readmes_picture_is_sharp_and_small():
    with Image.open(PICTURE) as picture:
        assert picture.width >= 1600, "twice the width at which it is shown"
    assert PICTURE.stat().st_size < 300_000
    readme = (PICTURE.parents[2] / "README.md").read_text()
    assert "notebooks/results/attacks.png" in readme
