"""The operators with their Triton implementation, in Triton's interpreter: run with TRITON_INTERPRET=1."""

import pytest
import torch
from operator_samples import OPERATORS, SAMPLES, chain, chain_arguments, run, sample

from smi_kernels import ops


def test_every_operator_has_samples():
    kinds = vars(ops).values()
    assert {op._name for op in kinds if isinstance(op, torch.library.CustomOpDef)} == set(OPERATORS)


@pytest.mark.parametrize(("name", "number"), SAMPLES)
def test_opcheck(name, number):
    kwargs = sample(name, number)
    torch.library.opcheck(getattr(torch.ops.smi_kernels, name).default, (), kwargs)


@pytest.mark.parametrize(("name", "number"), SAMPLES)
def test_kernel_and_twin_agree(name, number, monkeypatch):
    ours = run(name, sample(name, number))
    monkeypatch.setattr(ops, "_compiled", lambda tensor: False)
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
    monkeypatch.setattr(ops, "_compiled", lambda tensor: False)
    torch.testing.assert_close(chain(*arguments), expected, rtol=1e-4, atol=1e-5)
