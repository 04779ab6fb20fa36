"""What users add: by entry point (the package in `example_plugin`), and by a module of their own with `check_*`."""

import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
from example_net import EXAMPLE, IMAGES, MINE, OPTIONS, in_interpreter, net

from smi_kernels import InputError, stability_scores
from smi_kernels.divergences import divergences
from smi_kernels.epilogues import epilogues
from smi_kernels.graph.plan import Layer, plan_of
from smi_kernels.noise import families
from smi_kernels.plugins import load_plugins
from smi_kernels.testing import check_divergence, check_epilogue, check_family

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Registries, modules and plug-ins as before the test."""
    for registry in (families, divergences, epilogues):
        monkeypatch.setattr(registry, "_items", dict(registry._items))
    before = set(sys.modules)
    load_plugins.cache_clear()
    yield
    load_plugins.cache_clear()
    for name in set(sys.modules) - before:
        if name.startswith(("laplace_noise", "_smi_kernels_extension_", "sound", "broken")):
            del sys.modules[name]


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))


def test_a_package_is_found_by_its_entry_point(example):
    assert "laplace" not in families
    assert load_plugins() == ("laplace",)
    scores = stability_scores(net(), IMAGES, **OPTIONS, **MINE)
    exact = stability_scores(net(), IMAGES, **OPTIONS | MINE | {"dtype": "float64"}, backend="reference")
    assert (exact > 1e-5).all()
    torch.testing.assert_close(scores.double(), exact, rtol=1e-3, atol=1e-6)
    fused = [step.epilogue for step, _ in plan_of(net(), IMAGES).steps if isinstance(step, Layer)]
    assert fused == ["hardswish", "hardswish", "identity"]
    assert load_plugins() == ("laplace",)  # once: registering twice would raise


def test_without_the_package_its_names_are_unknown():
    assert load_plugins() == ()
    with pytest.raises(InputError, match="noise family 'laplace'"):
        stability_scores(net(), IMAGES, **OPTIONS, family="laplace")


def test_the_example_passes_its_checks(example):
    """In processes of their own, which must find the package although only this process's sys.path has it."""
    check_family("laplace")
    check_divergence("hellinger")
    check_epilogue("hardswish")


def test_the_example_in_the_triton_backend(example):
    folder = Path(__file__).parent
    found = in_interpreter(
        """
        import torch
        from smi_kernels import stability_scores
        from example_net import IMAGES, MINE, OPTIONS, net
        print(stability_scores(net(), IMAGES, **OPTIONS, **MINE, backend="triton", reduce="none").tolist())
        """,
        EXAMPLE, folder,
    )  # fmt: skip
    expected = stability_scores(net(), IMAGES, **OPTIONS, **MINE, backend="torch", reduce="none")
    torch.testing.assert_close(torch.tensor(eval(found)), expected, rtol=1e-3, atol=1e-6)


def test_every_builtin_passes_its_check():
    """Here in torch; their Triton twins together in one interpreter, where the checks need no process of their own."""
    out = in_interpreter(
        """
        from smi_kernels.divergences import divergences
        from smi_kernels.epilogues import epilogues
        from smi_kernels.noise import families
        from smi_kernels.testing import check_divergence, check_epilogue, check_family
        for check, registry in (
            (check_family, families), (check_divergence, divergences), (check_epilogue, epilogues),
        ):
            for name in registry:
                check(name)
                print(name)
        """
    )
    assert out.split() == [*families, *divergences, *epilogues]


SOUND = """
    import torch
    import triton
    import triton.language as tl
    from smi_kernels import Divergence, Epilogue, Family
    from smi_kernels.divergences import divergences
    from smi_kernels.epilogues import epilogues
    from smi_kernels.noise import families
    from smi_kernels.noise.philox import uniform
    from smi_kernels.noise.triton import uniform as u01

    @triton.jit
    def flat(w0, w1, w2, w3):
        return _one(w0), _one(w1), _one(w2), _one(w3)

    @triton.jit
    def _one(w):
        return (u01(w) - 0.5) * 3.4641016

    def values(words):
        return torch.stack([(uniform(w) - 0.5) * 3.4641016 for w in words], 1)
"""


def written(folder, name, code):
    path = folder / f"{name}.py"
    path.write_text(textwrap.dedent(SOUND) + textwrap.dedent(code))
    return str(path)


ADD = "families.add('mine', Family(elements=4, values=values, kernel=flat))"


def test_a_users_file(tmp_path):
    check_family("mine", module=written(tmp_path, "sound", ADD))


def test_a_users_module(tmp_path, monkeypatch):
    written(tmp_path, "sound_module", ADD)
    monkeypatch.syspath_prepend(str(tmp_path))
    check_family("mine", module="sound_module")


FAULTS = {
    "wrong twin": (
        """
        @triton.jit
        def off(w0, w1, w2, w3):
            return _one(w0), _one(w1), _one(w3), _one(w2)
        families.add('mine', Family(elements=4, values=values, kernel=off))
        """,
        "twins' values differ by",
    ),
    "twin that crashes": (
        """
        @triton.jit
        def off(w0, w1, w2):
            return _one(w0), _one(w1), _one(w2), _one(w2)
        families.add('mine', Family(elements=4, values=values, kernel=off))
        """,
        "the Triton twin of 'mine' fails:\n(.|\n)*Error",
    ),
    "no kernel": ("families.add('mine', Family(elements=4, values=values))", "'mine' has no Triton twin: give it ker"),
    "variance": (
        "families.add('mine', Family(elements=4, values=lambda w: 1.1 * values(w), kernel=flat))",
        r"the variance is 1\.2\d*, not 1",
    ),
    "mean": (
        "families.add('mine', Family(elements=4, values=lambda w: values(w) + 0.1, kernel=flat))",
        r"the mean is 0\.\d*, not 0",
    ),
    "draws": (
        """
        pattern = torch.tensor([1.0, -1.0, 1.0, -1.0])
        families.add('mine', Family(elements=4, values=lambda w: 0.6 * values(w) + 0.8 * pattern, kernel=flat))
        """,
        "draws are correlated: 0.6",
    ),
    "elements": (
        """
        families.add('mine', Family(elements=4, values=lambda w: values((w[0], w[1], w[0], w[3])), kernel=flat))
        """,
        "elements of a counter are correlated",
    ),
    "rows": (
        """
        def mixed(words):
            noise = values(words)
            return noise - noise.mean(0)
        families.add('mine', Family(elements=4, values=mixed, kernel=flat))
        """,
        "a row depends on other rows",
    ),
    "shape": (
        "families.add('mine', Family(elements=128, values=values, kernel=flat))",
        r"values have shape \(512, 4\), not",
    ),
    "not finite": (
        "families.add('mine', Family(elements=4, values=lambda w: values(w) / 0, kernel=flat))",
        "not finite float32",
    ),
    "dtype": (
        "families.add('mine', Family(elements=4, values=lambda w: values(w).double(), kernel=flat))",
        "not finite float32",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_family_is_told_what_is_wrong(fault, tmp_path):
    code, message = FAULTS[fault]
    with pytest.raises(AssertionError, match=message):
        check_family("mine", module=written(tmp_path, "broken", code))


OTHER_FAULTS = {
    "divergence with a wrong twin": (
        check_divergence,
        """
        @triton.jit
        def off(clean, perturbed, labels, mask):
            return tl.sum(tl.where(mask, clean - perturbed, 0.0), 1)
        divergences.add('mine', Divergence(compute=lambda p, q, y: (p - q).abs().sum(1), kernel=off))
        """,
        r"the twins \(reduce='none'\) differ",
    ),
    "divergence that cancels in float32": (
        check_divergence,
        """
        divergences.add('mine', Divergence(compute=lambda p, q, y: (q.exp() + 1e9 - 1e9 - p.exp()).sum(1), kernel=1))
        """,
        "float32 and float64 differ",
    ),
    "divergence of the wrong shape": (
        check_divergence,
        "divergences.add('mine', Divergence(compute=lambda p, q, y: (p - q).abs(), kernel=1))",
        r"have shape \(37, 5, 11\), not \[N, draws\]",
    ),
    "epilogue with a wrong twin": (
        check_epilogue,
        """
        @triton.jit
        def off(x):
            return tl.where(x < 0.0, 0.0, x) + 1e-3
        epilogues.add('mine', Epilogue(compute=torch.relu, kernel=off))
        """,
        "the twins differ",
    ),
    "epilogue with a wrong gradient": (
        check_epilogue,
        "epilogues.add('mine', Epilogue(compute=lambda x: x * torch.sigmoid(x).detach(), kernel=1))",
        "the gradient is wrong",
    ),
    "epilogue that is not elementwise": (
        check_epilogue,
        "epilogues.add('mine', Epilogue(compute=lambda x: x.cumsum(0), kernel=1))",
        "an element depends on others",
    ),
    "epilogue of another dtype": (
        check_epilogue,
        "epilogues.add('mine', Epilogue(compute=lambda x: x.double(), kernel=1))",
        "another shape or dtype",
    ),
}


@pytest.mark.parametrize("fault", OTHER_FAULTS)
def test_a_faulty_divergence_or_epilogue_is_told_what_is_wrong(fault, tmp_path):
    check, code, message = OTHER_FAULTS[fault]
    with pytest.raises(AssertionError, match=message):
        check("mine", module=written(tmp_path, "broken", code))


def test_two_files_of_one_name_and_one_that_fails_to_load(tmp_path):
    bad = written(tmp_path, "broken", "raise RuntimeError('half loaded')\n" + ADD)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="half loaded"):
            check_family("mine", module=bad)
    (tmp_path / "other").mkdir()
    good = written(tmp_path / "other", "broken", "families.add('other', Family(elements=4, values=values))")
    with pytest.raises(AssertionError, match="'other' has no Triton twin"):
        check_family("other", module=good)


def test_bad_names(tmp_path):
    with pytest.raises(InputError, match="Unknown noise family 'gausian'"):
        check_family("gausian")
    with pytest.raises(InputError, match=r"There is no file .*absent\.py"):
        check_family("gaussian", module=str(tmp_path / "absent.py"))


def test_a_family_of_this_process_alone_is_told_to_pass_its_module():
    gaussian = families["gaussian"]
    families.add("local", type(gaussian)(elements=4, values=gaussian.values, kernel=gaussian.kernel))
    with pytest.raises(AssertionError, match=r"Unknown noise family 'local'.*by module="):
        check_family("local")


def plugin(folder, name, code):
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[smi_kernels]\n{name} = {name}:register\n")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import nothing_of_this_name", "No module named 'nothing_of_this_name'"),
        ("def register():\n    raise RuntimeError('not today')", "not today"),
        ("", "register"),
        (
            "from smi_kernels.noise import families\n"
            "def register():\n    families.add('gaussian', families['gaussian'])",
            "'gaussian' is registered already",
        ),
    ],
)
def test_a_broken_plugin_only_warns(tmp_path, monkeypatch, example, code, message):
    plugin(tmp_path, "broken_plugin", code)
    sound = "from smi_kernels.noise import families\ndef register():\n    families.add('sound', families['gaussian'])"
    plugin(tmp_path, "sound_plugin", sound)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.warns(UserWarning, match=f"plug-in 'broken_plugin' .* failed: .*{message}") as caught:
        stability_scores(net(), IMAGES, **OPTIONS, family="laplace")
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_plugins() == ("laplace", "sound_plugin")
        stability_scores(net(), IMAGES, **OPTIONS, family="sound")
