"""For the files that run in Triton's interpreter; `test_kernels_interpreter` starts a process for them."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for kernel_reference


def pytest_configure():
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.exit("Set TRITON_INTERPRET=1 to run these files.", returncode=1)
