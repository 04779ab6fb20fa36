"""What an installation gets: the same packages by pip and by conda, and a wheel that works outside the checkout."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import smi

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())
CONDA_TO_PYPI = {"pytorch": "torch", "matplotlib-base": "matplotlib"}
CONDA_ONLY = {"python", "pip", "ipykernel"}  # what pip has already or installs with JupyterLab
TEST_COMMAND = 'python -m pip install -e ".[test]" && pytest'

BLOCK_TRITON = """
import sys
for finder in sys.meta_path:
    def without(name, *rest, find=finder.find_spec):
        return None if name.split(".")[0] == "triton" else find(name, *rest)
    try:
        finder.find_spec = without
    except AttributeError:
        pass
"""


def by_name(requirements):
    return {r.name: r for r in map(Requirement, requirements)}


def conda():
    plain = [entry for entry in ENVIRONMENT["dependencies"] if isinstance(entry, str)]
    return {CONDA_TO_PYPI.get(name, name): requirement for name, requirement in by_name(plain).items()}


def from_pip():
    (entry,) = [entry["pip"] for entry in ENVIRONMENT["dependencies"] if isinstance(entry, dict)]
    return entry


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_version_is_in_one_voice():
    assert PROJECT["version"] == smi.__version__ == version(PROJECT["name"])


def test_environment_yml_comes_from_conda_forge_and_installs_the_project():
    assert [c for c in ENVIRONMENT["channels"] if c != "nodefaults"] == ["conda-forge"]
    assert "-e ." in from_pip()


def test_environment_yml_and_pyproject_agree():
    extra = by_name(PROJECT["optional-dependencies"]["study"])  # conda has no extras
    ours = by_name(PROJECT["dependencies"]) | extra
    pip = by_name(entry for entry in from_pip() if not entry.startswith("-"))
    theirs = {name: r for name, r in conda().items() if name not in CONDA_ONLY} | pip
    assert {name: r.specifier for name, r in theirs.items()} == {name: r.specifier for name, r in ours.items()}
    assert {name: str(r.marker) for name, r in pip.items()} == {name: str(ours[name].marker) for name in pip}
    assert conda()["python"].specifier == SpecifierSet(PROJECT["requires-python"])


@pytest.mark.parametrize("name", sorted(by_name(PROJECT["dependencies"])))
def test_ranges_have_a_minimum_and_a_cap_and_hold_here(name):
    requirement = by_name(PROJECT["dependencies"])[name]
    assert {s.operator for s in requirement.specifier} == {">=", "<"}
    if requirement.marker is None or requirement.marker.evaluate():
        assert requirement.specifier.contains(version(name), prereleases=True)


def test_ipykernel_is_in_range_here():
    assert conda()["ipykernel"].specifier.contains(version("ipykernel"))


OPTIONAL = {e: by_name(PROJECT["optional-dependencies"][e]) for e in ("study", "test")}


@pytest.mark.parametrize(("extra", "name"), [(extra, name) for extra, found in OPTIONAL.items() for name in found])
def test_optional_packages_are_in_range_here(extra, name):
    requirement = OPTIONAL[extra][name]
    assert requirement.specifier.contains(version(name), prereleases=True)


WITH_TRITON = re.compile(r"smi_kernels/(ops/.*(kernel|variants|signs)|(noise|divergences|epilogues)/triton)\.py$")


def test_everything_imports_without_triton(tmp_path):
    modules = "".join(
        f"\nimport {'.'.join(path.relative_to(ROOT).with_suffix('').parts)}"
        for package in ("smi", "smi_kernels")
        for path in sorted((ROOT / package).rglob("*.py"))
        if path.stem not in ("__init__", "__main__") and not WITH_TRITON.search(str(path))
    )
    check = "\nassert not any(name.split('.')[0] == 'triton' for name in sys.modules)"
    run(sys.executable, "-c", f"{BLOCK_TRITON}\nimport smi\nimport smi_kernels{modules}{check}", cwd=tmp_path)


FAKE_TOOL = """#!/bin/bash
echo "$(basename "$0") $* in $PWD with $(env | grep -cE '^(OMP|MKL|PYTEST|SMI)_')" >> "$RAN"
if [ "$1 $2" = "-m venv" ]; then
  mkdir -p "$3/bin"
  for tool in python smi pytest; do cp "$0" "$3/bin/$tool"; done
  echo "PATH=$3/bin:\\$PATH" > "$3/bin/activate"
fi
"""


def test_ci_runs_the_commands_of_the_readme(tmp_path):
    """With tools that only write down how they were called: in a copy, nothing set that a reader would not have."""
    commands = re.findall(r"^python -m pip install -e .* && .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert commands == ["python -m pip install -e . && smi demo", TEST_COMMAND]
    assert ".ci/run" in (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    repository, tools = tmp_path / "repository", tmp_path / "tools"
    for name in (".ci/run", "README.md"):
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, repository / name)
    tools.mkdir()
    for name in ("chromium", "fake"):
        (tools / name).write_text(FAKE_TOOL)
        (tools / name).chmod(0o755)
    run("git", "init", "-q", cwd=repository)
    run("git", "add", ".", cwd=repository)
    kept = {name: value for name, value in os.environ.items() if not re.match("(OMP|MKL|PYTEST|SMI)_", name)}
    kept |= {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": str(tools / "fake"), "RAN": str(tmp_path / "ran")}
    run(str(repository / ".ci" / "run"), env=kept)
    made, *called = (tmp_path / "ran").read_text().splitlines()
    assert made.startswith("fake -m venv")
    wanted = ["python -m pip install -e .", "smi demo", "python -m pip install -e .[test]", "pytest"]
    assert [line.partition(" in ")[0].strip() for line in called] == wanted
    assert all(line.endswith("with 0") and str(repository) not in line for line in called)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Sdist, and the wheel built from that sdist: what an upload would be."""
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    junk = shutil.ignore_patterns(".*", "*.egg-info", "build", "dist", "__pycache__", "data", "runs", "out")
    shutil.copytree(ROOT, source, ignore=junk)
    run(sys.executable, "-m", "build", "--outdir", str(folder / "dist"), str(source), cwd=folder)
    (sdist,), (wheel,) = (list((folder / "dist").glob(pattern)) for pattern in ("*.tar.gz", "*.whl"))
    return sdist, wheel


def test_the_wheel_holds_the_code_and_its_data_and_nothing_else(built):
    names = set(zipfile.ZipFile(built[1]).namelist())
    expected = {
        str(path.relative_to(ROOT))
        for package in ("smi", "smi_kernels")
        for pattern in ("*.py", "py.typed", "assets/*", "*.json")
        for path in (ROOT / package).rglob(pattern)
        if path.is_file()
    }
    assert expected <= names
    assert {f"smi/assets/{path.relative_to(ROOT)}" for path in (ROOT / "notebooks").glob("*.ipynb")} <= names
    assert {name.split("/")[0] for name in names} == {
        "smi",
        "smi_kernels",
        built[1].name.split("-py3")[0] + ".dist-info",
    }


def test_the_sdist_holds_notebooks_tests_and_environment(built):
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for pattern in ("notebooks/*.ipynb", "tests/*.py", "tests/nbval.cfg", "tests/*/*.py", "environment.yml", "LICENSE"):
        found = {str(path.relative_to(ROOT)) for path in ROOT.glob(pattern)}
        assert found
        assert found <= names


def test_the_installed_wheel_works_outside_the_checkout(built, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    run(*install, str(built[1]), cwd=elsewhere)
    smoke = f"""
import smi, smi_kernels, torch
assert smi.__file__.startswith({str(site)!r}) and smi_kernels.__file__.startswith({str(site)!r})
from smi.models.store import load_classifier
prior, victim = smi.load_prior("digits"), load_classifier("digits-badnets")
with torch.no_grad():
    print(tuple(victim(prior.generate(torch.zeros(1, prior.latent_dim))).shape))
"""
    environment = os.environ | {"PYTHONPATH": str(site)}
    assert run(sys.executable, "-c", smoke, cwd=elsewhere, env=environment).strip() == "(1, 10)"
    (script,) = re.findall(r"^smi = (.+)$", next(site.glob("*.dist-info/entry_points.txt")).read_text(), re.MULTILINE)
    assert script == PROJECT["scripts"]["smi"]
    assert "Usage" in run(str(site / "bin" / "smi"), "--help", cwd=elsewhere, env=environment)
    run(
        sys.executable,
        "-c",
        "from smi.tutorial.lab import notebooks_folder; notebooks_folder()",
        cwd=elsewhere,
        env=environment,
    )
    own = {path.name for path in (elsewhere / "smi-notebooks").glob("*.ipynb")}
    assert own == {path.name for path in (ROOT / "notebooks").glob("*.ipynb")}
