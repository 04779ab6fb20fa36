"""The convolution in C against float64, for one set of weights per draw."""

import pytest
import torch
from torch.nn import functional as F

from smi_kernels import native

FORMATS = [dtype for dtype in (torch.float32, torch.bfloat16) if native.convolves(dtype)]
pytestmark = pytest.mark.skipif(not FORMATS, reason="there is no C compiler, or the processor has no wide vectors")

# draws, images, channels, (height, width), outputs, kernel, stride, padding, dilation
SHAPES = [
    (2, 3, 5, (9, 7), 19, (3, 3), (1, 1), (1, 1), (1, 1)),  # odd channels, and outputs that fill no vector
    (3, 2, 24, (16, 16), 48, (3, 3), (2, 2), (1, 1), (1, 1)),
    (1, 2, 3, (32, 32), 24, (5, 5), (2, 2), (2, 2), (1, 1)),
    (2, 1, 6, (13, 11), 70, (3, 3), (2, 1), (0, 2), (2, 3)),
    (2, 1, 7, (5, 5), 33, (3, 1), (1, 1), (4, 0), (1, 1)),  # more padding than the kernel reaches
    (2, 2, 16, (4, 4), 96, (1, 1), (3, 3), (0, 0), (1, 1)),  # pixels that no output reads
    (1, 1, 1, (1, 1), 1, (1, 1), (1, 1), (0, 0), (1, 1)),
    (2, 5, 4, (3, 3), 130, (3, 3), (1, 1), (0, 0), (1, 1)),  # an output of one pixel
]


def values(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def problem(shape, dtype):
    draws, n, channels, size, outputs, kernel, *rest = shape
    x = values((draws * n, channels, *size), 0, dtype)
    weight, bias = values((draws, outputs, *kernel, channels), 1, dtype), values((draws, outputs), 2)
    stride, padding, dilation = rest
    exact = [
        F.conv2d(own.double(), w.movedim(-1, 1).double(), b.double(), stride, padding, dilation)
        for own, w, b in zip(x.chunk(draws), weight, bias, strict=True)
    ]
    return x, weight, bias, {"stride": stride, "padding": padding, "dilation": dilation}, torch.cat(exact)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_agrees_with_float64(shape, dtype, layout):
    x, weight, bias, options, exact = problem(shape, dtype)
    x = x.contiguous(memory_format=layout)
    size = exact.abs().max()
    ours = native.convolve(x, weight, bias, None, **options, relu=False, dtype=torch.float32)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert (ours - exact).abs().max() < 1e-6 * size * weight[0, 0].numel() ** 0.5
    without = native.convolve(x, weight, None, None, **options, relu=False, dtype=torch.float32)
    shift = bias.repeat_interleave(len(x) // len(bias), 0)[:, :, None, None]
    assert (without + shift - exact).abs().max() < 1e-6 * size * weight[0, 0].numel() ** 0.5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", FORMATS)
def test_residual_activation_and_rounding(shape, dtype):
    x, weight, bias, options, exact = problem(shape, dtype)
    residual = values(exact.shape, 3, dtype).contiguous(memory_format=torch.channels_last)
    ours = native.convolve(x, weight, bias, residual, **options, relu=True, dtype=dtype)
    expected = (exact + residual).relu()
    assert ours.dtype == dtype
    # Half a unit in the last of 8 bits, or of 24 and what the sums add.
    step = 2**-8 if dtype == torch.bfloat16 else 1e-6
    assert ((ours - expected).abs() <= step * expected + 2e-5 * exact.abs().max()).all()


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_draw_does_not_see_the_others(dtype):
    x, weight, bias, options, _ = problem(SHAPES[1], dtype)
    whole = native.convolve(x, weight, bias, None, **options, relu=True, dtype=dtype)
    for k in range(3):
        alone = native.convolve(
            x[2 * k : 2 * k + 2], weight[k : k + 1], bias[k : k + 1], None, **options, relu=True, dtype=dtype
        )
        assert torch.equal(whole[2 * k : 2 * k + 2], alone)


@pytest.mark.parametrize("dtype", FORMATS)
def test_threads_change_no_bit(dtype):
    x, weight, bias, options, _ = problem(SHAPES[1], dtype)
    before = torch.get_num_threads()
    try:
        made = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made.append(native.convolve(x, weight, bias, None, **options, relu=True, dtype=dtype))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(dtype, bad):
    x, weight, bias, options, _ = problem(SHAPES[0], dtype)
    x[0, 0, 4, 3] = bad
    ours = native.convolve(x, weight, bias, None, **options, relu=True, dtype=dtype)
    assert not ours[0].isfinite().all()
    assert ours[1:].isfinite().all()
