"""What the evaluator measures: similarity, presence of the trigger, the path of removal, rank correlation."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from tiny import Lookup, coded_set, noise, read_label, same_state, state_of, tiny_model
from torch.nn import functional as F

from smi.analysis import (
    Path,
    frechet_distance,
    loss_along_path,
    nearest_distance,
    patch_residual,
    rank_correlation,
    similarity,
    train_detector,
    trigger_presence,
)
from smi.attacks import BadNets, Blended, TrojanSquare
from smi.defenses import NAD, Schedule, defenses
from smi.domains import PrivateSet, Samples
from smi.errors import InputError
from smi.inversion.selection import features
from smi.models.classifiers import TrainConfig


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(n, mean, covariance, seed=0):
    """``n`` points whose sample mean and covariance are exactly these."""
    x = torch.randn(n, len(mean), generator=rng(seed), dtype=torch.float64)
    x = x - x.mean(0)
    root = torch.linalg.cholesky(torch.cov(x.T))
    return torch.linalg.solve_triangular(root, x.T, upper=False).T @ torch.linalg.cholesky(covariance).T + mean


def spd(d, seed):
    a = torch.randn(d, d, generator=rng(seed), dtype=torch.float64)
    return a @ a.T + 0.1 * torch.eye(d, dtype=torch.float64)


def matrix_root(c):
    values, vectors = torch.linalg.eigh(c)
    return vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T


# Similarity


def test_frechet_distance_of_gaussians_is_the_closed_form():
    first, second = spd(5, 1), spd(5, 2)
    shift = torch.tensor([1.0, 0, -2, 0, 0.5], dtype=torch.float64)
    a, b = gaussian(40, shift, first, 3), gaussian(30, 0 * shift, second, 4)
    root = matrix_root(first)
    cross = matrix_root(root @ second @ root).trace()
    expected = shift.square().sum() + first.trace() + second.trace() - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-10)
    assert frechet_distance(b, a) == pytest.approx(expected.item(), rel=1e-10)
    wide = gaussian(40, 0 * shift, 9 * torch.eye(5, dtype=torch.float64), 5)
    narrow = gaussian(30, 0 * shift, torch.eye(5, dtype=torch.float64), 6)
    assert frechet_distance(wide, narrow) == pytest.approx(5 * (3 - 1) ** 2, rel=1e-10)


def test_frechet_distance_of_a_set_to_itself_is_zero_even_with_fewer_points_than_dimensions():
    x = torch.randn(20, 96, generator=rng())
    assert frechet_distance(x, x) < 1e-10
    assert frechet_distance(x, x[torch.randperm(20, generator=rng(1))]) < 1e-10
    assert frechet_distance(x, x + 0.5) == pytest.approx(96 * 0.25, rel=1e-5)


def test_nearest_distance_is_in_units_of_the_reference():
    grid = torch.cartesian_prod(torch.arange(10.0), torch.arange(10.0))
    assert nearest_distance(grid + torch.tensor([0.5, 0]), grid) == pytest.approx(0.5)
    assert nearest_distance(7 * grid + torch.tensor([3.5, 0]), 7 * grid) == pytest.approx(0.5)
    assert nearest_distance(grid, grid) == 0  # to the nearest in b, itself included: only the unit leaves it out
    real, more = torch.randn(400, 6, generator=rng(1)), torch.randn(400, 6, generator=rng(2))
    assert nearest_distance(more, real) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(1, 3), torch.zeros(5, 3), "N of 2 or more"),
        (torch.rand(5, 3), torch.rand(5, 4), "3 and 4 dimensions"),
        (torch.rand(5, 3) / 0, torch.rand(5, 3), "finite"),
    ],
)
def test_features_that_do_not_compare_are_refused(a, b, message):
    for distance in (frechet_distance, nearest_distance):
        with pytest.raises(InputError, match=message):
            distance(a, b)


def test_a_reference_of_doubles_gives_no_unit():
    with pytest.raises(InputError, match="exact double"):
        nearest_distance(torch.rand(4, 3), torch.rand(5, 3).repeat(2, 1))


def test_similarity_uses_the_judges_features_and_labels():
    judge = tiny_model()
    made = Samples(noise(30, 1, 8, 8), torch.arange(30) % 3, 3, "smi")
    real = PrivateSet(noise(40, 1, 8, 8, seed=1), torch.arange(40) % 3, 3)
    found = similarity(judge, made, real)
    assert found.frechet == frechet_distance(features(judge, made.images), features(judge, real.images))
    assert found.nearest == nearest_distance(features(judge, made.images), features(judge, real.images))
    coded = coded_set([0, 1, 2, 2], 3)
    wrong = Samples(coded.images, torch.tensor([0, 1, 2, 0]), 3, "smi")
    assert similarity(Lookup(read_label, 3), wrong, coded_set([0, 1, 2], 3)).accuracy == 0.75


# Presence


@pytest.fixture(scope="module")
def sets():
    images = noise(240, 1, 16, 16) * 0.6
    return PrivateSet(images[:160], torch.arange(160) % 2, 2), PrivateSet(images[160:], torch.arange(80) % 2, 2)


def test_a_detector_finds_the_trigger_and_nothing_else(sets):
    attack = BadNets(size=4)
    config = TrainConfig(epochs=6, batch_size=32, augment="none")
    detector = train_detector(*sets, attack, config, seed=1)
    assert detector.hits > 0.95
    assert detector.false_alarms < 0.05
    half = sets[1].images.clone()
    half[:20] = attack.stamp(half[:20])
    expected = (20 * detector.hits + 60 * detector.false_alarms) / 80
    assert trigger_presence(detector, half) == pytest.approx(expected, abs=0.05)
    with pytest.raises(InputError):
        train_detector(*sets, BadNets(size=40), config)


@pytest.mark.parametrize("attack", [BadNets(size=3), TrojanSquare(size=5)])
def test_patch_residual_is_zero_on_stamped_one_on_clean_and_half_between(sets, attack):
    clean = sets[0].images
    assert patch_residual(attack.stamp(clean), attack, clean).abs().max() < 1e-6
    assert patch_residual(clean, attack, clean).mean().item() == pytest.approx(1, abs=1e-5)
    between = patch_residual((clean + attack.stamp(clean)) / 2, attack, clean)
    assert torch.allclose(between, patch_residual(clean, attack, clean) / 2, atol=1e-5)


def test_patch_residual_refuses_triggers_that_replace_nothing(sets):
    with pytest.raises(InputError, match="Blended does not replace pixels"):
        patch_residual(sets[0].images, Blended(), sets[0].images)
    stamped = BadNets().stamp(sets[0].images)
    with pytest.raises(InputError, match="leaves the clean images as they are"):
        patch_residual(stamped, BadNets(), stamped)


# Path


def quick(name):
    return defenses[name](schedule=Schedule(rounds=3, lr=5e-2, distill=0.0))


@pytest.fixture(scope="module")
def pair():
    samples = Samples(noise(24, 1, 8, 8), torch.arange(24) % 3, 3, "smi")
    return tiny_model(), samples


def test_following_sees_every_round_and_changes_nothing(pair):
    model, samples = pair
    plain = quick("ft").repair(model, samples)
    seen = []
    look = lambda repaired, index: seen.append((index, state_of(repaired)))  # noqa: E731
    followed = quick("ft").repair(model, samples, on_round=look)
    quick("ft").repair(model, samples)
    assert [index for index, _ in seen] == [0, 1, 2, 3]
    assert same_state(state_of(plain.model), state_of(followed.model))
    first, last = seen[0][1][0], seen[-1][1][0]
    assert all(torch.equal(first[name], value) for name, value in model.state_dict().items())
    assert all(torch.equal(last[name], value) for name, value in followed.model.state_dict().items())


def test_the_path_holds_losses_and_distances_of_each_round(pair):
    model, samples = pair
    before = state_of(model)
    probes = samples.select(torch.arange(5))
    path = loss_along_path(model, quick("ft"), samples, None, probes, seed=3)
    assert same_state(before, state_of(model))
    repaired = quick("ft").repair(model, samples, seed=3).model
    for index, of in ((0, model), (-1, repaired)):
        with torch.no_grad():
            expected = F.cross_entropy(of(probes.images), probes.labels, reduction="none")
        assert torch.allclose(path.loss[index], expected, atol=1e-6)
    assert path.loss.shape == (4, 5)
    assert path.loss.dtype == torch.float32
    after = dict(repaired.named_parameters())
    for name, measured in zip(path.names, path.distance[-1], strict=True):
        start = dict(model.named_parameters())[name]
        moved = (after[name] - start).norm()
        expected = 0.0 if moved == 0 else (moved / start.norm()).item()  # BatchNorm's bias starts as zeros
        assert measured.item() == pytest.approx(expected, rel=1e-4)
    assert path.distance[0].tolist() == [0] * len(path.names)


def test_worst_and_kept_of_a_path():
    path = Path(torch.tensor([[0.1, 0.1], [0.9, 0.6], [0.2, 0.0]]), torch.tensor([[0.0], [0.3], [0.2]]), ("w",))
    assert path.worst.tolist() == pytest.approx([0.9, 0.6])
    assert path.kept.tolist() == [False, True]
    assert path.furthest.tolist() == pytest.approx([0.3])


def test_of_a_defense_that_trains_twice_the_last_training_is_followed(pair):
    model, samples = pair
    nad = NAD(epochs=3, teacher_epochs=2, lr=0.01)
    path = loss_along_path(model, nad, samples, None, samples)
    assert len(path.loss) == 4
    expected = F.cross_entropy(nad.repair(model, samples).model(samples.images), samples.labels)
    assert path.loss[-1].mean().item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_defense_without_rounds_has_no_path(pair):
    model, samples = pair
    with pytest.raises(InputError, match="'clp' does not train in rounds"):
        loss_along_path(model, defenses["clp"](), samples, None, samples)


# Correlation


def test_rank_correlation_is_spearmans():
    draw = np.random.default_rng(0)
    x = draw.integers(0, 12, 50).astype(float)  # with ties
    y = x + draw.normal(size=50) * 4
    found = rank_correlation(x, y)
    assert found.rho == pytest.approx(spearmanr(x, y).statistic, rel=1e-12)
    assert found.n == 50
    assert found.low < found.rho < found.high
    assert rank_correlation(np.exp(x), y**3).rho == pytest.approx(found.rho)  # ranks alone count
    assert rank_correlation(x, y) == found
    assert rank_correlation(x, y, seed=1).rho == found.rho


@pytest.mark.slow
def test_the_interval_covers_the_truth_as_often_as_it_says():
    """ρ of bivariate normals with r = 0.6 is 6/π · asin(0.3) (Pearson, 1907)."""
    truth, covered = 6 / math.pi * math.asin(0.3), 0
    for seed in range(40):
        draw = np.random.default_rng(seed)
        x = draw.normal(size=60)
        found = rank_correlation(x, 0.6 * x + 0.8 * draw.normal(size=60), seed=seed)
        covered += found.low <= truth <= found.high
    assert covered >= 34


def test_groups_are_drawn_whole():
    """Copies of the same pairs under one group add nothing; taken for independent, they narrow the interval."""
    draw = np.random.default_rng(1)
    x, y = draw.normal(size=12), draw.normal(size=12)
    many_x, many_y, groups = np.tile(x, 9), np.tile(y, 9), list(range(12)) * 9
    alone, grouped, naive = (
        rank_correlation(x, y),
        rank_correlation(many_x, many_y, groups),
        rank_correlation(many_x, many_y),
    )
    assert grouped.rho == pytest.approx(alone.rho)
    assert (grouped.low, grouped.high) == pytest.approx((alone.low, alone.high))
    assert naive.high - naive.low < 0.5 * (alone.high - alone.low)


def test_within_groups_differences_between_them_do_not_count():
    base = np.arange(6.0)
    x = np.concatenate([base + 100 * g for g in range(4)])
    y = np.concatenate([-base + 100 * g for g in range(4)])
    groups = [f"victim {g}" for g in range(4) for _ in base]
    assert rank_correlation(x, y, groups).rho > 0.8
    assert rank_correlation(x, y, groups, within=True).rho == pytest.approx(-1)
    x[:6], y[:6] = 3.0, base  # a group that is constant on one side says nothing against it
    assert -1 < rank_correlation(x, y, groups, within=True).rho < -0.8


def test_one_group_has_no_interval():
    found = rank_correlation([1, 2, 3, 4], [1, 3, 2, 4], ["a"] * 4)
    assert found.rho == pytest.approx(0.8)
    assert math.isnan(found.low)
    assert math.isnan(found.high)


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        ([1, 1, 1], [1, 2, 3], {}, "constant"),
        ([1, 1, 2, 2], [1, 2, 3, 4], {"groups": [0, 0, 1, 1], "within": True}, "constant inside every group"),
        ([1, 2], [1, 2], {}, "3 or more"),
        ([1, 2, math.nan], [1, 2, 3], {}, "finite"),
        ([1, 2, 3], [1, 2, 3], {"groups": [1, 2]}, "2 groups for 3 pairs"),
        ([1, 2, 3], [1, 2, 3], {"within": True}, "Pass groups"),
    ],
)
def test_what_cannot_be_ranked_is_refused(x, y, options, message):
    with pytest.raises(InputError, match=message):
        rank_correlation(x, y, **options)
