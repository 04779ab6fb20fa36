"""A demo that nobody ran: untrained nets, noise for images, made-up curves."""

import torch
from tiny import noise

from smi.attacks import BadNets
from smi.defenses import Repair
from smi.demo import Demo, Row
from smi.domains import Domain, PrivateData, PrivateSet, PublicImages, Samples
from smi.evaluation import Comparison, Measurement
from smi.models.classifiers import build_classifier
from smi.models.store import save_classifier
from smi.models.suspects import Suspect
from smi.pipeline import Cleaned
from smi.report.removal import Removal

NASTY = ("<script>alert(1)</script>", "$\\frac{1}$ & \"quoted\" 'name'", "三")
COUNT = 6


def samples(source="smi", classes=3, scores=True):
    images = noise(COUNT * classes, 1, 32, 32)
    labels = torch.arange(classes).repeat_interleave(COUNT)
    return Samples(images, labels, classes, source, noise(COUNT * classes) * 1e-3 if scores else None)


def repair(source="smi", classes=3, seed=2):
    model, log = build_classifier("small_cnn", 1, classes, seed=seed).eval(), {"loss": [2.0, 1.5, 1.0], "radius": 2.5}
    return Repair(model, "ibau", source, {"defense": "ibau"}, log, noise(1, 1, 32, 32) - 0.5)


def domain(names=NASTY):
    n = len(names)
    private = PrivateSet(noise(4 * n, 1, 32, 32, seed=1), torch.arange(n).repeat(4), n)
    return Domain("digits", names, PrivateData(private, private), PublicImages(noise(4, 1, 32, 32, seed=2)))


def demo(names=NASTY, after=(0.97, 0.01, 0.95)):
    n, before = len(names), Measurement(0.981, 0.999, 0.001)
    tuned = Repair(build_classifier("small_cnn", 1, n).eval(), "ft", "public", {"defense": "ft"}, {"loss": [1.0, 0.5]})
    rows = [Row("public", "public images, pseudo-labels", "ft", Comparison(before, Measurement(0.9, 0.5, 0.4)), tuned)]
    for source, label in (("latent", "latent inversion"), ("smi", "SMI, no clean data"), ("clean", "clean samples")):
        rows.append(Row(source, label, "ibau", Comparison(before, Measurement(*after)), repair(source, n)))
    stages = {"train": 3.0, "invert": 2.0, "invert/latent": 1.0, "repair": 2.5, "evaluate": 0.1}
    settings = {"train": {"arch": "small_cnn"}, "note": "</pre><img src=http://example.org/x>", "odd": (1, None)}
    victim = build_classifier("small_cnn", 1, n, seed=1).eval()
    return Demo(3, domain(names), victim, BadNets(), before, samples(classes=n), rows, stages, settings)


def removal(names=NASTY, found=None):
    n = len(names)
    suspect, found = build_classifier("small_cnn", 1, n, seed=1).eval(), found or repair(classes=n)
    cleaned = Cleaned(found.model, samples(classes=n), found)

    def write(repaired, path, record):
        save_classifier(repaired, path, arch="small_cnn", record=record)

    loaded = Suspect(suspect, "small_cnn", 1, tuple(names), ".safetensors", write)
    return Removal(loaded, cleaned, 3, {"remove": 4.0}, {"note": NASTY[0]})
