import pytest
import torch
from tiny import noise, same_state, state_of, tiny_model
from torch import nn

from smi.errors import InputError
from smi.runtime.checks import check_images, check_labels, check_model, check_number, evaluating

GOOD = noise(2, 1, 8, 8)


@pytest.mark.parametrize("images", [GOOD, noise(1, 3, 4, 6), torch.zeros(1, 1, 2, 2), GOOD.double()])
def test_images_that_pass(images):
    check_images(images)


def _with(value):
    images = GOOD.clone()
    images[1, 0, 3, 3] = value
    return images


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (GOOD.numpy(), "not ndarray"),
        (GOOD[0], r"\(1, 8, 8\).*images\[None\]"),
        (noise(2, 8, 8, 3), "channels-last"),
        (GOOD[:0], "empty"),
        (torch.zeros(1, 1, 0, 4), "empty"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), r"uint8.*/ 255"),
        (_with(1.01), "1.01"),
        (_with(-0.1), "-0.1"),
        (GOOD * 255, "/ 255"),
        (_with(torch.nan), "nan"),
        (_with(torch.inf), "inf"),
    ],
)
def test_images_that_do_not(images, message):
    with pytest.raises(InputError, match=message) as error:
        check_images(images, "my images")
    assert "my images" in str(error.value)


def test_labels():
    check_labels(torch.tensor([0, 2]), 2, 3)
    for labels, message in [
        ([0, 1], "list"),
        (torch.tensor([0, 1], dtype=torch.int32), "int32"),
        (torch.tensor([0.0, 1.0]), "float32"),
        (torch.tensor([0, 1, 2]), r"shape \[2\]"),
        (torch.tensor([[0], [1]]), r"shape \[2\]"),
        (torch.tensor([0, 3]), "0 to 3, but there are 3 classes"),
        (torch.tensor([-1, 0]), "-1 to 0"),
    ]:
        with pytest.raises(InputError, match=message):
            check_labels(labels, 2, 3)


def test_a_model_that_fits_is_left_as_it_was():
    model = tiny_model()
    model.train()
    model.body[1].eval()  # a frozen BatchNorm in a model that is training
    before = state_of(model)
    assert check_model(model, GOOD, 3) == 3
    assert same_state(before, state_of(model))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["body.4.bias", "body.1.running_var"])
def test_a_model_with_broken_weights(value, name):
    model = tiny_model()
    model.state_dict()[name][0] = value
    with pytest.raises(InputError, match=rf"'{name}' has NaN"):
        check_model(model, GOOD)


class Picky(nn.Module):
    def forward(self, images):
        raise AssertionError(f"Input height {images.shape[2]} does not match the model's 224")


@pytest.mark.parametrize(
    ("model", "classes", "message"),
    [
        ("resnet18", None, "a str"),
        (tiny_model(classes=3), 10, "3 classes, but 10 were expected"),
        (tiny_model(size=16), None, r"does not accept images of shape \(1, 8, 8\)"),
        (tiny_model(channels=3), None, "does not accept"),
        (nn.Sequential(nn.Flatten(), nn.BatchNorm2d(4)), None, "does not accept"),  # these two raise no RuntimeError
        (Picky(), None, "does not accept.*224"),
        (nn.Conv2d(1, 3, 3), None, "one finite tensor of logits"),
    ],
)
def test_models_that_do_not_fit(model, classes, message):
    with pytest.raises(InputError, match=message):
        check_model(model, GOOD, classes)


def test_a_model_whose_logits_are_not_finite():
    class Overflow(nn.Module):
        def forward(self, images):
            return images.flatten(1)[:, :3].log() * torch.inf

    with pytest.raises(InputError, match="finite"):
        check_model(Overflow(), GOOD)


def test_evaluating_restores_modes_after_an_error_too():
    model = tiny_model()
    model.train()
    model.body[1].eval()
    modes = []

    def look_and_fail():
        with evaluating(model) as same:
            modes.extend(module.training for module in same.modules())
            raise RuntimeError

    with pytest.raises(RuntimeError):
        look_and_fail()
    assert modes
    assert not any(modes)
    assert model.training
    assert model.body[4].training
    assert not model.body[1].training


@pytest.mark.parametrize("value", [-1, 4, float("nan"), float("inf"), "2", True, None])
def test_numbers_that_are_not_allowed(value):
    with pytest.raises(InputError, match=r"rho is .*Allowed: a number from 0 to 3"):
        check_number("rho", value, low=0, high=3)


def test_whole_numbers():
    check_number("k", 3, low=1, integer=True)
    check_number("rho", 0.5, low=0)
    with pytest.raises(InputError, match="a whole number from 1 or more"):
        check_number("k", 2.0, low=1, integer=True)
