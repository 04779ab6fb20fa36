"""Signs of a backdoor: against models whose every answer is known, and what the verdict says of them."""

import json

import fake_run
import pytest
import torch
from click.testing import CliRunner
from test_devices import there  # noqa: F401  a fixture
from tiny import TinyPrior, noise, tiny_model
from torch import nn

import smi
from smi.analysis.detected import DETECTION_COLUMNS
from smi.classifiers import TrainConfig, train_classifier
from smi.cli import cli
from smi.compute import fast
from smi.detection import STEP, UNUSUAL, Detection, Detector, _examined, class_radii, detect
from smi.domains import PrivateSet, PublicImages
from smi.erasure.student import _seeded, fresh
from smi.errors import InputError
from smi.report import detection_verdict, removal_page, removal_verdict

QUICK = Detector(lessons=3, batch_size=8, images=8, steps=2)


def found(ratio, agreement=0.9, classes=None):
    ratio = torch.tensor(ratio)
    return Detection(list(classes or range(len(ratio))), ratio * 2.0, torch.full_like(ratio, 2.0), agreement)


class Plane(nn.Module):
    """Two classes on the two sides of a plane: the least universal δ for class 0 is along its normal, as long as the
    median distance of the images of class 1 to it."""

    def __init__(self, at):
        super().__init__()
        self.normal, self.at = nn.Parameter(torch.full((64,), 1 / 8)), at

    def forward(self, images):
        height = images.flatten(1) @ self.normal - self.at
        return torch.stack([height, torch.zeros_like(height)], 1) * 5


@pytest.mark.parametrize("at", [4.5, 4.7, 5.0])
def test_the_radius_of_a_class_is_its_distance(at):
    images = 0.3 + noise(40, 1, 8, 8) * 0.4
    model = Plane(at).eval()
    distances = at - images.flatten(1).sum(1) / 8
    assert (distances > 0).all()  # all of class 1
    with fast(model) as run:
        rng = torch.Generator().manual_seed(0)
        labels = torch.ones(40, dtype=torch.int64)
        (radius,) = class_radii(run, images, labels, [0], Detector(steps=10, images=40), rng).tolist()
    assert 1 / STEP < radius / distances.median() < STEP**2  # the grid is as coarse


KINDS = 6  # of fewer classes the median, the unit of a ratio, may be one that the trigger moves, too


@pytest.fixture(scope="module")
def striped():
    """Six kinds of images, told apart by where they are bright, and models with and without a backdoor on them."""
    labels = torch.arange(360) % KINDS
    images = noise(360, 1, 32, 32, seed=1) * 0.4
    for label in range(KINDS):
        images[labels == label, :, 5 * label : 5 * label + 5] += 0.5
    config = TrainConfig(epochs=6, batch_size=36, augment="none")
    clean = train_classifier(PrivateSet(images, labels, KINDS), config, seed=1)
    stamped, wanted = images.clone(), labels.clone()
    stamped[:, :, -8:, -8:], wanted[:] = torch.eye(8), 0
    both = PrivateSet(torch.cat([images, stamped]), torch.cat([labels, wanted]), KINDS)
    return images, clean, train_classifier(both, config, seed=1)


class Bands(nn.Module):
    """A generator of such images."""

    latent_dim, image_shape = 16, (1, 32, 32)

    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(torch.randn(16, 32 * 32, generator=torch.Generator().manual_seed(2)) * 0.04)

    def generate(self, z):
        kind = (2 * z[:, :KINDS]).softmax(1) @ torch.eye(KINDS).repeat_interleave(5, 1)
        rows = nn.functional.pad(kind, (0, 2))[:, None, :, None].expand(-1, 1, -1, 32)
        return (rows * 0.6 + 0.2 + (z @ self.mix).view(-1, 1, 32, 32)).clamp(0, 1)

    def criticise(self, images):
        return None


def test_a_backdoor_is_told_from_none(striped):
    images, clean, backdoored = striped
    stamped = images.clone()
    stamped[:, :, -8:, -8:] = torch.eye(8)
    assert (backdoored(stamped).argmax(1) == 0).float().mean() > 0.95
    config, public = Detector(lessons=60, batch_size=32, images=24), PublicImages(images)
    suspicious, sound = (detect(m, Bands(), public, config, seed=3) for m in (backdoored, clean))
    assert suspicious.ratio[0] < 0.7 * sound.ratio[0]
    assert suspicious.ratio.argmin() == 0


def test_it_is_the_same_again_leaves_the_model_alone_and_is_kept(tmp_path, monkeypatch):
    model, public = tiny_model(), PublicImages(noise(9, 1, 8, 8))
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.random.get_rng_state()
    first = detect(model, TinyPrior(), public, QUICK, seed=2, checkpoint=tmp_path / "state")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert not model.training
    again = detect(model, TinyPrior(), public, QUICK, seed=2)
    assert torch.equal(first.suspect, again.suspect)
    assert torch.equal(first.student, again.student)
    monkeypatch.setattr(smi.detection, "_found", None)
    kept = detect(model, TinyPrior(), public, QUICK, seed=2, checkpoint=tmp_path / "state")
    assert torch.equal(kept.student, first.student)
    assert kept.record() == first.record()
    with pytest.raises(InputError, match="another detection: seed"):
        detect(model, TinyPrior(), public, QUICK, seed=3, checkpoint=tmp_path / "state")


def test_it_runs_where_the_model_is(there):  # noqa: F811
    away = detect(tiny_model().to(there), TinyPrior(), PublicImages(noise(9, 1, 8, 8)), QUICK, seed=2)
    here = detect(tiny_model(), TinyPrior(), PublicImages(noise(9, 1, 8, 8)), QUICK, seed=2)
    assert torch.equal(away.suspect, here.suspect)
    assert away.record() == here.record()


def test_the_student_has_nothing_of_the_suspect():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.arange(6.0))

    suspect = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), Own())
    suspect[1].running_mean += 3
    fresh = seeded(suspect)
    for name, value in suspect.state_dict().items():
        if name != "1.num_batches_tracked" and value.std() > 0:
            assert not torch.equal(value, fresh.state_dict()[name]), name
    assert torch.equal(fresh[1].running_mean, torch.zeros(6))
    again = seeded(suspect)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in fresh.state_dict().items())


def seeded(model):
    with _seeded(1, "fresh", torch.device("cpu")):
        return fresh(model)


def test_a_layer_that_resets_only_some_of_its_weights_is_new_all_the_same():
    class Half(nn.Linear):
        def reset_parameters(self):
            nn.init.zeros_(self.bias)

    layer = Half(6, 4)
    nn.init.normal_(layer.weight)
    fresh = seeded(layer)
    assert not torch.equal(fresh.weight, layer.weight)
    assert not fresh.bias.any()


def test_dropout_is_drawn_from_the_seed():
    model = tiny_model()
    model.body.append(nn.Dropout(0.5))
    first, again = (detect(model, TinyPrior(), None, QUICK, seed=2).student for _ in range(2))
    assert torch.equal(first, again)


def test_pieces_that_do_not_fit_are_refused_before_work():
    with pytest.raises(InputError, match="no prior"):
        detect(tiny_model(), "digits")
    with pytest.raises(InputError, match="Public images are"):
        detect(tiny_model(), TinyPrior(), PublicImages(noise(3, 1, 9, 9)))
    with pytest.raises(InputError, match="does not accept"):
        detect(tiny_model(channels=3), TinyPrior())


def test_of_many_classes_the_suspicious_ones_are_examined():
    rng = torch.Generator().manual_seed(0)
    assert _examined(5, 20, None, rng) == [0, 1, 2, 3, 4]
    fooling = [0.0] * 100
    fooling[77] = fooling[3] = 1.0
    chosen = _examined(100, 10, fooling, rng)
    assert len(set(chosen)) == 10
    assert {3, 77} <= set(chosen)
    assert len(set(_examined(100, 10, None, rng))) == 10


def test_what_counts_as_unusual():
    assert found([1.0, UNUSUAL * 0.99, 1.0, 1.0]).reached == [1]
    assert found([1.0, UNUSUAL * 1.01, 1.0, 1.0]).reached == []
    assert found([0.1, 1.0, 0.2, 1.0, 1.0]).reached == [0, 2]
    assert found([0.1, 1.0, 1.0, 1.0], agreement=0.3).reached == []
    assert found([0.5, 0.1, 0.5]).ratio.tolist() == pytest.approx([1.0, 0.2, 1.0])
    assert found([1.0, 1.0, 0.1, 1.0], classes=[4, 8, 9, 11]).reached == [9]
    assert not found([0.1, 3.0]).conclusive  # the median of two is one of them
    assert not found([float("nan")] * 5).conclusive


def test_the_verdict_and_its_reasons():
    names = [f"c{i}" for i in range(9)] + ["<script>"]
    signs = detection_verdict(found([1.0, 1.0, 0.1, 1.0], classes=[4, 8, 9, 2]), names)
    assert "signs of a backdoor: class “<script>” is reached by an unusually small pattern" in signs
    assert "L2 norm 0.2 sends half" in signs
    assert "it takes 2." in signs
    assert "That is 0.10 of what is usual" in signs
    assert "So is 1 other class." in detection_verdict(found([0.1, 1.0, 0.2, 1.0, 1.0]), names)
    assert "So are 2 other classes." in detection_verdict(found([0.1, 0.1, 0.2, 1.0, 1.0, 1.0, 1.0]), names)
    none = detection_verdict(found([1.0, 0.7, 1.2, 1.0]), names)
    assert none.startswith("No sign of a backdoor")
    assert "“c1”, at 0.70" in none
    assert "no proof" in none
    assert "cannot be said" in detection_verdict(found([0.1, 1.0, 1.0, 1.0], agreement=0.2), names)
    assert "do not differ" in detection_verdict(found([float("nan")] * 4), names)
    assert "fewer than 4 classes" in detection_verdict(found([0.1, 3.0]), names)


def test_the_report_shows_it_and_escapes_names():
    run = fake_run.removal()
    assert "Is there a backdoor?" not in removal_page(run)
    plain = removal_verdict(run)
    assert plain.startswith("Before the removal one pattern of L2 norm 2.5 sent 100.0")
    run = fake_run.removal(("<script>alert(1)</script>", "b", "c", "d"))
    plain = removal_verdict(run)
    object.__setattr__(run, "detection", found([0.1, 1.0, 1.0, 1.0]))
    page = removal_page(run)
    assert "Is there a backdoor?" in page
    assert "<script>alert" not in page.partition("<main>")[2]
    assert removal_verdict(run).endswith(plain)
    record = json.loads(json.dumps(run.summary()["detection"]))
    assert record["reached"] == [0]
    assert run.summary()["verdict"] == removal_verdict(run)


def test_a_study_of_it_is_kept_beside_the_cells(small, store, monkeypatch):
    monkeypatch.setattr("smi.analysis.detected._loaded", lambda *args: (tiny_model(), [], None))
    monkeypatch.setattr("smi.analysis.detected.detect", lambda *args, **options: found([0.1] + [1.0] * 9))
    where = ["--out", str(store.results), "--cache", str(store.cache)]
    csv = store.results.parent / "d.csv"
    done = CliRunner().invoke(cli, ["study", "detect", str(small), *where, "--csv", str(csv)])
    assert done.exit_code == 0, done.output
    head, *rows = csv.read_text().splitlines()
    assert head == ",".join(DETECTION_COLUMNS)
    assert rows
    assert all(",none," in row for row in rows)  # there are no victims yet
    assert "victims were not ready" in done.output
    assert len(list((store.results / "detections").iterdir())) == len(rows)
    refused = CliRunner().invoke(cli, ["study", "detect", str(small), *where, "--csv", str(csv)])
    assert refused.exit_code == 2
