"""Hostile and broken models: each ends in a message and exit code 2, nothing is written and nothing is run."""

import builtins
import io
import json
import os
import pickle
import struct
import subprocess
import tarfile
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from safetensors.torch import save
from torch import nn

from smi.cli.main import cli
from smi.domains import load_public
from smi.errors import InputError
from smi.models.checkpoints import read_checkpoint
from smi.models.checkpoints.pickled import asked_for
from smi.models.classifiers import architectures

MARK = "it_ran"


class Calls:
    """An object whose unpickling calls ``function(*arguments)``."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def state():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return architectures["small_vgg"](3, 4).state_dict()


def saved(whole, **options):
    buffer = io.BytesIO()
    torch.save(whole, buffer, **options)
    return buffer.getvalue()


def with_first(change):
    held = state()
    name = next(iter(held))
    held[name] = change(held[name])
    return held


def zipped(files, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def header(declared, body=b""):
    text = json.dumps(declared).encode()
    return struct.pack("<Q", len(text)) + text + body


def flipped(raw, place):
    return raw[:place] + bytes([raw[place] ^ 0xFF]) + raw[place + 1 :]


def tarred():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo("../storages")
        archive.addfile(info, io.BytesIO())
    return buffer.getvalue()


def touch():
    return Calls(Path.touch, Path(MARK))


BOMB = {"x": {"dtype": "F32", "shape": [1 << 40, 1 << 20], "data_offsets": [0, 1 << 62]}}
SMALL = {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}

# name: content of the file, what the message must say
FILES = {
    # pickles that call something
    "pickle of os.system": (lambda: pickle.dumps(Calls(os.system, f"touch {MARK}"), 2), "system"),
    "pickle of eval": (lambda: pickle.dumps(Calls(builtins.eval, f"open('{MARK}', 'w')"), 2), "eval"),
    "pickle of exec, newest protocol": (lambda: pickle.dumps(Calls(builtins.exec, f"open('{MARK}', 'w')"), 5), "exec"),
    "pickle of subprocess": (lambda: pickle.dumps(Calls(subprocess.Popen, ["touch", MARK]), 4), "subprocess.Popen"),
    "pickle of pathlib": (lambda: pickle.dumps(touch(), 2), "pathlib"),
    "checkpoint with a call beside the weights": (lambda: saved({"state_dict": state(), "x": touch()}), "pathlib"),
    "checkpoint with a call in the weights": (lambda: saved(with_first(lambda _: touch())), "pathlib"),
    "checkpoint in the old format with a call": (
        lambda: saved({"net": state(), "x": touch()}, _use_new_zipfile_serialization=False), "pathlib",
    ),
    "checkpoint with getattr": (lambda: saved({"x": Calls(getattr, "x", "upper")}), "getattr"),
    "a whole pickled module": (lambda: saved(nn.Linear(2, 2)), "torch.nn.modules.linear.Linear"),
    # programs
    "TorchScript": (lambda: scripted(), "TorchScript"),
    "torch.export without weights": (lambda: exported(None), "without weights"),
    "torch.export with a pickled weight": (lambda: exported(entry(use_pickle=True)), "in a way that is not read"),
    "torch.export with weights elsewhere": (lambda: exported(entry(path_name="../model.json")), "intact"),
    "torch.export with weights nowhere": (lambda: exported(entry(path_name="w9")), "intact"),
    "torch.export with a claim of 2^80 bytes": (lambda: exported(HUGE), "claims the shape"),
    "torch.export with a negative size": (lambda: exported(entry(sizes=(-1, 2))), "in a way that is not read"),
    "torch.export with a stride of zero": (lambda: exported(entry(strides=(0, 0))), "in a way that is not read"),
    "torch.export of an unknown type": (lambda: exported(entry(dtype=99)), "in a way that is not read"),
    "torch.export with a list for JSON": (lambda: exported([]), "intact"),
    # archives
    "zip of text": (lambda: zipped({"readme.txt": "hello"}), "not one that torch.save wrote"),
    "zip with a path that leads out": (lambda: zipped({"../../x/data.pkl": b"\x80\x02}."}), "lead out"),
    "zip with an absolute path": (lambda: zipped({"/etc/data.pkl": b"\x80\x02}."}), "lead out"),
    "zip bomb": (lambda: zipped({"m/data.pkl": b"\0" * 10**7}, zipfile.ZIP_DEFLATED), "unpacks to more"),
    "zip with two pickles": (lambda: zipped({"a/data.pkl": b".", "b/data.pkl": b"."}), "not one that torch.save wrote"),
    "zip cut short": (lambda: saved(state())[:-500], "intact"),
    "zip without its end": (lambda: saved(state())[:200], "intact"),
    "zip with a broken pickle": (lambda: zipped({"m/data.pkl": b"\x80\x02garbage", "m/version": "3"}), "intact"),
    "tar": (tarred, "not a checkpoint"),
    # tensors
    "a tensor that repeats one number 10^13 times": (
        lambda: saved({"x": torch.zeros(1).expand(10**7, 10**6)}), "claims more than it holds",
    ),
    "weights with NaN": (lambda: saved(with_first(lambda w: w * float("nan"))), "NaN"),
    "weights with infinities": (lambda: saved(with_first(lambda w: w / 0)), "NaN or infinite"),
    "complex weights": (lambda: saved(with_first(lambda w: w.to(torch.complex64))), "complex64"),
    "sparse weights": (lambda: saved(with_first(lambda w: w.flatten(1).to_sparse())), "sparse"),
    "weights of another shape": (lambda: saved(with_first(lambda w: w[:, :2])), "has the shape"),
    "weights of another rank": (lambda: saved(with_first(lambda w: w.flatten())), "has the shape"),
    "a weight too few": (lambda: saved(dict(list(state().items())[1:])), "there is no '0.0.weight'"),
    "a weight too many": (lambda: saved(state() | {"extra.weight": torch.zeros(1)}), "extra.weight"),
    "zero classes": (lambda: saved(head(0)), "0 classes"),
    "one class": (lambda: saved(head(1)), "1 classes"),
    "a dict of nothing": (lambda: saved({}), "nothing in it"),
    "a dict of numbers": (lambda: saved({"epoch": 3, "lr": 0.1}), "not a state dict"),
    "a dict with tensors under numbers": (lambda: saved({1: torch.zeros(2)}), "not a state dict"),
    "one tensor": (lambda: saved(torch.zeros(3)), "one Tensor"),
    "a list of tensors": (lambda: saved([torch.zeros(3)]), "one list"),
    "wrappers without end": (lambda: saved(nested(50)), "not a state dict"),
    # safetensors
    "safetensors cut short": (lambda: save(state())[:-100], "intact"),
    "safetensors with a flipped length": (lambda: flipped(save(state()), 3), "intact"),
    "safetensors with a flipped header": (lambda: flipped(save(state()), 8), "not a checkpoint"),
    "safetensors that declare 2^60 numbers": (lambda: header(BOMB, b"\0" * 8), "intact"),
    "safetensors with a header of 2^62 bytes": (lambda: struct.pack("<Q", 1 << 62) + b'{"a": 1}', "intact"),
    "safetensors with overlapping tensors": (lambda: header(SMALL | {"y": SMALL["x"]}, b"\0" * 8), "intact"),
    "safetensors of an unknown type": (
        lambda: header({"x": {"dtype": "F31", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8), "intact",
    ),
    "safetensors of nothing": (lambda: header({}), "no tensors"),
    "safetensors whose metadata is no JSON": (lambda: save(state(), {"smi": "{"}), "says itself"),
    "safetensors whose metadata is a list": (lambda: save(state(), {"smi": "[]"}), "says itself"),
    # no checkpoints at all
    "an empty file": (lambda: b"", "empty"),
    "text": (lambda: b"these are not weights, whatever the name says", "not a checkpoint"),
    "HTML of an error page": (lambda: b"<!DOCTYPE html><title>404</title>", "not a checkpoint"),
    "HDF5": (lambda: b"\x89HDF\r\n\x1a\n" + b"\0" * 64, "HDF5"),
    "gzip": (lambda: b"\x1f\x8b\x08" + b"\0" * 64, "gzip"),
    "zeros": (lambda: b"\0" * 4096, "not a checkpoint"),
}  # fmt: skip


def scripted():
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), buffer)
    return buffer.getvalue()


def entry(path_name="w0", use_pickle=False, sizes=(2, 2), strides=(2, 1), dtype=7):
    meta = {"dtype": dtype, "storage_offset": {"as_int": 0}}
    meta |= {"sizes": [{"as_int": n} for n in sizes], "strides": [{"as_int": n} for n in strides]}
    return {"config": {"x": {"path_name": path_name, "use_pickle": use_pickle, "tensor_meta": meta}}}


HUGE = entry(sizes=(1 << 40, 1 << 40), strides=(1 << 40, 1))


def exported(config):
    files = {"m/archive_format": "pt2", "m/data/weights/w0": b"\0" * 16, "m/data/model.json": "{}"}
    if config is not None:
        files["m/data/weights/model_weights_config.json"] = json.dumps(config)
    return zipped(files)


def head(classes):
    held = state()
    *_, weight, bias = [name for name in held if not name.endswith("tracked")]
    return held | {weight: held[weight][:classes], bias: held[bias][:classes]}


def nested(depth):
    return {"model": nested(depth - 1)} if depth else {"x": torch.zeros(1)}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # put back, should --threads change it
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    return tmp_path


def refused(here, *arguments):
    """What a command says that must end with 2 and leave the folder as it is."""
    before = sorted(here.rglob("*"))
    result = CliRunner().invoke(cli, [str(a) for a in arguments])
    assert result.exit_code == 2, (result.output, result.exception)
    assert sorted(here.rglob("*")) == before, "something was written or run"
    return result.stderr


FORM = ("--arch", "small_vgg", "--mean", 0, "--std", 1)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:Sparse")
def test_a_bad_model_is_refused_and_nothing_runs(here, name):
    content, message = FILES[name]
    (here / "model.pth").write_bytes(content())
    (here / MARK).unlink(missing_ok=True)  # building some of them runs what they carry
    said = refused(here, "remove", "model.pth", *FORM, "--prior", "digits", "--out", "out")
    assert message in said
    assert "Traceback" not in said


def test_places_that_are_no_files(here):
    (here / "folder").mkdir()
    os.symlink("loop", here / "loop")
    os.mkfifo(here / "fifo")
    for path in ("folder", "loop", "fifo", "none.pth"):
        assert path in refused(here, "remove", path, *FORM, "--prior", "digits", "--out", "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(here):
    (here / "model.pth").write_bytes(saved(state()))
    (here / "model.pth").chmod(0)
    assert "permissions" in refused(here, "remove", "model.pth", *FORM, "--prior", "digits", "--out", "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--mean", "a,b,c", "--std", "1"), "--mean is 'a,b,c'"),
        (("--mean", "nan", "--std", "1"), "finite"),
        (("--mean", "0", "--std", "0"), "above zero"),
        (("--mean", "0,0", "--std", "1"), "2 values"),
        (("--mean", "0", "--std", "1", "--size", "0"), "--size is '0'"),
        (("--mean", "0", "--std", "1", "--size", "3x"), "--size is '3x'"),
        (("--mean", "0", "--std", "1", "--size", "99999"), "--size"),
        (("--mean", "0", "--std", "1", "--classes", "a,b"), "2 class names"),
        (("--mean", "0", "--std", "1", "--classes", "bytes.txt"), "UTF-8"),
    ],
)
def test_bad_options_are_refused(here, options, message):
    (here / "model.pth").write_bytes(saved(state()))
    (here / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    assert message in refused(
        here, "remove", "model.pth", "--arch", "small_vgg", *options, "--prior", "digits", "--out", "out"
    )


def huge_png():
    """A PNG of 100 bytes that claims 60,000 × 60,000 pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    size = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


IMAGES = {
    "a bomb": (huge_png(), "decompression bomb"),
    "empty": (b"", "cannot identify"),
    "text": (b"no image", "cannot identify"),
    "markup": (b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", "cannot identify"),
    "a pickle": (pickle.dumps(Calls(os.system, "true")), "cannot identify"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_bad_public_images_are_refused(here, name):
    content, message = IMAGES[name]
    (here / "photos").mkdir()
    (here / "photos" / "<b>.png").write_bytes(content)
    said = refused(here, "fit-prior", "photos", "--steps", 1, "--out", "prior.safetensors")
    assert message in said
    assert "<b>.png" in said


def test_a_folder_with_loops_and_pipes_is_read_without_them(here):
    (here / "photos").mkdir()
    Image.new("L", (32, 32), 90).save(here / "photos" / "a.png")
    first, second = Image.new("L", (32, 32), 0), Image.new("L", (32, 32), 255)
    first.save(here / "photos" / "b.gif", save_all=True, append_images=[second])
    os.symlink("loop.png", here / "photos" / "loop.png")
    os.mkfifo(here / "photos" / "pipe.png")
    images = load_public(str(here / "photos")).images
    assert images.mean((1, 2, 3)).tolist() == pytest.approx([90 / 255, 0]), "of an animation the first picture"


def test_what_a_pickle_asks_for_is_read_off_it():
    raw = pickle.dumps([Calls(os.system, "true"), Calls(builtins.eval, "1"), OrderedDict()], 2)
    assert list(asked_for(raw)) == [f"{os.name}.system", "__builtin__.eval", "collections.OrderedDict"]
    for protocol in (4, 5):
        found = list(
            asked_for(pickle.dumps([Calls(os.system, "true"), Calls(os.system, "x"), Calls(eval, "1")], protocol))
        )
        assert found[0] == f"{os.name}.system"
        assert found[-1] == "builtins.eval"


def read_or_refused(path):
    """Whether a file was read, or refused by a message that names it; anything else is raised."""
    try:
        return bool(read_checkpoint(path).tensors)
    except InputError as error:
        return str(path) in str(error)


GOOD = {
    "torch": saved(state()),
    "old": saved(state(), _use_new_zipfile_serialization=False),
    "safetensors": save(state()),
}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(sorted(GOOD)), data=st.data())
def test_a_damaged_file_is_read_or_refused_and_never_a_traceback(tmp_path, kind, data):
    raw = bytearray(GOOD[kind])
    ends = st.one_of(st.integers(0, min(4000, len(raw) - 1)), st.integers(max(0, len(raw) - 4000), len(raw) - 1))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(ends)] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        raw = raw[: data.draw(ends)]
    path = tmp_path / "model.pth"
    path.write_bytes(bytes(raw))
    assert read_or_refused(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    raw=st.binary(max_size=300),
    start=st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x05", b"\x02\0\0\0\0\0\0\0{"]),
)
def test_bytes_are_read_or_refused_and_never_a_traceback(tmp_path, raw, start):
    path = tmp_path / "model.pth"
    path.write_bytes(start + raw)
    assert read_or_refused(path)
