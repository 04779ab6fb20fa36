"""Ctrl-C and SIGTERM: exit codes, no step cut in two, nothing lost."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import load_file

from smi.runtime.signals import Stopped, delayed_signals, stoppable

BOTH = [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("number", BOTH)
def test_a_signal_ends_the_block_and_what_was_there_before_comes_back(number):
    def work():
        with stoppable():
            os.kill(os.getpid(), number)
            time.sleep(5)

    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stopped:
        work()
    assert stopped.value.signal == number
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", BOTH)
def test_a_signal_waits_for_the_end_of_the_step_and_a_second_does_not(number):
    done = []

    def work(times):
        with stoppable(), delayed_signals() as stop:
            done.append(stop())
            for _ in range(times):
                os.kill(os.getpid(), number)
            done.append(stop())

    with pytest.raises(Stopped) as stopped:
        work(1)
    assert done == [None, number]
    assert stopped.value.signal == number
    done.clear()
    with pytest.raises(Stopped):
        work(2)
    assert done == [None]


def test_other_threads_are_left_alone():
    seen = []

    def work():
        with stoppable(), delayed_signals() as stop:
            seen.append(stop())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None]


SCRIPT = """
import sys
import smi.priors.gan
from smi.cli.main import main
real = smi.priors.gan._Training.advance
def advance(run):
    real(run)
    print("step", run.step, flush=True)
smi.priors.gan._Training.advance = advance
main()
"""


COMMAND = [sys.executable, "-c", SCRIPT, "fit-prior", "digits", "--steps", "6", "--threads", "1", "--out"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The weights of a prior that was trained in one go."""
    path = tmp_path_factory.mktemp("whole") / "prior.safetensors"
    subprocess.run([*COMMAND, str(path)], capture_output=True, timeout=120, check=True)
    return load_file(path)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_training_a_prior_ends_with_its_state_written_and_goes_on_to_the_same_weights(
    tmp_path, uninterrupted, number, code
):
    command = [*COMMAND, str(tmp_path / "prior.safetensors")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line == "step 2\n":
            process.send_signal(number)
            break
    steps, told = process.communicate(timeout=120)
    assert process.returncode == code, told
    assert told.rstrip().endswith("Interrupted.")
    last = int((steps.split() or ["step", "2"])[-1])
    assert 2 <= last < 6
    assert [p.name for p in tmp_path.iterdir()] == ["prior.safetensors.unfinished"]
    refused = subprocess.run(command, capture_output=True)
    assert refused.returncode == 2
    assert b"--resume" in refused.stderr
    again = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=120, check=True)
    assert again.stdout.split()[1] == str(last + 1)
    assert [p.name for p in tmp_path.iterdir()] == ["prior.safetensors"]
    resumed = load_file(tmp_path / "prior.safetensors")
    assert resumed.keys() == uninterrupted.keys()
    assert all(torch.equal(resumed[name], uninterrupted[name]) for name in resumed)
