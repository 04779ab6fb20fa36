import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from kernel_reference import numpy_philox, numpy_uniform

from smi_kernels import InputError
from smi_kernels.noise.philox import box_muller, philox, uniform

word = st.integers(0, 2**32 - 1)

# Random123, examples/kat_vectors: counter, key, output.
GOLDEN = [
    ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def words(*values):
    return tuple(torch.as_tensor(v) for v in values)


@pytest.mark.parametrize(("counter", "key", "expected"), GOLDEN)
def test_golden_vectors(counter, key, expected):
    assert tuple(int(w) for w in philox(words(*counter), key)) == expected


@settings(deadline=None)
@given(counter=st.tuples(word, word, word, word), key=st.tuples(word, word), rounds=st.sampled_from([7, 10]))
def test_agrees_with_unsigned_arithmetic(counter, key, rounds):
    ours = [int(w) for w in philox(words(*counter), key, rounds)]
    assert ours == [int(w) for w in numpy_philox(counter, key, rounds)]


def test_broadcasts_and_vectorises():
    many = philox(words(torch.arange(1000), 1, 2, 3), (4, 5))
    assert all(w.shape == (1000,) for w in many)
    assert [int(w[321]) for w in many] == [int(w) for w in philox(words(321, 1, 2, 3), (4, 5))]


@pytest.mark.parametrize("rounds", [0, 6, 8, 11])
def test_other_rounds_are_refused(rounds):
    with pytest.raises(InputError, match="10"):
        philox(words(0, 0, 0, 0), (0, 0), rounds)


def test_uniform_is_bit_exact_and_below_one():
    edges = [0, 1, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 1, 2**24 + 1, 12345678]
    value = torch.cat([torch.tensor(edges), torch.arange(0, 2**32, 1048573)])
    expected = numpy_uniform(value.numpy().astype(np.uint64))
    assert np.array_equal(uniform(value).numpy().view(np.int32), expected.view(np.int32))
    assert uniform(value).min() == 0
    assert uniform(value).max() < 1


def test_box_muller_of_known_uniforms():
    radius = torch.tensor([0.0, float(np.exp(-0.5)), float(np.exp(-2.0))])
    x, y = box_muller(radius, torch.tensor([0.0, 0.25, 0.5]))
    torch.testing.assert_close(x, torch.tensor([np.sqrt(-2 * np.log(1e-7)), 0.0, -2.0], dtype=torch.float32))
    torch.testing.assert_close(y, torch.tensor([0.0, 1.0, 0.0]), atol=1e-6, rtol=1e-6)
