"""torchvision's data sets, as tiny files in their real formats."""

import pickle
import struct

import numpy as np
import pytest
import torch
from tiny import pixels, png
from torchvision import datasets

from smi.domains import load_domain
from smi.errors import InputError


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "gtsrb", "svhn", "mnist", "fashion_mnist"])
def test_nothing_is_downloaded_unasked(name, tmp_path):
    with pytest.raises(InputError, match=f"{name} is not in .*download=True"):
        load_domain(name, root=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_download_that_fails_is_bad_input(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.MNIST, "download", lambda self: (_ for _ in ()).throw(RuntimeError("no network")))
    with pytest.raises(InputError, match=r"could not be downloaded.*no network"):
        load_domain("mnist", root=tmp_path, download=True)


@pytest.mark.parametrize(("name", "folder_name"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_mnist_and_fashion_mnist(name, folder_name, tmp_path):
    raw = tmp_path / folder_name / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 12), ("t10k", 10)):
        x = pixels(n, 28, 28, seed=n)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, n, 28, 28) + x.tobytes())
        labels = (np.arange(n) % 10).astype(np.uint8)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, n) + labels.tobytes())
    domain = load_domain(name, root=tmp_path)
    assert domain.num_classes == 10
    assert domain.private.test.labels.tolist() == list(range(10))
    images = domain.private.train.images
    assert images.shape == (12, 1, 32, 32)
    padded = np.pad(pixels(12, 28, 28, seed=12), ((0, 0), (2, 2), (2, 2)))
    assert torch.equal(images[:, 0], torch.from_numpy(padded) / 255)


@pytest.mark.parametrize(("name", "cls"), [("cifar10", datasets.CIFAR10), ("cifar100", datasets.CIFAR100)])
def test_cifar(name, cls, tmp_path, monkeypatch):
    base = tmp_path / cls.base_folder
    base.mkdir()
    key, label_key = (cls.meta["key"], "labels" if name == "cifar10" else "fine_labels")
    classes = [f"class {i}" for i in range(10)]
    for file, seed in (("train", 0), ("test", 1)):
        entry = {"data": pixels(4, 3072, seed=seed), label_key: [1, 2, 3, seed]}
        (base / file).write_bytes(pickle.dumps(entry))
    (base / "meta").write_bytes(pickle.dumps({key: classes}))
    monkeypatch.setattr(cls, "train_list", [["train", None]])
    monkeypatch.setattr(cls, "test_list", [["test", None]])
    monkeypatch.setattr(cls, "meta", {"filename": "meta", "key": key, "md5": None})
    domain = load_domain(name, root=tmp_path)
    assert domain.classes == tuple(classes)
    expected = torch.from_numpy(pixels(4, 3072)).view(4, 3, 32, 32) / 255
    assert torch.equal(domain.private.train.images, expected)
    assert domain.private.test.labels.tolist() == [1, 2, 3, 1]


def test_svhn(tmp_path, monkeypatch):
    from scipy.io import savemat

    x = pixels(32, 32, 3, 5)
    for part in ("train", "test"):
        savemat(tmp_path / f"{part}_32x32.mat", {"X": x, "y": np.array([[10], [1], [2], [3], [9]], np.uint8)})
    monkeypatch.setattr(datasets.SVHN, "_check_integrity", lambda self: True)
    private = load_domain("svhn", root=tmp_path).private
    assert private.train.labels.tolist() == [0, 1, 2, 3, 9]  # the files call the digit 0 "10"
    assert torch.equal(private.test.images, torch.from_numpy(x).permute(3, 2, 0, 1) / 255)


def signs(root, tracks, frames=2):
    """``tracks`` of every class in ``{class: tracks}``; the red channel tells the class, the green one the track."""
    for number, count in tracks.items():
        for track in range(count):
            for frame in range(frames):
                file = root / "gtsrb" / "GTSRB" / "Training" / f"{number:05d}" / f"{track:05d}_{frame:05d}.ppm"
                png(file, np.full((20 + frame, 30, 3), (number, track, 200), np.uint8))


def test_gtsrb_is_split_by_track(tmp_path):
    signs(tmp_path, {0: 5, 1: 8, 2: 3})
    domain = load_domain("gtsrb", root=tmp_path)
    assert domain.num_classes == 43
    tracks = {
        part: sorted({(int(red), int(green)) for red, green in (own.images[:, :2, 5, 5] * 255).round().tolist()})
        for part, own in (("train", domain.private.train), ("test", domain.private.test))
    }
    assert tracks["test"] == [(0, 2), (1, 2), (1, 7), (2, 2)]
    assert sorted(tracks["train"] + tracks["test"]) == [(c, t) for c, n in ((0, 5), (1, 8), (2, 3)) for t in range(n)]
    test = domain.private.test
    assert test.labels.tolist() == [0, 0, 1, 1, 1, 1, 2, 2]  # two frames a track
    assert torch.equal((test.images[:, 0, 5, 5] * 255).round().long(), test.labels)
    assert domain.private.train.images.shape == (24, 3, 32, 32)


def test_gtsrb_needs_files_that_name_their_track(tmp_path):
    png(tmp_path / "gtsrb" / "GTSRB" / "Training" / "00000" / "sign.ppm", pixels(8, 8, 3))
    with pytest.raises(InputError, match=r"gtsrb is not in .* or is damaged"):
        load_domain("gtsrb", root=tmp_path)


def test_damaged_files_are_bad_input(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (raw / f"{part}-ubyte").write_bytes(struct.pack(">IIII", 0x803, 9, 28, 28) + b"short")
    with pytest.raises(InputError, match=r"mnist is not in .* or is damaged"):
        load_domain("mnist", root=tmp_path)
