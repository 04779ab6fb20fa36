"""Arguments for every operator in ``torch.ops.smi_kernels``: with and without what is optional."""

import torch

SEED = (9, 0x80000001)
NOISE = {"seed_low": SEED[0], "seed_high": SEED[1]}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def channels_last(*shape, dtype=torch.float32):
    return random(*shape).to(dtype, memory_format=torch.channels_last)


def unit_noise():
    index, tensor = torch.tensor([5, 0, 2**32 - 1]), torch.tensor([1, 2, 0])
    for family, antithetic in (("gaussian", False), ("rademacher", True)):
        yield {"index": index, "tensor": tensor, "family": family, "first": 3, "draws": 2, "stream": 1, **NOISE,
               "antithetic": antithetic}  # fmt: skip


def perturb_weight():
    common = {"std": 0.25, "tensor": 7, "first": 1, "draws": 2, **NOISE}
    conv, linear, scale = random(5, 3, 2, 2), random(4, 7), random(2, 5) + 3
    for family, antithetic in (("gaussian", True), ("rademacher", False)):
        yield {"theta": conv, "out": torch.zeros(2, 5, 4, 3), "scale": scale, "family": family, "left": None,
               "right": None, "antithetic": antithetic, **common}  # fmt: skip
    yield {"theta": linear, "out": torch.zeros(2, 4, 1, 7, dtype=torch.bfloat16), "scale": None, "family": "gaussian",
           "left": None, "right": None, "antithetic": False, **common}  # fmt: skip
    for family, left, right in (
        ("rank1", random(2, 5), random(2, 12, seed=1)),
        ("flipout", random(2, 5).sign(), random(2, 3, seed=1).sign()),
    ):
        yield {"theta": conv, "out": torch.zeros(2, 5, 4, 3), "scale": scale, "family": family, "antithetic": True,
               "left": left, "right": right, **common}  # fmt: skip


def perturb_input():
    for shape, family, antithetic, dtype in (
        ((2, 3, 5, 4), "gaussian", True, torch.float32),
        ((3, 1, 5, 3), "rademacher", False, torch.bfloat16),
    ):
        images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        yield {"images": images, "sigma": 0.3, "family": family, "first": 1, "draws": 3, **NOISE, "dtype": dtype,
               "antithetic": antithetic}  # fmt: skip


def perturbed_linear():
    weight = random(2, 4, 7)
    yield {"x": random(6, 7), "weight": weight, "bias": random(2, 4), "residual": random(6, 4), "draws": 2,
           "epilogue": "silu", "shared": False, "out_dtype": torch.float32}  # fmt: skip
    yield {"x": random(3, 7).bfloat16(), "weight": weight.bfloat16(), "bias": None, "residual": None, "draws": 2,
           "epilogue": "identity", "shared": True, "out_dtype": torch.float32}  # fmt: skip


GEOMETRY = {"stride": [2, 1], "padding": [1, 0], "dilation": [1, 2]}


def perturbed_conv():
    yield {"x": channels_last(4, 6, 5, 7), "weight": random(2, 4, 6, 3), "bias": random(2, 4), "draws": 2,
           "residual": channels_last(4, 4, 3, 5), "kernel": [3, 2], **GEOMETRY, "groups": 2, "epilogue": "relu",
           "shared": False, "out_dtype": torch.float32}  # fmt: skip
    yield {"x": channels_last(2, 3, 5, 7, dtype=torch.bfloat16), "weight": random(2, 4, 6, 3).bfloat16(), "bias": None,
           "residual": None, "draws": 2, "kernel": [3, 2], **GEOMETRY, "groups": 1, "epilogue": "identity",
           "shared": True, "out_dtype": torch.bfloat16}  # fmt: skip


def _signs():
    return {"std": 0.25, "tensor": 7, "first": 1, "draws": 2, **NOISE}


def perturbed_linear_signs():
    yield {"x": random(6, 7), "theta": random(4, 7), "scale": random(2, 4), "bias": random(2, 4), **_signs(),
           "residual": random(6, 4), "antithetic": True, "epilogue": "gelu", "shared": False,
           "out_dtype": torch.float32}  # fmt: skip
    yield {"x": random(3, 7).bfloat16(), "theta": random(4, 7), "scale": None, "bias": None, **_signs(),
           "residual": None, "antithetic": False, "epilogue": "identity", "shared": True,
           "out_dtype": torch.float32}  # fmt: skip


def perturbed_conv_signs():
    yield {"x": channels_last(4, 6, 5, 7), "theta": random(4, 3, 3, 2), "scale": random(2, 4), "bias": random(2, 4),
           "residual": channels_last(4, 4, 3, 5), **_signs(), "antithetic": True, **GEOMETRY, "groups": 2,
           "epilogue": "relu6", "shared": False, "out_dtype": torch.float32}  # fmt: skip
    yield {"x": channels_last(2, 3, 5, 7, dtype=torch.bfloat16), "theta": random(4, 3, 3, 2), "scale": None,
           "bias": None, "residual": None, **_signs(), "antithetic": False, **GEOMETRY, "groups": 1,
           "epilogue": "identity", "shared": True, "out_dtype": torch.bfloat16}  # fmt: skip


def score_logits():
    clean, perturbed = random(5, 7), random(3, 5, 7, seed=1)
    for labels, divergence, reduce in (
        (None, "kl", "mean"), (torch.tensor([0, 6, 2, 2, 1]), "margin", "none"), (None, "total_variation", "max"),
    ):  # fmt: skip
        yield {"clean": clean, "perturbed": perturbed, "labels": labels, "divergence": divergence, "reduce": reduce}


OPERATORS = [
    "perturb_input", "perturb_weight", "perturbed_conv", "perturbed_conv_signs", "perturbed_linear",
    "perturbed_linear_signs", "score_logits", "unit_noise",
]  # fmt: skip
SAMPLES = [(name, i) for name in OPERATORS for i in range(len(list(globals()[name]())))]


def sample(name, number):
    """Arguments by name, fresh."""
    return list(globals()[name]())[number]


def moved(kwargs, device):
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in kwargs.items()}


def run(name, kwargs):
    """The result, of an operator that writes to its argument ``out`` that argument."""
    result = getattr(torch.ops.smi_kernels, name)(**kwargs)
    return kwargs["out"] if result is None else result


def chain(images, conv, scale, linear, bias, labels):
    """Scores of a network of two layers, as the Triton backend makes them."""
    ops = torch.ops.smi_kernels
    draws, n = 2, images.shape[0]
    x = ops.perturb_input(images, 0.1, "gaussian", 0, draws, *SEED, False, torch.float32)
    scratch = images.new_empty(draws * conv.numel())
    weight = scratch.view(draws, conv.shape[0], -1, conv.shape[1])
    ops.perturb_weight(conv, weight, 0.2, scale, 0, "gaussian", 0, draws, *SEED, False, None, None)
    y = ops.perturbed_conv(
        x, weight, bias, None, draws, [3, 3], [2, 2], [1, 1], [1, 1], 1, "relu", False, torch.float32
    )
    weight = scratch[: draws * linear.numel()].view(draws, linear.shape[0], 1, linear.shape[1])
    ops.perturb_weight(linear, weight, 0.2, None, 1, "gaussian", 0, draws, *SEED, False, None, None)
    head = (weight.squeeze(2), None, None, draws, "identity", False, torch.float32)
    logits = ops.perturbed_linear(y.mean((2, 3)), *head).unflatten(0, (draws, n))
    clean = logits[0] * 0.5
    return ops.score_logits(clean, logits, labels, "margin", "mean")


def chain_arguments():
    images = torch.rand(3, 2, 6, 5, generator=torch.Generator().manual_seed(0))
    return images, random(4, 2, 3, 3), random(2, 4), random(5, 4), random(2, 4, seed=1), torch.tensor([0, 4, 2])
