"""What CONTRIBUTING.md shows works as it stands there, and the files that contributors and citers look for agree."""

import re
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from tiny import TinyPrior, check_repair, noise, tiny_model

import smi
from smi.attacks.base import attacks
from smi.defenses import defenses
from smi.inversion.base import inversions
from smi_kernels import stability_scores
from smi_kernels.noise import families
from smi_kernels.testing import _check_moments

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture
def shown(monkeypatch):
    """The names that the examples define, run one after the other; registries are as before after the test."""
    for registry in (attacks, defenses, inversions, families):
        monkeypatch.setattr(registry, "_items", dict(registry._items))
    names = {"__name__": "shown"}
    for block in re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL):
        exec(compile(block, "CONTRIBUTING.md", "exec"), names)
    return names


def test_the_examples_work_as_what_they_show(shown):
    images = noise(6, 1, 8, 8)
    samples = smi.Samples(images, torch.arange(6) % 3, 3, "clean")
    stamped = attacks["stripe"](row=3).stamp(images)
    assert (stamped[:, :, 3] == 1).all()
    assert torch.equal(stamped[:, :, :3], images[:, :, :3])
    check_repair(defenses["smoothed"](), samples, None)
    found = smi.invert(tiny_model(), TinyPrior(), inversions["plain"](steps=2), per_class=2)
    assert found.labels.tolist() == [0, 0, 1, 1, 2, 2]
    words = [torch.randint(2**32, (4096,), generator=torch.Generator().manual_seed(i)) for i in range(4)]
    _check_moments(families["uniform"].values(words).flatten().double())
    assert (
        stability_scores(tiny_model(), images, sigma_x=0.1, sigma_w=0.1, k=2, family="uniform", backend="torch") > 0
    ).all()


def test_a_removal_of_the_example_goes_on_where_it_was_stopped(shown, tmp_path):
    samples = smi.Samples(noise(6, 1, 8, 8), torch.arange(6) % 3, 3, "clean")
    seen = []

    def stop(model, index):
        seen.append(index)
        if index == 2:
            raise KeyboardInterrupt

    defense, file = defenses["smoothed"](), tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        defense.repair(tiny_model(), samples, checkpoint=file, every=0, on_round=stop)
    defense.repair(tiny_model(), samples, checkpoint=file, on_round=lambda model, index: seen.append(index))
    assert seen == [0, 1, 2, 1, 2, 3], "the round that was being told of is done again, the first is not"


def test_version_and_licence_are_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_hooks_and_templates_are_whole():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert {hook["id"] for hook in hooks} == {"ruff", "ruff-format", "mypy", "notebooks"}
    for file in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(file.read_text())
        assert {"name", "description", "body"} <= form.keys()
