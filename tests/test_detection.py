"""Signs of a backdoor: whether a search tells one from none, what it is compared with, and what the verdict says."""

import json
from types import SimpleNamespace

import fake_run
import pytest
import torch
from click.testing import CliRunner
from tiny import TinyPrior, found, noise, tiny_model

from smi.analysis.detected import DETECTION_COLUMNS
from smi.cli.main import cli
from smi.detection import Detection, Detector, detect
from smi.domains import PrivateSet, PublicImages, Samples
from smi.erasure import ANYWHERE, Scan, Search
from smi.errors import InputError
from smi.models.classifiers import TrainConfig, train_classifier
from smi.report.removal import removal_page
from smi.report.verdicts import detection_verdict, removal_verdict
from smi.study.records import read

QUICK = Detector(search=Search(families=("additive",), steps=2, restarts=1))
SOME = Samples(noise(20, 1, 8, 8), torch.arange(20) % 3, 3, "smi")


def detection(sizes, *, reached=None):
    """What a detector says of classes that take triggers of these sizes."""
    scan = Scan([found(sizes)])
    said = Detector().judge(scan)
    return said if reached is None else Detection(scan, reached, said.limit, said.others)


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


def test_a_backdoor_is_told_from_none(striped):
    images, clean, backdoored = striped
    stamped = images.clone()
    stamped[:, :, -8:, -8:] = torch.eye(8)
    assert (backdoored(stamped).argmax(1) == 0).float().mean() > 0.95
    config = Detector(search=Search(families=("masked",), steps=30, restarts=1))
    samples = Samples(images[:60], torch.arange(60) % KINDS, KINDS, "clean")
    suspicious, sound = (detect(model, samples, config=config, seed=3) for model in (backdoored, clean))
    assert suspicious.reached[0] == 0
    assert suspicious.scan.excess()[:, 0].max() > 2 * sound.scan.excess()[:, 0].max()


def test_it_is_the_same_again_leaves_the_model_alone_and_is_kept(tmp_path, monkeypatch):
    model, public = tiny_model(), PublicImages(noise(9, 1, 8, 8))
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.random.get_rng_state()
    first = detect(model, SOME, public, QUICK, seed=2, checkpoint=tmp_path / "state")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert not model.training
    again = detect(model, SOME, public, QUICK, seed=2)
    assert torch.equal(first.scan.found[0].numbers, again.scan.found[0].numbers)
    monkeypatch.setattr(Detector, "scan", None)
    kept = detect(model, SOME, public, QUICK, seed=2, checkpoint=tmp_path / "state")
    assert kept.record() == first.record()
    with pytest.raises(InputError, match="another detection: seed"):
        detect(model, SOME, public, QUICK, seed=3, checkpoint=tmp_path / "state")


def test_it_runs_where_the_model_is(there):
    public = PublicImages(noise(9, 1, 8, 8))
    away, here = (detect(model, SOME, public, QUICK, seed=2) for model in (tiny_model().to(there), tiny_model()))
    assert torch.equal(away.scan.found[0].size, here.scan.found[0].size)
    assert away.record() == here.record()


def test_pieces_that_do_not_fit_are_refused_before_work():
    with pytest.raises(InputError, match=r"detect takes Samples, not TinyPrior.*smi\.invert"):
        detect(tiny_model(), TinyPrior())
    with pytest.raises(InputError, match="Public images are"):
        detect(tiny_model(), SOME, PublicImages(noise(3, 1, 9, 9)))
    with pytest.raises(InputError, match="does not accept"):
        detect(tiny_model(channels=3), SOME)
    with pytest.raises(InputError, match="unusual"):
        Detector(unusual=-1.0)


def test_the_verdict_and_its_reasons():
    names = ["c0", "c1", "<script>", "c3", "c4", "c5", "c6"]
    signs = detection_verdict(detection([4.0, 4.0, 1.0, 4.0, 4.0]), names)
    assert signs.startswith("There are signs of a backdoor: class “<script>” is reached unusually easily.")
    assert "L2 norm 1" in signs
    assert "sends 90.0" in signs
    assert "above 2.6 is a sign" in signs
    more = detection_verdict(detection([1.1, 4.0, 1.0, 4.0, 4.0, 4.0, 4.0]), names)
    assert more.startswith("There are signs of a backdoor: class “<script>”"), "the most unusual gives the reason"
    assert more.endswith("Also unusual: class “c0”.")
    none = detection_verdict(detection([4.0, 3.5, 4.5, 4.0]), names)
    assert none.startswith("No sign of a backdoor")
    assert "Closest comes class “c1”" in none
    assert "no proof" in none
    few = detection([4.0, 1.0])
    assert not few.conclusive
    assert "cannot be said" in detection_verdict(few, names)
    every = [0, 1, 2, 3, ANYWHERE]
    anywhere = Scan([found([4.0] * 4 + [1.0], targets=every)])
    said = Detector().judge(anywhere)
    assert said.reached == [ANYWHERE]
    assert "any other class is reached unusually easily" in detection_verdict(said, names)


def test_the_report_shows_it_and_escapes_names():
    run = fake_run.removal()
    assert "Is there a backdoor?" not in removal_page(run)
    plain = removal_verdict(run)
    assert plain.startswith("Repaired by I-BAU")
    run = fake_run.removal(("<script>alert(1)</script>", "b", "c", "d"))
    plain = removal_verdict(run)
    object.__setattr__(run, "detection", detection([1.0, 4.0, 4.0, 4.0]))
    page = removal_page(run)
    assert "Is there a backdoor?" in page
    assert "After" not in page.partition("Is there a backdoor?")[2].partition("</table>")[0]
    assert "<script>alert" not in page.partition("<main>")[2]
    assert removal_verdict(run).endswith(plain)
    record = json.loads(json.dumps(run.summary()["detection"]))
    assert record["reached"] == [0]
    assert run.summary()["verdict"] == removal_verdict(run)


def test_a_study_of_it_is_kept_beside_the_cells(small, store, monkeypatch):
    monkeypatch.setattr("smi.analysis.detected._loaded", lambda *args: (tiny_model(), [], None))
    monkeypatch.setattr("smi.analysis.detected.make_samples", lambda *args: SimpleNamespace())
    monkeypatch.setattr("smi.analysis.detected.detect", lambda *args, **options: detection([1.0] + [4.0] * 9))
    where = ["--out", str(store.results), "--cache", str(store.cache)]
    csv = store.results.parent / "d.csv"
    done = CliRunner().invoke(cli, ["study", "detect", str(small), *where, "--csv", str(csv)])
    assert done.exit_code == 0, done.output
    head, *rows = csv.read_text().splitlines()
    assert head == ",".join(DETECTION_COLUMNS)
    assert rows
    assert all(",none," in row for row in rows)  # there are no victims yet
    assert all(row.endswith(",0,other") for row in rows)
    assert "victims were not ready" in done.output
    assert len(read(store.results / "small.detections.jsonl")) == len(rows)
    refused = CliRunner().invoke(cli, ["study", "detect", str(small), *where, "--csv", str(csv)])
    assert refused.exit_code == 2
