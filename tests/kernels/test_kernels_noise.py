import pytest
import torch
from hypothesis import given, settings, strategies as st
from kernel_reference import numpy_noise

from smi_kernels.noise import INPUT, PARAMETERS, draw, families

FAMILIES = ["gaussian", "rademacher"]
names = st.sampled_from(FAMILIES)
seeds = st.integers(0, 2**64 - 1)
quick = settings(max_examples=25, deadline=None)


def one(name, shape, *, tensor=0, seed=0, k=0, stream=PARAMETERS, **more):
    return draw(families[name], {tensor: shape}, seed=seed, k=k, stream=stream, **more)[tensor]


def correlation(a, b):
    return (torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]).abs().item()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5, 7), (129,), (70000,)])
def test_agrees_with_numpy(name, shape):
    where = {"seed": 2**63 + 12345, "k": 7, "stream": INPUT}
    ours = one(name, shape, tensor=11, **where)
    theirs = numpy_noise(name, shape, tensor=11, **where)
    assert ours.shape == theirs.shape
    assert ours.dtype == torch.float32
    # The angle is rounded to float32 (2.4e-7 at most) and then stretched by a radius of at most 5.7.
    torch.testing.assert_close(ours.double(), theirs, atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_moments(name):
    x = one(name, (400_000,), seed=3).double()
    kurtosis = {"gaussian": 3.0, "rademacher": 1.0}[name]
    assert abs(x.mean()) < 5 / 400_000**0.5
    assert abs(x.var() - 1) < 5 * (max(kurtosis - 1, 0.01) / 400_000) ** 0.5
    assert abs((x**3).mean()) < 5 * (15 / 400_000) ** 0.5
    assert abs((x**4).mean() - kurtosis) < 5 * (96 / 400_000) ** 0.5


@pytest.mark.parametrize("name", FAMILIES)
def test_neighbouring_elements_are_independent(name):
    x = one(name, (100_000,), seed=4)
    for lag in (1, 2, 3, 4, 32, 128):
        assert correlation(x[lag:], x[:-lag]) < 5 / 100_000**0.5


@quick
@given(name=names, seed=seeds, k=st.integers(0, 1000), tensor=st.integers(0, 1000), axis=st.integers(0, 3))
def test_draws_tensors_streams_and_seeds_are_independent(name, seed, k, tensor, axis):
    first = {"seed": seed, "k": k, "tensor": tensor, "stream": PARAMETERS}
    second = dict(first)
    key = ("seed", "k", "tensor", "stream")[axis]
    second[key] = (first[key] + 1) % 2**64
    assert correlation(one(name, (20_000,), **first), one(name, (20_000,), **second)) < 6 / 20_000**0.5


@quick
@given(name=names, sizes=st.lists(st.integers(0, 300), min_size=1, max_size=5), k=st.integers(0, 9))
def test_does_not_depend_on_the_other_tensors(name, sizes, k):
    shapes = {i * i: (size,) for i, size in enumerate(sizes)}
    together = draw(families[name], shapes, seed=1, k=k, stream=PARAMETERS)
    for tensor, shape in shapes.items():
        assert torch.equal(together[tensor], one(name, shape, tensor=tensor, seed=1, k=k))


@quick
@given(name=names, small=st.integers(1, 500), more=st.integers(1, 500))
def test_a_longer_tensor_starts_with_the_shorter_one(name, small, more):
    assert torch.equal(one(name, (small,)), one(name, (small + more,))[:small])


def test_does_not_depend_on_the_chunk(monkeypatch):
    whole = one("gaussian", (5000,))
    monkeypatch.setattr("smi_kernels.noise.torch._CHUNK", 37)
    assert torch.equal(whole, one("gaussian", (5000,)))


@pytest.mark.parametrize("name", FAMILIES)
def test_antithetic_pairs(name):
    draws = [one(name, (50,), k=k, antithetic=True) for k in range(4)]
    assert torch.equal(draws[0], -draws[1])
    assert torch.equal(draws[2], -draws[3])
    assert not torch.equal(draws[0].abs() * draws[0].sign(), draws[2])
    assert torch.equal(draws[2], one(name, (50,), k=1))


def test_does_not_touch_the_global_generator():
    before = torch.get_rng_state()
    one("gaussian", (100,))
    assert torch.equal(before, torch.get_rng_state())
