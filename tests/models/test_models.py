import json

import pytest
import torch
from safetensors.torch import save_file

from smi.errors import InputError
from smi.models.classifiers import build_classifier
from smi.models.store import Card, load_classifier, read_classifier, save_classifier
from smi.runtime.files import load_tensors, save_tensors


@pytest.fixture
def model():
    return build_classifier("small_cnn", 1, 4, seed=1).eval()


@pytest.fixture
def saved(model, tmp_path):
    path = tmp_path / "model.safetensors"
    save_classifier(model, path, arch="small_cnn", record={"classes": ["a", "b", "c", "d"], "made": "by hand"})
    return path


def rewrite(path, tensors=None, **meta):
    """The file with some tensors or metadata replaced."""
    held, old = load_tensors(path, "classifier")
    save_tensors(path, held | (tensors or {}), old | meta)


def test_a_saved_classifier_comes_back_bit_for_bit(model, saved):
    loaded, card = read_classifier(saved)
    assert card == Card("small_cnn", 1, 4, {"classes": ["a", "b", "c", "d"], "made": "by hand"})
    assert card.classes == ("a", "b", "c", "d")
    assert not loaded.training
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_half_halves_the_file_and_keeps_the_predictions(model, saved, tmp_path):
    save_classifier(model, tmp_path / "half.safetensors", arch="small_cnn", half=True)
    assert (tmp_path / "half.safetensors").stat().st_size < 0.6 * saved.stat().st_size
    loaded, card = read_classifier(tmp_path / "half.safetensors")
    images = torch.rand(8, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(loaded(images), model(images), atol=5e-2)
    assert all(value.dtype != torch.float16 for value in loaded.state_dict().values())
    assert card.classes == ("0", "1", "2", "3")


@pytest.mark.parametrize("names", [["a"], "abcd", [1, 2, 3, 4], None])
def test_class_names_that_do_not_fit_are_replaced_by_numbers(names):
    assert Card("small_cnn", 1, 4, {"classes": names}).classes == ("0", "1", "2", "3")


def test_saving_checks_architecture_and_weights(model, tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(InputError, match="Did you mean 'small_cnn'"):
        save_classifier(model, path, arch="smal_cnn")
    with pytest.raises(InputError, match="does not have the weights of a 'resnet18'"):
        save_classifier(model, path, arch="resnet18")
    with pytest.raises(InputError, match="not Linear"):
        save_classifier(torch.nn.Linear(2, 2), path, arch="small_cnn")
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(InputError, match="NaN"):
        save_classifier(model, path, arch="small_cnn")
    assert list(tmp_path.iterdir()) == []


def test_weights_too_large_for_half_are_refused(model, tmp_path):
    with torch.no_grad():
        next(model.parameters()).fill_(1e6)
    save_classifier(model, tmp_path / "single.safetensors", arch="small_cnn")
    with pytest.raises(InputError, match="infinite"):
        save_classifier(model, tmp_path / "half.safetensors", arch="small_cnn", half=True)


def test_loading_refuses_nan_and_a_std_of_zero(saved):
    rewrite(saved, {"std": torch.zeros(1, 1, 1, 1)})
    with pytest.raises(InputError, match="not above zero"):
        load_classifier(saved)
    rewrite(saved, {"mean": torch.full((1, 1, 1, 1), float("nan"))})
    with pytest.raises(InputError, match="NaN or infinite values in 'mean'"):
        load_classifier(saved)


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"arch": "small_cn"}, "Did you mean 'small_cnn'"),
        ({"arch": ["small_cnn"]}, "does not say"),
        ({"channels": 3}, "does not have the weights"),
        ({"channels": 10**9}, "claims"),
        ({"num_classes": 5}, "does not have the weights"),
        ({"num_classes": 10**12}, "claims"),
        ({"num_classes": True}, "does not say"),
        ({"record": "text"}, "does not say"),
        ({"kind": "prior"}, "holds no classifier"),
    ],
)
def test_loading_refuses_metadata_that_does_not_fit(saved, meta, message):
    rewrite(saved, **meta)
    with pytest.raises(InputError, match=message):
        load_classifier(saved)


def test_loading_refuses_missing_truncated_foreign_and_pickled_files(saved, tmp_path):
    with pytest.raises(InputError, match="There is no file"):
        load_classifier(tmp_path / "none.safetensors")
    with pytest.raises(InputError, match="Allowed: digits-badnets, digits-judge"):
        load_classifier("digits-badnet")
    saved.write_bytes(saved.read_bytes()[:-100])
    with pytest.raises(InputError, match="intact"):
        load_classifier(saved)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"x": torch.zeros(1)}, str(foreign), {"format": json.dumps("pt")})
    with pytest.raises(InputError, match="holds no classifier"):
        load_classifier(foreign)
    pickled = tmp_path / "pickled.pt"
    torch.save({"x": torch.zeros(1)}, pickled)
    with pytest.raises(InputError, match="intact"):
        load_classifier(pickled)
