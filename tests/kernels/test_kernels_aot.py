"""The gate of compiled kernels. It cannot share a process with Triton's interpreter, so it runs in its own."""

import ast
import collections
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from smi_kernels.aot.gate import main
from smi_kernels.aot.shipped import variants
from smi_kernels.ops.perturbed_conv.kernel import conv_tile
from smi_kernels.ops.perturbed_linear.kernel import linear_tile

HERE = Path(__file__).parent
PACKAGE = HERE.parents[1] / "smi_kernels"


def command(*arguments):
    return [sys.executable, "-m", "smi_kernels.aot", *map(str, arguments)]


def gate(*arguments):
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment = clean | {"PYTHONPATH": f"{HERE}:{HERE.parents[1]}"}
    return subprocess.run(command(*arguments), env=environment, capture_output=True, text=True, timeout=500)


def written_kernels():
    """Operator (or file) and name of each jitted function that returns nothing and that none calls: a kernel."""
    jitted, called = {}, set()
    for path in PACKAGE.rglob("*.py"):
        place = path.parent.name if path.stem == "kernel" else path.stem
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list):
                jitted[place, node.name] = node
                called |= {ast.unparse(inner.func) for inner in ast.walk(node) if isinstance(inner, ast.Call)}
    return {
        f"{file}.{name}"
        for (file, name), node in jitted.items()
        if name not in called and not any(isinstance(n, ast.Return) and n.value for n in ast.walk(node))
    }


@pytest.mark.parametrize("archs", [(90,), pytest.param((75, 80), marks=pytest.mark.slow)])
def test_shipped_kernels_keep_their_manifest(archs):
    done = gate("--arch", *archs)
    assert done.returncode == 0, done.stdout + done.stderr
    listed = {line.split()[0] for line in done.stdout.splitlines() if "  sm_" in line}
    assert len(written_kernels()) >= 8
    assert written_kernels() <= listed, "a kernel is not among the variants of its operator"
    for arch in archs:
        assert f" sm_{arch} " in done.stdout


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """What the gate says of kernels that break their manifest: lines of the summary by variant, the rest, and JSON."""
    path = tmp_path_factory.mktemp("aot") / "report.json"
    done = gate("--arch", 80, "--manifest", "toy_kernels:broken", "--json", path)
    assert done.returncode == 1, done.stdout + done.stderr
    table, _, summary = done.stdout.partition("8 compiled in")
    said = {line.partition("(")[2].partition(")")[0]: line for line in summary.splitlines()[1:]}
    return said, table, json.loads(path.read_text())


@pytest.mark.parametrize(
    ("variant", "kernel", "reason"),
    [
        ("spills", "toy_kernels.spilling", "spills "),
        ("wrong type", "toy_kernels.untypable", "does not compile: CompilationError"),
        ("no block", "toy_kernels.copy", "'BLOCK' must have either a type or a constant"),
        ("no fp_fusion", "toy_kernels.copy", "does not set enable_fp_fusion"),
        ("tight", "toy_kernels.matmul", "registers, at most 40 expected"),
        ("unaligned", "toy_kernels.matmul", "cp.async is missing"),
        ("too large", "toy_kernels.matmul", "bytes of shared memory, and sm_80 has 166912"),
    ],
)
def test_a_broken_promise_is_named(broken, variant, kernel, reason):
    said, _, _ = broken
    assert kernel in said[variant]
    assert reason in said[variant]


def test_the_rest_goes_on_after_a_breach(broken):
    said, table, record = broken
    assert len(said) == 7
    last = table.strip().splitlines()[-1]
    assert last.startswith("toy_kernels.copy")
    assert "BROKEN" not in last
    assert [bool(kernel["breaches"]) for kernel in record["kernels"]] == [True] * 7 + [False]
    spills = record["kernels"][0]["resources"]
    assert spills["spill_bytes"] > 0
    assert spills["stack_bytes"] > 0
    assert record["kernels"][1]["resources"] is None


def test_only_and_jobs():
    done = gate("--arch", 80, 90, "--jobs", 2, "--only", "matmul", "--manifest", "toy_kernels:kept")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 compiled" in done.stdout
    assert done.stdout.count("toy_kernels.matmul") == 2
    assert "toy_kernels.copy" not in done.stdout


def test_a_compiler_that_crashes_is_one_breach():
    done = gate("--arch", 80, "--manifest", "toy_kernels:crashing")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "toy_kernels.copy (toy) on sm_80: does not compile: the compiler crashed" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--arch", "8"], "Unknown compute capability '8'. Allowed: 75, 80, 86, 89, 90. Did you mean '89'"),
        (["--only", "matmull"], "Unknown kernel 'matmull'. Allowed: copy, matmul"),
        (["--only", "copi"], "Did you mean 'copy'?"),
        (["--manifest", "toy_kernels:absent"], "The manifest 'toy_kernels:absent' cannot be loaded"),
        (["--manifest", "toy_kernels"], "The manifest 'toy_kernels' cannot be loaded"),
        (["--jobs", "0"], "--jobs is 0. It must be 1 or more."),
    ],
)
def test_bad_usage(arguments, said, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["--manifest", "toy_kernels:kept", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("Error: ")
    assert said in captured.err


def test_the_interpreter_is_refused(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["--arch", "80"]) == 2
    assert capsys.readouterr().err.startswith("Error: TRITON_INTERPRET is set.")


def test_missing_triton_is_said(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["--arch", "80"]) == 2
    assert capsys.readouterr().err.startswith("Error: Triton is not installed")


def test_every_tile_is_in_the_manifest(monkeypatch):
    """Launchers choose tiles by size and type; each tile that they can choose is compiled."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    shipped = collections.defaultdict(set)
    for variant in variants():
        size = variant.constants
        if "BLOCK_M" in size:
            dtype = variant.signature["x"]
            tile = (size["BLOCK_M"], size["BLOCK_O"], variant.num_warps, variant.num_stages)
            shipped[variant.kernel_name, dtype, variant.name.split()[0]].add(tile)
    sizes = [1, 16, 17, 32, 33, 64, 65, 128, 512, 1024, 4096, 1 << 20]
    for dtype, name in ((torch.bfloat16, "*bf16"), (torch.float32, "*fp32")):
        for m, o, signs in itertools.product(sizes, sizes, (False, True)):
            kind = "signs" if signs else "dense"
            conv, linear = conv_tile(m, o, 512, dtype, signs), linear_tile(m, o, 512, dtype, signs)
            assert _tile(conv) in shipped["perturbed_conv.conv_kernel", name, kind]
            assert _tile(linear) in shipped["perturbed_linear.linear_kernel", name, kind]


def _tile(tile):
    return tile["block_m"], tile["block_o"], tile["num_warps"], tile["num_stages"]
