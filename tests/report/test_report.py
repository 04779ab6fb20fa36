import base64
import dataclasses
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import fake_run
import pytest
import torch

from smi.defenses import Repair
from smi.errors import InputError
from smi.models.store import read_classifier
from smi.plotting import report as figures
from smi.report.removal import demo_page, removal_page, table, write_report
from smi.report.verdicts import removal_verdict, verdict

VOID = {"meta", "img", "br", "hr"}


class Page(HTMLParser):
    """Tags with their attributes, text, and whether every tag is closed in order."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.open, self.balanced = [], "", [], True
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        self.balanced &= bool(self.open) and self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, name):
        return [attrs for tag, attrs in self.tags if tag == name]


@pytest.fixture(scope="module")
def demo():
    return fake_run.demo()


@pytest.fixture(scope="module", params=["demo", "removal"])
def html(request, demo):
    return demo_page(demo) if request.param == "demo" else removal_page(fake_run.removal())


def test_the_page_is_well_formed_and_accessible(html):
    page = Page(html)
    assert html.startswith("<!DOCTYPE html>")
    assert page.balanced
    assert not page.open
    assert page.all("html") == [{"lang": "en"}]
    assert any(meta.get("name") == "viewport" for meta in page.all("meta"))
    assert len(page.all("h1")) == 1
    images = page.all("img")
    assert len(images) >= 3
    for image in images:
        assert len(image["alt"]) > 20
        assert base64.b64decode(image["src"].removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")
    assert "prefers-color-scheme: dark" in html


def test_the_page_is_self_contained(html):
    page = Page(html)
    assert not page.all("script")
    assert not page.all("link")
    for tag, attrs in page.tags:
        for name in ("src", "href", "srcset", "action", "data"):
            assert attrs.get(name, "data:").startswith("data:"), (tag, name)
        assert not any(name.startswith("on") for name in attrs)
    assert "url(" not in html
    assert "@import" not in html


def test_names_and_settings_are_escaped(html):
    page = Page(html)
    assert "<script" not in html
    assert "<img src=http" not in html
    assert fake_run.NASTY[0] in page.text + " ".join(i["alt"] for i in page.all("img"))


def test_pictures_are_opaque(html):
    from io import BytesIO

    from PIL import Image

    for data in re.findall(r"data:image/png;base64,([^\"]+)", html):
        picture = Image.open(BytesIO(base64.b64decode(data))).convert("RGBA")
        assert picture.getchannel("A").getextrema() == (255, 255)


def test_the_demo_page_says_what_was_found(demo):
    text = Page(demo_page(demo)).text
    for wanted in (verdict(demo), "98.1", "99.9", "fine-tuning", "I-BAU", "A removal alone", "torch"):
        assert wanted in text


def test_the_models_are_compared_on_what_the_removal_did_not_use():
    run = fake_run.removal()
    assert "held-out" not in removal_verdict(run)
    held = fake_run.samples(source="held out").select(torch.arange(0, 18, 2))
    run = dataclasses.replace(run, held_out=held)
    assert len(run.agreement) == len(run.stability[0]) == len(held) == 9
    assert run.summary()["held_out"] == 9
    assert "of the held-out reconstructions" in removal_verdict(run)
    assert "Both on 9 reconstructions that the removal did not use." in removal_page(run)


def test_weights_that_the_layout_cannot_hold_leave_no_report(tmp_path):
    run = fake_run.removal()

    def refuse(repaired, path, record):
        raise InputError("do not fit into torch.float16")

    object.__setattr__(run.suspect, "_write", refuse)
    with pytest.raises(InputError, match="float16"):
        write_report(run, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_the_removal_page_claims_no_accuracy():
    page = Page(removal_page(fake_run.removal()))
    assert "cannot be measured" in page.text
    assert "ASR" not in page.text


def test_the_table_has_every_row_and_one_digit(demo):
    lines = table(demo).splitlines()
    assert len(lines) == 2 + 5
    assert lines[2].split()[-4:] == ["98.1", "99.9", "0.1", "-"]
    assert [line.split("  ")[0] for line in lines[3:]] == [row.label for row in demo.rows]
    assert lines[5].split()[-4:] == ["97.0", "1.0", "95.0", "98.9"]


@pytest.mark.parametrize(
    ("after", "head"),
    [
        ((0.97, 0.01, 0.9), "The backdoor is removed: "),
        ((0.92, 0.01, 0.9), "The backdoor is removed, at a price"),
        ((0.50, 0.01, 0.5), "The backdoor is removed, but so is"),
        ((0.97, 0.40, 0.5), "The backdoor is weakened"),
        ((0.97, 0.90, 0.1), "The backdoor is still there"),
    ],
)
def test_the_verdict_follows_the_numbers(demo, after, head):
    assert verdict(fake_run.demo(after=after)).startswith(head)


def test_a_victim_without_a_backdoor_is_called_so(demo):
    clean = fake_run.demo()
    clean.before = replace(clean.before, asr=0.02)
    assert verdict(clean).startswith("There was hardly a backdoor")


@pytest.mark.parametrize("delta", [None, torch.zeros(1, 1, 32, 32)])
def test_a_defense_that_looks_for_no_class_has_a_page_too(delta):
    model = fake_run.repair().model
    run = fake_run.removal(found=Repair(model, "ibau", "smi", {}, {"loss": [1.0, float("nan")], "radius": 2.5}, delta))
    assert removal_verdict(run).startswith("Repaired by I-BAU")
    page = Page(removal_page(run))
    assert page.balanced
    assert ("What the defender found" in page.text) == (delta is not None)


def test_many_classes_are_cut_in_figures_only():
    page = Page(removal_page(fake_run.removal(names=[f"class {i}" for i in range(30)])))
    assert "20 of 30 classes are shown" in page.text
    assert "class 29" in page.text


def test_the_files_are_written_and_hold_what_they_should(demo, tmp_path):
    paths = write_report(demo, tmp_path / "new" / "out")
    assert [p.name for p in paths] == ["report.html", "report.json", "repaired.safetensors"]
    record = json.loads(paths[1].read_text())
    assert {
        "seed",
        "n",
        "before",
        "after",
        "controls",
        "stages",
        "settings",
        "versions",
        "precision",
        "device",
        "threads",
        "kernel_backend",
    } <= (record.keys())
    assert record["before"].keys() == {"acc", "asr"}
    assert record["after"].keys() == {"acc", "asr", "ra", "der"}
    assert record["controls"].keys() == {"clean", "latent", "public"}
    assert all(rates.keys() == record["after"].keys() for rates in record["controls"].values())
    assert {"train", "invert", "repair"} <= record["stages"].keys()
    model, card = read_classifier(paths[2])
    assert card.classes == fake_run.NASTY
    images = demo.samples.images
    assert torch.equal(model(images), demo.row("smi").repair.model(images))


def test_the_removal_record_is_strict_json(tmp_path):
    run = fake_run.removal()
    run.cleaned.repair.log["loss"] = [1.0, float("nan")]
    path = write_report(run, tmp_path / "out")[1]

    def refuse(name):
        raise AssertionError(name)

    record = json.loads(path.read_text(), parse_constant=refuse)
    assert record["findings"]["loss"] == [1.0, None]
    assert 0 <= record["agreement"] <= 1


def test_nothing_is_overwritten(demo, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        write_report(demo, tmp_path)
    assert [p.name for p in Path(tmp_path).iterdir()] == ["mine.txt"]


def test_label_text_is_one_short_line_without_mathematics():
    assert figures.label_text("a\nb\tc") == "a b c"
    assert figures.label_text("x" * 40) == "x" * 11 + "…"
    assert figures.label_text("$x$") == r"\$x\$"


@pytest.mark.parametrize(("scores", "power"), [([2e-4, 3e-4, 9e-2], -4), ([0.0, 0.0, 0.0], 0), ([float("nan")], 0)])
def test_scores_are_read_in_the_unit_of_their_median(scores, power):
    assert figures.score_unit(torch.tensor(scores)) == power
