"""The README and the evidence are what the committed results give, and the picture is the notebook's.

Numbers and tables are generated (`smi.dev.evidence`). What is tested here is what sentences say without a number.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner

from smi.dev import evidence
from smi.dev.committed import Committed
from smi.study.results import as_csv, from_csv, stored, summarise

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "notebooks/results"
CELLS = {
    "digits": 504, "distillation": 36, "firm": 72, "trusted": 324, "restarted": 72, "forgetting": 72,
    "gtsrb": 84, "cifar10_firm": 84, "cifar10": 20, "resnet18": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def results():
    return Committed(RESULTS)


def victims(rows):
    """Their rates before removal, which tell one training of a victim from another."""
    return {(row["attack"], row["seed"]): (row["acc_before"], row["asr_before"]) for row in rows}


def test_the_pages_say_what_the_results_give():
    done = CliRunner().invoke(evidence.main, ["--check"])
    assert done.exit_code == 0, f"run python -m smi.dev.evidence\n{done.output}"


def test_the_demo_ran_with_the_same_settings_for_every_seed():
    records = json.loads((RESULTS / "demo.json").read_text())
    assert [record["seed"] for record in records] == [10, 11, 12, 13, 14]
    settings = [record["settings"] for record in records]
    assert all(s == settings[0] for s in settings)


def test_every_study_is_whole(results):
    studies = {file.stem for file in RESULTS.glob("*.jsonl") if "." not in file.stem}
    assert {name: len(results.rows(name)) for name in studies} == CELLS
    for name, removals in {"digits": 36, "trusted": 36, "restarted": 36, "forgetting": 36, "firm": 36, "gtsrb": 12,
                           "cifar10_firm": 12}.items():  # fmt: skip
        cells = Counter((row["defense"], row["source"]) for row in results.rows(name))
        assert set(cells.values()) == {removals}, name
    assert {row["source"] for row in results.rows("resnet18")} == {"none"}


def test_a_files_lines_are_in_order_and_none_is_there_twice():
    for name in CELLS:
        lines = (RESULTS / f"{name}.jsonl").read_text().splitlines()
        assert len(lines) == CELLS[name]
        places = [[row[column] for column in ("domain", "attack", "source", "defense", "seed")]
                  for _, row in stored(RESULTS / f"{name}.jsonl")]  # fmt: skip
        configs = [json.loads(line)["config"] for line in lines]
        assert places == [[c["domain"], c["attack"]["name"], c["source"], c["defense"]["name"], c["seed"]]
                          for c in configs]  # fmt: skip


def test_the_table_of_notebook_07_is_that_of_the_cells():
    kept = (RESULTS / "digits.csv").read_text()
    assert sorted(as_csv(row for _, row in stored(RESULTS / "digits.jsonl")).splitlines()) == sorted(kept.splitlines())
    assert len(from_csv(kept)) == CELLS["digits"]


def test_studies_that_are_compared_met_the_same_victims(results):
    digits = results.rows("digits")
    met = {(row["attack"], row["seed"], row["acc_before"], row["asr_before"]) for row in digits}
    assert len(met) == 36, "all removals meet the same victims"
    for name in ("trusted", "firm", "restarted", "forgetting"):
        assert victims(results.rows(name)) == victims(digits), name
    few = victims(results.rows("distillation"))
    assert few == {key: rates for key, rates in victims(digits).items() if key[0] in ("badnets", "blended", "wanet")}
    weakest = min(met, key=lambda victim: victim[3])
    assert weakest[:2] == ("input_aware", 21)


def test_which_attacks_stay(results):
    by = {(r["attack"], r["source"]): r for r in summarise(results.chosen("digits.ibau"), ("attack", "source"))}
    excess = {attack: by[attack, "smi"]["asr"] - by[attack, "clean"]["asr"] for attack, _ in by}
    assert max(excess, key=excess.__getitem__) == "wanet"
    for source in ("smi", "clean"):
        assert sorted(name for name, of in by if of == source and by[name, of]["asr"] > 0.15) == ["smooth", "wanet"]
    deep = sorted(results.rows("resnet18"), key=lambda row: row["asr"])
    assert deep[0]["attack"] == "trojan_watermark"


def test_what_the_former_detection_flagged(results):
    assert {row["flagged"] for row in results.chosen("detection.-none")} == {"target", "no"}
    assert {row["flagged"] for row in results.chosen("detection.none")} == {"no"}


def test_in_which_samples_the_trigger_is(results):
    rows, _ = results.column("digits.frechet")
    assert {row["seed"] for row in rows} == {20}
    assert len(rows) == 156, "I-BAU's, and those of two removals with clean samples and SMI's"
    ibau, _ = results.column("digits.ibau.frechet")
    assert len(ibau) == 108, "nine sources, twelve victims"
    present = {row["attack"]: row["presence_target"] for row in ibau if row["source"] == "smi"}
    assert {attack for attack, value in present.items() if value} == {"wanet", "input_aware"}
    assert present["wanet"] == 1


def test_which_removals_of_the_check_stay_dangerous(results):
    rows = results.chosen("removal_check.digits.smi.-none")
    assert {(row["attack"], row["seed"]) for row in rows if row["asr"] > 0.15} == {("input_aware", 30), ("wanet", 30)}
    assert {row["seed"] for row in rows} == {30, 32}
    clean = results.chosen("removal_check.none")
    assert all(row["signs"] == "" for row in clean), "no class of a clean model is named"
    assert all(row["signs"] == row["target"] for row in results.chosen("removal_check.wanet.cifar10+gtsrb"))


def test_the_picture_is_the_notebooks():
    notebook = json.loads((ROOT / "notebooks/00_start_here.ipynb").read_text())
    (saved,) = [c for c in notebook["cells"] if c["metadata"].get("saves") == "story.png"]
    (png,) = [o["data"]["image/png"] for o in saved["outputs"] if "image/png" in o.get("data", {})]
    assert base64.b64decode(png) == (ROOT / "notebooks/pictures/story.png").read_bytes()
