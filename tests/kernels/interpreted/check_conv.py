"""Convolutions of K copies against float64 torch, in Triton's interpreter: run with TRITON_INTERPRET=1."""

import pytest
import torch
from torch.nn import functional as F

from smi_kernels.epilogues import epilogues
from smi_kernels.errors import InputError
from smi_kernels.noise import draw, families
from smi_kernels.ops.launch import Draws
from smi_kernels.ops.perturbed_conv.kernel import Packed, conv_tile, perturbed_conv
from smi_kernels.ops.perturbed_conv.pack_signs import pack_signs
from smi_kernels.ops.perturbed_conv.shape import geometry

STD, TENSOR, SEED = 0.25, 7, (1 << 63) + (1 << 31) + 9  # both words of the seed have their highest bit set
SMALL = {"block_m": 16, "block_o": 16, "block_k": 16, "num_warps": 4, "num_stages": 2}


def channels_last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last)


def taps(weight):
    """``[..., O, C, KH, KW]`` as the kernels take it: ``[..., O, KH·KW, C]``."""
    return weight.flatten(-2).transpose(-1, -2).contiguous()


def problem(k, n, channels, outputs, size, kernel, groups=1, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = channels_last(torch.randn(k * n, channels, *size, generator=generator).to(dtype))
    weight = torch.randn(k, outputs, channels // groups, *kernel, generator=generator).to(dtype)
    return x, weight, torch.randn(k, outputs, generator=generator)


def expected(x, weight, bias=None, residual=None, act=None, scale=None, **geometry):
    k = len(weight)
    y = torch.stack([
        F.conv2d(part, w, **geometry) for part, w in zip(x.double().chunk(k), weight.double(), strict=True)
    ])  # fmt: skip
    if scale is not None:
        y = y * scale.double()[:, None, :, None, None]
    if bias is not None:
        y = y + bias.double()[:, None, :, None, None]
    y = y.flatten(0, 1)
    if residual is not None:
        y = y + residual.double()
    return act(y) if act else y


def unit_signs(shape, k, *, first=0, antithetic=False):
    drawn = [
        draw(families["rademacher"], {TENSOR: shape}, seed=SEED, k=first + j, stream=0, antithetic=antithetic)
        for j in range(k)
    ]
    return torch.stack([signs[TENSOR] for signs in drawn])


def packed(weight, k, *, first=0, antithetic=False):
    """Signs for a parameter of the shape of ``weight``, ``[O, C, KH, KW]``."""
    which = Draws(first=first, count=k, seed=SEED, antithetic=antithetic)
    return pack_signs(*weight.shape[:2], weight[0, 0].numel(), tensor=TENSOR, which=which, device="cpu")


def conv(x, weight, *added, kernel_size, stride=1, padding=0, dilation=1, groups=1, epilogue="identity", **options):
    """The launcher, with a geometry and an activation as the tests write them."""
    read = geometry(kernel_size, stride, padding, dilation, groups)
    return perturbed_conv(x, weight, *added, geometry=read, epilogue=epilogues[epilogue], **options)


def close(y, reference, dtype):
    """float32 sums, then at most one rounding to ``dtype``: its relative error is half its eps."""
    eps = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y.double(), reference, rtol=eps + 1e-6, atol=2e-5, check_stride=False)


GEOMETRIES = [  # channels, outputs, image, kernel, and what conv2d takes besides
    (17, 7, (6, 5), (3, 3), {"padding": 1}),
    (20, 19, (7, 5), (3, 3), {"stride": 2, "padding": (1, 2)}),
    (18, 4, (9, 8), (3, 2), {"dilation": 2, "padding": (2, 1), "stride": (1, 3)}),
    (33, 5, (4, 3), (1, 1), {}),
    (18, 5, (5, 6), (1, 1), {"stride": 2}),
    (3, 5, (7, 6), (5, 5), {"padding": 2}),  # few channels: taps and channels are summed as one axis
    (1, 18, (9, 8), (3, 3), {"stride": 2, "padding": 1}),
    (2, 3, (9, 9), (7, 7), {"padding": 3, "stride": 2}),
    (4, 6, (5, 4), (3, 3), {"groups": 2, "padding": 1}),
    (36, 4, (4, 4), (3, 3), {"groups": 2, "padding": (0, 1)}),
    (5, 5, (5, 4), (3, 3), {"groups": 5, "padding": 1, "dilation": (1, 2)}),
    (3, 6, (4, 4), (3, 3), {"groups": 3}),
    (2, 3, (1, 1), (3, 3), {"padding": 1}),  # most taps lie outside
]


@pytest.mark.parametrize(("channels", "outputs", "size", "kernel", "geometry"), GEOMETRIES)
def test_conv_equals_float64(channels, outputs, size, kernel, geometry):
    x, weight, bias = problem(2, 2, channels, outputs, size, kernel, geometry.get("groups", 1))
    y = conv(x, taps(weight), bias, draws=2, kernel_size=kernel, **geometry)
    close(y, expected(x, weight, bias, **geometry), torch.float32)


@pytest.mark.parametrize(("channels", "outputs", "size", "kernel", "geometry"), GEOMETRIES)
def test_signed_conv_equals_the_registered_family(channels, outputs, size, kernel, geometry):
    x, weight, bias = problem(2, 1, channels, outputs, size, kernel, geometry.get("groups", 1))
    theta, scale = weight[0], torch.rand(2, outputs) + 0.5
    signs = Packed(packed(theta, 2, first=1), STD, scale)
    y = conv(x, taps(theta), bias, draws=2, kernel_size=kernel, packed=signs, **geometry)
    noisy = theta + STD * unit_signs(theta.shape, 2, first=1)
    close(y, expected(x, noisy, bias, scale=scale, **geometry), torch.float32)


@pytest.mark.parametrize("channels", [1, 20, 32, 70, 96])  # 96: the last block of 64 has one word
@pytest.mark.parametrize("block_k", [16, 32, 64])
def test_signs_of_every_block_of_channels(channels, block_k):
    """A one-hot image reads the weights of one channel at a time: theta 0 and std 1 give the signs themselves."""
    x = channels_last(torch.eye(channels)[:, :, None, None])
    theta = torch.zeros(5, channels, 1, 1)
    y = conv(
        x, taps(theta), draws=2, kernel_size=1, shared=True, packed=Packed(packed(theta, 2), 1.0),
        tile={**SMALL, "block_m": 64, "block_k": block_k},
    )  # fmt: skip
    signs = unit_signs(theta.shape, 2)[..., 0, 0]
    assert torch.equal(y.reshape(2, channels, 5).transpose(1, 2), signs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_summed_in_float32(dtype):
    x, weight, bias = problem(2, 1, 40, 6, (5, 4), (3, 3), dtype=dtype)
    residual = channels_last(torch.randn(2, 6, 5, 4).to(dtype))
    y = conv(x, taps(weight), bias, residual, draws=2, kernel_size=3, padding=1, epilogue="relu")
    reference = expected(x, weight, bias, residual, torch.relu, padding=1)
    assert y.dtype == dtype
    close(y, reference, dtype)
    full = conv(
        x, taps(weight), bias, residual.float(), draws=2, kernel_size=3, padding=1, epilogue="relu",
        out_dtype=torch.float32,
    )  # fmt: skip
    assert full.dtype == torch.float32
    close(full, reference, torch.float32)


@pytest.mark.parametrize("std", [0.3, 2.0**-8, 2.0**-11])  # the powers lie halfway between neighbours of many weights
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_signed_half_weights_are_rounded_as_stored_ones(dtype, std):
    x, weight, _ = problem(2, 1, 40, 6, (5, 4), (3, 3), dtype=dtype)
    theta = weight[0]
    signs = Packed(packed(theta, 2), std)
    y = conv(x, taps(theta), draws=2, kernel_size=3, packed=signs, out_dtype=torch.float32)
    noisy = theta.float() + std * unit_signs(theta.shape, 2)
    close(y, expected(x, noisy.to(dtype)), torch.float32)
    assert (y - expected(x, noisy)).abs().max() > 1e-3


def test_shared_images_residual_and_no_bias():
    _, weight, _ = problem(3, 2, 18, 5, (4, 5), (3, 3))
    x, residual = channels_last(torch.randn(2, 18, 4, 5)), channels_last(torch.randn(6, 5, 4, 5))
    common = {"draws": 3, "kernel_size": 3, "padding": 1, "epilogue": "relu", "shared": True}
    y = conv(x, taps(weight), None, residual, **common)
    close(y, expected(x.repeat(3, 1, 1, 1), weight, None, residual, torch.relu, padding=1), torch.float32)
    theta = weight[0]
    y = conv(x, taps(theta), None, residual, packed=Packed(packed(theta, 3), STD), **common)
    noisy = theta + STD * unit_signs(theta.shape, 3)
    close(y, expected(x.repeat(3, 1, 1, 1), noisy, None, residual, torch.relu, padding=1), torch.float32)


@pytest.mark.parametrize("name", ["identity", "relu", "relu6", "silu", "gelu"])
def test_every_epilogue_equals_its_twin(name):
    x, weight, bias = problem(1, 1, 8, 18, (4, 4), (1, 1))
    y = conv(x, taps(weight), bias, draws=1, kernel_size=1, epilogue=name)
    close(y, epilogues[name].compute(expected(x, weight, bias)), torch.float32)


def test_tiles_agree():
    x, weight, bias = problem(1, 1, 70, 20, (5, 4), (2, 2))
    common = {"draws": 1, "kernel_size": 2, "padding": 1, "epilogue": "identity"}
    tiles = [SMALL, {**SMALL, "block_k": 64, "weight_first": 1}, {**SMALL, "block_m": 64, "block_o": 32, "block_k": 32}]
    given = [conv(x, taps(weight), bias, **common, tile=tile) for tile in tiles]
    theta = weight[0]
    drawn = [conv(x, taps(theta), packed=Packed(packed(theta, 1), STD), **common, tile=tile) for tile in tiles]
    for results in (given, drawn):
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], rtol=1e-5, atol=5e-5)


def test_tile_table_covers_all_sizes():
    for m in (1, 5000):
        for o in (1, 40, 512):
            for dtype in (torch.float32, torch.bfloat16):
                for signs in (False, True):
                    tile = conv_tile(m, o, 3, dtype, signs)
                    assert {"block_m", "block_o", "num_warps", "num_stages"} <= set(tile)
                    assert tile["block_k"] == 16
                    assert conv_tile(m, o, 4096, dtype, signs)["block_k"] in (32, 64)


@pytest.mark.parametrize(("rows", "channels", "count"), [(3, 5, 9), (2, 33, 1), (4, 64, 2), (1, 1, 25), (2, 128, 1)])
@pytest.mark.parametrize("antithetic", [False, True])
def test_packed_signs_are_the_registered_ones(rows, channels, count, antithetic):
    def pack(first, draws):
        which = Draws(first=first, count=draws, seed=SEED, antithetic=antithetic)
        return pack_signs(rows, channels, count, tensor=TENSOR, which=which, device="cpu")

    signs = pack(1, 3)
    assert signs.dtype == torch.int32
    assert signs.shape == (3, rows, count, -(-channels // 32))
    bits = (signs[..., None] >> torch.arange(32)) & 1
    bits = bits.flatten(-2)
    wanted = unit_signs((rows, channels, count), 3, first=1, antithetic=antithetic).transpose(2, 3)
    assert torch.equal(1.0 - 2.0 * bits[..., :channels], wanted)
    assert not bits[..., channels:].any()
    for j in range(3):  # however the draws are split
        assert torch.equal(pack(1 + j, 1)[0], signs[j])


def test_empty_batch():
    x = channels_last(torch.empty(0, 3, 4, 4))
    y = conv(x, torch.ones(2, 5, 9, 3), draws=2, kernel_size=3)
    assert y.shape == (0, 5, 2, 2)


def run(x, weight, bias, residual=None, **changes):
    return conv(x, weight, bias, residual, **{"draws": 2, "kernel_size": 3, **changes})


BAD = {
    "x is not contiguous in channels_last": lambda x, w, b: run(x.contiguous(), w, b),
    "weight is not contiguous": lambda x, w, b: run(x, w.transpose(0, 1).contiguous().transpose(0, 1), b),
    "weight is float16": lambda x, w, b: run(x, w.half(), b),
    "weight has shape": lambda x, w, b: run(x, w[:1], b),
    "with 3 draws": lambda x, w, b: run(x, w, b, draws=3),
    "bias has shape": lambda x, w, b: run(x, w, b[:, :1]),
    "bias is": lambda x, w, b: run(x, w, b.double()),
    "residual has shape": lambda x, w, b: run(x, w, b, channels_last(torch.ones(4, 6, 3, 3))),
    "residual is not contiguous": lambda x, w, b: run(x, w, b, torch.ones(4, 6, 2, 2)),
    "residual is float16": lambda x, w, b: run(x, w, b, channels_last(torch.ones(4, 6, 2, 2)).half()),
    "x is float64": lambda x, w, b: run(x.double(), w.double(), b),
    "out_dtype is": lambda x, w, b: run(x, w, b, out_dtype=torch.float64),
    "stride is": lambda x, w, b: run(x, w, b, stride=0),
    "padding is": lambda x, w, b: run(x, w, b, padding=(1, -1)),
    "kernel_size is": lambda x, w, b: run(x, w, b, kernel_size=(3, 3, 3)),
    "dilation is": lambda x, w, b: run(x, w, b, dilation=0),
    "2 groups": lambda x, w, b: run(x, w, b, groups=2),
    "exceeds images": lambda x, w, b: run(x, w, b, dilation=2),
    "is on meta": lambda x, w, b: run(x.to("meta"), w, b),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    x, weight, bias = problem(2, 2, 5, 6, (4, 4), (3, 3))
    with pytest.raises(InputError, match=message):
        BAD[message](x, taps(weight), bias)


def test_bad_signs_are_named():
    x, weight, _ = problem(2, 2, 5, 6, (4, 4), (3, 3))
    signs = packed(weight[0], 2)
    common = {"draws": 2, "kernel_size": 3}
    for bad, message in ((signs[:1], "signs has shape"), (signs.long(), "signs is int64")):
        with pytest.raises(InputError, match=message):
            conv(x, taps(weight[0]), packed=Packed(bad, 1.0), **common)
    with pytest.raises(InputError, match="theta has shape"):
        conv(x, taps(weight[0])[:, :8].contiguous(), packed=Packed(signs, 1.0), **common)


@pytest.mark.parametrize(
    ("sizes", "tensor", "message"), [((2, 3, 4), 1 << 32, "tensor is"), ((2, 0, 4), 0, "No signs")]
)
def test_bad_sizes_and_ids_are_named(sizes, tensor, message):
    with pytest.raises(InputError, match=message):
        pack_signs(*sizes, tensor=tensor, which=Draws(first=0, count=1, seed=0), device="cpu")
