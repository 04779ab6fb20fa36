import pytest
import torch
from tiny import TinyPrior, noise, tiny_model
from torch import nn
from torch.nn.utils import parametrize

from smi.domains import PublicImages
from smi.errors import InputError
from smi.inversion import Latent, invert
from smi.models.own_code import own_function
from smi.priors import gan
from smi.priors.base import GAN, GeneratorPrior, Prior, load_generator, load_prior, sample_latents, save_prior
from smi.priors.gan import PriorConfig, fit_prior
from smi.runtime.files import load_tensors, save_tensors

CONFIG = PriorConfig(steps=6, batch_size=8)
PUBLIC = PublicImages(noise(20, 1, 32, 32))


class Interrupted(Exception):
    pass


@pytest.fixture(scope="module")
def fitted():
    return fit_prior(PUBLIC, CONFIG, seed=1)


@pytest.fixture
def stop_after(monkeypatch):
    """``stop_after(n)``: training breaks off before step n + 1. Returns a list that counts the steps made."""
    advance = gan._Training.advance

    def use(n):
        made = []

        def step(run):
            if len(made) == n:
                raise Interrupted
            made.append(run.step)
            advance(run)

        monkeypatch.setattr(gan._Training, "advance", step)
        return made

    return use


def equal(first, second):
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# the networks


@pytest.mark.parametrize("channels", [1, 3])
def test_shapes_and_range(channels):
    prior = GAN(channels).eval()
    assert isinstance(prior, Prior)
    z = 3 * sample_latents(prior, 4, torch.Generator().manual_seed(0))
    images = prior.generate(z)
    assert images.shape == (4, *prior.image_shape) == (4, channels, 32, 32)
    assert images.min() >= 0
    assert images.max() <= 1
    assert prior.criticise(images).shape == (4,)
    assert (images[0] - images[1]).abs().max() > 1e-4


def test_critic_and_generator_are_differentiable():
    prior = GAN(1).eval()
    z = sample_latents(prior, 2, torch.Generator().manual_seed(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(prior.criticise(prior.generate(z)).sum(), z)
    assert (gradient.norm(dim=1) > 0).all()


# training


def test_training_gives_a_prior_in_eval_mode(fitted):
    assert not any(module.training for module in fitted.modules())
    images = fitted.generate(torch.zeros(1, fitted.latent_dim))
    assert images.shape == (1, 1, 32, 32)
    assert fitted.record["config"]["steps"] == 6
    assert fitted.record["images"] == 20


def test_training_moves_generator_and_critic():
    short, longer = (fit_prior(PUBLIC, PriorConfig(steps=s, batch_size=8), seed=1) for s in (1, 3))
    z = torch.ones(1, short.latent_dim)
    assert not torch.equal(short.generate(z), longer.generate(z))
    assert not torch.equal(short.criticise(PUBLIC.images), longer.criticise(PUBLIC.images))


def test_colour():
    prior = fit_prior(PublicImages(noise(8, 3, 32, 32)), PriorConfig(steps=1, batch_size=4))
    assert prior.image_shape == (3, 32, 32)
    assert prior.generate(torch.zeros(1, prior.latent_dim)).shape == (1, 3, 32, 32)


def test_the_seed_alone_decides(fitted):
    state = torch.get_rng_state()
    again, other = fit_prior(PUBLIC, CONFIG, seed=1), fit_prior(PUBLIC, CONFIG, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert equal(fitted, again)
    assert not equal(fitted, other)


def test_an_interrupted_run_resumes_to_the_same_bits(fitted, stop_after, tmp_path):
    checkpoint = tmp_path / "run.safetensors"
    stop_after(5)
    with pytest.raises(Interrupted):
        fit_prior(PUBLIC, CONFIG, seed=1, checkpoint=checkpoint, every=0)
    resumed = stop_after(None)
    assert equal(fit_prior(PUBLIC, CONFIG, seed=1, checkpoint=checkpoint), fitted)
    assert resumed == [5]  # from the last checkpoint, not from the start
    done = stop_after(None)
    assert equal(fit_prior(PUBLIC, CONFIG, seed=1, checkpoint=checkpoint), fitted)
    assert done == []


def test_the_checkpoint_of_another_run_is_refused(stop_after, tmp_path):
    checkpoint = tmp_path / "run.safetensors"
    fit_prior(PUBLIC, PriorConfig(steps=1, batch_size=8), checkpoint=checkpoint)
    before, made = checkpoint.read_bytes(), stop_after(None)
    for public, config, seed in [
        (PUBLIC, PriorConfig(steps=1, batch_size=8), 1),
        (PUBLIC, PriorConfig(steps=2, batch_size=8), 0),
        (PublicImages(noise(20, 1, 32, 32, seed=1)), PriorConfig(steps=1, batch_size=8), 0),
    ]:
        with pytest.raises(InputError, match="is of another prior"):
            fit_prior(public, config, seed=seed, checkpoint=checkpoint)
    assert not made
    assert checkpoint.read_bytes() == before


def test_a_finished_prior_is_no_checkpoint(fitted, tmp_path):
    save_prior(fitted, tmp_path / "prior.safetensors")
    with pytest.raises(InputError, match="holds no unfinished prior"):
        fit_prior(PUBLIC, CONFIG, checkpoint=tmp_path / "prior.safetensors")


def largest_gain(weight):
    """Spectral norm of a layer's weight as a matrix."""
    return torch.linalg.matrix_norm(weight.detach().flatten(1), 2).item()


def test_spectral_normalisation_is_on_in_training_and_baked_in_after(monkeypatch):
    runs, gains = [], []
    advance = gan._Training.advance

    def watched(run):
        advance(run)
        layers = [m for m in run.live.critic.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        gains.append([largest_gain(layer.weight) for layer in layers])
        runs.append(run)

    monkeypatch.setattr(gan._Training, "advance", watched)
    # At a small rate power iteration keeps up to within a few per cent.
    prior = fit_prior(PUBLIC, PriorConfig(steps=6, batch_size=8, lr=1e-5), seed=1)
    assert torch.tensor(gains).shape == (6, 4)
    assert torch.tensor(gains).sub(1).abs().max() < 0.1
    finished = [m for m in prior.critic.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    raw = [m.parametrizations.weight.original for m in runs[-1].live.critic.modules() if parametrize.is_parametrized(m)]
    assert max(abs(largest_gain(weight) - 1) for weight in raw) > 0.2  # it is the normalisation that does it
    assert max(abs(largest_gain(layer.weight) - 1) for layer in finished) < 0.1
    assert not any(parametrize.is_parametrized(m) for m in prior.critic.modules())
    live = runs[-1].live.critic.eval()
    assert torch.allclose(prior.criticise(PUBLIC.images), live(PUBLIC.images), atol=1e-5)


def test_the_generator_that_is_kept_is_an_average(monkeypatch):
    runs = []
    restore = gan._Training.finished
    monkeypatch.setattr(gan._Training, "finished", lambda run, record: (runs.append(run), restore(run, record))[1])
    prior = fit_prior(PUBLIC, CONFIG, seed=1)
    kept, live = prior.generator.stem[0].weight, runs[0].live.generator.stem[0].weight
    assert torch.equal(kept, runs[0].average.stem[0].weight)
    assert not torch.equal(kept, live)


@pytest.mark.parametrize(
    ("public", "message"),
    [(PUBLIC.images, "not Tensor"), (PublicImages(noise(4, 1, 28, 28)), r"32×32.*\(28, 28\)")],
)
def test_wrong_public_images(public, message, tmp_path):
    with pytest.raises(InputError, match=message):
        fit_prior(public, CONFIG, checkpoint=tmp_path / "c.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "settings", [{"steps": 0}, {"batch_size": 2}, {"ema": 1.0}, {"lr": -1.0}, {"zoom": float("nan")}]
)
def test_settings_are_checked(settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        PriorConfig(**settings)


# files


def test_save_and_load(fitted, tmp_path):
    file = tmp_path / "prior.safetensors"
    save_prior(fitted, file)
    state = torch.get_rng_state()
    loaded = load_prior(file)
    assert torch.equal(torch.get_rng_state(), state)
    assert not loaded.training
    assert loaded.record == fitted.record
    assert loaded.image_shape == fitted.image_shape
    z = sample_latents(fitted, 4, torch.Generator().manual_seed(0))
    assert torch.allclose(loaded.generate(z), fitted.generate(z), atol=0.01)  # float16 in the file
    assert all(v.dtype == torch.float32 for v in loaded.state_dict().values() if v.is_floating_point())
    assert file.stat().st_size < 0.6 * sum(4 * v.numel() for v in fitted.state_dict().values())


def test_loading_what_is_no_prior(fitted, tmp_path):
    with pytest.raises(InputError, match=r"Unknown prior 'digit'.*Did you mean 'digits'"):
        load_prior("digit")
    with pytest.raises(InputError, match="There is no file"):
        load_prior(tmp_path / "none.safetensors")
    file = tmp_path / "other.safetensors"
    save_prior(fitted, file)
    tensors, meta = load_tensors(file, "prior")
    for change, message in [
        ({"latent_dim": 3}, "does not match"),
        ({"channels": 3}, "does not match"),
        ({"channels": 10**9}, "describes no prior"),
        ({"latent_dim": 10**9}, "describes no prior"),
    ]:
        save_tensors(file, tensors, meta | change)
        with pytest.raises(InputError, match=message):
            load_prior(file)
    save_tensors(file, tensors, {"kind": "prior"})
    with pytest.raises(InputError, match=r"other\.safetensors"):
        load_prior(file)


# a user's own generator


class Own(nn.Module):
    def __init__(self, low=-1.0, high=1.0, shape=(3, 16, 16)):
        super().__init__()
        self.low, self.high, self.shape = low, high, shape
        self.linear = nn.Linear(5, int(torch.tensor(shape).prod()))

    def forward(self, z):
        return (self.linear(z).sigmoid() * (self.high - self.low) + self.low).view(-1, *self.shape)


@pytest.mark.parametrize("output_range", [(-1.0, 1.0), (0.0, 1.0), (0.0, 255.0)])
def test_a_generator_of_ones_own(output_range):
    own = Own(*output_range)
    prior = GeneratorPrior(own, 5, output_range=output_range)
    assert isinstance(prior, Prior)
    assert (prior.latent_dim, prior.image_shape) == (5, (3, 16, 16))
    z = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(prior.generate(z), own.linear(z).sigmoid().view(4, 3, 16, 16), atol=1e-5)
    assert prior.criticise(prior.generate(z)) is None


@pytest.mark.parametrize(
    ("own", "latent_dim", "message"),
    [
        (Own(0.0, 255.0), 5, r"values from .* to 2\d\d, outside of its output range -1 to 1"),
        (Own(float("nan"), 1.0), 5, "from nan"),
        (Own(shape=(16, 16, 3)), 5, r"\(16, 16, 16, 3\)"),
        (Own(shape=(3 * 256,)), 5, r"\[N, C, H, W\]"),
        (Own(), 0, "latent_dim"),
        (Own(), 7, "latents of length 7"),
    ],
)
def test_a_generator_that_does_not_fit(own, latent_dim, message):
    with pytest.raises(InputError, match=message):
        GeneratorPrior(own, latent_dim)


def test_a_range_that_is_only_half_used_is_asked_about():
    with pytest.warns(UserWarning, match="Is its range really -1 to 1"):
        GeneratorPrior(Own(0.0, 1.0), 5)
    with pytest.raises(InputError, match="lower one first"):
        GeneratorPrior(Own(), 5, output_range=(1.0, 0.0))


def test_its_images_are_brought_to_a_shape():
    own, z = Own(0.0, 1.0), torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    prior = GeneratorPrior(own, 5, output_range=(0, 1), image_shape=(1, 8, 8))
    images = own(z)
    grey = images[:, :1] * 0.299 + images[:, 1:2] * 0.587 + images[:, 2:] * 0.114
    wanted = nn.functional.interpolate(grey, (8, 8), mode="bilinear", antialias=True)
    assert torch.allclose(prior.generate(z), wanted, atol=1e-5)
    coloured = prior.as_channels(3).generate(z)
    assert coloured.shape == (2, 3, 8, 8)
    grey_only = GeneratorPrior(Own(shape=(1, 8, 8)), 5).as_channels(3).generate(z)
    assert torch.equal(grey_only[:, 0], grey_only[:, 2])


def test_latents_as_maps_of_one_pixel():
    net = nn.Sequential(nn.ConvTranspose2d(5, 3, 8), nn.Tanh())
    prior, z = GeneratorPrior(net, 5), torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(prior.generate(z), (net(z[:, :, None, None]) + 1) / 2, atol=1e-6)


def test_a_generator_with_kernels_of_kernels_is_searched():
    class Modulated(nn.Module):
        """A convolution whose kernel has five dimensions, as in StyleGAN2."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(1, 3, 5, 1, 1))

        def forward(self, z):
            return nn.functional.conv2d(z[:, :, None, None].expand(-1, -1, 8, 8), self.weight[0]).tanh()

    model = tiny_model(channels=3)
    assert len(invert(model, GeneratorPrior(Modulated(), 5), Latent(steps=1, pool=1), per_class=1)) == 3


def test_code_of_ones_own_may_import_its_neighbours(tmp_path):
    (tmp_path / "a_neighbour.py").write_text("from torch import nn\nlayer = nn.Tanh")
    (tmp_path / "own.py").write_text("def make(size):\n    from a_neighbour import layer\n    return layer()")
    assert isinstance(own_function(f"{tmp_path}/own.py:make")(size=3, other=4), nn.Tanh)


def test_a_generator_from_a_file(tmp_path):
    file, code = tmp_path / "weights.pth", tmp_path / "own.py"
    code.write_text(
        "from torch import nn\n"
        "def net(latent_dim): return nn.Sequential(nn.ConvTranspose2d(latent_dim, 3, 8), nn.Tanh())\n"
        "def number(): return 3\n"
    )
    net = nn.Sequential(nn.ConvTranspose2d(5, 3, 8), nn.Tanh())
    torch.save({"state_dict": {f"module.{name}": value for name, value in net.state_dict().items()}}, file)
    prior, z = load_generator(file, f"{code}:net", 5), torch.randn(2, 5)
    assert torch.allclose(prior.generate(z), (net(z[:, :, None, None]) + 1) / 2, atol=1e-6)
    torch.save({"more.weight": torch.ones(1)} | net.state_dict(), tmp_path / "more.pth")
    with pytest.raises(InputError, match=r"that has no 'more\.weight'"):
        load_generator(tmp_path / "more.pth", f"{code}:net", 5)
    for spec, latent_dim, message in [
        (f"{code}:net", 6, "does not hold the weights.*size mismatch"),
        (f"{code}:no", 5, "no function 'no'"),
        (f"{code}:number", 5, "returns a int"),
        (f"{tmp_path}/none.py:net", 5, "no file"),
    ]:
        with pytest.raises(InputError, match=message):
            load_generator(file, spec, latent_dim)


def test_what_the_protocol_asks_for():
    assert isinstance(TinyPrior(), Prior)
    assert not isinstance(nn.Linear(2, 2), Prior)
