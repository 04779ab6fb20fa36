"""By how much what notebooks claim and tests compare holds: over seeds, numbers of threads and number formats.

    python tests/margins.py [--only NAME ...] [--workers N] [--out FILE] [--resume] [--table]

Runs every notebook once in each of `SETTINGS`, and the tests that compare numbers, which take minutes a file, in those
of `FEW`. Writes a table with a row for each comparison whose numbers are not always the same, the smallest margin
first. ``margin`` is the distance of the mean from the bound and ``worst`` that of the nearest run, both in units of the
spread (the standard deviation over runs); below zero it failed. Where all numbers are above zero these three are of
their logarithms. A comparison holds by a hair where its margin is below `HAIR`. Tests' ≤ and ≥ have no row unless they
failed: ranges and limits, which hold by construction. With ``--only`` the table's rows of other files stay.

A seed of n adds n to every seed that torch's generators and the stability score are given. bfloat16 is the processor's
own where it has it; elsewhere what goes into and comes out of a layer is rounded to it, forward and backward.
"""

from __future__ import annotations

import argparse
import ast
import csv
import json
import math
import operator
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "tests" / "margins.csv"
RUNS = ROOT / "build" / "margins"  # one file a run
HAIR = 3.0


class Setting(NamedTuple):
    seed: int
    threads: int
    precision: str


SETTINGS = [
    Setting(0, 1, "float32"), Setting(1, 1, "bfloat16"), Setting(2, 2, "float32"), Setting(3, 2, "bfloat16"),
    Setting(4, 4, "float32"), Setting(0, 4, "bfloat16"),
]  # fmt: skip
FEW = [SETTINGS[0], SETTINGS[3], SETTINGS[4]]

# The tests that train or search something and compare numbers of it.
TESTS = (
    "analysis", "analysis_study", "analysis_theorem", "attacks", "attacks_optimised", "attacks_static",
    "classifiers", "defenses", "defenses_others", "detection", "explorers", "hypergradient",
    "inversion", "pipeline", "priors", "selection", "universal",
)  # fmt: skip
SIGNS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
NODES = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}


# In the process of one run ------------------------------------------------------------------------------------------


class Log:
    """Appends what was compared to a file, a line each."""

    def __init__(self, path):
        self.path, self.seen = path, defaultdict(int)

    def write(self, where, text, holds, left=None, sign=None, right=None):
        self.seen[text] += 1
        name = f"{text} ({self.seen[text]})" if self.seen[text] > 1 else text
        line = {"where": where, "text": name, "holds": holds, "left": left, "sign": sign, "right": right}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def shift(seed):
    """Add ``seed`` to what torch's generators and the score are seeded with. Before smi is imported."""
    import torch

    import smi_kernels

    class Generator(torch.Generator):
        def manual_seed(self, value):
            return super().manual_seed((value + seed) % 2**63)

    global_seed, scores = torch.manual_seed, smi_kernels.stability_scores
    torch.Generator = Generator
    torch.manual_seed = torch.random.manual_seed = lambda value: global_seed(int(value) + seed)
    smi_kernels.stability_scores = lambda *args, **options: scores(
        *args, **options | {"seed": options.get("seed", 0) + seed}
    )


def compute_in(precision):
    """Run models in this number format for the rest of the process."""
    from contextlib import nullcontext

    import torch
    from torch.overrides import TorchFunctionMode

    import smi.runtime.precision  # before what takes `mixed` from it
    from smi_kernels.precision import has_bfloat16

    if precision == "bfloat16" and not has_bfloat16(torch.device("cpu")):

        class Round(torch.autograd.Function):
            @staticmethod
            def forward(ctx, value):
                return value.bfloat16().float()

            @staticmethod
            def backward(ctx, gradient):
                return gradient.bfloat16().float()

        f = torch.nn.functional
        layers = {f.conv2d, torch.conv2d, f.conv_transpose2d, f.linear, f.batch_norm, torch.matmul}

        def rounded(value):
            return Round.apply(value) if isinstance(value, torch.Tensor) and value.dtype == torch.float32 else value

        class Rounded(TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                if function not in layers:
                    return function(*args, **(kwargs or {}))
                inputs = args if function is f.batch_norm else map(rounded, args)
                return rounded(function(*inputs, **(kwargs or {})))

        def mixed(device):
            auto = device.type == "cpu" and smi.runtime.precision.asked_precision() == "auto"
            return Rounded() if auto else nullcontext()

        smi.runtime.precision.mixed = mixed
    else:
        smi.runtime.precision._asked.set(precision)


def number(value):
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return None


class Compared(ast.NodeTransformer):
    """``a < b`` in a claim becomes ``__compared__("<", a, b)``; not what is compared inside of it, for counts."""

    def visit_GeneratorExp(self, node):
        return node

    visit_ListComp = visit_GeneratorExp

    def visit_Compare(self, node):
        if not all(type(sign) in NODES for sign in node.ops):
            return node
        signs = ast.Constant(" ".join(NODES[type(sign)] for sign in node.ops))
        return ast.Call(ast.Name("__compared__", ast.Load()), [signs, node.left, *node.comparators], [])


class Claims(ast.NodeTransformer):
    """Rewrites ``claim(text, condition)``."""

    def visit_Call(self, node):
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id == "claim":
            condition = Compared().visit(node.args[1])
            node.args[1] = ast.Lambda(ast.arguments([], [], None, [], [], None, []), condition)
        return node


def notebook_script(path):
    """The code of a notebook, with its claims rewritten."""
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    tree = ast.parse("\n\n".join("".join(cell["source"]) for cell in cells))
    return ast.unparse(ast.fix_missing_locations(Claims().visit(tree)))


def run_notebook(path, log):
    """Run a notebook's code in this process and write down its claims; one that does not hold does not stop it."""
    import runpy

    import smi.tutorial.exercises

    text = ""

    def compared(signs, *values):
        holds = True
        for sign, left, right in zip(signs.split(), values[:-1], values[1:], strict=True):
            found = SIGNS[sign](left, right)
            if number(left) is not None and number(right) is not None:
                log.write(path.stem, text, bool(found), number(left), sign, number(right))
            holds = found if holds is True else holds & found
        return holds

    def claim(said, condition):
        nonlocal text
        text = said
        log.write(path.stem, f"{said}:", bool(condition()))

    smi.tutorial.exercises.claim = claim
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / f"{path.stem}.py"
        script.write_text(notebook_script(path))
        runpy.run_path(str(script), {"__compared__": compared})


class Assertions:
    """A plugin that writes down the comparisons of assertions, and which failed."""

    def __init__(self, log):
        self.log = log

    def pytest_assertion_pass(self, item, lineno, orig, expl):
        self.compared(item.nodeid, orig.strip(), expl.splitlines()[0])

    def pytest_runtest_makereport(self, item, call):
        if call.excinfo is None or call.excinfo.typename == "Skipped":
            return
        said = (str(call.excinfo.value).splitlines() or [call.excinfo.typename])[0]
        source = str(call.excinfo.traceback[-1].statement).strip().removeprefix("assert ")
        if not self.compared(item.nodeid, source, said.removeprefix("assert ")):
            self.log.write(item.nodeid, f"{source}: {said}"[:300], False)

    def compared(self, where, source, shown):
        """Write down the numbers of an assertion as pytest shows it. Returns whether there were any."""
        parts = re.split(r" (<=|>=|<|>) ", re.sub(r"tensor\(([^(),]*)(, [^()]*)?\)", r"\1", shown))
        found = False
        for left, sign, right in zip(parts[:-2:2], parts[1::2], parts[2::2], strict=True):
            try:
                values = [float(eval(side, {"__builtins__": {}}, {"inf": math.inf})) for side in (left, right)]
            except Exception:
                continue
            self.log.write(where, source, SIGNS[sign](*values), values[0], sign, values[1])
            found = True
        return found


def run_tests(path, log):
    import pytest

    options = ["-o", "addopts=", "-o", "enable_assertion_pass_hook=true", "-p", "no:cacheprovider", "-q", "-m"]
    return pytest.main([*options, "not gpu and not slow and not browser", str(path)], plugins=[Assertions(log)])


def one(path, setting, log):
    """One run of one notebook or test file, in this process."""
    shift(setting.seed)
    compute_in(setting.precision)
    if path.suffix == ".ipynb":
        run_notebook(path, Log(log))
    else:
        run_tests(path, Log(log))


# All runs -----------------------------------------------------------------------------------------------------------


def subjects(only):
    tests = [file for name in TESTS for file in (ROOT / "tests").rglob(f"test_{name}.py")]
    files = [*sorted((ROOT / "notebooks").glob("*.ipynb")), *tests]
    chosen = [file for file in files if not only or any(name in file.stem for name in only)]
    return chosen or sys.exit(f"--only names none of {', '.join(file.stem for file in files)}.")


def log_of(path, setting, folder):
    """The file of one run, and the one that says that it ended well."""
    log = folder / "-".join(map(str, (path.stem, *setting)))
    return log, log.with_name(f"{log.name}.done")


def begin(path, setting, folder):
    """Run `one` in a process of its own. Returns what it wrote and, where it did not end well, its last words."""
    log, done = log_of(path, setting, folder)
    if done.exists():
        return read(log, setting), ""
    log.unlink(missing_ok=True)
    environment = os.environ | {
        "OMP_NUM_THREADS": str(setting.threads), "OMP_WAIT_POLICY": "PASSIVE", "SMI_PROGRESS": "0",
        "PYTHONPYCACHEPREFIX": str(folder / "pycache"),  # assertions are compiled otherwise for their hook
    }  # fmt: skip
    if path.stem.startswith("09"):
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, __file__, "--one", str(path), *map(str, setting), str(log)]
    cwd = path.parent if path.suffix == ".ipynb" else ROOT
    ended = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True)
    if ended.returncode:
        return read(log, setting), (ended.stdout + ended.stderr)[-2000:]
    done.touch()
    return read(log, setting), ""


def read(log, setting):
    lines = log.read_text().splitlines() if log.exists() else []
    return [json.loads(line) | {"setting": setting} for line in lines]


def scaled(lines):
    """Both sides of each comparison; their logarithms where all are above zero, so that a factor counts, not a unit."""
    pairs = [(line["left"], line["right"]) for line in lines]
    positive = all(0 < value < math.inf for pair in pairs for value in pair)
    return [(math.log(x), math.log(y)) for x, y in pairs] if positive else pairs


def rows_of(found):
    """The table: one row for each comparison, and for each claim without numbers that did not always hold."""
    grouped = defaultdict(list)
    for line in found:
        grouped[line["where"], line["text"], line["sign"]].append(line)
    rows = []
    for (where, text, sign), lines in grouped.items():
        failed = [line for line in lines if not line["holds"]]
        said = "; ".join(f"seed {s.seed}, {s.threads} threads, {s.precision}" for s in (x["setting"] for x in failed))
        row = {"where": where, "what": text, "runs": len(lines), "failed": len(failed), "failed_in": said}
        if sign is None:
            if failed:
                rows.append(row | {"margin": -math.inf})
            continue
        if not failed and "=" in sign and where.startswith("tests/"):
            continue
        gaps = [(x - y) * (1 if sign.startswith(">") else -1) for x, y in scaled(lines)]
        spread = stdev(gaps) if len(gaps) > 1 else 0.0
        if spread == 0 and not failed:
            continue  # a fact that no seed changes
        scale = spread or 1.0
        row |= {"sign": sign, "left": fmean(x["left"] for x in lines), "right": fmean(x["right"] for x in lines)}
        rows.append(row | {"spread": spread, "worst": min(gaps) / scale, "margin": fmean(gaps) / scale})
    return sorted(rows, key=lambda row: (not row["failed"], row["margin"]))


FIELDS = ["where", "what", "runs", "failed", "margin", "worst", "left", "sign", "right", "spread", "failed_in"]


def write(rows, out, renewed):
    """The table; rows that it has of files other than those in ``renewed`` stay."""
    text = [{k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in row.items()} for row in rows]
    if out.exists():
        with out.open(newline="") as file:
            text += [row for row in csv.DictReader(file) if Path(row["where"].partition("::")[0]).stem not in renewed]
    text.sort(key=lambda row: (row["failed"] == "0", float(row["margin"])))
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, restval="")
        writer.writeheader()
        writer.writerows(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="parts of names of notebooks and test files"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes at a time")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument(
        "--resume", action="store_true", help=f"keep what {RUNS.relative_to(ROOT)} has of an earlier call"
    )
    parser.add_argument("--table", action="store_true", help="run nothing: a table of what is kept there")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        path, seed, threads, precision, log = options.one
        return one(Path(path), Setting(int(seed), int(threads), precision), Path(log))
    if not (options.resume or options.table):
        shutil.rmtree(RUNS, ignore_errors=True)
    RUNS.mkdir(parents=True, exist_ok=True)
    files = subjects(options.only)
    runs = [(file, one) for one in SETTINGS for file in files if file.suffix == ".ipynb" or one in FEW]
    if options.table:
        runs = [(path, one) for path, one in runs if log_of(path, one, RUNS)[1].exists()]
    found = []
    with ThreadPoolExecutor(options.workers) as pool:
        for run, (lines, died) in zip(runs, pool.map(lambda run: begin(*run, RUNS), runs), strict=True):
            found += lines
            print(run[0].stem, *run[1], f"{len(lines)} comparisons", flush=True)
            broken = [f"    does not hold: {line['text']}" for line in lines if not line["holds"]]
            print(
                *broken, *([f"    did not end: {died}"] if died else []), sep="\n", end="\n" if broken or died else ""
            )
    rows = rows_of(found)
    write(rows, options.out, {path.stem for path, _ in runs})
    for row in rows:
        if row["failed"] or row["margin"] < HAIR:
            print(f"{row['margin']:6.1f}  {row['failed']} of {row['runs']} failed  {row['where']}: {row['what'][:120]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
