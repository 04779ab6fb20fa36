"""Models of strangers: layouts, architectures, what has to be said, and repaired weights back in the same layout."""

import copy
import runpy
from collections import OrderedDict

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import noise
from torch import nn

from smi.errors import InputError
from smi.models.checkpoints import read_checkpoint
from smi.models.classifiers import architectures, build_classifier
from smi.models.store import save_classifier
from smi.models.suspects import load_suspect

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
AS_THEY_ARE = {"mean": (0,), "std": (1,)}
THEIR_FILE = """
from torch import nn

class VGG(nn.Module):
    def __init__(self, num_classes, in_channels):
        super().__init__()
        convolution = nn.Conv2d(in_channels, 8, 3, padding=1)
        self.features = nn.Sequential(convolution, nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(4))
        self.classifier = nn.Linear(8 * 64, num_classes)

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))

def vgg(num_classes=10, in_channels=3):
    return VGG(num_classes, in_channels)

def fixed():
    return VGG(7, 1)

def no_module():
    return 3

def fails():
    raise RuntimeError("on purpose")
"""


def small_vgg(classes=5):
    """A body with weights and statistics that are nobody's defaults."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        body = architectures["small_vgg"](3, classes)
        for value in body.state_dict().values():
            if value.is_floating_point():
                value.add_(0.01 * torch.rand(value.shape))
    return body.eval()


@pytest.fixture
def their_file(tmp_path):
    path = tmp_path / "theirs.py"
    path.write_text(THEIR_FILE)
    return path


def nudged(suspect):
    """A repaired model: every float of the body a little different."""
    repaired = copy.deepcopy(suspect.model)
    for value in repaired.body.state_dict().values():
        if value.is_floating_point() and value.ndim:
            value.mul_(1.01)
    return repaired


LAYOUTS = {
    "plain": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 7},
    "net": lambda state: {"net": OrderedDict((f"module.{k}", v) for k, v in state.items()), "acc": 93.5, "epoch": 199},
    "model in model": lambda state: {"model": {"state_dict": state}, "args": {"lr": 0.1, "name": "x"}},
    "compiled": lambda state: {f"_orig_mod.net.{k}": v for k, v in state.items()},
    "without counters": lambda state: {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")},
    "parameters": lambda state: {k: nn.Parameter(v) if v.is_floating_point() else v for k, v in state.items()},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_read_and_written_as_it_was(tmp_path, layout):
    body, path = small_vgg(), tmp_path / "suspect.pth"
    whole = LAYOUTS[layout](body.state_dict())
    torch.save(whole, path)
    suspect = load_suspect(path, arch="small_vgg", **IMAGENET)
    images = noise(4, 3, 32, 32)
    mean, std = (torch.tensor(IMAGENET[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    assert torch.allclose(suspect.model(images), body((images - mean) / std), atol=1e-5)
    assert (suspect.channels, suspect.classes, suspect.suffix) == (3, ("0", "1", "2", "3", "4"), ".pth")
    assert not suspect.model.training

    repaired = nudged(suspect)
    suspect.write(repaired, tmp_path / "repaired.pth", {"seed": 0})
    again = torch.load(tmp_path / "repaired.pth", weights_only=True)
    before, after = flat(torch.load(path, weights_only=True)), flat(again)
    assert list(before) == list(after)
    for name, old in before.items():
        if isinstance(old, torch.Tensor):
            assert after[name].dtype == old.dtype
            assert torch.allclose(after[name].float(), old.float() * (1.01 if old.is_floating_point() else 1))
        else:
            assert after[name] == old
    assert torch.equal(
        load_suspect(tmp_path / "repaired.pth", arch="small_vgg", **IMAGENET).model(images), repaired(images)
    )


def flat(whole, prefix=""):
    items = {}
    for key, value in whole.items():
        items |= flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {prefix + key: value}
    return items


def test_safetensors_keep_names_metadata_and_types(tmp_path):
    body, path = small_vgg(), tmp_path / "suspect.safetensors"
    save_file({f"net.{k}": v.half() if v.is_floating_point() else v for k, v in body.state_dict().items()}, path,
              {"format": "pt", "author": "somebody"})  # fmt: skip
    suspect = load_suspect(path, arch="small_vgg", classes=list("abcde"), **AS_THEY_ARE)
    assert suspect.classes == tuple("abcde")
    assert next(suspect.model.parameters()).dtype == torch.float32
    suspect.write(nudged(suspect), tmp_path / "out.safetensors", {})
    before, after = load_file(path), load_file(tmp_path / "out.safetensors")
    assert before.keys() == after.keys()
    assert all(after[name].dtype == before[name].dtype for name in before)
    with safe_open(tmp_path / "out.safetensors", "pt") as content:
        assert content.metadata() == {"format": "pt", "author": "somebody"}


def test_an_exported_program_comes_back_with_other_weights_and_is_never_run_here(tmp_path, monkeypatch):
    body, path, images = small_vgg(), tmp_path / "suspect.pt2", noise(2, 3, 32, 32)
    torch.export.save(torch.export.export(body, (images,)), path)
    with monkeypatch.context() as patch:
        patch.setattr(torch.export, "load", None)
        patch.setattr(torch, "load", None)
        suspect = load_suspect(path, arch="small_vgg", **AS_THEY_ARE)
        assert torch.allclose(suspect.model(images), body(images), atol=1e-5)
        repaired = nudged(suspect)
        suspect.write(repaired, tmp_path / f"repaired{suspect.suffix}", {})
    program = torch.export.load(tmp_path / "repaired.pt2").module()
    assert torch.allclose(program(images), repaired(images), atol=1e-4)
    assert not torch.allclose(program(images), body(images), atol=1e-2)


def test_weights_that_a_type_cannot_hold_are_not_written(tmp_path):
    path = tmp_path / "suspect.safetensors"
    save_file({k: v.half() if v.is_floating_point() else v for k, v in small_vgg().state_dict().items()}, path)
    suspect = load_suspect(path, arch="small_vgg", **AS_THEY_ARE)
    with torch.no_grad():
        next(suspect.model.parameters()).fill_(1e6)
    with pytest.raises(InputError, match=r"do not fit into torch\.float16"):
        suspect.write(suspect.model, tmp_path / "out.safetensors", {})
    assert [p.name for p in tmp_path.iterdir()] == ["suspect.safetensors"]


def test_a_resnet18_of_torchvision_with_ten_classes(tmp_path):
    from torchvision.models import resnet18

    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = resnet18(num_classes=10).eval()
    torch.save(theirs.state_dict(), tmp_path / "resnet.pth")
    images = noise(2, 3, 64, 64)
    for name in ("resnet18", "torchvision/resnet18"):  # this project has a resnet18, too, with other weights
        suspect = load_suspect(tmp_path / "resnet.pth", arch=name, **AS_THEY_ARE)
        assert len(suspect.classes) == 10
        assert torch.allclose(suspect.model(images), theirs(images), atol=1e-5)
    save_classifier(build_classifier("resnet18", 3, 4).eval(), tmp_path / "ours.safetensors", arch="resnet18")
    assert len(load_suspect(tmp_path / "ours.safetensors").classes) == 4


def test_an_architecture_of_ones_own(tmp_path, their_file):
    torch.save({"net": small_of(their_file, "vgg", num_classes=6).state_dict()}, tmp_path / "six.pth")
    torch.save(small_of(their_file, "fixed").state_dict(), tmp_path / "seven.pth")
    six = load_suspect(tmp_path / "six.pth", arch=f"{their_file}:vgg", **AS_THEY_ARE)
    assert (six.channels, len(six.classes)) == (3, 6)
    seven = load_suspect(tmp_path / "seven.pth", arch=f"{their_file}:fixed", **AS_THEY_ARE)
    assert (seven.channels, len(seven.classes)) == (1, 7)
    for function, message in (("no_module", "returns a int"), ("fails", "on purpose"), ("none", "no function 'none'")):
        with pytest.raises(InputError, match=message):
            load_suspect(tmp_path / "seven.pth", arch=f"{their_file}:{function}", **AS_THEY_ARE)
    with pytest.raises(InputError, match="There is no file"):
        load_suspect(tmp_path / "seven.pth", arch="nowhere.py:vgg", **AS_THEY_ARE)
    (tmp_path / "broken.py").write_text("def (")
    with pytest.raises(InputError, match="SyntaxError"):
        load_suspect(tmp_path / "seven.pth", arch=f"{tmp_path / 'broken.py'}:vgg", **AS_THEY_ARE)


def small_of(file, function, **settings):
    return runpy.run_path(str(file))[function](**settings)


def test_size_and_channel_order_are_undone_before_the_model(tmp_path):
    body = small_vgg()
    torch.save(body.state_dict(), tmp_path / "suspect.pth")
    images = noise(3, 3, 32, 32)
    blue_first = load_suspect(tmp_path / "suspect.pth", arch="small_vgg", bgr=True, **AS_THEY_ARE)
    assert torch.allclose(blue_first.model(images), body(images[:, [2, 1, 0]]), atol=1e-5)
    larger = load_suspect(tmp_path / "suspect.pth", arch="small_vgg", size=(48, 64), **AS_THEY_ARE)
    seen = []
    hook = larger.model.classifier.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    larger.model(images)
    hook.remove()
    assert seen[0].shape == (3, 3, 48, 64)
    assert (seen[0].mean((2, 3)) - images.mean((2, 3))).abs().max() < 0.01
    grey = load_suspect(tmp_path / "suspect.pth", arch="small_vgg", grey=True, **AS_THEY_ARE)
    assert grey.channels == 1
    assert torch.allclose(grey.model(images[:, :1]), body(images[:, [0, 0, 0]]), atol=1e-5)
    with pytest.raises(InputError, match="takes grey ones"):
        grey.model(images)
    larger.write(larger.model, tmp_path / "out.pth", {})
    for name, value in torch.load(tmp_path / "out.pth", weights_only=True).items():
        assert torch.equal(value, body.state_dict()[name])


def test_what_a_file_does_not_say_has_to_be_said(tmp_path):
    torch.save(small_vgg().state_dict(), tmp_path / "suspect.pth")
    path = tmp_path / "suspect.pth"
    cases = [
        ({}, "does not say of what"),
        ({"arch": "small_vgg"}, "how the images were normalised"),
        ({"arch": "small_vgg", "mean": (0,)}, "how the images were normalised"),
        ({"arch": "smal_vgg", **AS_THEY_ARE}, "Did you mean 'small_vgg'"),
        ({"arch": "small_cnn", **AS_THEY_ARE}, "does not hold the weights of 'small_cnn'"),
        ({"arch": "resnet18", **AS_THEY_ARE}, "does not hold the weights of 'resnet18'"),
        ({"arch": "small_vgg", "mean": (0, 1), "std": (1,)}, "mean has 2 values"),
        ({"arch": "small_vgg", "classes": ["a"], **AS_THEY_ARE}, "1 class names"),
    ]
    for said, message in cases:
        with pytest.raises(InputError, match=message):
            load_suspect(path, **said)
    save_classifier(build_classifier("small_cnn", 1, 3).eval(), tmp_path / "ours.safetensors", arch="small_cnn")
    with pytest.raises(InputError, match="says itself"):
        load_suspect(tmp_path / "ours.safetensors", arch="small_cnn")
    assert load_suspect("digits-badnets").classes == tuple("0123456789")
    with pytest.raises(InputError, match="digits-badnets"):
        load_suspect("digits-badnet")


def test_timm_where_it_is_installed(tmp_path):
    torch.save(small_vgg().state_dict(), tmp_path / "suspect.pth")
    try:
        import timm  # noqa: F401
    except ImportError:
        with pytest.raises(InputError, match="pip install timm"):
            load_suspect(tmp_path / "suspect.pth", arch="timm/resnet18", **AS_THEY_ARE)
        return
    with pytest.raises(InputError, match="Unknown timm architecture"):
        load_suspect(tmp_path / "suspect.pth", arch="timm/resnet17", **AS_THEY_ARE)


def test_loading_leaves_the_global_generator_alone(tmp_path):
    torch.save(small_vgg().state_dict(), tmp_path / "suspect.pth")
    state = torch.get_rng_state()
    load_suspect(tmp_path / "suspect.pth", arch="small_vgg", **AS_THEY_ARE)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_checkpoint_takes_no_tensor_that_it_has_no_place_for(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "x.pt")
    with pytest.raises(InputError, match="has no 'b'"):
        read_checkpoint(tmp_path / "x.pt").write(tmp_path / "y.pt", {"b": torch.zeros(2)})
