"""Operators, ``torch.ops.smi_kernels.*``: Triton where it runs, torch elsewhere. A folder is one operator.

    kernel.py      Triton kernels and their launcher
    reference.py   the launcher's twin in torch, with the same name and arguments; slow and plain
    op.py          the operator, and its fake: ``torch.compile`` keeps it whole in one graph
    variants.py    what the ahead-of-time gate compiles

Families, divergences and epilogues go to an operator by their registered names, seeds as two 32-bit words, low first,
because operators take signed integers. Kernels are imported when they are launched, and triton with them.
"""

from importlib import import_module

OPERATORS = (
    "unit_noise", "perturb_weight", "perturb_input", "score_logits", "perturbed_conv", "perturbed_linear",
)  # fmt: skip
"""The folders."""

for _name in OPERATORS:
    import_module(f"{__name__}.{_name}.op")
