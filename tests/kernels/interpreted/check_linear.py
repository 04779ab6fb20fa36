"""Linear layers of K copies against float64 torch, in Triton's interpreter: run with TRITON_INTERPRET=1."""

import pytest
import torch
from torch.nn import functional as F

from smi_kernels.epilogues import epilogues
from smi_kernels.errors import InputError
from smi_kernels.noise import draw, families
from smi_kernels.ops.launch import Draws, Signs
from smi_kernels.ops.perturbed_linear.kernel import linear_tile, perturbed_linear

STD, TENSOR, SEED = 0.25, 3, (1 << 63) + (1 << 31) + 5  # both words of the seed have their highest bit set
IDENTITY, RELU = epilogues["identity"], epilogues["relu"]
SMALL = {"block_m": 16, "block_o": 16, "num_warps": 4, "num_stages": 2}


def problem(k, m, f, o, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(k * m, f, generator=generator).to(dtype)
    weight = torch.randn(k, o, f, generator=generator).to(dtype)
    return x, weight, torch.randn(k, o, generator=generator)


def expected(x, weight, bias=None, residual=None, act=None, scale=None):
    k = len(weight)
    y = torch.einsum("kmf,kof->kmo", x.double().reshape(k, -1, x.shape[-1]), weight.double())
    if scale is not None:
        y = y * scale.double()[:, None]
    if bias is not None:
        y = y + bias.double()[:, None]
    y = y.flatten(0, 1)
    if residual is not None:
        y = y + residual.double()
    return act(y) if act else y


def signed_weights(theta, k, *, first=0, antithetic=False, std=STD):
    """What every backend would store: added in float32, rounded once to theta's dtype."""
    signs = [
        draw(families["rademacher"], {TENSOR: theta.shape}, seed=SEED, k=first + j, stream=0, antithetic=antithetic)
        for j in range(k)
    ]
    return torch.stack([(theta.float() + std * sign[TENSOR]).to(theta.dtype) for sign in signs])


def drawn(first, count, *, std=STD, antithetic=False, scale=None, seed=SEED, tensor=TENSOR):
    which = Draws(first=first, count=count, seed=seed, antithetic=antithetic)
    return {"draws": count, "signs": Signs(std=std, tensor=tensor, which=which, scale=scale)}


def close(y, reference, dtype):
    """float32 sums, then at most one rounding to ``dtype``: its relative error is half its eps."""
    eps = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    torch.testing.assert_close(y.double(), reference, rtol=eps + 1e-6, atol=2e-5)


@pytest.mark.parametrize(("k", "m", "f", "o"), [(3, 5, 70, 7), (2, 33, 17, 20), (1, 70, 128, 40), (2, 1, 1, 1)])
def test_linear_equals_float64(k, m, f, o):
    x, weight, bias = problem(k, m, f, o)
    y = perturbed_linear(x, weight, bias, draws=k, epilogue=IDENTITY)
    assert y.shape == (k * m, o)
    close(y, expected(x, weight, bias), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_summed_in_float32(dtype):
    x, weight, bias = problem(2, 9, 150, 11, dtype)
    y = perturbed_linear(x, weight, bias, draws=2, epilogue=RELU)
    assert y.dtype == dtype
    close(y, expected(x, weight, bias, act=torch.relu), dtype)
    logits = perturbed_linear(x, weight, bias, draws=2, epilogue=RELU, out_dtype=torch.float32)
    assert logits.dtype == torch.float32
    close(logits, expected(x, weight, bias, act=torch.relu), torch.float32)


def test_shared_x_residual_and_no_bias():
    _, weight, _ = problem(3, 6, 20, 18)
    x, residual = torch.randn(6, 20), torch.randn(18, 18)
    y = perturbed_linear(x, weight, None, residual, draws=3, epilogue=RELU, shared=True)
    close(y, expected(x.repeat(3, 1), weight, None, residual, torch.relu), torch.float32)


@pytest.mark.parametrize("name", ["identity", "relu", "relu6", "silu", "gelu"])
def test_every_epilogue_equals_its_twin(name):
    x, weight, bias = problem(1, 20, 8, 18)
    y = perturbed_linear(x, weight, bias, draws=1, epilogue=epilogues[name])
    reference = epilogues[name].compute(expected(x, weight, bias))
    assert reference.min() < 0.1  # every branch of them
    assert reference.max() > 5.9
    close(y, reference, torch.float32)


@pytest.mark.parametrize("name", ["relu", "relu6"])
def test_nan_is_not_hidden(name):
    x, weight, bias = problem(1, 3, 8, 5)
    x[1, 2] = float("nan")
    y = perturbed_linear(x, weight, bias, draws=1, epilogue=epilogues[name])
    assert y[1].isnan().all()
    assert not y[[0, 2]].isnan().any()


@pytest.mark.parametrize("f", [70, 128, 300, 33, 1])  # rows begin at words, inside words, at counters
@pytest.mark.parametrize("antithetic", [False, True])
def test_signs_equal_the_registered_family(f, antithetic):
    k, first = 3, 1
    x, weight, bias = problem(k, 4, f, 19)
    theta = weight[0].contiguous()
    y = perturbed_linear(x, theta, bias, **drawn(first, k, antithetic=antithetic), epilogue=IDENTITY)
    close(y, expected(x, signed_weights(theta, k, first=first, antithetic=antithetic), bias), torch.float32)


def test_signs_are_bit_exact():
    """With the identity as x, theta 0 and std 1, the result is the signs themselves."""
    f, o = 131, 10
    y = perturbed_linear(torch.eye(f), torch.zeros(o, f), **drawn(0, 2, std=1.0), epilogue=IDENTITY, shared=True)
    signs = signed_weights(torch.zeros(o, f), 2, std=1.0)
    assert torch.equal(y.reshape(2, f, o).transpose(1, 2), signs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_signed_half_weights_are_rounded_as_stored_ones(dtype):
    x, weight, bias = problem(2, 5, 140, 9, dtype)
    theta, scale = weight[0].contiguous(), torch.rand(2, 9) + 0.5
    residual = torch.randn(10, 9)
    signs = drawn(0, 2, std=0.3, scale=scale)
    y = perturbed_linear(x, theta, bias, residual, **signs, epilogue=RELU, out_dtype=torch.float32)
    weights = signed_weights(theta, 2, std=0.3)
    close(y, expected(x, weights, bias, residual, torch.relu, scale), torch.float32)
    unrounded = torch.stack([theta.float() + 0.3 * (w - theta).sign().float() for w in weights])
    assert (y - expected(x, unrounded, bias, residual, torch.relu, scale)).abs().max() > 1e-3


@pytest.mark.parametrize("antithetic", [False, True])
def test_draws_do_not_depend_on_chunks(antithetic):
    x, weight, _ = problem(4, 3, 140, 17)
    theta = weight[0].contiguous()

    def part(first, count):
        own = x[3 * first : 3 * (first + count)]
        return perturbed_linear(own, theta, **drawn(first, count, antithetic=antithetic), epilogue=IDENTITY)

    whole, parts = part(0, 4), [part(0, 1), part(1, 3)]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole[:3], whole[3:6])


def test_tiles_agree():
    x, weight, bias = problem(2, 40, 70, 37)
    reference = perturbed_linear(x, weight, bias, draws=2, epilogue=IDENTITY, tile={**SMALL, "block_k": 16})
    for tile in ({**SMALL, "block_k": 64, "weight_first": 1}, {**SMALL, "block_m": 64, "block_o": 32, "block_k": 32}):
        torch.testing.assert_close(
            perturbed_linear(x, weight, bias, draws=2, epilogue=IDENTITY, tile=tile), reference, rtol=1e-5, atol=1e-5
        )
    tiles = ({**SMALL, "block_k": 128, "weight_first": 1}, {**SMALL, "block_m": 32, "block_o": 64, "block_k": 128})
    theta = weight[0].contiguous()
    a, b = (perturbed_linear(x, theta, **drawn(0, 2), epilogue=IDENTITY, tile=t) for t in tiles)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_signs_of_the_tile_table_fill_a_counter():
    for dtype in (torch.float32, torch.bfloat16):
        for m, o in ((1, 1), (64, 10), (64, 64), (4, 100)):
            assert linear_tile(m, o, 20, dtype, signs=True)["block_k"] == 128
            assert linear_tile(m, o, 20, dtype)["block_k"] == 32


def test_empty_batch():
    assert perturbed_linear(torch.empty(0, 4), torch.ones(2, 3, 4), draws=2, epilogue=IDENTITY).shape == (0, 3)


@pytest.mark.filterwarnings("ignore:overflow")  # of exp, to infinity, as on a GPU
def test_large_negative_inputs_of_silu_are_zero():
    x, weight = torch.full((1, 1), -200.0), torch.ones(1, 1, 1)
    y = perturbed_linear(x, weight, draws=1, epilogue=epilogues["silu"])
    assert y.item() == pytest.approx(F.silu(x).item(), abs=1e-30)


BAD = {
    "not contiguous": lambda x, w, b: perturbed_linear(x.t().contiguous().t(), w, b, draws=2, epilogue=IDENTITY),
    "weight is": lambda x, w, b: perturbed_linear(x, w.half(), b, draws=2, epilogue=IDENTITY),
    "bias is": lambda x, w, b: perturbed_linear(x, w, b.double(), draws=2, epilogue=IDENTITY),
    "bias has shape": lambda x, w, b: perturbed_linear(x, w, b[:1], draws=2, epilogue=IDENTITY),
    "weight has shape": lambda x, w, b: perturbed_linear(x, w[:1], b, draws=2, epilogue=IDENTITY),
    "x has shape": lambda x, w, b: perturbed_linear(x[:3], w, b, draws=2, epilogue=IDENTITY),
    "with 0 draws": lambda x, w, b: perturbed_linear(x, w, b, draws=0, epilogue=IDENTITY),
    "x is float64": lambda x, w, b: perturbed_linear(x.double(), w.double(), b, draws=2, epilogue=IDENTITY),
    "residual is": lambda x, w, b: perturbed_linear(x, w, b, torch.ones(4, 3).half(), draws=2, epilogue=IDENTITY),
    "residual has shape": lambda x, w, b: perturbed_linear(x, w, b, torch.ones(2, 3), draws=2, epilogue=IDENTITY),
    "out_dtype is": lambda x, w, b: perturbed_linear(x, w, b, draws=2, epilogue=IDENTITY, out_dtype=torch.float64),
    "is on meta": lambda x, w, b: perturbed_linear(x.to("meta"), w, b, draws=2, epilogue=IDENTITY),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    x, weight, bias = problem(2, 2, 5, 3)
    with pytest.raises(InputError, match=message):
        BAD[message](x, weight, bias)


@pytest.mark.parametrize("bad", [{"seed": -1}, {"seed": 1 << 64}, {"tensor": -1}, {"first": -1}])
def test_bad_counters_are_named(bad):
    x, weight, _ = problem(2, 2, 5, 3)
    numbers = {"tensor": 0, "first": 0, "seed": 0, **bad}
    with pytest.raises(InputError, match=next(iter(bad))):
        perturbed_linear(x, weight[0], **drawn(count=2, **numbers), epilogue=IDENTITY)
