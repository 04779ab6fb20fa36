"""The benchmark is right about what it computes. How fast anything is, is never tested."""

import copy
import json
import zlib
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from smi.models.classifiers import architectures
from smi_kernels.bench import __main__ as command, measure as measuring
from smi_kernels.bench.compiled import Step
from smi_kernels.bench.measure import (
    Ours,
    Tuned,
    Unavailable,
    interleaved,
    max_error,
    median_and_spread,
    peak_bytes,
    peak_of_trace,
)
from smi_kernels.bench.models import ARCHITECTURES, make_images, make_model
from smi_kernels.bench.peers import Candidate, ceilings, compiled_loop, eager, peers
from smi_kernels.bench.problem import Problem
from smi_kernels.bench.records import Record, fill_ratios, summary
from smi_kernels.bench.run import SIGMA_W, SIGMA_X

CPU = torch.device("cpu")
PEERS = ["eager", "compiled", "vmap", "grouped"]
TINY = ["--models", "small_cnn", "--n", "4", "--k", "2", "--repeats", "1", "--no-compile"]


def seeded(name, draws, shape):
    """The same noise for every peer, whatever order it draws in and however many draws at once."""
    seeds = [[zlib.crc32(name.encode()), k] for k in draws]
    return torch.stack([torch.from_numpy(np.random.default_rng(s).standard_normal(tuple(shape))) for s in seeds])


@cache
def model_of(name):
    """A model that no test changes."""
    return make_model(name)


def problem(name="small_cnn", n=3, low=torch.float32, **options):
    options = {"sigma_x": SIGMA_X, "sigma_w": SIGMA_W, "draw": seeded} | options
    return Problem(model=model_of(name), images=make_images(name, n), low=low, **options)


def candidates(setting, peer):
    """All versions of a peer, run without a compiler."""
    if peer == "compiled":
        return [
            Candidate(
                label=body,
                dtype=setting.low,
                build=lambda p, body=body: compiled_loop(p, body=body, compiler=False),
            )
            for body in Step.bodies(setting.low)
        ]
    return peers(setting, compiler=False)[peer]


@pytest.fixture(scope="module")
def exact():
    """Scores of each model by the eager loop in float64."""

    def scores(name):
        setting = problem(name)
        with torch.no_grad():
            return eager(replace(setting, model=copy.deepcopy(setting.model).double(), images=setting.images.double()))(
                3
            )

    return {name: scores(name) for name in ARCHITECTURES}


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_peers_agree_given_the_same_noise(exact, name, peer):
    assert (exact[name] > 1e-3).all()
    setting = problem(name)
    with torch.no_grad():
        for candidate in candidates(setting, peer):
            torch.testing.assert_close(candidate.build(setting)(3).double(), exact[name], rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("peer", PEERS)
def test_peers_in_bfloat16_are_near(exact, peer):
    setting = problem(low=torch.bfloat16)
    with torch.no_grad():
        for candidate in candidates(setting, peer):
            torch.testing.assert_close(candidate.build(setting)(3).double(), exact["small_cnn"], rtol=0.3, atol=1e-3)


@pytest.mark.parametrize("peer", PEERS)
def test_peers_without_noise_score_zero(peer):
    setting = problem(sigma_x=0.0, sigma_w=0.0, draw=None)
    with torch.no_grad():
        for candidate in candidates(setting, peer):
            assert candidate.build(setting)(2).abs().max() < 1e-9


def test_peers_draw_noise_of_the_stated_size():
    setting = problem("resnet18", draw=None)
    name = "body.8.main.3.weight"
    states = setting.states(range(2))
    noise = states[name] - setting.parameters[name]
    expected = SIGMA_W * setting.parameters[name].norm().item()
    assert noise.flatten(1).norm(dim=1).tolist() == pytest.approx([expected] * 2, rel=0.01)
    assert not torch.equal(noise[0], noise[1])
    assert set(states) == set(setting.parameters)  # biases and BatchNorms too
    grey = torch.full((2, 3, 32, 32), 0.5)
    images = replace(setting, images=grey).noisy_images(range(2))
    assert torch.equal(images[:, 0], images[:, 1])  # one draw for all images
    assert (images - grey).std().item() == pytest.approx(SIGMA_X, rel=0.05)
    images = replace(setting, images=grey, sigma_x=10.0).noisy_images(range(2))
    assert (images.min(), images.max()) == (0, 1)


def test_a_compiled_draw_is_one_graph():
    setting = problem(draw=None)
    for body in Step.bodies(torch.bfloat16):
        step = Step(replace(setting, low=torch.bfloat16), body)
        whole = torch.compile(step, backend="eager", fullgraph=True)  # raises if the graph breaks
        with torch.no_grad():
            scores = whole(setting.images, setting.model(setting.images))
        assert scores.shape == (3,)
        assert scores.dtype == torch.float32
        assert (scores > 0).all()
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_ceiling_is_the_plain_model_on_all_images(name):
    setting = problem(name)
    with torch.no_grad():
        expected = setting.model(setting.images).repeat(2, 1)
        for candidate in ceilings(setting, compiler=False):
            torch.testing.assert_close(candidate.build(setting)(2), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_models_are_those_of_smi_and_not_degenerate(name):
    model, images = model_of(name), make_images(name, 32)
    twin = architectures[name](ARCHITECTURES[name].channels, 10)
    assert [p.shape for p in model.parameters()] == [p.shape for p in twin.parameters()]
    assert all(p.detach().norm() > 0 for p in model.parameters())
    assert not any(m.training for m in model.modules())
    assert torch.equal(images[:8], make_images(name, 8))
    assert 0 <= images.min() < images.max() <= 1
    with torch.no_grad():
        logits = model(images)
        assert torch.equal(logits, make_model(name)(images))
    assert 1.5 < logits.std() < 6
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert (norm.running_mean != 0).all()


def test_ours_is_exact_in_float64_and_changes_its_seed():
    setting = problem()
    ours = Ours(setting, "gaussian")
    reference = ours.reference(2)
    assert reference.dtype == torch.float64
    assert ours.error(2, reference) < 0.5
    assert ours.error(2, None) is None
    assert not torch.equal(ours(2), ours(2))


def test_max_error():
    exact = torch.tensor([1e-4, 0.5], dtype=torch.float64)
    assert max_error(torch.tensor([3e-4, 0.5, 9.0]), exact) == pytest.approx(1.0)


def test_every_round_runs_every_call_and_starts_one_further():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times = interleaved(calls, 3, CPU)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert [len(t) for t in times.values()] == [3, 3, 3]


def test_median_and_spread():
    assert median_and_spread([4.0, 1.0, 2.0, 3.0, 100.0]) == pytest.approx((3.0, 2 / 3))
    assert median_and_spread([2.0]) == (2.0, 0.0)


def test_peak_memory():
    ones = torch.ones(1000, 1000)
    assert 8e6 <= peak_bytes(lambda: (ones + 1) * 2, CPU) < 8.1e6
    assert peak_bytes(lambda: None, CPU) == 0
    events = [("[memory]", 1, 5), ("[memory]", 3, -5), ("[memory]", 2, 7), ("aten::add", 2, 99), ("[memory]", 4, 4)]
    trace = [{"name": name, "ts": ts, "args": {"Bytes": size}} for name, ts, size in events]
    assert peak_of_trace({"traceEvents": trace}) == 12


def fake(label, run):
    return Candidate(label=label, dtype=torch.float32, build=lambda setting: run)


def broken(k):
    raise RuntimeError("\n  No working C++ compiler found.\nMore text.")


def test_tuning_takes_the_fastest_that_runs(monkeypatch):
    slow, quick = (lambda k: torch.zeros(k)), (lambda k: torch.ones(k))
    monkeypatch.setattr(measuring, "seconds", lambda call, device: 2.0 - call()[0].item())
    tuned = Tuned(problem(), [fake("broken", broken), fake("slow", slow), fake("quick", quick)])
    candidate, run = tuned.best(32)
    assert (candidate.label, run) == ("quick", quick)


def test_a_peer_that_cannot_run_says_why():
    with pytest.raises(Unavailable, match=r"^RuntimeError: No working C\+\+ compiler found\.$"):
        Tuned(problem(), [fake("broken", broken)]).best(8)


def record(variant, seconds, family="gaussian", **options):
    fields = dict.fromkeys(Record.__annotations__) | {"model": "small_cnn", "n": 16, "k": 8, "dtype": "float32"}
    fields |= {"spread": 0.0, "peak_bytes": 10}
    return fields | {"variant": variant, "seconds": seconds, "family": family} | options


def test_ratios_and_summary():
    point = [record("smi", 2.0), record("eager", 8.0), record("compiled", 3.0), record("ceiling", 1.0, None)]
    fill_ratios(point)
    assert [r["vs_eager"] for r in point] == pytest.approx([4, 1, 8 / 3, 8])
    assert [r["vs_best_peer"] for r in point] == pytest.approx([1.5, 3 / 8, 1, 3])
    assert [r["of_ceiling"] for r in point] == pytest.approx([0.5, 1 / 8, 1 / 3, 1])
    other = [record("smi", 4.0), record("eager", 4.0)]
    fill_ratios(other)
    assert other[0]["of_ceiling"] is None
    text = "\n".join(summary(point + other))
    assert "eager geometric mean 2.00, minimum 1.00" in text
    assert "best peer geometric mean 1.22, minimum 1.00" in text
    alone = [record("smi", 4.0)]
    fill_ratios(alone)
    assert (alone[0]["vs_eager"], alone[0]["vs_best_peer"]) == (None, None)
    assert summary(alone) == ["smi gaussian, speed relative to: nothing"]


def run(*arguments):
    return CliRunner().invoke(command.main, [str(a) for a in arguments])


@pytest.fixture
def threads():
    """Restores what the option --threads and the benchmark set for the process."""
    before = torch.get_num_threads(), torch.backends.cudnn.benchmark
    yield
    torch.set_num_threads(before[0])
    torch.backends.cudnn.benchmark = before[1]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_command_line_end_to_end(tmp_path, suffix):
    file, picture = tmp_path / "out.json", tmp_path / f"out.{suffix}"
    result = run(*TINY, "--threads", 1, "--json", file, "--plot", picture)
    assert result.exit_code == 0, result.output
    records = json.loads(file.read_text())
    assert {"smi", "eager", "vmap", "grouped", "ceiling"} == {r["variant"] for r in records}
    for r in records:
        assert list(r) == list(Record.__annotations__)
        assert (r["model"], r["n"], r["k"]) == ("small_cnn", 4, 2)
        assert r["dtype"] in ("float32", "bfloat16")
        assert r["seconds"] > 0
        assert r["spread"] == 0
        assert r["peak_bytes"] > 0
        assert (r["error"] is not None) == (r["variant"] == "smi")
        assert (r["family"] is None) == (r["variant"] == "ceiling")
        assert min(r["vs_eager"], r["vs_best_peer"], r["of_ceiling"]) > 0
    machine = json.loads((tmp_path / "out.machine.json").read_text())
    assert machine["threads"] == 1
    assert machine["torch"] == torch.__version__
    assert machine["unavailable"] == {}
    assert "smi gaussian, speed relative to: eager geometric mean" in result.output
    start = picture.read_bytes()
    assert len(start) > 2000
    assert start.startswith(b"\x89PNG" if suffix == "png" else b"<?xml")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["out.json", "out.machine.json", picture.name])


@pytest.mark.parametrize(
    ("existing", "arguments", "told"),
    [
        ("a.json", ["--json", "a.json"], "exists"),
        ("a.machine.json", ["--json", "a.json"], "exists"),
        ("a.png", ["--plot", "a.png"], "exists"),
        ("", ["--plot", "a.gif"], "format"),
        ("", ["--json", "none/a.json"], "folder"),
        ("", ["--json", "a.svg", "--plot", "a.svg"], "different"),
        ("", ["--device", "gpu"], "device"),
        ("", ["--device", "mps"], "device"),
        ("", ["--device", f"cuda:{torch.cuda.device_count()}"], "CUDA"),
        ("", ["--models", "vgg"], "small_vgg"),
        ("", ["--k", "0"], "range"),
    ],
)
def test_bad_input_is_told_before_anything_is_measured(tmp_path, monkeypatch, existing, arguments, told):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "measure", lambda *_: pytest.fail("it measured"))
    if existing:
        (tmp_path / existing).write_text("kept")
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert told in result.output
    if existing:
        assert (tmp_path / existing).read_text() == "kept"


def interrupted(grid, notes, step):
    point = [record("smi", 1.0), record("eager", 2.0)]
    fill_ratios(point)
    yield point
    raise KeyboardInterrupt


@pytest.mark.usefixtures("threads")
def test_an_interrupted_run_keeps_its_points_and_force_overwrites(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "measure", interrupted)
    file = tmp_path / "a.json"
    file.write_text("old")
    result = run("--json", file, "--force")
    assert result.exit_code == 130
    assert [r["vs_eager"] for r in json.loads(file.read_text())] == [2.0, 1.0]
    assert json.loads((tmp_path / "a.machine.json").read_text())["unavailable"] == {}


@pytest.mark.usefixtures("threads")
def test_a_peer_that_cannot_run_is_reported_and_the_rest_goes_on(tmp_path, monkeypatch):
    def without_compiler(*args, **options):
        raise RuntimeError("No working C++ compiler found.")

    monkeypatch.setattr("smi_kernels.bench.peers.compile_module", without_compiler)
    file = tmp_path / "a.json"
    result = run(*TINY[:-1], "--json", file)
    assert result.exit_code == 0, result.output
    assert "unavailable: compiled, small_cnn, N=4, K=2: RuntimeError: No working C++ compiler found." in result.output
    assert {r["variant"] for r in json.loads(file.read_text())} == {"smi", "eager", "vmap", "grouped", "ceiling"}
