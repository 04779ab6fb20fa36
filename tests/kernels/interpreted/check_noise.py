import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from kernel_reference import numpy_noise, numpy_philox

from smi_kernels.errors import InputError
from smi_kernels.noise import Family, draw, families
from smi_kernels.noise.philox import uniform as torch_uniform
from smi_kernels.noise.triton import gaussian, philox_words, uniform
from smi_kernels.ops.launch import Draws, as_word, key_words
from smi_kernels.ops.unit_noise.kernel import unit_noise

SEEDS = [0, 1, 0xFFFFFFFF, 2**32 + 5, 2**63 + 0x123456789, 2**64 - 1]
LARGEST = 2**32 - 1  # tensor id


@triton.jit
def _philox_kernel(out, uniforms, low, high, tensor, number, stream, COUNT: tl.constexpr):
    index = tl.arange(0, COUNT)
    words = philox_words(low, high, index, tensor, number, stream)
    for i in tl.static_range(4):
        tl.store(out + i * COUNT + index, words[i].to(tl.int64))
        tl.store(uniforms + i * COUNT + index, uniform(words[i]))


@triton.jit
def _gaussian_kernel(words, out, COUNT: tl.constexpr):
    place = tl.arange(0, COUNT)
    w = tl.load(words + place).to(tl.uint32)
    v0, v1, v2, v3 = gaussian(w, tl.load(words + COUNT + place).to(tl.uint32), w, w)
    tl.store(out + place, v0)
    tl.store(out + COUNT + place, v1)
    tl.store(out + 2 * COUNT + place, v2)
    tl.store(out + 3 * COUNT + place, v3)


def same_bits(a, b):
    """Also of zeros, which have a sign that == does not see."""
    assert a.dtype == b.dtype == torch.float32
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def all_counters(size, per_counter, tensor):
    index = torch.arange(-(-size // per_counter))
    return index, torch.full_like(index, tensor)


@pytest.mark.parametrize("seed", SEEDS)
def test_words_and_uniforms(seed):
    count = 64
    words, uniforms = torch.empty(4, count, dtype=torch.int64), torch.empty(4, count)
    _philox_kernel[(1,)](words, uniforms, *key_words(seed), as_word(LARGEST), 3, 1, COUNT=count)
    expected = numpy_philox((np.arange(count), LARGEST, 3, 1), (seed & 0xFFFFFFFF, seed >> 32))
    expected = torch.from_numpy(np.stack(expected).astype(np.int64))
    assert torch.equal(words, expected)
    assert same_bits(uniforms, torch_uniform(expected))


def test_normals_at_the_edges_of_the_words():
    """Both ends of the uniforms, the clip of the radius, and every quarter turn of the angle and what lies beside."""
    edges = [0, 1, 2, 107, 108, 214, 215, 2**31 - 1, 2**31, 2**32 - 1]
    turns = [q * 2**28 + d for q in range(16) for d in (-65, -64, -1, 0, 1, 63, 64, 65) if q * 2**28 + d >= 0]
    words = torch.tensor(edges + turns)
    pairs = torch.cartesian_prod(words, words).T.contiguous()
    padded = torch.nn.functional.pad(pairs, (0, triton.next_power_of_2(pairs.shape[1]) - pairs.shape[1]))
    out = torch.empty(4, padded.shape[1])
    _gaussian_kernel[(1,)](padded, out, COUNT=padded.shape[1], enable_fp_fusion=False)
    w0, w1 = padded
    expected = families["gaussian"].values((w0, w1, w0, w0))
    assert same_bits(out.T.contiguous(), expected)
    assert out.isfinite().all()


def test_many_normals_are_those_of_torch():
    """So many that a change in the last bit of a polynomial's coefficient shows."""
    index, tensor = all_counters(2**21, 4, 1)
    options = {"family": families["gaussian"], "which": Draws(first=0, count=1, seed=5), "stream": 0}
    noise = unit_noise(index, tensor, block=2**16, **options).flatten()
    assert same_bits(noise, draw(families["gaussian"], {1: (2**21,)}, seed=5, k=0, stream=0)[1])


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["gaussian", "rademacher"])
def test_unit_noise_is_that_of_torch(name, seed, antithetic):
    family, size = families[name], 1301
    index, tensor = all_counters(size, family.elements, LARGEST)
    which = Draws(first=3, count=3, seed=seed, antithetic=antithetic)
    noise = unit_noise(index, tensor, family=family, which=which, stream=1, block=256)
    for j in range(3):
        common = {"seed": seed, "k": 3 + j, "stream": 1, "antithetic": antithetic}
        expected = draw(family, {LARGEST: (size,)}, **common)[LARGEST]
        assert same_bits(noise[j].flatten()[:size], expected)
        independent = numpy_noise(name, (size,), tensor=LARGEST, **common)
        assert (noise[j].flatten()[:size] - independent).abs().max() < 1e-6


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("name", ["gaussian", "rademacher"])
def test_neither_chunks_nor_blocks_nor_order_change_the_noise(name, antithetic):
    family = families[name]
    index = torch.tensor([5, 0, 2**32 - 1, 7, 7], dtype=torch.int64)
    tensor = torch.tensor([1, 2, 0, 2**31, 0], dtype=torch.int64)
    common = {"family": family, "stream": 0}
    first, second, third, every = (
        Draws(first=first, count=count, seed=2**40 + 1, antithetic=antithetic)
        for first, count in [(0, 1), (1, 2), (3, 4), (0, 7)]
    )
    whole = unit_noise(index, tensor, which=every, **common)
    pieces = [unit_noise(index, tensor, which=which, block=128, **common) for which in (first, second, third)]
    assert same_bits(torch.cat(pieces), whole)
    back = torch.tensor([4, 2, 0])
    assert same_bits(unit_noise(index[back], tensor[back], which=every, **common), whole[:, back])
    assert len({tuple(row) for row in whole.flatten(0, 1).tolist()}) == 35


def test_int32_counters():
    family = families["gaussian"]
    index, tensor = torch.tensor([0, 9], dtype=torch.int32), torch.tensor([3, 4], dtype=torch.int32)
    common = {"family": family, "which": Draws(first=0, count=1, seed=0), "stream": 0}
    assert same_bits(unit_noise(index, tensor, **common), unit_noise(index.long(), tensor.long(), **common))


@triton.jit
def _first_uniforms(w0, w1, w2, w3):
    return uniform(w0), uniform(w1), uniform(w2), uniform(w3)


def test_a_family_of_the_user():
    family = Family(
        elements=4, values=lambda words: torch.stack([torch_uniform(w) for w in words], 1), kernel=_first_uniforms
    )
    index, tensor = all_counters(40, 4, 6)
    noise = unit_noise(index, tensor, family=family, which=Draws(first=2, count=1, seed=11), stream=0)
    assert same_bits(noise.flatten(), draw(family, {6: (40,)}, seed=11, k=2, stream=0)[6])


FIRST = {"first": 0, "count": 1, "seed": 0}
GOOD = {"family": families["gaussian"], "which": Draws(**FIRST), "stream": 0}


@pytest.mark.parametrize(
    ("index", "tensor", "change", "message"),
    [
        (torch.arange(8)[::2], torch.arange(4), {}, "index is not contiguous"),
        (torch.arange(4), torch.arange(3), {}, "tensor has shape"),
        (torch.arange(4.0), torch.arange(4), {}, "index is float32"),
        (torch.arange(4, device="meta"), torch.arange(4), {}, "index is on meta"),
        (torch.arange(4), torch.arange(4), {"family": Family(elements=4, values=torch.stack)}, "no Triton kernel"),
    ],
)
def test_bad_input(index, tensor, change, message):
    with pytest.raises(InputError, match=message):
        unit_noise(index, tensor, **GOOD | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 2**64}, "seed"), ({"seed": -1}, "seed"), ({"count": 0}, "draws"), ({"count": 65536}, "draws"),
        ({"first": -1}, "first"), ({"first": 2**31 - 1}, "first"),
    ],
)  # fmt: skip
def test_bad_draws(change, message):
    with pytest.raises(InputError, match=message):
        Draws(**FIRST | change)
