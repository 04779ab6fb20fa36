"""Explorers: a pure computation, callbacks that reach the view, and outputs that a static page can show."""

import base64

import pytest
import torch
from matplotlib.figure import Figure
from tiny import TinyPrior, noise, tiny_model

from smi.attacks import BadNets
from smi.domains.base import PrivateSet, Samples
from smi.errors import InputError
from smi.inversion.pixel import total_variation
from smi.models.classifiers import build_classifier
from smi.runtime.compute import predict
from smi.tutorial.explorers import (
    LatentExplorer,
    NoiseExplorer,
    Picture,
    PixelExplorer,
    ScoreExplorer,
    StabiliseExplorer,
    StabilityExplorer,
    StudyExplorer,
    TriggerExplorer,
    UniversalExplorer,
    WorldExplorer,
    image_row,
)
from smi.tutorial.explorers.latent import slerp
from smi_kernels.noise import PARAMETERS, draw, families

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def model():
    return build_classifier("small_cnn", 1, 3, seed=1).eval()


@pytest.fixture(scope="module")
def samples():
    rng = torch.Generator().manual_seed(2)
    return Samples(torch.rand(12, 1, 32, 32, generator=rng), torch.arange(3).repeat_interleave(4), 3, "toy")


@pytest.fixture
def explorer(model, samples):
    return StabilityExplorer(model, samples, limit=3)


def test_compute_is_pure_and_deterministic(explorer):
    values, state, readout = explorer.values, explorer.state, explorer.readout
    other = explorer.compute(label=2, sigma_x=0.2, sigma_w=0.3, k=4)
    again = explorer.compute(label=2, sigma_x=0.2, sigma_w=0.3, k=4)
    assert torch.equal(other.scores, again.scores)
    assert torch.equal(other.images, again.images)
    assert (explorer.values, explorer.state, explorer.readout) == (values, state, readout)


def test_images_come_from_the_class_most_stable_first(explorer, samples):
    result = explorer.compute(label=1, sigma_x=0.1, sigma_w=0.2, k=4)
    assert len(result.images) == 3
    assert (result.scores.diff() >= 0).all()
    of_class = samples.images[samples.labels == 1]
    assert all(any(torch.equal(image, one) for one in of_class) for image in result.images)


def test_without_noise_every_score_is_zero(explorer):
    assert explorer.compute(label=0, sigma_x=0.0, sigma_w=0.0, k=1).scores.abs().max() == 0


@pytest.mark.parametrize(("control", "value"), [("label", 1), ("sigma_x", 0.3), ("sigma_w", 0.2), ("k", 4)])
def test_a_control_changes_state_readout_and_picture(explorer, control, value, monkeypatch):
    monkeypatch.setattr(explorer, "_settings", lambda: "")  # these change by themselves
    explorer.controls["label"].value, explorer.controls["label"].value = 2, 0  # drawn again, without them
    state, readout, picture = explorer.state, explorer.readout, explorer.picture.png
    explorer.controls[control].value = value
    assert explorer.state[control] == value
    assert explorer.state != state
    assert explorer.readout != readout
    assert explorer.picture.png != picture
    assert explorer.status == ""


def test_the_same_settings_give_the_same_picture_again(explorer):
    before = explorer.picture.png
    explorer.controls["label"].value = 1
    explorer.controls["label"].value = 0
    assert explorer.picture.png == before


def test_an_exception_is_shown_and_the_last_good_figure_stays(explorer, monkeypatch):
    readout, bundle = explorer.readout, explorer._repr_mimebundle_()

    def fail(**values):
        raise ValueError("no <such> thing")

    monkeypatch.setattr(explorer, "compute", fail)
    explorer.controls["label"].value = 1
    assert "no &lt;such&gt; thing" in explorer.status
    assert 'role="alert"' in explorer.status
    assert explorer.readout == readout
    assert explorer._repr_mimebundle_()["image/png"] == bundle["image/png"]

    monkeypatch.undo()
    explorer.controls["label"].value = 2
    assert explorer.status == ""
    assert explorer.readout != readout


def test_state_is_plain_and_rounded(explorer):
    for value in explorer.state.values():
        assert isinstance(value, int | float)
        assert value == float(f"{value:.3g}")


def test_repr_is_stable(explorer, model, samples):
    assert repr(explorer) == "StabilityExplorer(label=0, sigma_x=0.03, sigma_w=0.05, k=16)"
    assert repr(explorer) == repr(StabilityExplorer(model, samples, limit=3))


def test_mimebundle_has_widget_picture_and_text(explorer):
    bundle = explorer._repr_mimebundle_()
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == explorer.widget.model_id
    assert base64.b64decode(bundle["image/png"]).startswith(PNG)
    assert bundle["text/plain"] == repr(explorer)


def test_the_view_is_a_figure_with_alt_text_and_caption(explorer):
    assert '<img alt="3 images of class 0' in explorer.readout
    assert "<figcaption>Class 0: scores from" in explorer.readout


def test_controls_wait_for_release_and_fit_the_keyboard(explorer):
    for name in ("sigma_x", "sigma_w", "k"):
        assert not explorer.controls[name].continuous_update
    assert all(control.description for control in explorer.controls.values())


def test_the_picture_says_its_settings(explorer, monkeypatch):
    draw, drawn = explorer.figure, []
    monkeypatch.setattr(explorer, "figure", lambda result: drawn.append(draw(result)) or drawn[-1])
    explorer.controls["sigma_x"].value = 0.2
    (figure,) = drawn
    assert figure.get_suptitle() == "Class: 0   Noise on pixels σ_x: 0.2   on weights σ_w: 0.05   Draws K: 16"


def test_class_names_are_shown(model, samples):
    explorer = StabilityExplorer(model, samples, names=("ant", "bee", "cat"))
    assert explorer.controls["label"].options == (("ant", 0), ("bee", 1), ("cat", 2))


def test_wrong_samples_are_refused(model):
    with pytest.raises(InputError, match="samples is a Tensor"):
        StabilityExplorer(model, torch.rand(3, 1, 32, 32))


def test_two_scorings_agree_more_with_more_draws():
    samples = Samples(noise(40, 1, 32, 32), torch.arange(40) % 3, 3, "toy")  # of a dozen two orders may agree by luck
    model = tiny_model(size=32)  # one whose logits differ between images
    explorer = ScoreExplorer(model, samples)
    few = explorer.compute(sigma_x=0.1, sigma_w=0.1, k=1, family="gaussian")
    many = explorer.compute(sigma_x=0.1, sigma_w=0.1, k=64, family="gaussian")
    assert few.agreement < many.agreement <= 1
    assert not torch.equal(many.first, many.second)
    certain = predict(model, samples.images).softmax(1).gather(1, samples.labels[:, None])[:, 0]
    assert torch.allclose(many.certainty, certain, atol=1e-3)
    other = explorer.compute(sigma_x=0.1, sigma_w=0.1, k=64, family="rank1")
    assert not torch.equal(many.first, other.first)


def test_scores_that_are_all_zero_have_no_order_and_are_drawn(model, samples):
    explorer = ScoreExplorer(model, samples, limit=5)
    assert len(explorer.samples) == 5
    explorer.controls["sigma_x"].value = 0.0
    explorer.controls["sigma_w"].value = 0.0
    assert explorer.state["median"] == explorer.state["agreement"] == 0
    assert explorer.status == ""
    with pytest.raises(InputError, match="samples is a Tensor"):
        ScoreExplorer(model, torch.rand(3, 1, 32, 32))


@pytest.fixture(scope="module")
def stabilising():
    return StabiliseExplorer(tiny_model(), TinyPrior(), classes=3, steps=4)


def test_a_search_with_a_button_waits_for_it(stabilising):
    readout, state = stabilising.readout, stabilising.state
    stabilising.controls["lambda_x"].value = 3.0
    assert stabilising.readout == readout
    assert "Press the button" in stabilising.status
    stabilising.button.click()
    assert stabilising.status == ""
    assert stabilising.readout != readout
    assert stabilising.state["with"] != state["with"]
    assert stabilising.state["without"] == state["without"]


def test_without_weight_both_searches_are_one_and_each_term_changes_the_second(stabilising):
    none = {"label": 1, "lambda_x": 0.0, "epsilon": 1.0, "lambda_w": 0.0, "rho": 0.1}
    found = stabilising.compute(**none)
    assert torch.equal(found.without.images, found.with_terms.images)
    for term in ("lambda_x", "lambda_w"):
        changed = stabilising.compute(**(none | {term: 3.0}))
        assert torch.equal(changed.without.images, found.without.images)
        assert not torch.equal(changed.with_terms.images, found.with_terms.images)


@pytest.fixture
def study():
    base = {"domain": "d", "seed": 0, "n": 3, "acc_before": 1.0, "asr_before": 1.0, "seconds": 1.0}
    names = ("attack", "source", "defense", "acc", "asr", "der")
    values = [
        ("a", "smi", "ibau", 0.9, 0.1, 0.9), ("b", "smi", "ibau", 0.8, 0.3, 0.7),
        ("a", "clean", "ibau", 0.7, 0.0, 0.85), ("b", "clean", "ibau", 0.7, 0.6, 0.65),
        ("a", "none", "clp", 0.5, 0.5, 0.5),
    ]  # fmt: skip
    return [base | dict(zip(names, value, strict=True)) for value in values]


def test_a_study_is_shown_best_first_with_the_worst_of_each(study):
    explorer = StudyExplorer(study, {"smi": "SMI"})
    bars = explorer.compute(defense="ibau", attack="all attacks", seed="all seeds", rate="DER, both in one")
    assert list(bars.mean) == ["smi", "clean"]
    assert bars.mean == pytest.approx({"smi": 80.0, "clean": 75.0})
    assert bars.worst == pytest.approx({"smi": 70.0, "clean": 65.0})
    assert bars.cells == {"smi": 2, "clean": 2}
    low = explorer.compute(defense="ibau", attack="a", seed="0", rate="ASR, attack success (remove)")
    assert list(low.mean) == ["clean", "smi"], "for attack success the lowest is the best"
    assert "Best: SMI, 80.0 % over 2 removals" in explorer.readout
    labels = [label.get_text() for label in explorer.figure(bars).axes[0].get_yticklabels()]
    assert labels == ["SMI", "clean"]


def test_where_a_study_is_still_running_the_bars_say_of_how_many_removals(study):
    more = [*study, study[0] | {"seed": 1, "asr": 0.3, "der": 0.8}]
    explorer = StudyExplorer(more, {"smi": "SMI"})
    bars = explorer.compute(defense="ibau", attack="all attacks", seed="all seeds", rate="DER, both in one")
    labels = [label.get_text() for label in explorer.figure(bars).axes[0].get_yticklabels()]
    assert labels == ["SMI (3 removals)", "clean (2 removals)"]
    one = explorer.compute(defense="ibau", attack="all attacks", seed="1", rate="DER, both in one")
    assert one.mean == pytest.approx({"smi": 80.0})


def test_a_study_without_such_cells_says_so(study):
    explorer = StudyExplorer(study)
    explorer.controls["defense"].value = "clp"
    explorer.controls["attack"].value = "b"
    assert "No removal of this kind" in explorer.readout
    assert explorer.status == ""
    with pytest.raises(InputError, match="no rows"):
        StudyExplorer([])


def test_the_world_says_excluded_only_where_it_is_true():
    explorer = WorldExplorer()
    assert explorer.state["excludes"] == 1
    assert "excludes the trigger; the nearest image of the circle is 3 away" in explorer.readout
    explorer.controls["trigger"].value = 1.0
    assert explorer.state["excludes"] == 0
    assert "nothing follows; and the circle does reach it" in explorer.readout
    for trigger in (0.5, 2.0, 3.0, 5.0):
        for radius in (0.5, 2.0):
            verdict = explorer.compute(slack=0.8, radius=radius, trigger=trigger, eta=0.02)
            assert not verdict.sides.excludes or verdict.closest > explorer.reach


def test_the_noise_shown_is_the_packages_and_counters_are_counted():
    explorer = NoiseExplorer()
    shown = explorer.compute(family="gaussian", k=3, tile=8)
    assert torch.equal(shown.noise, draw(families["gaussian"], {0: (32, 32)}, seed=7, k=3, stream=PARAMETERS)[0])
    assert (shown.rank, shown.counters) == (32, 8 * 8 // 4)
    assert explorer.compute(family="rademacher", k=0, tile=4).counters == 1
    stripes = explorer.compute(family="rank1", k=0, tile=8)
    assert (stripes.rank, stripes.counters) == (1, None)
    explorer.controls["family"].value = "flipout"
    assert "the values of its 16 rows and 16 columns" in explorer.readout
    assert explorer.status == ""


def test_pictures_are_reproducible_and_described():
    def draw():
        figure = Figure(figsize=(3, 1))
        image_row(figure.subplots(), torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), ["a", "b"])
        return Picture(figure, 'two "colour" images')

    one, two = draw(), draw()
    assert one.png == two.png
    assert repr(one) == 'Picture: two "colour" images'
    assert 'alt="two &quot;colour&quot; images"' in one.html("caption & more")
    assert "caption &amp; more" in one.html("caption & more")
    assert set(one._repr_mimebundle_()) == {"image/png", "text/plain"}


@pytest.fixture(scope="module")
def test_images():
    return PrivateSet(noise(40, 1, 32, 32), torch.arange(40) % 4, 4)


def test_the_trigger_explorer_measures_the_stamped_images_of_other_classes(test_images):
    class Bright(torch.nn.Module):
        """Says 0 where the lower right corner is white."""

        def forward(self, x):
            white = (x[:, 0, 27:31, 27:31].mean((1, 2)) > 0.99).float()
            return torch.stack([white, 1 - white, torch.zeros_like(white), torch.zeros_like(white)], 1)

    explorer = TriggerExplorer(Bright(), test_images, train_size=1000)
    values = {"trigger": "badnets", "size": 4, "opacity": 1.0, "rate": 0.05}
    own = explorer.compute(**values)
    assert (own.asr, own.poisoned) == (1.0, 50)
    assert own.answers == [0, 0, 0]  # one image of each of the classes 1 to 3
    others = test_images.images[test_images.labels != 0]
    expected = (BadNets(size=4).stamp(others) - others).flatten(1).norm(dim=1).mean().item()
    assert own.moved == pytest.approx(expected, rel=1e-5)
    half = explorer.compute(**(values | {"opacity": 0.5}))
    assert half.asr == 0
    assert half.moved == pytest.approx(expected / 2, rel=1e-5)
    assert explorer.compute(**(values | {"size": 3})).asr == 0
    assert explorer.compute(**(values | {"trigger": "blended"})).asr == 0
    assert explorer.compute(**(values | {"opacity": 0.0})).moved == 0
    explorer.controls["size"].value = 3
    assert "ASR 0 %" in explorer.readout
    assert "50 of 1,000" not in explorer.readout  # the control stands at 10 %
    assert "100 of 1,000 training images" in explorer.readout


class Corner(torch.nn.Module):
    """Says 0 where the first pixel is brighter than 0.5, and else 1: one small change sends all images to 0."""

    def forward(self, x):
        first = 20 * (x[:, 0, 0, 0] - 0.5)
        return torch.stack([first, torch.zeros_like(first), torch.full_like(first, -9.0)], 1)


@pytest.fixture
def universal():
    images = noise(30, 1, 8, 8) * 0.3
    return UniversalExplorer({"suspect": Corner()}, Samples(images, torch.arange(30) % 3, 3, "toy"))


def test_the_universal_explorer_finds_the_short_cut_and_tests_it_on_other_images(universal):
    values = {"model": "suspect", "label": 0, "radius": 1.0, "steps": 8}
    found = universal.compute(**values)
    assert found.fooled == 1.0
    assert found.answers == [0] * len(found.shown)
    assert found.delta.abs().argmax() == 0, "the pixel that the model looks at"
    assert found.delta.norm() <= 1.0001
    assert universal.compute(**(values | {"radius": 0.05})).fooled == 0, "the radius is respected"
    assert universal.compute(**(values | {"label": 2})).fooled == 0, "no pixel leads there"
    assert not set(universal.searched.tolist()) & set(universal.held.tolist())
    universal.controls["label"].value = 2
    assert "sends 0 %" in universal.readout
    assert universal.state["fooled"] == 0


def test_the_universal_explorer_needs_images_to_test_on():
    with pytest.raises(InputError, match="There are 5 samples"):
        UniversalExplorer({"suspect": Corner()}, Samples(noise(5, 1, 8, 8), torch.arange(5) % 3, 3, "toy"))


def test_the_pixel_explorer_descends_from_the_same_noise(model):
    class Judge(torch.nn.Module):
        def forward(self, x):
            return torch.tensor([[0.0, 0.0, 1.0]]).repeat(len(x), 1)

    class Shape:
        image_shape, latent_dim = (1, 32, 32), 1

    explorer = PixelExplorer(model, Judge(), Shape(), classes=3)
    start = explorer.compute(label=2, smooth=0.0, steps=0)
    found = explorer.compute(label=2, smooth=0.0, steps=40)
    assert torch.equal(start.images, explorer.compute(label=2, smooth=100.0, steps=0).images)
    assert found.sure > start.sure
    assert found.judge == [2] * 6
    smooth = explorer.compute(label=2, smooth=100.0, steps=40)
    assert total_variation(smooth.images).mean() < 0.5 * total_variation(found.images).mean()
    explorer.controls["label"].value = 2
    assert "the judge agrees on 6 of 6" in explorer.readout
    explorer.controls["label"].value = 1
    assert "the judge agrees on 0 of 6" in explorer.readout


def test_the_latent_explorer_walks_on_the_sphere_and_truncates(model):
    class Linear:
        """Image value = 0.5 + z / 20: what was walked can be read from the pixels."""

        image_shape, latent_dim = (1, 32, 32), 2

        def generate(self, z):
            return (0.5 + z.mean(1) / 20).view(-1, 1, 1, 1).expand(-1, 1, 32, 32)

        def criticise(self, images):
            return None

    explorer = LatentExplorer(Linear(), model, count=4)
    found = explorer.compute(start=0, end=1, truncation=1.0)
    ends = Linear().generate(explorer.latents[:2])
    torch.testing.assert_close(found.images[[0, -1]], ends)
    still = explorer.compute(start=2, end=2, truncation=2.0)
    torch.testing.assert_close(still.images, Linear().generate(2 * explorer.latents[2:3]).expand(9, -1, -1, -1))
    assert explorer.compute(start=0, end=1, truncation=0.0).spread == 0
    assert explorer.compute(start=0, end=1, truncation=2.0).spread > 1.5 * found.spread
    with pytest.raises(InputError, match="no prior"):
        LatentExplorer(model, model)


def test_slerp_keeps_the_length_of_the_way():
    start, end = torch.tensor([2.0, 0.0, 0.0]), torch.tensor([0.0, 2.0, 0.0])
    half = slerp(start, end, 0.5)
    torch.testing.assert_close(half, torch.tensor([2.0, 2.0, 0.0]) / 2**0.5)
    torch.testing.assert_close(slerp(start, start, 0.3), start)
