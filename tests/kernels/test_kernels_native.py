"""The C library: bit for bit what torch draws, and what happens without it."""

import multiprocessing
import os

import pytest
import torch

from smi_kernels import native, stability_scores
from smi_kernels.noise import PARAMETERS, Draw, draw, families

needed = pytest.mark.skipif(native.library() is None, reason="there is no C compiler")
SEED = 2**63 + 2**33 + 5


@pytest.fixture
def without(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)


def in_torch(name, shape, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", lambda: None)
        return draw(families[name], {9: shape}, seed=SEED, stream=PARAMETERS, **options)[9]


@needed
@pytest.mark.parametrize("name", ["gaussian", "rademacher", "rank1", "flipout"])
@pytest.mark.parametrize("size", [1, 3, 127, 129, 4097, 300_001])
def test_noise_is_the_same_to_the_last_bit(name, size):
    for k in (0, 5):
        ours = draw(families[name], {9: (size,)}, seed=SEED, k=k, stream=PARAMETERS, antithetic=True)[9]
        assert torch.equal(ours, in_torch(name, (size,), k=k, antithetic=True))


@needed
@pytest.mark.parametrize("name", ["gaussian", "rademacher"])
@pytest.mark.parametrize("shape", [(5, 1, 5, 5), (33, 7, 3, 3), (10, 96), (3, 4, 1, 1), (1, 9001), (300, 500)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_perturbed_weights_are_the_same_to_the_last_bit(name, shape, dtype):
    theta = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    scale = 0.5 + torch.rand(shape[0], generator=torch.Generator().manual_seed(1))
    draws = [Draw(seed=SEED, k=k, stream=PARAMETERS, antithetic=True) for k in (3, 0, 4)]
    stream = native.Stream(9, 0, PARAMETERS, SEED & 0xFFFFFFFF, SEED >> 32)
    numbers, signs = [d.number for d in draws], [draws[0].sign, 0.0, draws[2].sign]
    noise = [in_torch(name, shape, k=3, antithetic=True), 0, in_torch(name, shape, k=4, antithetic=True)]
    for factor in (None, torch.stack([scale, scale + 1, scale + 2])):
        rows, channels, *kernel = shape
        out = torch.full((3, rows, *kernel, channels), float("nan"), dtype=dtype)
        native.perturb_weights(theta, out, 0.037, factor, name, stream, numbers, signs)
        for i, own in enumerate(noise):
            expected = theta + 0.037 * own
            if factor is not None:
                expected = expected * factor[i].reshape(-1, *[1] * (len(shape) - 1))
            assert torch.equal(out[i], expected.movedim(1, -1).to(dtype))


@needed
def test_bfloat16_keeps_what_is_not_finite():
    theta = torch.tensor([[float("nan"), float("inf"), -float("inf"), 3.4e38, -0.0, 1e-40]])
    out = torch.empty(1, 1, 6, dtype=torch.bfloat16)
    native.perturb_weights(theta, out, 0.0, None, "rademacher", native.Stream(0, 0, 0, 0, 0), [0], [1.0])
    torch.testing.assert_close(out[0], theta.to(torch.bfloat16), equal_nan=True, rtol=0, atol=0)


@needed
def test_threads_change_no_bit():
    before = torch.get_num_threads()
    try:
        drawn = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            drawn.append(draw(families["gaussian"], {0: (1_000_003,)}, seed=1, k=0, stream=PARAMETERS)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("options", [{}, {"family": "rademacher", "antithetic": True}])
def test_scores_without_the_library(cnn, images, options, without):
    options = {"k": 4, "sigma_x": 0.1, "sigma_w": 0.05} | options
    exact = stability_scores(cnn, images, **options, dtype="float64", backend="reference")
    for dtype, relative, floor in (("float32", 1e-3, 1e-6), ("bfloat16", 5e-2, 1e-5)):
        ours = stability_scores(cnn, images, **options, dtype=dtype).double()
        assert ((ours - exact).abs() <= relative * exact + floor).all()


def fresh_library():
    native.library.cache_clear()
    try:
        return native.library()
    finally:
        native.library.cache_clear()


def test_it_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("SMI_KERNELS_NATIVE", "0")
    assert fresh_library() is None


def test_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert fresh_library() is None


@needed
def test_it_is_built_once_in_a_private_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert fresh_library() is not None
    (built,) = (tmp_path / "smi_kernels").iterdir()
    stamp = built.stat().st_mtime_ns
    assert fresh_library() is not None
    assert built.stat().st_mtime_ns == stamp
    assert (tmp_path / "smi_kernels").stat().st_mode & 0o077 == 0
    (tmp_path / "smi_kernels").chmod(0o777)
    assert fresh_library() is None  # others could put their own code there


@needed
def test_a_compiler_that_fails(monkeypatch, tmp_path):
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert fresh_library() is None


def _draw_in_a_child(queue):
    # Nothing that torch runs in parallel: its own threads do not survive a fork.
    queue.put(draw(families["gaussian"], {0: (600_000,)}, seed=1, k=0, stream=PARAMETERS)[0][-4:].tolist())


@needed
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_child_draws_too():
    expected = draw(families["gaussian"], {0: (600_000,)}, seed=1, k=0, stream=PARAMETERS)[0][-4:].tolist()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_draw_in_a_child, args=(queue,))
    child.start()
    assert queue.get(timeout=60) == expected
    child.join()
