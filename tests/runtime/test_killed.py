"""SIGKILL at any step, and faults while a checkpoint is being written: going on ends as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

TIMES = 20
LOST = {"prior": 2, "inversion": 1, "removal": 12}  # optimizer steps, at most


@pytest.mark.slow
@pytest.mark.parametrize("stage", LOST)
def test_work_that_is_killed_goes_on_to_the_same_result(tmp_path, stage):
    script = Path(__file__).parents[1] / "killed.py"
    done = subprocess.run(
        [sys.executable, script, stage, tmp_path, str(TIMES)], capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(cases) == TIMES
    for case in cases:
        killed = os.WIFSIGNALED(case["status"]) and os.WTERMSIG(case["status"]) == signal.SIGKILL
        failed = os.waitstatus_to_exitcode(case["status"]) == 3 if not killed else False
        assert failed if case["kind"] == "full" else killed, case
        assert case["ended"] == 0, case
        assert case["same"], case
        kept = (case["at"] - 1) // LOST[stage] * LOST[stage]
        assert case["again"] == case["total"] - kept, case
    assert sum(case["left"] for case in cases) > TIMES / 2
    assert len({case["at"] for case in cases}) > TIMES / 3
