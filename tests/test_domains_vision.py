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


def test_gtsrb(tmp_path):
    base = tmp_path / "gtsrb"
    for number in (0, 42):
        png(base / "GTSRB" / "Training" / f"{number:05d}" / "0.ppm", np.full((20, 30, 3), (number, 100, 200), np.uint8))
    png(base / "GTSRB" / "Final_Test" / "Images" / "t.ppm", np.full((50, 40, 3), 51, np.uint8))
    (base / "GT-final_test.csv").write_text("Filename;Width;ClassId\nt.ppm;40;17\n")
    domain = load_domain("gtsrb", root=tmp_path)
    assert domain.num_classes == 43
    assert domain.private.test.labels.tolist() == [17]
    assert torch.allclose(domain.private.test.images, torch.tensor(0.2))
    assert domain.private.train.images.shape == (2, 3, 32, 32)
    assert torch.allclose(domain.private.train.images[0, :, 5, 5], torch.tensor([0, 100, 200]) / 255)


def test_damaged_files_are_bad_input(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (raw / f"{part}-ubyte").write_bytes(struct.pack(">IIII", 0x803, 9, 28, 28) + b"short")
    with pytest.raises(InputError, match=r"mnist is not in .* or is damaged"):
        load_domain("mnist", root=tmp_path)
