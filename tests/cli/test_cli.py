import errno
import json
import os
import shutil
import subprocess
import sys

import fake_run
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from small_runs import REMOVALS

import smi.demo
import smi.detection
import smi.domains
import smi.models.suspects
import smi.pipeline
import smi.priors.base
import smi.runtime.unfinished
from smi.cli.main import cli
from smi.cli.options import PER_CLASS
from smi.defenses import IBAU, Erasure
from smi.detection import Detector
from smi.erasure import Search
from smi.inversion import Stabilized, inversions
from smi.models.classifiers import build_classifier
from smi.models.store import save_classifier
from smi.priors.base import GAN, save_prior
from smi.priors.gan import PriorConfig, fit_prior
from smi.runtime.files import load_tensors, save_tensors
from smi.runtime.precision import asked_precision

QUICK = Detector(search=Search(families=("additive",), steps=1, restarts=1))
COMMANDS = ["demo", "remove", "fit-prior", "invert", "score", "evaluate"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder with a suspect model, a prior and images; threads stay as they are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # put back, should --threads change it
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(smi.detection, "Detector", lambda: QUICK)
    monkeypatch.setattr(smi.pipeline, "Erasure", lambda: Erasure(detector=QUICK, targets=(1,)))
    monkeypatch.setattr(smi.pipeline, "HELD_OUT", 1)
    save_classifier(build_classifier("small_cnn", 1, 3).eval(), "suspect.safetensors", arch="small_cnn")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_prior(GAN(1), "prior.safetensors")
        save_prior(GAN(3), "colour.safetensors")
    np.savez("images.npz", images=np.zeros((5, 32, 32, 1), np.uint8), labels=np.arange(5) % 3)
    return tmp_path


def smi_run(*args):
    return CliRunner().invoke(cli, [str(a) for a in args])


def refused(here, *args):
    """Runs a command that must end with 2, write nothing and show no traceback; returns its message."""
    before = sorted(here.rglob("*"))
    result = smi_run(*args)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert sorted(here.rglob("*")) == before
    return result.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_and_the_common_options(command):
    result = smi_run(command, "--help")
    assert result.exit_code == 0
    assert f":\n    smi {command}" in result.output.split("Example", 1)[1]
    for option in ("--seed", "--device", "--precision", "--threads", "--out", "--force"):
        assert option in result.output


def test_the_group_lists_every_command():
    assert sorted(cli.commands) == sorted([*COMMANDS, "lab", "study"])  # those two: test_lab.py, test_study.py


def test_defaults_agree_with_the_library():
    assert PER_CLASS == smi.pipeline.PER_CLASS


def test_demo_prints_the_table_and_says_where_files_went(here, monkeypatch):
    monkeypatch.setattr(smi.priors.base, "load_prior", lambda name: GAN(1))
    monkeypatch.setattr(smi.domains, "load_domain", lambda name: fake_run.domain())
    monkeypatch.setattr(smi.demo, "run_demo", lambda domain, prior, **options: fake_run.demo())
    result = smi_run("demo", "--seed", 3)
    assert result.exit_code == 0, result.output
    assert "SMI, no clean data" in result.output
    assert "The backdoor is removed" in result.output
    assert json.loads((here / "smi-demo-3" / "report.json").read_text())["seed"] == 3
    smi_run("demo", "--seed", 3)
    assert (here / "smi-demo-3-2" / "report.html").exists()


def test_demo_refuses_a_folder_that_is_not_empty(here):
    (here / "full").mkdir()
    (here / "full" / "mine.txt").touch()
    assert "not empty" in refused(here, "demo", "--out", "full")


def test_force_replaces_what_has_the_same_name_and_nothing_else(here, monkeypatch):
    found = fake_run.removal().cleaned
    monkeypatch.setattr(smi.pipeline, "remove_backdoor", lambda *args, **options: found)
    (here / "out").mkdir()
    for name in ("mine.txt", "report.json"):
        (here / "out" / name).write_text("mine")
    command = ["remove", "suspect.safetensors", "--prior", "prior.safetensors", "--out", "out"]
    assert "--force" in refused(here, *command)
    assert smi_run(*command, "--force").exit_code == 0
    assert (here / "out" / "mine.txt").read_text() == "mine"
    assert json.loads((here / "out" / "report.json").read_text())["n"]


def test_bad_input_does_not_cost_the_stopped_work(here):
    (here / "out.unfinished").mkdir()
    (here / "out.unfinished" / "inversion.safetensors").write_text("kept")
    command = ["remove", "--prior", "prior.safetensors", "--out", "out", "--force"]
    assert "There is no file" in refused(here, *command, "suspekt.safetensors")
    assert (here / "out.unfinished" / "inversion.safetensors").read_text() == "kept"


def test_a_detection_that_fails_does_not_cost_the_removal(here, monkeypatch):
    found = fake_run.removal().cleaned
    monkeypatch.setattr(smi.pipeline, "remove_backdoor", lambda *args, **options: found)

    def fail(*args, **options):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(smi.detection, "detect", fail)
    result = smi_run("remove", "suspect.safetensors", "--prior", "prior.safetensors", "--out", "deep/er/out")
    assert result.exit_code == 0, result.output
    assert "could not be looked for: RuntimeError: CUDA out of memory" in result.stderr
    assert (here / "deep/er/out/repaired.safetensors").exists()
    assert json.loads((here / "deep/er/out/report.json").read_text())["detection"] is None


def test_the_removal_may_be_another(here, monkeypatch):
    found, given = fake_run.removal().cleaned, {}
    monkeypatch.setattr(smi.pipeline, "remove_backdoor", lambda *args, **options: given.update(options) or found)
    command = ["remove", "suspect.safetensors", "--prior", "prior.safetensors", "--out", "out"]
    assert "ibau" in refused(here, *command, "--defense", "ibou")
    assert smi_run(*command, "--defense", "ibau").exit_code == 0
    assert given["defense"] == IBAU()


def test_without_a_prior_one_is_trained_on_the_public_images(here, monkeypatch):
    found, given = fake_run.removal().cleaned, {}

    def quick(model, prior, public, **options):
        given.update(prior=prior, public=public)
        return found

    monkeypatch.setattr(smi.pipeline, "remove_backdoor", quick)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 24, 20, 3), dtype=np.uint8)
    np.savez("colours.npz", x_train=pixels)
    result = smi_run(
        "remove", "suspect.safetensors", "--public", "colours.npz", "--prior-steps", 2, "--out", "out", "--seed", 3
    )
    assert result.exit_code == 0, result.output
    assert "public images (3, 24, 20) are used as (1, 32, 32)" in result.stderr
    names = ["prior.safetensors", "repaired.safetensors", "report.html", "report.json"]
    assert sorted(p.name for p in (here / "out").iterdir()) == names
    assert not (here / "out.unfinished").exists()
    assert tuple(given["public"].images.shape) == (40, 1, 32, 32)
    again = fit_prior(given["public"], PriorConfig(steps=2), seed=3).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in given["prior"].state_dict().items())
    kept = smi.priors.base.load_prior("out/prior.safetensors")
    assert kept.record["config"]["steps"] == 2
    assert json.loads((here / "out/report.json").read_text())["stages"].keys() == {
        "prior",
        "remove",
        "hold out",
        "detect",
    }


@pytest.mark.parametrize(
    ("options", "stages"),
    [((), ["inversion", "removal"]), (("--defense", "ft"), ["inversion", "removal", "detection"])],
)
def test_a_removal_that_is_stopped_goes_on_to_the_same_weights(here, monkeypatch, options, stages):
    monkeypatch.setattr(smi.pipeline, "Stabilized", lambda: Stabilized(steps=2, pool=1))
    monkeypatch.setattr(smi.pipeline, "Erasure", lambda: REMOVALS["erasure"])
    command = ["remove", "suspect.safetensors", "--prior", "prior.safetensors", "--per-class", 2, *options]
    assert smi_run(*command, "--out", "whole").exit_code == 0
    real, begun = smi.runtime.unfinished.Unfinished.save, []

    def save(self, state):
        """Ctrl-C after the first state of each stage."""
        real(self, state)
        if self._kind not in begun:
            begun.append(self._kind)
            raise KeyboardInterrupt

    monkeypatch.setattr(smi.runtime.unfinished.Unfinished, "save", save)
    assert smi_run(*command, "--out", "parts").exit_code == 130
    assert "--resume" in refused(here, *command, "--out", "parts")
    assert "seed was 0 there" in refused(here, *command, "--out", "parts", "--resume", "--seed", 1)
    for _ in stages[1:]:
        assert smi_run(*command, "--out", "parts", "--resume").exit_code == 130
    assert begun == stages
    kept = {"inversion", "removal", *(["detection", "held_out"] if "detection" in stages else [])}
    assert {path.stem for path in (here / "parts.unfinished").iterdir()} == kept
    assert smi_run(*command, "--out", "parts", "--resume").exit_code == 0
    assert not (here / "parts.unfinished").exists()
    whole, parts = (load_tensors(here / name / "repaired.safetensors", "classifier")[0] for name in ("whole", "parts"))
    assert all(torch.equal(parts[name], value) for name, value in whole.items())
    assert json.loads((here / "parts/report.json").read_text())["settings"]["resumed"] is True


def test_remove_writes_a_report(here, monkeypatch):
    found = fake_run.removal().cleaned
    monkeypatch.setattr(smi.pipeline, "remove_backdoor", lambda *args, **options: found)
    result = smi_run("remove", "suspect.safetensors", "--prior", "prior.safetensors", "--out", "out")
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in (here / "out").iterdir()) == ["repaired.safetensors", "report.html", "report.json"]
    assert smi_run("score", "out/repaired.safetensors", "images.npz").exit_code == 0


def test_a_strangers_checkpoint_is_repaired_in_its_layout(here, monkeypatch):
    body = build_classifier("small_cnn", 1, 3).body.eval()
    whole = {"net": {f"module.{k}": v for k, v in body.state_dict().items()}, "epoch": 3}
    torch.save(whole, "theirs.pth")
    form = ["--arch", "small_cnn", "--mean", "0.5", "--std", "0.25", "--classes", "cat,<script>,dog"]
    given = {}

    def quick(model, *args, **options):
        given.update(model=model, repaired=(found := fake_run.removal(names=("cat", "<script>", "dog"))).cleaned.model)
        return found.cleaned

    monkeypatch.setattr(smi.pipeline, "remove_backdoor", quick)
    result = smi_run("remove", "theirs.pth", *form, "--prior", "prior.safetensors", "--out", "out")
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in (here / "out").iterdir()) == ["repaired.pth", "report.html", "report.json"]
    images = torch.rand(2, 1, 32, 32)
    assert torch.allclose(given["model"](images), body((images - 0.5) / 0.25), atol=1e-5)
    after = torch.load("out/repaired.pth", weights_only=True)
    assert (list(after), after["epoch"], list(after["net"])) == (list(whole), 3, list(whole["net"]))
    weight = given["repaired"].body.state_dict()["0.0.weight"]
    assert torch.equal(after["net"]["module.0.0.weight"], weight)
    assert "<script>" not in (here / "out/report.html").read_text().partition("<main>")[2]
    assert json.loads((here / "out/report.json").read_text())["settings"]["form"]["arch"] == "small_cnn"
    assert smi_run("score", "out/repaired.pth", "images.npz", *form).exit_code == 0

    (here / "ours.py").write_text(
        "from smi.models.classifiers import small_cnn\ndef net(num_classes): return small_cnn(1, num_classes)"
    )
    form[1] = "ours.py:net"
    scored = smi_run("score", "out/repaired.pth", "images.npz", *form)
    assert scored.exit_code == 0, scored.output
    assert "running ours.py for its function net" in scored.stderr


def test_room_for_the_states_of_a_large_model_is_asked_for_before_work(here, monkeypatch):
    command = ["remove", "suspect.safetensors", "--prior", "prior.safetensors", "--out", "out"]
    usage = shutil.disk_usage(here)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=101_000_000))
    assert "has 101 MB left; at least 104 MB are needed" in refused(here, *command)


def test_a_disk_that_fails_in_the_middle_is_told(here, monkeypatch):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/report.html")

    monkeypatch.setattr(smi.pipeline, "remove_backdoor", full)
    said = refused(here, "remove", "suspect.safetensors", "--prior", "prior.safetensors", "--out", "out")
    assert "out/report.html cannot be read or written: No space left on device" in said


def test_a_generator_of_ones_own_is_a_prior(here):
    (here / "own.py").write_text(
        "from torch import nn\n"
        "def net(latent_dim): return nn.Sequential(nn.ConvTranspose2d(latent_dim, 3, 32), nn.Tanh())\n"
    )
    with torch.random.fork_rng():
        torch.save(torch.nn.Sequential(torch.nn.ConvTranspose2d(5, 3, 32)).state_dict(), "generator.pth")
    base = ["invert", "suspect.safetensors", "--prior", "generator.pth", "--per-class", 1, "--out"]
    own = ["--generator", "own.py:net", "--latent-dim", 5]
    done = smi_run(*base, "a.npz", *own)
    assert done.exit_code == 0, done.output
    assert "running own.py for its function net" in done.stderr
    assert np.load("a.npz")["images"].shape == (3, 32, 32, 1)  # grey, as the model takes them
    remove = ["remove", "suspect.safetensors", "--public", "digits", "--out", "c"]
    assert "--generator needs --prior" in refused(here, *remove, *own)
    assert "needs --latent-dim" in refused(here, *base, "b.npz", *own[:2])
    assert "are for --generator" in refused(here, *base, "b.npz", *own[2:])
    assert "two numbers" in refused(here, *base, "b.npz", *own, "--range", "1")
    assert "lower one first" in refused(here, *base, "b.npz", *own, "--range", "1,0")
    assert "outside of its output range 5 to 6" in refused(here, *base, "b.npz", *own, "--range", "5,6")
    assert "--generator" in refused(here, *base, "b.npz")


def test_remove_refuses_what_does_not_fit_before_any_work(here, monkeypatch):
    def never(*args, **options):
        raise AssertionError("work was begun")

    monkeypatch.setattr(smi.pipeline, "remove_backdoor", never)
    base = ["remove", "suspect.safetensors", "--out", "out", "--prior"]
    assert "channels" in refused(here, *base, "colour.safetensors")
    assert "Allowed: digits" in refused(here, *base, "digit")
    assert "There is no file" in refused(here, *base, "none.safetensors")
    assert "--prior, --public or both" in refused(here, *base[:-1])
    assert "--prior-steps" in refused(here, *base, "prior.safetensors", "--prior-steps", 3)
    assert "Did you mean 'digits'" in refused(here, *base, "prior.safetensors", "--public", "digts")
    tensors, meta = load_tensors("suspect.safetensors", "classifier")
    save_tensors("suspect.safetensors", tensors | {"mean": torch.full((1, 1, 1, 1), float("nan"))}, meta)
    assert "NaN" in refused(here, *base, "prior.safetensors")


def test_fit_prior_writes_a_prior_that_loads(here):
    result = smi_run("fit-prior", "digits", "--steps", 1, "--out", "new.safetensors")
    assert result.exit_code == 0, result.output
    assert smi.priors.base.load_prior("new.safetensors").image_shape == (1, 32, 32)
    assert "exists" in refused(here, "fit-prior", "digits", "--steps", 1, "--out", "new.safetensors")
    resized = smi_run("fit-prior", small_npz(), "--steps", 1, "--out", "other.safetensors")
    assert resized.exit_code == 0, resized.output
    assert "(1, 8, 8) are used as (1, 32, 32)" in resized.stderr


def small_npz():
    np.savez("small.npz", x_train=np.zeros((4, 8, 8), np.uint8))
    return "small.npz"


@pytest.mark.parametrize("method", ["smi", "latent", "pixel"])
def test_invert_writes_images_labels_scores_and_a_picture(here, monkeypatch, method):
    quick = inversions[method](steps=1)
    monkeypatch.setitem(inversions._items, method, lambda: quick)
    base = ["invert", "suspect.safetensors", "--prior", "prior.safetensors", "--method", method]
    result = smi_run(*base, "--per-class", 2, "--out", "found.npz")
    assert result.exit_code == 0, result.output
    with np.load("found.npz") as found:
        assert found["images"].shape == (6, 32, 32, 1)
        assert found["images"].dtype == np.uint8
        assert found["labels"].tolist() == [0, 0, 1, 1, 2, 2]
        assert np.isfinite(found["scores"]).all()
    assert (here / "found.png").read_bytes().startswith(b"\x89PNG")
    assert smi_run("score", "suspect.safetensors", "found.npz", "--k", 2).exit_code == 0


def test_invert_refuses_unknown_methods_and_names(here):
    base = ["invert", "suspect.safetensors", "--prior", "prior.safetensors"]
    assert "Did you mean 'latent'" in refused(here, *base, "--method", "latnt", "--out", "x.npz")
    assert "ends in .npz" in refused(here, *base, "--out", "x.zip")
    (here / "x.png").touch()
    assert "exists" in refused(here, *base, "--out", "x.npz")


def test_score_prints_quantiles_and_writes_csv(here):
    result = smi_run("score", "suspect.safetensors", "images.npz", "--k", 2, "--out", "scores.csv")
    assert result.exit_code == 0, result.output
    assert "median" in result.output
    lines = (here / "scores.csv").read_text().splitlines()
    assert lines[0] == "index,label,prediction,score"
    assert len(lines) == 6


def write(**arrays):
    np.savez("bad.npz", **arrays)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.full((2, 32, 32, 1), 1.5, np.float32)}, "values from 1.5"),
        ({"images": np.full((2, 32, 32, 1), np.nan, np.float32)}, "finite"),
        ({"images": np.zeros((2, 1, 32, 32), np.uint8)}, "Allowed: [N, H, W, C]"),
        ({"images": np.zeros((2, 32, 32, 1), np.int64)}, "int64"),
        ({"images": np.zeros((2, 32, 32, 3), np.uint8)}, "does not accept images"),
        ({"images": np.zeros((2, 32, 32), np.uint8), "labels": np.array([0, 3])}, "there are 3 classes"),
        ({"images": np.zeros((2, 32, 32), np.uint8), "labels": np.zeros(3, int)}, "one whole number an image"),
        ({"pictures": np.zeros(3)}, "no array called images"),
        ({"images": np.array([{}], object)}, "not an .npz of plain arrays"),
    ],
)
def test_score_refuses_images_that_do_not_fit(here, arrays, message):
    write(**arrays)
    assert message in refused(here, "score", "suspect.safetensors", "bad.npz", "--out", "scores.csv")


def test_score_refuses_unknown_names_and_numbers(here):
    base = ["score", "suspect.safetensors", "images.npz", "--out", "scores.csv"]
    assert "Did you mean 'gaussian'" in refused(here, *base, "--family", "gausian")
    assert "Unknown divergence" in refused(here, *base, "--divergence", "klx")
    assert "sigma_x" in refused(here, *base, "--sigma-x", -1)
    refused(here, *base, "--k", 0)
    refused(here, *base, "--seed", -1)
    refused(here, *base, "--precision", "int8")


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_refused(here, monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    said = refused(here, "score", "suspect.safetensors", "images.npz", "--device", device)
    assert f"--device is '{device}', which torch does not find here. Allowed: cpu." in said


def test_commands_hand_the_device_and_the_precision_on(here, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    seen, found = [], fake_run.removal().cleaned

    def moved(suspect, device):
        seen.append((device, asked_precision()))
        return suspect

    monkeypatch.setattr(smi.models.suspects.Suspect, "to", moved)
    monkeypatch.setattr(smi.pipeline, "remove_backdoor", lambda *args, **options: found)
    options = ["--device", "mps", "--precision", "bfloat16"]
    smi_run("remove", "suspect.safetensors", "--prior", "prior.safetensors", "--out", "out", *options)
    smi_run("evaluate", "suspect.safetensors", "--domain", "none.npz", *options)
    smi_run(
        "invert", "suspect.safetensors", "--prior", "prior.safetensors", "--out", "a.npz", "--method", "x", *options
    )
    assert seen == [("mps", "bfloat16")] * 2  # invert: refused before
    assert asked_precision() == "auto"


def test_evaluate_measures_one_model_or_two(here, monkeypatch):
    monkeypatch.setattr(smi.domains, "load_domain", lambda name, **options: fake_run.domain())
    result = smi_run("evaluate", "suspect.safetensors", "--out", "rates.json")
    assert result.exit_code == 0, result.output
    assert json.loads((here / "rates.json").read_text())["model"].keys() == {"acc", "asr", "ra"}
    both = smi_run("evaluate", "suspect.safetensors", "suspect.safetensors")
    assert both.output.splitlines()[-1].split()[0::4] == ["repaired", "50.0"]


def test_evaluate_refuses_what_does_not_fit(here):
    base = ["evaluate", "suspect.safetensors", "--out", "rates.json"]
    assert "3 classes, but 10 were expected" in refused(here, *base)
    assert "Did you mean 'badnets'" in refused(here, *base, "--attack", "badnet")
    assert "Did you mean 'digits'" in refused(here, *base, "--domain", "digit")
    assert "Allowed: 0 to 9" in refused(here, *base, "--target", 10)


def test_ctrl_c_ends_with_130(here, monkeypatch):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(smi.priors.base, "load_prior", interrupted)
    result = smi_run("demo")
    assert result.exit_code == 130
    assert "Interrupted" in result.output


RUN = "from smi.cli.main import main; main()"


def start(*args, code=RUN):
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=60)


def test_the_real_process_ends_with_2_and_a_message(tmp_path):
    found = start("score", str(tmp_path / "none.safetensors"), "none.npz")
    assert found.returncode == 2
    assert "There is no file" in found.stderr
    assert "Traceback" not in found.stderr
    assert found.stdout == ""


def test_help_does_not_import_torch():
    code = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); " + RUN
    found = start("--help", code=code)
    assert found.returncode == 0
    assert found.stdout.splitlines()[-1] == "False"


def test_threads_wait_passively_and_the_environment_comes_first():
    code = (
        "import os, sys; os.environ.pop('OMP_WAIT_POLICY', None); from smi.cli.main import main; "
        "assert 'torch' not in sys.modules; import atexit; "
        "atexit.register(lambda: print(os.environ['OMP_WAIT_POLICY'])); main()"
    )
    assert start("--help", code=code).stdout.splitlines()[-1] == "PASSIVE"


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_the_real_process_ends_with_130_on_ctrl_c(tmp_path):
    code = (
        "import os, signal, time, smi.priors.gan; "
        "smi.priors.gan.fit_prior = lambda *a, **k: (os.kill(os.getpid(), signal.SIGINT), time.sleep(30)); " + RUN
    )
    found = start("fit-prior", "digits", "--out", str(tmp_path / "prior.safetensors"), code=code)
    assert found.returncode == 130
    assert found.stderr.strip() == "Interrupted."
    assert list(tmp_path.iterdir()) == []
