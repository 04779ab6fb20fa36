"""How many threads: control groups and affinity as files describe them, what the user said, and what a block leaves."""

import os
import subprocess
import sys

import pytest
import torch
from tiny import tiny_model
from torch import nn

import smi
from smi.errors import InputError
from smi.runtime import threads
from smi.runtime.compute import fast
from smi.runtime.threads import choose_threads, suitable, suited, threads_of, usable_cores, use_threads


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    """A machine of eight cores, torch's number as it is there, no variable; all put back."""
    before = torch.get_num_threads()
    for name in threads.VARIABLES:
        monkeypatch.setenv(name, "")  # also puts back what `use_threads` sets
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(threads, "usable_cores", lambda: 8)
    torch.set_num_threads(8)
    yield
    torch.set_num_threads(before)


def machine(root, groups, files, siblings=range(8)):
    """A ``proc`` and a ``sys``. groups: lines of /proc/self/cgroup. siblings: the first thread of each cpu's core."""
    for name, text in {"proc/self/cgroup": groups, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for cpu, core in enumerate(siblings):
        path = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        path.parent.mkdir(parents=True)
        path.write_text(f"{core}\n")
    return root


V1 = "/sys/fs/cgroup/cpu,cpuacct"


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("", {}, 8),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "max 100000\n"}, 8),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "300000 100000\n"}, 3),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "290000 100000\n"}, 2),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "nonsense\n"}, 8),
        ("0::/a/b\n", {"sys/fs/cgroup/a/b/cpu.max": "max 100000", "sys/fs/cgroup/a/cpu.max": "20000 10000"}, 2),
        ("0::/elsewhere/b\n", {"sys/fs/cgroup/cpu.max": "400000 100000"}, 4),
        ("2:cpu:/a\n0::/b\n", {"sys/fs/cgroup/unified/b/cpu.max": "500000 100000"}, 5),
        (
            "4:memory:/x\n3:cpu,cpuacct:/docker/1\n",
            {f"{V1[1:]}/cpu.cfs_quota_us": "150000", f"{V1[1:]}/cpu.cfs_period_us": "50000"},
            3,
        ),
        ("3:cpu:/a\n", {"sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "1"}, 8),
    ],
)
def test_control_groups_count(tmp_path, groups, files, cores):
    assert usable_cores(machine(tmp_path, groups, files)) == cores


def test_two_threads_of_a_core_count_once(tmp_path):
    assert usable_cores(machine(tmp_path, "", {}, siblings=[0, 0, 1, 1, 2, 2, 3, 3])) == 4


def test_affinity_counts(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {2, 5})
    assert usable_cores(machine(tmp_path, "", {})) == 2


def test_elsewhere_than_on_linux(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_cores(tmp_path) == 8


def large():
    return nn.Linear(600, 600)


def test_small_models_get_one_thread():
    assert suitable() == suitable(tiny_model()) == suitable(smi.build_classifier("small_cnn", 1, 10)) == 1
    assert suitable(smi.build_classifier("small_vgg", 3, 10)) == suitable(large()) == 8


def test_a_block_has_what_suits_the_model_and_leaves_what_was():
    with fast(tiny_model()) as run:
        assert torch.get_num_threads() == 1
        run(torch.zeros(1, 1, 8, 8))
        with fast(large()):
            assert torch.get_num_threads() == 1, "more threads are never asked for than there are"
    assert torch.get_num_threads() == 8
    with suited(large()), suited(tiny_model()):
        assert torch.get_num_threads() == 1
    with pytest.raises(ZeroDivisionError), fast(tiny_model()):
        raise ZeroDivisionError
    assert torch.get_num_threads() == 8


@pytest.mark.parametrize("how", ["variable", "torch", "call"])
def test_what_the_user_says_stays(how, monkeypatch, capsys):
    if how == "variable":
        monkeypatch.setenv("OMP_NUM_THREADS", "8")
    elif how == "torch":
        torch.set_num_threads(3)
    else:
        use_threads(3)
    before = torch.get_num_threads()
    choose_threads()
    assert capsys.readouterr().out == f"Threads: {before}, as you have set it.\n"
    assert threads_of(tiny_model()) == before
    with fast(tiny_model()):
        assert torch.get_num_threads() == before
    if how == "call":
        assert os.environ["OMP_NUM_THREADS"] == "3", "processes that are started from here do alike"


def test_what_was_chosen_is_said(capsys):
    choose_threads(large())
    assert torch.get_num_threads() == 8
    choose_threads()
    assert torch.get_num_threads() == 1
    many, one = capsys.readouterr().out.splitlines()
    assert many == "Threads: 8 of 8 cores. OMP_NUM_THREADS sets another number."
    assert one.startswith("Threads: 1 of 8 cores (a small model gains little by more")


def test_bad_numbers_are_refused():
    for count in (0, -1, 1.5, "two"):
        with pytest.raises(InputError, match="count"):
            use_threads(count)


def test_the_command_says_how_many_and_takes_another_number():
    environment = {name: value for name, value in os.environ.items() if name not in threads.VARIABLES}
    told = subprocess.run([sys.executable, "-c", HELP], env=environment, capture_output=True, text=True, timeout=60)
    cores, *said = told.stdout.split()
    assert f"1 for a small model, {cores} for others" in " ".join(said)


HELP = """
from smi.cli.main import cli
from smi.runtime.threads import usable_cores
print(usable_cores())
cli(["demo", "--help"])
"""
