"""Run the check files of ``interpreted`` in a process of their own, with Triton's interpreter and one thread."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"
CHECKS = sorted(FOLDER.glob("check_*.py"))

pytest.importorskip("triton")


def interpreted(path):
    """pytest on a file or folder, under the interpreter. Returns its exit code and output."""
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-o", "python_files=check_*.py", "-p", "no:nbval"]
    command += ["-p", "no:cacheprovider", "-rs", f"--rootdir={FOLDER}", str(path)]
    # Standard error too, where a crash would be reported.
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, text=True, timeout=1800,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return done.returncode, done.stdout


def test_interpreted_checks_pass():
    code, output = interpreted(FOLDER)
    if code != 0 or not re.search(r"\b[1-9]\d* passed", output) or "skipped" in output.splitlines()[-1]:
        pytest.fail(f"The checks exited with {code}:\n{output}", pytrace=False)
    assert all(f"{path.name} ." in output for path in CHECKS), output


def test_there_are_checks():
    expected = {"check_backend", "check_conv", "check_linear", "check_noise", "check_ops", "check_perturb"}
    assert expected <= {path.stem for path in CHECKS}


def test_a_failing_check_is_reported(tmp_path):
    path = tmp_path / "check_failing.py"
    path.write_text("def test_fails():\n    assert 1 == 2\n")
    code, output = interpreted(path)
    assert code == 1
    assert "1 failed" in output
