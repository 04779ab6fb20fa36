"""Set before torch is imported: threads that spin while they wait slow down every other process of a small machine."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import study_pieces

from smi.memory import keep_freed

keep_freed()


@pytest.fixture
def small(tmp_path):
    file = tmp_path / "small.toml"
    file.write_text(study_pieces.SMALL)
    return file


@pytest.fixture
def store(tmp_path):
    from smi.study import Store

    (tmp_path / "cache").mkdir()
    return Store(tmp_path / "out", tmp_path / "cache")
