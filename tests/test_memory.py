"""Freed memory that is kept is not asked for again."""

import subprocess
import sys

import pytest

from smi.memory import keep_freed

FAULTS = """
import resource, torch
from smi.memory import keep_freed
if {keep}:
    assert keep_freed()
torch.ones(10_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(100):
    torch.ones(10_000_000)  # 40 MB, freed at once
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(keep):
    command = [sys.executable, "-c", FAULTS.format(keep=keep)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(not keep_freed(), reason="needs glibc")
def test_what_was_freed_is_used_again_with_few_page_faults():
    returned, kept = faults(keep=False), faults(keep=True)
    assert returned > 100_000  # or this shows nothing
    assert kept < returned / 5  # a first use of fresh memory may still come late
