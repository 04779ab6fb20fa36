"""The operators with their Triton implementation, in Triton's interpreter: run with TRITON_INTERPRET=1."""

from importlib import import_module
from inspect import Parameter, signature
from pkgutil import iter_modules

import pytest
import torch
from operator_samples import OPERATORS, SAMPLES, chain, chain_arguments, run, sample

from smi_kernels import ops
from smi_kernels.ops import launch


def test_every_operator_has_samples():
    found = [vars(import_module(f"smi_kernels.ops.{folder}.op")) for folder in ops.OPERATORS]
    made = [op for names in found for op in names.values() if isinstance(op, torch.library.CustomOpDef)]
    assert {op._name for op in made} == set(OPERATORS)


def test_every_operator_is_a_folder():
    folders = [module.name for module in iter_modules(ops.__path__) if module.ispkg]
    assert sorted(folders) == sorted(ops.OPERATORS)


@pytest.mark.parametrize("folder", ops.OPERATORS)
def test_launchers_take_what_their_references_take(folder):
    """The operator calls one or the other. A launcher's own arguments, such as its tile, have defaults."""
    reference, kernel = (import_module(f"smi_kernels.ops.{folder}.{part}") for part in ("reference", "kernel"))
    own = [
        function for function in vars(reference).values() if getattr(function, "__module__", "") == reference.__name__
    ]
    assert any(function.__name__ == folder for function in own)
    for function in own:
        theirs = signature(function).parameters
        ours = signature(getattr(kernel, function.__name__)).parameters
        assert {name: ours[name] for name in theirs} == dict(theirs)
        assert all(ours[name].default is not Parameter.empty for name in ours.keys() - theirs.keys())


@pytest.mark.parametrize(("name", "number"), SAMPLES)
def test_opcheck(name, number):
    kwargs = sample(name, number)
    torch.library.opcheck(getattr(torch.ops.smi_kernels, name).default, (), kwargs)


@pytest.mark.parametrize(("name", "number"), SAMPLES)
def test_kernel_and_twin_agree(name, number, monkeypatch):
    ours = run(name, sample(name, number))
    monkeypatch.setattr(launch, "compiled", lambda tensor: False)
    theirs = run(name, sample(name, number))
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    if name in ("unit_noise", "perturb_weight", "perturb_input"):
        assert torch.equal(ours, theirs)
        return
    # One step of bfloat16, which a sum in another order may be rounded to.
    rtol, atol = (1e-5, 1e-5) if ours.dtype == torch.float32 else (8e-3, 1e-2)
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


def test_a_chain_under_torch_compile(monkeypatch):
    arguments = chain_arguments()
    expected = chain(*arguments)
    assert (expected.abs() > 1e-3).all()
    compiled = torch.compile(chain, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*arguments), expected)
    monkeypatch.setattr(launch, "compiled", lambda tensor: False)
    torch.testing.assert_close(chain(*arguments), expected, rtol=1e-4, atol=1e-5)
