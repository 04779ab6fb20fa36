import pytest
import torch
import triton
import triton.language as tl
from kernel_reference import naive_divergence

from smi_kernels.divergences import Divergence, divergences
from smi_kernels.errors import InputError
from smi_kernels.ops.score_logits.kernel import score_logits

NAMES = ["cross_entropy", "flip", "kl", "margin", "total_variation"]


def logits(k, n, classes, *, size=3.0, change=0.3):
    generator = torch.Generator().manual_seed(k * n * classes)
    clean = size * torch.randn(n, classes, generator=generator)
    perturbed = clean + change * torch.randn(k, n, classes, generator=generator)
    return clean, perturbed, torch.randint(classes, (n,), generator=generator)


def close(actual, expected):
    """Within 1e-3·S + 1e-6 of the float64 reference."""
    return bool(((actual - expected).abs() <= 1e-3 * expected.abs() + 1e-6).all())


def reference(name, clean, perturbed, labels):
    columns = [naive_divergence(name, clean.double(), q.double(), labels) for q in perturbed]
    return torch.stack(columns, dim=1)


def test_all_divergences_are_checked():
    assert list(divergences) == NAMES


@pytest.mark.parametrize("change", [1e-2, 0.3, 10.0])
@pytest.mark.parametrize(("k", "n", "classes"), [(1, 1, 2), (3, 5, 10), (5, 17, 16), (3, 4, 1003)])
@pytest.mark.parametrize("name", NAMES)
def test_score_is_that_of_float64(name, k, n, classes, change):
    clean, perturbed, labels = logits(k, n, classes, change=change)
    expected = reference(name, clean, perturbed, labels)
    scores = {
        reduce: score_logits(clean, perturbed, labels, divergence=divergences[name], reduce=reduce)
        for reduce in ("none", "mean", "max")
    }
    assert close(scores["none"], expected)
    assert close(scores["mean"], expected.mean(1))
    assert torch.equal(scores["max"], scores["none"].amax(1))
    in_order = sum(scores["none"][:, j] for j in range(k)) / k
    assert torch.equal(scores["mean"], in_order)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_and_batches_change_nothing(name):
    clean, perturbed, labels = logits(3, 21, 10)
    options = {"divergence": divergences[name]}
    whole = score_logits(clean, perturbed, labels, **options)
    assert torch.equal(score_logits(clean, perturbed, labels, block=16, **options), whole)
    part = score_logits(clean[3:10], perturbed[:, 3:10].contiguous(), labels[3:10], **options)
    assert torch.equal(part, whole[3:10])


@pytest.mark.parametrize("name", ["flip", "kl", "total_variation"])
def test_no_labels_and_no_change(name):
    clean, _, _ = logits(2, 6, 10)
    scores = score_logits(clean, clean.repeat(2, 1, 1), divergence=divergences[name])
    assert torch.equal(scores, torch.zeros(6))


def test_kl_of_a_confident_model():
    """Scores far below the rounding of a probability near 1, and log-probabilities of −60."""
    clean, perturbed, labels = logits(3, 7, 10, change=1e-2)
    clean[:, 0] += 20
    perturbed[:, :, 0] += 20
    clean[:, 1] -= 60
    expected = reference("kl", clean, perturbed, labels)
    assert expected.max() < 1e-4
    actual = score_logits(clean, perturbed, divergence=divergences["kl"], reduce="none")
    theirs = torch.stack([divergences["kl"].compute(clean, q, labels) for q in perturbed], 1)
    assert (actual >= 0).all()
    assert (actual - expected).abs().max() <= 2 * (theirs - expected).abs().max() + 1e-9


def test_flip_at_ties():
    """The lowest class wins, as in torch on the CPU."""
    clean = torch.tensor([[1.0, 2.0, 2.0], [1.0, 2.0, 2.0], [0.0, 0.0, 0.0]])
    perturbed = torch.tensor([[[2.0, 2.0, 2.0], [0.0, 3.0, 3.0], [-1.0, 0.0, 0.0]]])
    scores = score_logits(clean, perturbed, divergence=divergences["flip"])
    assert scores.tolist() == [1, 0, 1]
    assert torch.equal(scores, divergences["flip"].compute(clean, perturbed[0], None))


def test_a_nan_is_not_hidden():
    clean, perturbed, _ = logits(3, 4, 10)
    perturbed[1, 2, 5] = torch.nan
    for reduce in ("mean", "max"):
        scores = score_logits(clean, perturbed, divergence=divergences["kl"], reduce=reduce)
        assert scores.isnan().tolist() == [False, False, True, False]


@triton.jit
def _squared(clean, perturbed, labels, mask):
    difference = tl.where(mask, clean, 0.0) - tl.where(mask, perturbed, 0.0)
    return tl.sum(difference * difference, 1)


def test_a_divergence_of_the_user():
    clean, perturbed, _ = logits(3, 5, 7)
    divergence = Divergence(compute=lambda p, q, y: ((p - q) ** 2).sum(1), kernel=_squared)
    expected = ((clean.double() - perturbed.double()) ** 2).sum(2).mean(0)
    assert close(score_logits(clean, perturbed, divergence=divergence), expected)


CLEAN, PERTURBED, LABELS = logits(2, 4, 6)


@pytest.mark.parametrize(
    ("clean", "perturbed", "labels", "change", "message"),
    [
        (CLEAN[:3], PERTURBED, LABELS, {}, "clean has shape"),
        (CLEAN, PERTURBED[0], LABELS, {}, "perturbed has shape"),
        (CLEAN, PERTURBED[:0], LABELS, {}, "perturbed has shape"),
        (CLEAN, PERTURBED, LABELS[:3], {}, "labels has shape"),
        (CLEAN, PERTURBED, LABELS.int(), {}, "labels is int32"),
        (CLEAN.double(), PERTURBED, LABELS, {}, "clean is float64"),
        (CLEAN, PERTURBED.bfloat16(), LABELS, {}, "perturbed is bfloat16"),
        (CLEAN.T.contiguous().T, PERTURBED, LABELS, {}, "clean is not contiguous"),
        (CLEAN, PERTURBED.to("meta"), LABELS, {}, "perturbed is on meta"),
        (CLEAN, PERTURBED, None, {"divergence": divergences["margin"]}, "needs labels"),
        (CLEAN, PERTURBED, LABELS, {"reduce": "median"}, "reduction"),
        (CLEAN, PERTURBED, LABELS, {"divergence": Divergence(compute=max)}, "no Triton kernel"),
    ],
)
def test_bad_input(clean, perturbed, labels, change, message):
    with pytest.raises(InputError, match=message):
        score_logits(clean, perturbed, labels, **{"divergence": divergences["kl"]} | change)
