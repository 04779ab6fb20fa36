"""What CONTRIBUTING.md shows works as it stands there, and the files that contributors and citers look for agree."""

import os
import re
import shutil
import subprocess
import sys
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

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
BLOCKS = re.findall(r"```python\n(?:# (\S+\.py)\n)?(.*?)```", TEXT, flags=re.DOTALL)
"""File, if the first line names one, and code of each example."""
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture
def shown(monkeypatch):
    """The names that the examples define, run one after the other; registries are as before after the test."""
    for registry in (attacks, defenses, inversions, families):
        monkeypatch.setattr(registry, "_items", dict(registry._items))
    names = {"__name__": "shown"}
    for file, block in BLOCKS:
        if not file:
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


@pytest.fixture(scope="module")
def with_operator(tmp_path_factory):
    """A copy of the package and of its tests with the operator of the example, put where the text says."""
    pytest.importorskip("triton")
    tree = tmp_path_factory.mktemp("tree")
    for name in ("smi_kernels", "tests/kernels"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "smi_kernels/ops/blend").mkdir()
    (tree / "smi_kernels/ops/blend/__init__.py").touch()
    samples = "tests/kernels/operator_samples.py"
    for file, block in BLOCKS:
        if file:
            whole = (tree / samples).read_text().replace("\nOPERATORS", f"\n{block}\n\nOPERATORS")
            (tree / file).write_text(whole if file == samples else block)
    for file in ("smi_kernels/ops/__init__.py", samples):
        text = (tree / file).read_text()
        assert len(re.findall(r"OPERATORS = [(\[]", text)) == 1
        (tree / file).write_text(re.sub(r"OPERATORS = [(\[]", r'\g<0>"blend", ', text))
    return tree


def run(tree, *arguments, **environment):
    """Python on the copy. Returns what it prints."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=tree / "tests/kernels", env=kept | environment | {"PYTHONPATH": str(tree)},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_the_gate_compiles_the_operator_of_the_example(with_operator):
    said = run(with_operator, "-m", "smi_kernels.aot", "--arch", "90", "--only", "blend")
    assert "blend.blend_kernel" in said
    assert "1 compiled" in said


def test_the_operator_of_the_example_passes_its_checks(with_operator):
    options = ("-p", "no:nbval", "-p", "no:cacheprovider", "-o", "addopts=", "-k", "blend or every_operator")
    said = run(with_operator, "-m", "pytest", *options, "interpreted/check_ops.py", TRITON_INTERPRET="1")
    assert "5 passed" in said


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
