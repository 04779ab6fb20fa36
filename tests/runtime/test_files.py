import errno
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from smi.errors import InputError
from smi.runtime import files
from smi.runtime.files import (
    claimed,
    fingerprint,
    load_tensors,
    output_file,
    output_folder,
    save_tensors,
    to_half,
    to_single,
    write_atomic,
)

# atomic writes


@pytest.mark.parametrize("content", ["grüße", b"\x00\xff"])
def test_write(content, tmp_path):
    file = tmp_path / "a.txt"
    write_atomic(file, content)
    assert file.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert file.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("call", ["fdopen", "fsync", "chmod", "replace"])
@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_what_was_there(call, failure, tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    file.write_text("old")

    def fail(*args, **kwargs):
        raise failure

    monkeypatch.setattr(files.os, call, fail)
    with pytest.raises(type(failure)):
        write_atomic(file, "new")
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["a.txt"]
    assert file.read_text() == "old"


# output paths


def test_an_output_folder_is_new_or_empty(tmp_path):
    new = tmp_path / "a" / "b"
    assert output_folder(new) == new
    assert not (tmp_path / "a").exists()  # bad input found later leaves nothing behind
    assert output_folder(str(tmp_path)) == tmp_path
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"not empty.*--force"):
        output_folder(tmp_path)
    assert output_folder(tmp_path, force=True) == tmp_path
    with pytest.raises(InputError, match="is a file"):
        output_folder(tmp_path / "file")
    with pytest.raises(InputError, match="file/inside"):
        output_folder(tmp_path / "file" / "inside")


def test_a_hidden_file_makes_a_folder_not_empty(tmp_path):
    (tmp_path / ".keep").touch()
    with pytest.raises(InputError, match="not empty"):
        output_folder(tmp_path)


def test_an_output_folder_must_be_writable(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "access", lambda path, mode: path != tmp_path)  # root may write anywhere
    with pytest.raises(InputError, match="cannot be written to"):
        output_folder(tmp_path / "new")


def test_an_output_file_is_new(tmp_path):
    assert output_file(tmp_path / "a.npz") == tmp_path / "a.npz"
    (tmp_path / "a.npz").touch()
    with pytest.raises(InputError, match=r"exists.*--force"):
        output_file(tmp_path / "a.npz")
    assert output_file(tmp_path / "a.npz", force=True) == tmp_path / "a.npz"
    with pytest.raises(InputError, match="exists"):
        output_file(tmp_path, force=True)  # a folder cannot be replaced by a file
    with pytest.raises(InputError, match="does not exist"):
        output_file(tmp_path / "missing" / "a.npz")


# tensors


@pytest.fixture
def saved(tmp_path):
    file = tmp_path / "a.safetensors"
    tensors = {"w": torch.arange(6.0).view(2, 3).T, "n": torch.tensor(3)}  # not contiguous on purpose
    save_tensors(file, tensors, {"kind": "prior", "record": {"seed": 1}})
    return file


def test_tensors_come_back(saved):
    tensors, metadata = load_tensors(saved, "prior")
    assert torch.equal(tensors["w"], torch.arange(6.0).view(2, 3).T)
    assert tensors["n"].dtype == torch.int64
    assert metadata == {"kind": "prior", "record": {"seed": 1}}


def test_the_kind_must_match(saved):
    with pytest.raises(InputError, match=r"holds no classifier.*'prior'"):
        load_tensors(saved, "classifier")


def test_a_missing_file(tmp_path):
    with pytest.raises(InputError, match="There is no file"):
        load_tensors(tmp_path / "none.safetensors", "prior")


@pytest.mark.parametrize("keep", [0, 7, 40, -1])
def test_a_file_cut_short(saved, keep):
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(InputError, match="not an intact safetensors file"):
        load_tensors(saved, "prior")


def test_a_pickle_is_not_opened(tmp_path):
    file = tmp_path / "a.safetensors"
    torch.save({"w": torch.zeros(2)}, file)
    with pytest.raises(InputError, match="not an intact safetensors file"):
        load_tensors(file, "prior")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"smi": "{"}, {"smi": "[1]"}])
def test_a_file_of_another_program(metadata, tmp_path):
    file = tmp_path / "a.safetensors"
    save_file({"w": torch.zeros(2)}, file, metadata)
    with pytest.raises(InputError, match=r"a\.safetensors"):
        load_tensors(file, "prior")


def test_half_and_single_leave_integers_alone():
    tensors = {"w": torch.tensor([1.0, 0.1]), "n": torch.tensor([70000])}
    half = to_half(tensors)
    assert (half["w"].dtype, half["n"].dtype) == (torch.float16, torch.int64)
    back = to_single(half)
    assert back["w"].dtype == torch.float32
    assert back["n"].item() == 70000
    assert torch.allclose(back["w"], tensors["w"], rtol=1e-3)


def test_a_fingerprint_tells_shape_and_values():
    x = torch.arange(6.0).view(2, 3)
    assert fingerprint(x) == fingerprint(x.clone())
    assert len({fingerprint(x), fingerprint(x.view(3, 2)), fingerprint(x + 1), fingerprint(x.T)}) == 4


# claims


def test_a_claim_keeps_others_out_and_leaves_nothing(tmp_path):
    with claimed(tmp_path / "out", folder=True) as folder:
        assert folder == tmp_path / "out"
        with pytest.raises(InputError, match="Another process is writing"), claimed(tmp_path / "out", folder=True):
            pass
        with claimed(tmp_path / "other.npz"), claimed(tmp_path / "new" / "out", folder=True):
            pass
    with pytest.raises(RuntimeError), claimed(tmp_path / "out", folder=True):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_claim_of_a_killed_process_does_not_bar_the_way(tmp_path):
    script = f"""
import os, signal
from smi.runtime.files import claimed
with claimed({str(tmp_path / "out")!r}):
    print("claimed", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "claimed\n"
    assert [p.name for p in tmp_path.iterdir()] == [".out.smi-lock"]
    with claimed(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_full_or_missing_disk_is_told_before_any_work(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="MB left"), claimed(tmp_path / "out", room=10**18):
        pass

    def refuse(*args, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(InputError, match="Read-only file system"), claimed(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_of_many_claims_at_once_one_holds(tmp_path):
    script = f"""
import time
from smi.errors import InputError
from smi.runtime.files import claimed
try:
    with claimed({str(tmp_path / "out")!r}) as file:
        time.sleep(0.5)
        file.write_text("mine")
        print("mine")
except InputError as error:
    print(error)
"""
    started = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    told = sorted(process.communicate(timeout=120)[0] for process in started)
    assert told.count("mine\n") == 1
    assert all(line == "mine\n" or "Another process" in line or "exists" in line for line in told)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
