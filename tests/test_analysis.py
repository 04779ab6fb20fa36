"""The analysis: distances against closed forms, the theorem's every inequality, and a study analysed from its files."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from scipy.stats import chi2, poisson, spearmanr
from tiny import Lookup, TinyPrior, coded_set, noise, read_label, same_state, state_of, tiny_model
from torch import nn
from torch.nn import functional as F

from smi.analysis import (
    ANALYSIS_COLUMNS,
    Path,
    TwoPixels,
    analyse,
    bound,
    check_world,
    figures,
    frechet_distance,
    gaussian_ball_mass,
    loss_along_path,
    nearest_distance,
    patch_residual,
    range_distance,
    rank_correlation,
    similarity,
    train_detector,
    trigger_presence,
    where_vacuous,
)
from smi.analysis.study import sample_sets
from smi.attacks import BadNets, Blended, TrojanSquare
from smi.classifiers import TrainConfig, build_classifier
from smi.cli import cli
from smi.defenses import defenses
from smi.defenses.base import Schedule, following
from smi.domains import PrivateSet, Samples
from smi.errors import InputError
from smi.files import save_tensors, write_atomic
from smi.stability import features
from smi.study import Store, load_study


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
    with following(lambda repaired, index: seen.append((index, state_of(repaired)))):
        followed = quick("ft").repair(model, samples)
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
    path = loss_along_path(model, quick("nad"), samples, None, samples)
    assert len(path.loss) == 4
    expected = F.cross_entropy(quick("nad").repair(model, samples).model(samples.images), samples.labels)
    assert path.loss[-1].mean().item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_defense_without_rounds_has_no_path(pair):
    model, samples = pair
    with pytest.raises(InputError, match="'clp' does not train in rounds"):
        loss_along_path(model, defenses["clp"](), samples, None, samples)


# Theorem


@pytest.mark.parametrize(("centre", "radius", "dim"), [(1.0, 1.0, 2), (3.0, 2.0, 9), (8.0, 2.0, 64), (0.0, 1.5, 3)])
def test_the_mass_of_a_ball_is_a_poisson_mixture_of_chi_squares(centre, radius, dim):
    k = np.arange(400)
    expected = (poisson.pmf(k, centre**2 / 2) * chi2.cdf(radius**2, dim + 2 * k)).sum()
    assert gaussian_ball_mass(centre, radius, dim) == pytest.approx(expected, rel=1e-9)


def test_the_mass_of_a_ball_in_one_dimension_and_far_out():
    interval = torch.special.ndtr(torch.tensor([2.5, -0.5], dtype=torch.float64))
    assert gaussian_ball_mass(1.0, 1.5, 1) == pytest.approx((interval[0] - interval[1]).item(), rel=1e-12)
    masses = [gaussian_ball_mass(r, 1.0, 4) for r in (0, 0.5, 1, 2, 4)]
    assert masses == sorted(masses, reverse=True)


def test_where_the_theorem_is_vacuous():
    reach = where_vacuous([8, 16, 64])
    assert [r.dim for r in reach] == [8, 16, 64]
    assert [r.mass for r in reach] == pytest.approx([1.00e-2, 1.84e-6, 1.96e-40], rel=0.01)
    for r in reach:
        edge = {"public_mass": 0, "slack": 2.0, "lipschitz": 1.0, "centre": math.sqrt(r.dim), "dim": r.dim}
        assert bound(eta=0.999 * r.eta, **edge).excludes
        assert not bound(eta=1.001 * r.eta, **edge).excludes


def test_the_bound_has_both_terms():
    found = bound(public_mass=0.1, eta=0.06, slack=0.5, lipschitz=2.0, centre=1.0, dim=2)
    assert found.left == pytest.approx(0.22)
    assert found.right == gaussian_ball_mass(1.0, 0.25, 2)
    for name in ("slack", "lipschitz"):
        with pytest.raises(InputError, match=f"{name} is 0"):
            bound(**{"public_mass": 0, "eta": 0, "slack": 1, "lipschitz": 1, "centre": 1, "dim": 2, name: 0})


@pytest.mark.parametrize("shift", [0.02, -0.3])
@pytest.mark.parametrize(
    ("trigger", "reach", "slack", "lipschitz", "premise", "excluded"),
    [
        (4.0, 0.1, 1.0, 1.0, False, True),  # the theorem speaks
        (0.9, 0.1, 1.0, 1.0, True, False),  # a latent carries the trigger, and step 1 must hold
        (2.2, 0.3, 0.7, 2.0, True, False),
        (2.5, 0.1, 1.0, 1.0, False, False),  # no latent does, but the theorem cannot tell
    ],
)
def test_every_inequality_holds_in_the_two_pixel_world(trigger, reach, slack, lipschitz, premise, excluded, shift):
    world = TwoPixels(lipschitz=lipschitz, shift=shift, trigger=trigger)
    sides = world.bound(centre=1.0, reach=reach, slack=slack)
    assert sides.excludes == (excluded and abs(shift) < 0.1)
    checks = check_world(world, centre=1.0, reach=reach, slack=slack, n=20_000)
    assert [check.name for check in checks if not check.holds] == []
    assert (checks[2].left > 0) == premise
    assert checks[2].right == pytest.approx(world.prior_mass(reach + slack), abs=0.02)
    assert checks[3].right == pytest.approx(world.public_mass(reach + 2 * slack) + abs(shift) / slack, abs=0.02)
    assert (checks[4].left > 0) == sides.excludes


def test_a_world_that_lies_about_itself_is_caught():
    class Steep(TwoPixels):
        def generate(self, z):
            return 3 * super().generate(z)

    class Elsewhere(TwoPixels):
        def public(self, n, rng):
            return super().public(n, rng) - 5

    steep = check_world(Steep(), centre=1.0, reach=0.1, slack=1.0, n=20_000)
    assert not steep[0].holds  # and a latent of the ball comes as near as 1 to a trigger that 3 leaves out
    away = check_world(Elsewhere(trigger=1.0), centre=1.0, reach=0.1, slack=1.0, n=20_000)
    assert [check.holds for check in away] == [True, True, True, False, True]


def test_masses_of_a_strip_are_exact_in_the_tail():
    assert TwoPixels(trigger=0.0).prior_mass(1.0) == pytest.approx(math.erf(1 / math.sqrt(2)), rel=1e-12)
    far = TwoPixels(trigger=-12.0, shift=0.0)
    assert far.prior_mass(1.0) == pytest.approx(math.erfc(11 / math.sqrt(2)) / 2, rel=1e-9)
    assert far.public_mass(1.0) == far.prior_mass(1.0)


class Line(nn.Module):
    """Images ``0.5 + z · u / 8`` for a unit vector u: the distance to its range is known."""

    latent_dim, image_shape = 4, (1, 8, 8)

    def __init__(self):
        super().__init__()
        self.basis = nn.Parameter(torch.linalg.qr(torch.randn(64, 4, generator=rng(2))).Q.T)

    def generate(self, z):
        return (0.5 + (z @ self.basis) / 8).view(-1, 1, 8, 8)

    def criticise(self, images):
        return None


def test_range_distance_is_the_distance_to_a_linear_range_within_the_ball():
    prior = Line()
    inside = prior.generate(torch.tensor([[1.0, 0, 0, 0], [0, -1, 1, 0]])).detach()
    away = torch.linalg.qr(torch.cat([prior.basis.detach().T, torch.ones(64, 1)], 1)).Q[:, 4].view(1, 1, 8, 8)
    beyond = prior.generate(torch.tensor([[5.0, 0, 0, 0]])).detach()  # the ball ends at √4
    images = torch.cat([inside, inside + 0.4 * away, beyond])
    found = range_distance(prior, images, steps=400, lr=0.02)
    assert found.tolist() == pytest.approx([0, 0, 0.4, 0.4, 3 / 8], abs=5e-3)
    assert torch.equal(found, range_distance(prior, images, steps=400, lr=0.02))
    assert (range_distance(prior, images, steps=3) >= found - 1e-3).all()
    with pytest.raises(InputError, match="Resize"):
        range_distance(prior, noise(2, 1, 16, 16))


def test_stamped_images_are_further_from_a_priors_range():
    prior = TinyPrior()
    with torch.no_grad():
        own = prior.generate(torch.randn(12, 6, generator=rng()) * 0.7)
    near, far = (range_distance(prior, x, steps=80) for x in (own, BadNets(size=3).stamp(own)))
    assert (near < far).all()


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


# A study, from its files

STUDY = """
seeds = [1]
attacks = ["badnets", "blended"]
per_class = 4

[domain."{domain}"]

[train]
epochs = 1
augment = "none"

[[grid]]
sources = ["clean", "latent", "smi"]
defenses = ["ibau", "ft"]

[[grid]]
sources = ["none"]
defenses = ["clp"]
"""


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """A study of untrained victims on noise, as files: quick, and every number can still be checked."""
    folder = tmp_path_factory.mktemp("study")
    labels = np.arange(90) % 3
    np.savez(folder / "noise.npz", x_train=(noise(90, 16, 16) * 255).byte().numpy(), y_train=labels)
    (folder / "small.toml").write_text(STUDY.format(domain=folder / "noise.npz"))
    study, store = load_study(folder / "small.toml"), Store(folder / "out", folder / "cache")
    store.results.mkdir()
    before = {"acc": 0.9, "asr": 1.0, "ra": 0.0}
    for index, cell in enumerate(study.cells):
        model = build_classifier("small_cnn", 1, 3, seed=1)
        meta = {"kind": "victim", "arch": "small_cnn", "channels": 1, "num_classes": 3, "before": before}
        tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
        save_tensors(store.kept("victims", cell.victim_key), tensors, meta | {"fitted": False, "seconds": 1.0})
        if cell.source == "latent":
            continue  # its samples are not there
        images = noise(12, 1, 16, 16, seed=5)
        images = cell.attack.stamp(images) if cell.source == "smi" else images
        if cell.source != "none":
            save_tensors(store.kept("samples", cell.samples_key), {"images": images, "labels": torch.arange(12) % 3},
                         {"kind": "samples", "num_classes": 3, "seconds": 1.0})  # fmt: skip
        after = {"acc": 0.8 + index / 100, "asr": 0.1, "ra": 0.5, "der": 0.9}
        record = {"config": cell.config, "n": 12, "before": before, "after": after,
                  "seconds": {"samples": 1.0, "repair": 1.0}}  # fmt: skip
        done = not (cell.source == "clean" and cell.defense_name == "ibau" and cell.attack_name == "blended")
        if done:
            write_atomic(store.cell(cell), json.dumps(record))
    return study, store, folder


def test_a_study_is_analysed_from_what_is_there(studied):
    study, store, _ = studied
    found = sample_sets(study, store)
    assert (len(found.ready), found.missing) == (3, 3)  # no samples of `latent`, twice; one clean set without its ibau
    rows = analyse(study, store)
    assert [(row["attack"], row["source"], row["defense"]) for row in rows] == [
        ("badnets", "clean", "ibau"), ("badnets", "clean", "ft"), ("badnets", "smi", "ibau"), ("badnets", "smi", "ft"),
        ("blended", "smi", "ibau"), ("blended", "smi", "ft"),
    ]  # fmt: skip
    assert all(set(row) == set(ANALYSIS_COLUMNS) for row in rows)
    clean, _, stamped, *_ = rows
    assert stamped["residual_target"] == pytest.approx(0, abs=1e-5)
    assert clean["residual_target"] > 0.5
    assert stamped["presence"] == stamped["presence_if_stamped"] == clean["presence_if_stamped"]
    assert rows[-1]["residual_target"] is None
    assert clean["acc"] == 0.8
    made = list((store.cache / "detectors").iterdir())
    assert len(made) == 2
    assert len(list((store.cache / "judges").iterdir())) == 1  # one seed, one place
    again = analyse(study, store)
    assert again == rows
    for name in ("score_joint", "score_input", "score_parameter", "frechet", "nearest"):
        assert all(math.isfinite(row[name]) and row[name] >= 0 for row in rows), name
    assert {row["score_input"] for row in rows} != {row["score_joint"] for row in rows}


def test_the_command(studied, tmp_path):
    _, store, folder = studied
    where = ["study", "analyse", str(folder / "small.toml"), "--cache", str(store.cache)]
    table, picture = tmp_path / "a.csv", tmp_path / "a.png"
    wanted = [*where, "--out", str(store.results), "--csv", str(table), "--plot", str(picture)]
    found = CliRunner().invoke(cli, wanted)
    assert found.exit_code == 0, found.output
    assert "6 rows; 3 sample sets were not ready" in found.output
    rows = list(csv.DictReader(table.open()))
    assert tuple(rows[0]) == ANALYSIS_COLUMNS
    assert [row["residual_target"] for row in rows].count("") == 2
    assert picture.stat().st_size > 10_000
    assert CliRunner().invoke(cli, wanted).exit_code == 2  # nothing is overwritten
    assert CliRunner().invoke(cli, [*wanted, "--force"]).exit_code == 0
    nothing = CliRunner().invoke(cli, [*where, "--out", str(tmp_path / "none"), "--csv", str(tmp_path / "b.csv")])
    assert nothing.exit_code == 2
    assert "No sample set of small is ready" in nothing.output


# Figures


def rows(sources=("clean", "pixel", "latent", "smi"), attacks=("badnets", "sig"), seeds=(1, 2)):
    draw, made = np.random.default_rng(0), []
    for attack in attacks:
        for seed in seeds:
            for place, source in enumerate(sources):
                row = dict.fromkeys(ANALYSIS_COLUMNS, 0.5) | {
                    "domain": "digits", "attack": attack, "source": source, "defense": "ibau", "seed": seed,
                }  # fmt: skip
                made.append(row | {"frechet": 1.0 + place, "score_joint": 10.0**-place, "der": draw.uniform()})
    return made


def texts(figure):
    return " ".join(t.get_text() for axes in figure.axes for t in (axes.title, axes.xaxis.label, axes.yaxis.label))


def test_figures_have_labels_a_mark_a_source_and_the_correlation():
    drawn = rows()
    found = rank_correlation([r["frechet"] for r in drawn], [r["der"] for r in drawn])
    figure = figures.similarity_and_outcome(drawn)
    assert f"ρ = {found.rho:.2f}".replace("-", "−") in texts(figure)
    assert "DER" in texts(figure)
    assert "ρ is not defined" in texts(figure)  # the columns that are constant here
    marks = {(line.get_color(), line.get_marker()) for line in figure.axes[0].lines}
    assert len(marks) == 4
    assert len(set(figures.MARKS.values())) == len(figures.MARKS)
    for make in (figures.stability_and_outcome, figures.presence_by_source, figures.overview):
        make(drawn).canvas.draw()
    assert "ρ = " in texts(figures.overview([row for row in drawn if row["seed"] == 1 and row["attack"] == "sig"]))


def test_figures_refuse_what_they_cannot_draw():
    with pytest.raises(InputError, match="no row of the defense 'nad'"):
        figures.presence_by_source(rows(), defense="nad")
    with pytest.raises(InputError, match="Did you mean 'acc'"):
        figures.similarity_and_outcome(rows(), outcome="ac")
    path = Path(torch.rand(4, 20), torch.rand(4, 3), ("a", "b", "c"))
    with pytest.raises(InputError, match="3 scores for 20 probes"):
        figures.path_figure(path, torch.rand(3))


def test_the_path_figure_tells_stable_from_unstable():
    scores = torch.linspace(1e-5, 1e-2, 50)
    loss = torch.stack([scores * 0.1, scores * 100, scores * 10])
    figure = figures.path_figure(Path(loss, torch.rand(3, 4), ("a", "b", "c", "d")), scores)
    assert "ρ = 1.00" in texts(figure)
    stable, unstable = (line.get_ydata() for line in figure.axes[0].lines[:2])
    assert (torch.as_tensor(stable) < torch.as_tensor(unstable)).all()
    figure.canvas.draw()


def test_with_labels_the_tenths_are_those_of_each_class():
    labels = torch.arange(40) % 2
    scores = torch.linspace(0.1, 1, 40, dtype=torch.float64) + 10 * labels  # class 1 is less stable throughout
    before = scores.clone()
    figure = figures.path_figure(Path(torch.rand(3, 40) + 1, torch.rand(3, 1), ("w",)), scores, labels)
    assert torch.equal(scores, before)
    _, stable, unstable, *_ = (list(line.get_xdata()) for line in figure.axes[1].lines)
    for drawn, chosen in ((stable, slice(2)), (unstable, slice(18, 20))):
        assert sorted(drawn) == sorted([*scores[labels == 0][chosen].tolist(), *scores[labels == 1][chosen].tolist()])
    assert "inside each class ρ" in texts(figure)


def test_the_theorem_figure_marks_where_it_speaks():
    figure = figures.theorem_figure()
    left, right = (np.asarray(line.get_ydata()) for line in figure.axes[0].lines[:2])
    assert (left < right).any()
    assert (left > right).any()
    figure.canvas.draw()
