"""What ships: small enough, with its record, and what the record says is true."""

from __future__ import annotations

import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

import smi
from smi.dev import assets
from smi.domains import load_public
from smi.models.store import read_classifier
from smi.runtime.files import fingerprint

ASSETS = resources.files("smi") / "assets"


def test_together_they_take_at_most_two_megabytes() -> None:
    assert sum(len(file.read_bytes()) for file in ASSETS.iterdir() if file.name.endswith(".safetensors")) <= 2_000_000


def test_the_prior_was_trained_on_the_public_digits_with_the_default_configuration() -> None:
    from dataclasses import asdict

    record = smi.load_prior("digits").record
    assert record["public"] == fingerprint(load_public("digits").images)
    assert record["config"] == asdict(smi.PriorConfig())
    assert {"torch", "numpy", "python"} <= set(record["versions"])


def test_the_victim_has_the_backdoor_that_its_record_names() -> None:
    victim, card = read_classifier("digits-badnets")
    attack = dict(card.record["attack"])
    attack.pop("rate")
    trigger = smi.attacks.attacks[attack.pop("name")](**attack)
    found = smi.Evaluator(smi.load_domain("digits").private.test, trigger).measure(victim)
    assert found.acc == pytest.approx(card.record["measured"]["acc"], abs=0.005)
    assert found.asr == pytest.approx(card.record["measured"]["asr"], abs=0.005)
    assert found.acc >= 0.97
    assert found.asr >= 0.99


def test_the_judge_knows_digits_and_no_trigger() -> None:
    judge, card = read_classifier("digits-judge")
    found = smi.Evaluator(smi.load_domain("digits").private.test, smi.attacks.BadNets(target=0)).measure(judge)
    assert found.acc == pytest.approx(card.record["measured"]["acc"], abs=0.005)
    assert found.acc >= 0.97
    assert found.asr <= 0.02


def test_rebuilding_refuses_bad_input_and_overwrites_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "prior.safetensors"
    file.write_text("precious")
    assert assets.main(["prior", str(file)]) == 2
    assert assets.main(["pryor", str(tmp_path / "new")]) == 2
    assert assets.main([]) == 2
    said = capsys.readouterr().err
    assert "exists" in said
    assert "Did you mean 'prior'" in said
    assert "Usage" in said
    assert file.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [file]


def test_the_prior_rebuilds_without_mlxtend(tmp_path: Path) -> None:
    """Two steps of the real thing, in a process where importing mlxtend fails."""
    code = f"""
import sys
sys.modules["mlxtend"] = None
import smi.priors.gan, smi.dev.assets, functools
smi.dev.assets.fit_prior = functools.partial(smi.priors.gan.fit_prior, config=smi.priors.gan.PriorConfig(steps=2))
sys.exit(smi.dev.assets.main(["prior", r"{tmp_path / "p.safetensors"}"]))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert smi.load_prior(tmp_path / "p.safetensors").image_shape == (1, 32, 32)
