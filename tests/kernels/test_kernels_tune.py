"""Choices by what was measured on a GPU."""

import json
import re

import pytest
import torch

from smi_kernels.ops.perturbed_conv.shape import conv_shape, geometry
from smi_kernels.tune import choices
from smi_kernels.tune.choices import FOLDER, HALF, SIGNS, nearest, prefers_library, prefers_scratch, tuned_tile
from smi_kernels.tune.measure import NAMES, TILES, Problem, problems, tiles_for

CPU = torch.device("cpu")
TUNED = [file for file in FOLDER.glob("*.json") if file.name != "default.json"]


def shape(images=64, channels=64, outputs=128, size=16, groups=1, draws=2):
    x = torch.empty(draws * images, channels, size, size, device="meta")
    weight = torch.Size((outputs, 9, channels // groups))
    return conv_shape(x, weight, draws, geometry(3, 1, 1, 1, groups), shared=False)


def row(kind, of, tile, **seconds):
    return {"kind": kind, "features": choices.features(of), "tile": {"block_m": tile}, **seconds}


@pytest.fixture
def table(monkeypatch):
    """Many small images of few channels, and few large ones of many: other tiles, other winners."""
    small, large = shape(images=256, channels=16, size=8), shape(images=8, channels=256, size=32)
    rows = [
        row(HALF, small, 32, seconds=2.0, library_seconds=1.0),
        row(HALF, large, 64, seconds=1.0, library_seconds=2.0),
        row(SIGNS, small, 16, seconds=2.5, perturb_seconds=1.0),
        row(SIGNS, large, 128, seconds=2.5, perturb_seconds=1.0),
    ]
    monkeypatch.setattr(choices, "load", lambda device: {"convolutions": rows})
    nearest.cache_clear()
    yield small, large
    nearest.cache_clear()


def test_the_nearest_shape_that_was_measured_decides(table):
    small, large = table
    assert tuned_tile(CPU, small, HALF) == {"block_m": 32}
    assert tuned_tile(CPU, large, SIGNS) == {"block_m": 128}
    assert tuned_tile(CPU, shape(images=6, channels=200, size=30), HALF) == {"block_m": 64}
    assert prefers_library(CPU, small)
    assert not prefers_library(CPU, large)
    assert not prefers_scratch(CPU, small)  # 2 + 1 seconds against 2.5
    assert prefers_scratch(CPU, large)  # 1 + 1


def test_cutting_draws_into_groups_changes_no_choice(table):
    assert choices.features(shape(draws=1)) == choices.features(shape(draws=7))


def test_groups_of_few_channels_go_to_the_library(table):
    _, large = table
    assert prefers_library(CPU, shape(images=8, channels=256, outputs=256, size=32, groups=32))
    assert not prefers_library(CPU, large)


def test_where_nothing_was_measured_it_is_our_kernel_with_its_own_tile():
    nearest.cache_clear()
    assert tuned_tile(CPU, shape(), HALF) is None
    assert not prefers_library(CPU, shape())
    assert not prefers_scratch(CPU, shape())


@pytest.mark.parametrize("file", TUNED, ids=lambda file: file.stem)
def test_what_was_measured(file):
    """Files say where they come from, are found by the name of their device, and hold tiles that can be launched."""
    content = json.loads(file.read_text())
    made = content["measured"]
    assert f"{choices.file_name(made['device'])}.json" == file.name
    assert re.match(r"20\d\d-\d\d-\d\dT", made["date"])
    assert {"torch", "triton", "python"} < set(made)
    assert len(content["convolutions"]) == 2 * len(list(problems()))
    for line in content["convolutions"]:
        other = "library_seconds" if line["kind"] == HALF else "perturb_seconds"
        assert 0 < line["seconds"] < 1
        assert 0 < line[other] < 1
        assert tuple(line["tile"]) == NAMES
        assert all(line["tile"][name] in (16, 32, 64, 128, 256) for name in ("block_m", "block_o", "block_k"))


def test_there_is_a_measured_file():
    assert TUNED


def test_candidates_do_not_mostly_multiply_zeros():
    for kind in TILES:
        found = list(tiles_for(kind, shape(channels=1, outputs=24)))
        assert found
        assert all(tile["block_o"] == 32 and tile["block_k"] == 16 for tile in found)
        wide = [tile["block_o"] for tile in tiles_for(kind, shape(channels=512, outputs=512))]
        assert max(wide) > 64


def test_what_is_timed_are_the_layers_of_the_benchmark_each_once():
    seen = list(problems())
    assert {n for _, _, _, n in seen} == {16, 64, 256}
    assert {name for name, *_ in seen} == {"small_cnn", "small_vgg", "resnet18"}
    _, module, size, _ = seen[0]
    problem = Problem(module, size, 3, "cpu")
    assert problem.library().shape == (3 * 8, module.out_channels, *problem.shape.result)
    assert problem.perturb().shape == problem.weight.shape
