"""The operators on a device without Triton, where their references run. With Triton: interpreted/check_ops.py."""

import pytest
import torch
from operator_samples import SAMPLES, chain, chain_arguments, random, run, sample

from smi_kernels import InputError
from smi_kernels.noise import INPUT, PARAMETERS, draw, families
from smi_kernels.ops import launch
from smi_kernels.ops.unit_noise import reference


@pytest.mark.parametrize(("name", "number"), SAMPLES)
def test_opcheck(name, number):
    torch.library.opcheck(getattr(torch.ops.smi_kernels, name).default, (), sample(name, number))


@pytest.mark.parametrize(("name", "number"), SAMPLES)
def test_layout_and_dtype(name, number):
    """What the next operator of a chain relies on."""
    kwargs = sample(name, number)
    result = run(name, kwargs)
    memory = torch.channels_last if result.ndim == 4 and name != "perturb_weight" else torch.contiguous_format
    assert result.is_contiguous(memory_format=memory)
    assert result.dtype == kwargs.get("out_dtype", kwargs.get("dtype", result.dtype))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_chain_under_torch_compile(backend):
    arguments = chain_arguments()
    compiled = torch.compile(chain, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), chain(*arguments), rtol=1e-5, atol=1e-6)


def test_a_chain_is_the_same_in_plain_torch():
    """Written out with `draw` and torch's own layers, in float64."""
    images, conv, scale, linear, bias, labels = chain_arguments()
    seed, gaussian = 9 + (0x80000001 << 32), families["gaussian"]
    columns = []
    for k in range(2):
        options = {"seed": seed, "k": k}
        delta = draw(gaussian, {0: images.shape[1:]}, stream=INPUT, **options)[0].double()
        noise = draw(gaussian, {0: conv.shape, 1: linear.shape}, stream=PARAMETERS, **options)
        weight = (conv.double() + 0.2 * noise[0].double()) * scale[k].double()[:, None, None, None]
        moved = (images.double() + 0.1 * delta).clamp(0, 1)
        y = torch.nn.functional.conv2d(moved, weight, bias[k].double(), stride=2, padding=1).relu().mean((2, 3))
        columns.append(y @ (linear.double() + 0.2 * noise[1].double()).T)

    def margin(z):
        others = z.scatter(1, labels[:, None], -torch.inf).amax(1)
        return z.gather(1, labels[:, None])[:, 0] - others

    expected = torch.stack([margin(0.5 * columns[0]) - margin(z) for z in columns]).mean(0)
    found = chain(images, conv, scale, linear, bias, labels).double()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gaussian", "rademacher"])
def test_words_of_the_seed(family):
    """Both words and an index past 2³¹ reach the noise."""
    seed = 0xFFFFFFFE_00000003
    index, tensor = torch.tensor([0, 1]), torch.tensor([2**32 - 1, 2**32 - 1])
    noise = torch.ops.smi_kernels.unit_noise(index, tensor, family, 4, 2, 3, 0xFFFFFFFE, PARAMETERS, True)
    for j in range(2):
        options = {"seed": seed, "k": 4 + j, "stream": PARAMETERS, "antithetic": True}
        size = 2 * families[family].elements
        assert torch.equal(noise[j].flatten(), draw(families[family], {2**32 - 1: (size,)}, **options)[2**32 - 1])


def test_unknown_names():
    x, weight = random(2, 3), random(1, 4, 3)
    with pytest.raises(InputError, match="Unknown epilogue 'rellu'"):
        torch.ops.smi_kernels.perturbed_linear(x, weight, None, None, 1, "rellu", False, torch.float32)
    index = torch.arange(2)
    with pytest.raises(InputError, match="Unknown noise family 'gausian'"):
        torch.ops.smi_kernels.unit_noise(index, index, "gausian", 0, 1, 0, 0, 0, False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_signs_are_added_before_the_weights_are_rounded_and_scaled_after(dtype):
    """As the kernels do it: (round(θ + σ s)) · scale, not round((θ + σ s) · scale)."""
    kwargs = sample("perturbed_linear_signs", 0) | {"residual": None, "bias": None, "epilogue": "identity"}
    kwargs = kwargs | {"x": kwargs["x"].to(dtype), "antithetic": False}
    signs = torch.stack([
        draw(families["rademacher"], {7: (4, 7)}, seed=9 + (0x80000001 << 32), k=k, stream=PARAMETERS)[7]
        for k in (1, 2)
    ])  # fmt: skip
    weight = (kwargs["theta"].to(dtype).float() + 0.25 * signs).to(dtype).double()
    weight = weight * kwargs["scale"].double()[:, :, None]
    expected = torch.cat([x.double() @ w.T for x, w in zip(kwargs["x"].chunk(2), weight, strict=True)])
    torch.testing.assert_close(run("perturbed_linear_signs", kwargs).double(), expected, rtol=1e-5, atol=1e-5)


def test_the_operators_run_their_references_here(monkeypatch):
    assert not launch.compiled(torch.zeros(1))
    called = []
    monkeypatch.setattr(reference, "unit_noise", lambda *a, **b: called.append(a) or torch.zeros(2, 3, 4))
    run("unit_noise", sample("unit_noise", 0))
    assert called
