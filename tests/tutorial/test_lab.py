"""`smi lab`: the notebooks to work on, and a JupyterLab that really serves them."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

from smi.errors import InputError
from smi.tutorial.lab import FIRST, lab_command, notebooks_folder

ROOT = Path(__file__).resolve().parents[2]


def test_a_checkout_is_worked_on_in_place():
    assert notebooks_folder() == (ROOT / "notebooks", [])


def test_a_copy_is_whole_and_never_overwrites(tmp_path):
    folder, copied = notebooks_folder(tmp_path / "own")
    assert folder == tmp_path / "own"
    names = {path.name for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert {path.name for path in folder.glob("*.ipynb")} == names
    assert (folder / "results/digits.csv") in copied
    (folder / FIRST).write_text("mine")
    (folder / "02_remove_it_with_clean_data.ipynb").unlink()
    again = notebooks_folder(folder)[1]
    assert [path.name for path in again] == ["02_remove_it_with_clean_data.ipynb"]
    assert (folder / FIRST).read_text() == "mine"
    with pytest.raises(InputError, match="is a file"):
        notebooks_folder(folder / FIRST)


def test_only_this_machine_and_never_without_a_token(tmp_path):
    command = lab_command(tmp_path, port=9000, browser=False)
    assert "--ServerApp.ip=127.0.0.1" in command
    assert "--no-browser" in command
    assert "--no-browser" not in lab_command(tmp_path, port=9000, browser=True)
    assert not any("token" in part or "password" in part for part in command)


def listens(address):
    try:
        socket.create_connection(("127.0.0.1", urllib.parse.urlsplit(address).port), timeout=10).close()
    except ConnectionRefusedError:
        return False
    return True


@pytest.fixture
def address(tmp_path):
    """What a started `smi lab` prints: the address with the token."""
    home = {name: str(tmp_path / name.lower()) for name in ("HOME", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR")}
    command = [sys.executable, "-c", "from smi.cli.main import main; main()", "lab", "--no-browser", "--port", "0"]
    command += ["--", "--allow-root"] if os.geteuid() == 0 else []  # JupyterLab refuses to run as root otherwise
    with (tmp_path / "log").open("w") as log:
        lab = subprocess.Popen(command, cwd=tmp_path, env=os.environ | home, stderr=log, stdout=log)
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and lab.poll() is None:
            found = re.search(r"http://127\.0\.0\.1:\d+/lab/tree/\S+token=\w+", (tmp_path / "log").read_text())
            if found and listens(found.group()):  # it is printed before the port is bound
                break
            time.sleep(0.2)
        else:
            pytest.fail((tmp_path / "log").read_text())
        yield found.group()
    finally:
        lab.send_signal(signal.SIGKILL)
        lab.wait()


def test_it_serves_the_first_notebook_to_whoever_has_the_token(address):
    assert f"/lab/tree/{FIRST}?token=" in address
    base, _, token = address.partition("/lab/tree/")[0], *address.rpartition("token=")[1:]
    contents = f"{base}/api/contents/{FIRST}?content=0"
    with urllib.request.urlopen(f"{contents}&token={token}", timeout=30) as answer:
        assert json.load(answer)["name"] == FIRST
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(contents, timeout=30)
