"""The defenses that I-BAU is compared with: the generic promises, and of each the term that makes it that defense."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from small_runs import PUBLIC, REMOVALS, SAMPLES
from thirds import QUICK, rng, samples, thirds
from tiny import check_repair, tiny_model
from torch import Tensor, nn
from torch.nn import functional as F

from smi.attacks import BadNets, plant
from smi.defenses import ANP, CLP, FTSAM, NAD, FinePrune, FineTune, Schedule, defenses
from smi.defenses.anp import THRESHOLDS
from smi.defenses.channels import Layer, activity, agreement, conv_layers, prune, split
from smi.defenses.clp import lipschitz_bounds
from smi.defenses.ftsam import worst
from smi.defenses.nad import attention_distance, attention_layers
from smi.domains import PrivateSet, PublicImages, Samples, load_domain
from smi.errors import InputError
from smi.evaluation import Evaluator, clean_control
from smi.models.classifiers import Classifier, build_classifier
from smi.models.store import load_classifier
from smi.runtime.compute import predict

ALL = {
    "fp": FinePrune(schedule=QUICK),
    "nad": NAD(epochs=2, teacher_epochs=1, lr=0.01, batch_size=12),
    "anp": ANP(schedule=Schedule(rounds=2, batch_size=12, lr=0.2), tolerance=0.7),
    "ftsam": FTSAM(epochs=2, batch_size=12),
    "clp": CLP(u=0.5),
}


@pytest.mark.parametrize("name", ALL)
def test_repair_changes_a_copy_and_only_a_copy_and_repeats(name) -> None:
    public = PublicImages(torch.rand(9, 1, 8, 8, generator=rng(4)))
    repair = check_repair(ALL[name], samples(), public, keeps_statistics=name not in ("ftsam", "nad"))
    assert repair.defense == name
    assert defenses[name] is type(ALL[name])


@pytest.mark.parametrize("name", REMOVALS)
def test_what_was_frozen_is_repaired_all_the_same_and_stays_marked(name) -> None:
    plain, frozen = tiny_model(), tiny_model()
    frozen.body[0].requires_grad_(False)
    ours, theirs = (REMOVALS[name].repair(model, SAMPLES, PUBLIC).model for model in (plain, frozen))
    for (weight, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other), weight
        assert one.requires_grad
        assert other.requires_grad == ("body.0." not in weight)


@pytest.mark.parametrize("name", ALL)
def test_a_defense_takes_neither_private_data_nor_a_trigger(name) -> None:
    s = samples()
    private = PrivateSet(s.images, s.labels, 3)
    with pytest.raises(InputError, match="PrivateSet"):
        ALL[name].repair(tiny_model(), private)
    with pytest.raises(InputError, match="BadNets"):
        ALL[name].repair(tiny_model(), BadNets(target=0))
    with pytest.raises(InputError, match="PublicImages"):
        ALL[name].repair(tiny_model(), s, private)


@pytest.mark.parametrize("name", ALL)
def test_only_clp_does_without_samples(name) -> None:
    if name == "clp":
        assert CLP().repair(tiny_model()).source == "none"
        with pytest.raises(InputError, match="PublicImages"):
            CLP().repair(tiny_model(), None, samples())
        with pytest.raises(InputError, match="Module"):
            CLP().repair("model")
    else:
        with pytest.raises(InputError, match=f"'{name}' takes Samples, not None"):
            ALL[name].repair(tiny_model())


@pytest.mark.parametrize(
    ("defense", "bad"),
    [
        (FinePrune, {"tolerance": 2}),
        (NAD, {"betas": (-1.0,)}),
        (NAD, {"betas": ()}),
        (NAD, {"epochs": 0}),
        (NAD, {"augment": "mirror"}),
        (ANP, {"epsilon": -1}),
        (FTSAM, {"rho": -1}),
        (FTSAM, {"augment": "mirror"}),
        (CLP, {"u": -1}),
    ],
)
def test_settings_are_checked(defense, bad) -> None:
    with pytest.raises(InputError, match=next(iter(bad))):
        defense(**bad)


# ---------------------------------------------------------------- channels


@pytest.mark.parametrize(("arch", "count"), [("small_cnn", 5), ("small_vgg", 6), ("resnet18", 20)])
def test_each_convolution_is_found_with_its_batchnorm_and_both_ways_agree(arch, count) -> None:
    model = build_classifier(arch, 3, 4).eval()
    used, registered = conv_layers(model, torch.rand(1, 3, 32, 32, generator=rng())), conv_layers(model)
    assert len(used) == count
    assert set(used) == set(registered)
    assert all(layer.norm is not None for layer in used)


def test_torchvision_and_crossed_registration() -> None:
    from torchvision.models import resnet18

    with torch.random.fork_rng():
        model = resnet18(num_classes=3).eval()
    layers = conv_layers(model, torch.rand(1, 3, 32, 32, generator=rng()))
    assert set(layers) == set(conv_layers(model))
    assert layers[-1] == Layer("layer4.1.conv2", "layer4.1.bn2", 512)
    assert attention_layers(model, torch.rand(1, 3, 64, 64, generator=rng()))[-3:] == ["layer2", "layer3", "layer4"]

    class Crossed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.late, self.early = nn.Conv2d(4, 4, 1), nn.Conv2d(1, 4, 1)
            self.of_early, self.of_late = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.of_late(self.late(self.of_early(self.early(x))))

    assert conv_layers(Crossed().eval(), torch.rand(1, 1, 4, 4)) == [
        Layer("early", "of_early", 4), Layer("late", "of_late", 4)
    ]  # fmt: skip
    with pytest.raises(InputError, match="no convolution"):
        conv_layers(nn.Linear(2, 2))


@pytest.mark.parametrize("norm", [True, False])
def test_a_pruned_channel_is_zero_and_the_others_are_untouched(norm) -> None:
    torch_layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)][: 1 + norm]
    model = nn.Sequential(*torch_layers).eval()
    if norm:
        nn.init.normal_(model[1].bias, generator=rng())
    images = torch.rand(3, 1, 8, 8, generator=rng())
    before, (layer,) = model(images), conv_layers(model, images)
    prune(model, layer, torch.tensor([1, 3]))
    after = model(images)
    assert after[:, [1, 3]].eq(0).all()
    assert torch.equal(after[:, [0, 2]], before[:, [0, 2]])


def test_split_and_agreement() -> None:
    s = samples(10)
    fit, held = split(s, 0.3, 7)
    assert (len(fit), len(held)) == (7, 3)
    assert len({image.sum().item() for part in (fit, held) for image in part.images}) == 10
    with pytest.raises(InputError, match="One sample"):
        split(samples(1), 0.5, 0)
    model = tiny_model()
    labels = predict(model, s.images).argmax(1)
    assert agreement(model, model, s.images) == 1.0
    labels[:3] = (labels[:3] + 1) % 3
    assert agreement(model, labels, s.images) == pytest.approx(0.7)


# ---------------------------------------------------------------- fine-pruning and ANP


class Planted(nn.Module):
    """Channels 0 to 2 are the brightness of a third of a 9×9 image, which decides the class; 3 is one bright pixel in
    the lower right corner, which means class 0: dormant on clean images, and large.
    """

    def __init__(self, backdoor: float = 40.0, bias: float = 0.0) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 9, bias=False), nn.BatchNorm2d(4), nn.Linear(4, 3)
        with torch.no_grad():
            self.conv.weight.zero_()
            for k in range(3):
                self.conv.weight[k, :, 1:6, 3 * k : 3 * k + 3] = 1 / 15
            self.conv.weight[3, :, 8, 8] = 1
            self.norm.bias[3] = bias
            self.head.weight.zero_()
            self.head.weight[:, :3] = 10 * torch.eye(3)
            self.head.weight[0, 3] = backdoor
            self.head.bias.zero_()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 1, 9, 9]`` to logits ``[N, 3]``."""
        return self.head(F.relu(self.norm(self.conv(x))).flatten(1))


def success(model: nn.Module, s: Samples) -> float:
    patched = s.images[s.labels != 0].clone()
    patched[:, :, 8, 8] = 1.0
    return (model(patched).argmax(1) == 0).float().mean().item()


def test_activity_is_the_mean_after_the_activation() -> None:
    model, s = Planted(), thirds(30)
    found = activity(model, conv_layers(model, s.images)[0], s.images)
    assert found.tolist() == pytest.approx([0.8 / 3] * 3 + [0.0], rel=1e-2, abs=1e-3)


def test_fine_tuning_learns_the_labels_of_its_samples() -> None:
    """The defining term: without the cross-entropy on the labels nothing teaches it labels that the model denies."""
    s = thirds(60)
    model = nn.Sequential(nn.Flatten(), nn.Linear(81, 3))
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.zero_()
        for k in range(3):
            model[1].weight[k].view(9, 9)[1:6, 3 * k : 3 * k + 3] = 1 / 3
    moved = Samples(s.images, (s.labels + 1) % 3, 3, "moved")
    assert agreement(model, s.labels, s.images) == 1.0
    tuned = FineTune(schedule=Schedule(rounds=20, batch_size=12, lr=0.03, distill=0.0)).repair(model, moved).model
    assert agreement(tuned, moved.labels, s.images) == 1.0


def test_fine_pruning_prunes_the_dormant_backdoor_that_fine_tuning_keeps() -> None:
    s, schedule = thirds(60), Schedule(rounds=10, distill=0.0)
    assert success(Planted(), s) == 1.0
    tuned = FineTune(schedule=schedule).repair(Planted(), s).model
    pruned = FinePrune(schedule=schedule).repair(Planted(), s)
    assert success(tuned, s) == 1.0
    assert success(pruned.model, s) == 0.0
    assert agreement(pruned.model, s.labels, s.images) == 1.0
    assert pruned.log["pruned"] == {"norm": [3]}
    for name in ("conv.weight", "norm.weight", "norm.bias"):
        assert pruned.model.state_dict()[name][3].eq(0).all(), "what is pruned must stay zero while the rest trains"
    assert not torch.equal(pruned.model.head.weight, Planted().head.weight)


def test_what_is_pruned_stays_zero_where_no_relu_stops_its_gradient() -> None:
    """As at the end of a residual block."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        body = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(6 * 36, 3)).eval()
    found = FinePrune(schedule=QUICK, tolerance=1.0).repair(body, samples())
    pruned = found.log["pruned"]["1"]
    assert len(pruned) == 5
    assert found.model[:2](samples().images)[:, pruned].eq(0).all()


def test_fine_pruning_stops_at_the_tolerance() -> None:
    s = thirds(60)
    all_but_one = FinePrune(schedule=QUICK, tolerance=1.0).repair(Planted(), s)
    assert len(all_but_one.log["pruned"]["norm"]) == 3
    careful = FinePrune(schedule=QUICK, tolerance=0.0).repair(Planted(), s)
    assert careful.log["pruned"]["norm"] == [3]
    assert careful.log["agreement"] == 1.0


def test_anp_prunes_the_sensitive_channel_and_without_perturbation_does_not() -> None:
    """On clean images channel 3 sees faint noise and stays just below where it fires: relative noise on its weight and
    bias turns images into class 0, while clean images alone say nothing about it.
    """
    s, found, schedule = thirds(60), {}, Schedule(rounds=60, lr=0.05, batch_size=30, distill=0.0)
    s.images[:, 0, 8, 8] = 0.1 * torch.rand(60, generator=torch.Generator().manual_seed(0))
    model = Planted(bias=-2.0)
    seen = model.conv(s.images)[:, 3].detach()
    model.norm.running_mean[3], model.norm.running_var[3] = seen.mean(), seen.var()
    remembered = model.norm.running_mean.clone()
    assert agreement(model, s.labels, s.images) == 1.0
    assert success(model, s) == 1.0
    for epsilon in (0.4, 0.0):
        found[epsilon] = ANP(schedule=schedule, epsilon=epsilon).repair(model, s)
        assert agreement(found[epsilon].model, s.labels, s.images) == 1.0
    assert found[0.4].log["pruned"] == {"norm": [3]}
    assert found[0.4].log["threshold"] in THRESHOLDS
    assert success(found[0.4].model, s) == 0.0
    assert found[0.0].log["pruned"] == {"norm": []}
    assert success(found[0.0].model, s) == 1.0
    assert torch.equal(found[0.4].model.norm.running_mean, remembered), "only the search normalises by the batch"


def test_anp_normalises_by_the_batch_while_it_looks_for_masks() -> None:
    """Statistics that do not fit the images change nothing about the masks, and are those of the repaired model."""
    s, odd = thirds(60), Planted()
    odd.norm.running_mean[:] = 7.0
    tried = ANP(schedule=Schedule(rounds=3, lr=0.1, batch_size=30, distill=0.0), tolerance=1.0)
    usual, other = (tried.repair(model, s).log["masks"] for model in (Planted(), odd))
    assert usual == other


def test_anp_says_that_it_needs_batchnorm() -> None:
    bare = Classifier(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)), [0.5], [0.25])
    with pytest.raises(InputError, match="BatchNorm"):
        ANP().repair(bare, samples())
    for other in (FinePrune(schedule=QUICK), CLP()):
        other.repair(bare, samples())


# ---------------------------------------------------------------- NAD


def test_attention_distance_is_one_of_unit_maps() -> None:
    left, right = torch.zeros(2, 3, 2, 2), torch.zeros(2, 3, 2, 2)
    left[:, 0, 0, 0], right[:, 1, 1, 1] = 5.0, -0.1
    assert attention_distance(left, right, 2.0).item() == pytest.approx(2 / 4)  # two ones in four pixels
    assert attention_distance(left, -7 * left.roll(1, 1), 2.0).item() < 1e-10  # neither size, sign nor channel counts
    half = left.clone()
    half[:, 0, 0, 1] = 5.0
    assert attention_distance(left, half, 2.0).item() == pytest.approx(((1 - 0.5**0.5) ** 2 + 0.5) / 4)


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        ("small_cnn", {"body.1": 16, "body.3": 8, "body.4": 4}),
        ("small_vgg", {"body.1": 32, "body.4": 16, "body.7": 8}),
        ("resnet18", {"body.2": 32, "body.4": 16, "body.6": 8, "body.8": 4}),
    ],
)
def test_attention_layers_are_the_last_of_each_size(arch, expected) -> None:
    model, images = build_classifier(arch, 3, 4).eval(), torch.rand(2, 3, 32, 32, generator=rng())
    assert attention_layers(model, images) == list(expected)
    for name, size in expected.items():
        index = int(name.split(".")[1])
        assert model.body[: index + 1](images).shape[2] == size
        assert model.body[: index + 1](images).min() >= 0, "an activation"


def test_nad_brings_attention_nearer_to_the_teacher_than_without_its_term() -> None:
    ends = {}
    for beta in (0.0, 500.0):
        nad = NAD(betas=(beta,), epochs=12, teacher_epochs=2, lr=0.02, batch_size=24, augment="none")
        log = nad.repair(tiny_model(), samples(72), seed=3).log
        ends[beta] = sum(log["attention"][-3:])
        assert log["layers"] == ["body.2"]
        assert len(log["loss"]) == 12
        assert len(log["teacher_loss"]) == 2
    assert ends[500.0] < 0.7 * ends[0.0], ends


def test_the_last_beta_is_of_the_last_layer() -> None:
    given = Samples(torch.rand(6, 3, 32, 32, generator=rng()), torch.arange(6) % 3, 3, "clean")
    model = build_classifier("small_vgg", 3, 3).eval()
    for betas, layers in (((1.0,), ["body.7"]), ((0.0, 1.0), ["body.4", "body.7"])):
        assert NAD(betas=betas, epochs=1, teacher_epochs=1).repair(model, given).log["layers"] == layers
    more = NAD(betas=(0.0, 0.0, 0.0, 1.0), epochs=1, teacher_epochs=1).repair(model, given)
    assert more.log["layers"] == ["body.1", "body.4", "body.7"]


# ---------------------------------------------------------------- FT-SAM


def test_the_perturbed_gradient_is_the_closed_form_on_a_quadratic() -> None:
    """L = ½ Σ a w²: the gradient is a w, ε = ρ w² (a w) / ‖|w| a w‖, and the gradient there a (w + ε)."""
    a = torch.tensor([1.0, 4.0, 0.5])
    w = torch.tensor([2.0, -1.0, 0.1], requires_grad=True)

    def loss(point):
        return 0.5 * (a * point["w"].square()).sum()

    unused = torch.ones(2, requires_grad=True)
    point = worst({"w": w, "unused": unused}, loss, 0.3)
    gradient = a * w.detach()
    epsilon = 0.3 * w.detach() ** 2 * gradient / (w.detach().abs() * gradient).norm()
    assert torch.allclose(point["w"].detach(), w.detach() + epsilon)
    assert (epsilon / w.detach()).norm().item() == pytest.approx(0.3)
    assert point["unused"] is unused
    assert torch.allclose(torch.autograd.grad(loss(point), w)[0], a * (w.detach() + epsilon))


def test_ft_sam_ends_in_a_flatter_minimum_than_fine_tuning() -> None:
    s, sharpness = samples(48), {0.0: 0.0, 1.0: 0.0}
    for rho, start in itertools.product(sharpness, range(8)):
        recipe = FTSAM(rho=rho, epochs=40, batch_size=24, augment="none", smoothing=0.0)
        model = recipe.repair(tiny_model(seed=start), s).model

        def loss(point, model=model):
            return F.cross_entropy(torch.func.functional_call(model, point, (s.images,)), s.labels)

        weights = dict(model.named_parameters())
        sharpness[rho] += (loss(worst(weights, loss, 1.0)) - loss(weights)).item()
    assert sharpness[1.0] < 0.9 * sharpness[0.0], sharpness


def test_ft_sam_remembers_the_statistics_of_the_first_pass_alone() -> None:
    s, model = samples(), tiny_model()
    expected = copy.deepcopy(model)
    expected.body[1].train()
    expected(s.images)
    found = FTSAM(epochs=1, lr=0.0, augment="none").repair(model, s).model
    for name, value in expected.body[1].named_buffers():
        if name != "num_batches_tracked":
            torch.testing.assert_close(found.body[1].get_buffer(name), value, rtol=1e-2, atol=1e-3)
            assert not torch.allclose(value, model.body[1].get_buffer(name), rtol=5e-2)
    assert not any(module.training for module in found.modules())


@pytest.mark.slow
def test_ft_sam_removes_what_fine_tuning_by_its_recipe_leaves() -> None:
    """The paper's own trend: with ρ = 0 most of the patch is left, with its ρ little."""
    domain, model = load_domain("digits"), load_classifier("digits-badnets")
    s, evaluator = clean_control(domain.private.train, per_class=30), Evaluator(domain.private.test, BadNets(target=0))
    before = evaluator.measure(model)
    plain, sharp = (evaluator.measure(FTSAM(rho=rho).repair(model, s).model) for rho in (0.0, 2.0))
    print(f"before {before}, ρ = 0 {plain}, ρ = 2 {sharp}")
    assert sharp.asr < 0.5 * plain.asr
    assert sharp.acc > before.acc - 0.03


# ---------------------------------------------------------------- CLP


def test_the_bound_is_the_spectral_norm_times_the_slope() -> None:
    model = build_classifier("small_cnn", 1, 3).eval()
    layer = conv_layers(model)[1]
    norm = model.get_submodule(layer.norm)
    nn.init.normal_(norm.weight, generator=rng(1))
    norm.running_var.uniform_(0.1, 2, generator=rng(2))
    kernel = model.get_submodule(layer.conv).weight.detach().double()
    for channel, bound in enumerate(lipschitz_bounds(model, layer)):
        top = torch.linalg.svdvals(kernel[channel].reshape(kernel.shape[1], -1))[0].item()
        slope = abs(norm.weight[channel].item()) / math.sqrt(norm.running_var[channel].item() + norm.eps)
        assert bound.item() == pytest.approx(top * slope, rel=1e-9)


@pytest.mark.parametrize("where", ["kernel", "slope", "variance"])
def test_clp_prunes_exactly_the_channel_with_a_large_lipschitz_constant(where) -> None:
    model = build_classifier("small_cnn", 1, 3).eval()
    assert not any(CLP(u=4.5).repair(model).log["pruned"].values())
    conv, norm, _ = model.body[2]
    with torch.no_grad():
        if where == "kernel":
            conv.weight[7] *= 5
        elif where == "slope":
            norm.weight[7] = -5
        else:
            norm.running_var[7] = 0.04
    found = CLP(u=4.5).repair(model)
    assert {k: v for k, v in found.log["pruned"].items() if v} == {"body.2.1": [7]}
    expected = copy.deepcopy(model.state_dict())
    for name in ("0.weight", "1.weight", "1.bias"):
        expected[f"body.2.{name}"][7] = 0
    assert all(torch.equal(v, expected[k]) for k, v in found.model.state_dict().items())
    assert not any(CLP(u=20).repair(model).log["pruned"].values())


# ---------------------------------------------------------------- all, against a real backdoor


@pytest.mark.slow
def test_with_clean_samples_against_badnets_on_digits() -> None:
    domain = load_domain("digits")
    model, attack = plant(domain.private.train, BadNets(target=0), seed=100)
    s, evaluator = clean_control(domain.private.train, per_class=30, seed=100), Evaluator(domain.private.test, attack)
    for name in ALL:
        repair = defenses[name]().repair(model, s, seed=100)
        assert all(v.isfinite().all() for v in repair.model.state_dict().values())
        rates = evaluator.measure(repair.model)
        print(f"{name}: ACC {rates.acc:.3f}, ASR {rates.asr:.3f}")
        assert rates.acc > 0.85
