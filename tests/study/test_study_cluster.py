"""Studies on a cluster: which workers are used, and what happens when some or all of it goes away."""

import gc
import sys
import threading

import pytest
import study_pieces
from click.testing import CliRunner
from distributed import Scheduler, SpecCluster, Worker

import smi.study.run
from smi.cli.main import cli
from smi.errors import InputError
from smi.study import load_study, run_study, status


def forget(cell, file):
    """Take the lines of a cell out of a file."""
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if cell.key not in line))


def cluster(**resources):
    """A Dask cluster in this process: a worker of one thread for every name, with these resources."""
    workers = {name: {"cls": Worker, "options": {"nthreads": 1, "resources": r}} for name, r in resources.items()}
    options = {"dashboard_address": None, "port": 0}
    return SpecCluster(workers=workers, scheduler={"cls": Scheduler, "options": options}, silence_logs=50)


def test_a_resource_chooses_the_workers(small, store, monkeypatch):
    study = load_study(small)
    with cluster(plain={}, tagged={"GPU": 1}) as running:
        where = [str(small), "--out", str(store.results), "--cache", str(store.cache)]
        run_study(study, store, scheduler=running.scheduler_address, resource="GPU", pieces=study_pieces)
        assert status(study, store)["done"] == 16
        names = {line.split()[-1] for line in (store.cache / "log").read_text().splitlines()}
        assert names == {"tagged"}
        monkeypatch.setattr(smi.study.run, "PATIENCE", 0.5)
        forget(study.cells[0], store.found(study))
        options = ["--scheduler", running.scheduler_address, "--resource", "TPU"]
        found = CliRunner().invoke(cli, ["study", *where, *options])
        assert found.exit_code == 2
        assert "no worker with the resource 'TPU' (2 in all)" in found.output
        assert f'dask worker {running.scheduler_address} --nthreads 1 --resources "TPU=1"' in found.output
    with cluster() as running, pytest.raises(InputError, match=r"has had no worker \(0 in all\)"):
        run_study(study, store, scheduler=running.scheduler_address, pieces=study_pieces)
    with pytest.raises(InputError, match="Name the cluster's scheduler"):
        run_study(study, store, resource="GPU", pieces=study_pieces)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "nowhere at all"])
def test_a_scheduler_that_is_not_there(small, store, monkeypatch, address):
    monkeypatch.setattr(smi.study.run, "ANSWER", 0.5)
    with pytest.raises(InputError, match="No Dask scheduler answers at"):
        run_study(load_study(small), store, scheduler=address, pieces=study_pieces)
    gc.collect()  # now: later it may happen in the thread of another cluster, which Dask then fails to start


def test_without_dask_it_says_how_to_get_it(small, store, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(InputError, match=r'Dask, and distributed is not installed.* pip install "distributed>=2024.8"'):
        run_study(load_study(small), store, pieces=study_pieces)
    assert not list(store.results.rglob("*.jsonl"))


def test_a_scheduler_that_goes_away(small, store, monkeypatch):
    study = load_study(small)
    monkeypatch.setattr(study_pieces, "WAIT", 0.3)
    with cluster(only={}) as running:
        threading.Timer(1.5, running.close).start()
        with pytest.raises(InputError, match="The Dask scheduler went away"):
            run_study(study, store, scheduler=running.scheduler_address, pieces=study_pieces)
    assert status(study, store)["failed"] == 0, "a cell is not at fault where a cluster ends"


def test_workers_that_all_go_away(small, store, monkeypatch):
    study = load_study(small)
    monkeypatch.setattr(study_pieces, "WAIT", 0.3)
    monkeypatch.setattr(smi.study.run, "PATIENCE", 1.0)
    with cluster(only={}) as running:
        threading.Timer(1.5, running.scale, [0]).start()
        with pytest.raises(InputError, match=r"has had no worker \(0 in all\)"):
            run_study(study, store, scheduler=running.scheduler_address, pieces=study_pieces)
    found = status(study, store)
    assert found["failed"] == 0
    assert found["missing"] > 0


def test_a_full_disk_ends_the_study_and_fails_no_cell(small, store, monkeypatch):
    study = load_study(small)
    monkeypatch.setenv("STUDY_FULL", "1")
    with cluster(only={}) as running, pytest.raises(InputError, match=r"No space left on device\. Make room in"):
        run_study(study, store, scheduler=running.scheduler_address, pieces=study_pieces)
    assert status(study, store) == {"done": 0, "failed": 0, "missing": 16}
