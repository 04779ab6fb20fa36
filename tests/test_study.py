"""Studies: what a file stands for, that nothing is lost or done twice, and what the tables say."""

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import study_pieces
import torch
from click.testing import CliRunner
from distributed import Scheduler, SpecCluster, Worker
from tiny import noise

import smi.study.run
from smi import progress
from smi.cli import cli
from smi.domains import Domain, PrivateData, PrivateSet, PublicImages
from smi.errors import InputError
from smi.files import load_tensors
from smi.study import Store, load_study, read_rows, run_study, stages, status, summarise
from smi.study.results import as_csv, as_markdown, errors, outcome
from smi.study.run import submit
from smi.study.spec import shipped

SMALL = """
seeds = [1, 2]
attacks = ["badnets", "blended"]
per_class = 3

[domain.digits]
prior = "digits"

[train]
epochs = 2

[attack.badnets]
size = 3

[defense.ft.schedule]
rounds = 2

[[grid]]
sources = ["clean", "smi"]
defenses = ["ft"]

[[grid]]
sources = ["smi"]
defenses = ["ft", "ibau"]

[[grid]]
sources = ["none"]
defenses = ["clp"]
"""


@pytest.fixture
def small(tmp_path):
    file = tmp_path / "small.toml"
    file.write_text(SMALL)
    return file


@pytest.fixture
def store(tmp_path):
    (tmp_path / "cache").mkdir()
    return Store(tmp_path / "out", tmp_path / "cache")


def logged(store, word):
    lines = (store.cache / "log").read_text().splitlines()
    return Counter(line.split()[1] for line in lines if line.startswith(f"{word} "))


def test_a_file_stands_for_its_cells_each_once(small):
    study = load_study(small)
    assert len(study) == 2 * 2 * 4  # seeds × attacks × {clean ft, smi ft, smi ibau, none clp}
    assert len({cell.key for cell in study.cells}) == len(study)
    assert len({cell.victim_key for cell in study.cells}) == 4
    assert len({cell.samples_key for cell in study.cells}) == 4 * 3
    badnets = next(cell for cell in study.cells if cell.attack_name == "badnets")
    assert badnets.attack.size == 3
    assert badnets.place.train.epochs == 2
    assert next(cell for cell in study.cells if cell.defense_name == "ft").defense.schedule.rounds == 2
    json.dumps([cell.config for cell in study.cells])


def test_keys_depend_on_the_configuration_alone(small, tmp_path):
    keys = {cell.key for cell in load_study(small).cells}
    other = tmp_path / "other.toml"
    other.write_text(SMALL.replace('"badnets", "blended"', '"blended", "badnets"'))
    assert {cell.key for cell in load_study(other).cells} == keys
    other.write_text(SMALL.replace("epochs = 2", "epochs = 3"))
    assert not {cell.key for cell in load_study(other).cells} & keys


def test_the_shipped_studies_load():
    assert shipped() == ["cifar10", "digits", "gtsrb", "quick"]
    digits = load_study("digits")
    assert len(digits) == 12 * 3 * (9 + 6 + 1)
    assert min(cell.seed for cell in digits.cells) == 20
    assert max(cell.seed for cell in digits.cells) < 100, "seeds from 100 up are for development"
    for name, per_class in (("gtsrb", 12), ("cifar10", 50)):
        colour = load_study(name)
        assert len(colour) == 4 * 3 * (6 + 1)
        (place,) = {cell.place for cell in colour.cells}
        assert (place.domain, place.public, place.prior) == (f"data/{name}.npz", "data/natural.npz", "fit")
        assert {cell.per_class for cell in colour.cells} == {per_class}  # about 500 images for 43 classes as for 10


def test_a_place_keeps_its_paths_as_they_are_written(small, tmp_path, monkeypatch):
    """A study is the same study in another folder or on another machine."""
    small.write_text(SMALL.replace("[domain.digits]", '[domain."data/a.npz"]\npublic = "data/b.npz"'))
    keys = []
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        study = load_study(small)
        keys.append([cell.key for cell in study.cells])
    assert keys[0] == keys[1]
    place = study.cells[0].place
    assert (place.domain, place.public) == ("data/a.npz", "data/b.npz")
    for name in ("a", "b"):
        with pytest.raises(InputError, match=rf"no file data/{name}.npz in {tmp_path}/there"):
            place.check_present()
        (tmp_path / "there" / "data").mkdir(exist_ok=True)
        (tmp_path / "there" / "data" / f"{name}.npz").touch()
    place.check_present()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds = [1, 2]", "", "missing keys .'seeds'."),
        ("seeds = [1, 2]", "seeds = [1]\nsedes = 2", "unknown keys .'sedes'."),
        ('"badnets", "blended"', '"badnet"', "Did you mean 'badnets'"),
        ('["clean", "smi"]', '["clean", "sim"]', "Did you mean 'smi'"),
        ('prior = "digits"', "prior = 3", "prior of 'digits' is 3"),
        ('prior = "digits"', 'public = ["a"]', "public of 'digits' is .'a'."),
        ('prior = "digits"', 'public = "classes:x"', "names no classes"),
        ("size = 3", "sizes = 3", "attack.badnets has no setting 'sizes'"),
        ("rounds = 2", "rounds = 0", "rounds is 0"),
        ('["none"]', '["smi"]', "clp takes no samples"),
        ('sources = ["clean", "smi"]', 'sources = ["none"]', "ft needs samples"),
        ("seeds = [1, 2]", "seeds = [1", "is not TOML"),
    ],
)
def test_mistakes_in_a_file_are_named(small, old, new, message):
    assert old in SMALL
    small.write_text(SMALL.replace(old, new))
    with pytest.raises(InputError, match=message):
        load_study(small)


def test_an_unknown_study(tmp_path):
    with pytest.raises(InputError, match="Did you mean 'digits'"):
        load_study("digit")
    with pytest.raises(InputError, match="There is no file"):
        load_study(tmp_path / "none.toml")


def test_shared_pieces_are_computed_once_failures_are_recorded_and_a_rerun_does_what_is_missing(
    small, store, monkeypatch
):
    study = load_study(small)
    monkeypatch.setenv("STUDY_BREAK", "1")
    ran = run_study(study, store, workers=2, pieces=study_pieces)
    assert (ran.before, ran.finished, ran.failed) == (0, 8, 8)
    assert status(study, store) == {"done": 8, "failed": 8, "missing": 0}
    assert {error for _, error in errors(study, store)} == {"ValueError: no such attack today"}
    assert set(logged(store, "victim").values()) == {1}
    assert set(logged(store, "samples").values()) == {1}
    monkeypatch.delenv("STUDY_BREAK")
    ran = run_study(study, store, pieces=study_pieces)
    assert (ran.before, ran.finished, ran.failed) == (16, 0, 0)  # failed cells wait until one asks for them
    ran = run_study(study, store, retry=True, pieces=study_pieces)
    assert (ran.before, ran.finished, ran.failed) == (8, 8, 0)
    assert status(study, store)["done"] == 16
    assert set(logged(store, "end").values()) == {1}


def test_what_is_near_a_result_goes_first(small, store):
    """So that a study that is stopped has cells to show, and not only the pieces of all of them."""
    asked = {}

    class Client:
        def submit(self, function, *args, priority, **options):
            asked.setdefault(function.__name__, set()).add(priority)
            return object()

    submit(Client(), list(load_study(small).cells), store, study_pieces)
    (victim,), (samples,), (cell,) = (asked[name] for name in ("make_victim", "make_cell_samples", "run_cell"))
    assert victim < samples < cell


SCRIPT = """
import study_pieces
from pathlib import Path
from smi.study import Store, load_study, run_study
if __name__ == "__main__":
    out = Path({folder!r})
    print(run_study(load_study(out / "small.toml"), Store(out / "out", out / "cache"), pieces=study_pieces), flush=True)
"""


def start(folder):
    script = folder / "run.py"
    script.write_text(SCRIPT.format(folder=str(folder)))
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path, "STUDY_WAIT": "0.4"}
    return subprocess.Popen([sys.executable, str(script)], env=env, stdout=subprocess.PIPE, text=True)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


def begun(store):
    lines = (store.cache / "log").read_text().splitlines() if (store.cache / "log").exists() else []
    return [(line.split()[1], int(line.split()[2])) for line in lines if line.startswith("begin ")]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_killing_a_worker_and_then_the_study_loses_the_cells_in_flight_alone(small, store, tmp_path):
    study = load_study(small)
    process = start(tmp_path)
    wait_for(lambda: len(begun(store)) >= 2)
    victim = begun(store)[-1][1]
    os.kill(victim, signal.SIGKILL)  # a worker: its nanny starts another, and the cell is computed again
    wait_for(lambda: len(begun(store)) >= 6)
    process.kill()  # the study itself
    process.wait()
    workers = {pid for _, pid in begun(store)}
    wait_for(lambda: not any(alive(pid) for pid in workers))
    done = {cell.key for cell in study.cells if outcome(store.cell(cell)) == "done"}
    assert 0 < len(done) < len(study), "the study must have been killed in mid-run, or this test shows nothing"
    stamps = {key: (store.results / f"{key}.json").stat().st_mtime_ns for key in done}

    again = start(tmp_path)
    output, _ = again.communicate(timeout=120)
    assert f"before={len(done)}, finished={len(study) - len(done)}, failed=0" in output
    assert status(study, store) == {"done": len(study), "failed": 0, "missing": 0}
    assert all((store.results / f"{key}.json").stat().st_mtime_ns == stamp for key, stamp in stamps.items())
    starts = Counter(key for key, _ in begun(store))
    assert all(starts[key] == 1 for key in done if starts[key] and key not in lost(store)), "run twice"
    assert sum(starts.values()) <= len(study) + 1 + 2 * 2, "more was repeated than was in flight"


def lost(store):
    """Cells that were begun more often than they ended: what was in flight when something was killed."""
    ends = logged(store, "end")
    return {key for key, count in Counter(key for key, _ in begun(store)).items() if count > ends[key]}


COMMAND = """
import sys, study_pieces, smi.study
from functools import partial
from smi.cli import main
if __name__ == "__main__":
    smi.study.run_study = partial(smi.study.run_study, pieces=study_pieces)
    main()
"""


def in_session(leader):
    """Processes that were started by the process ``leader``, which began a session, or by those."""
    stats = {p.name: p / "stat" for p in Path("/proc").iterdir() if p.name.isdigit()}
    found = []
    for pid, stat in stats.items():
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z" and int(fields[3]) == leader:
            found.append(int(pid))
    return found


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
@pytest.mark.parametrize(
    ("number", "begins"),
    [(signal.SIGTERM, 6), (signal.SIGINT, 6), (signal.SIGINT, None)],
    ids=["terminated", "ctrl-c", "ctrl-c while it starts"],
)
def test_stopping_ends_the_workers_and_says_how_far_it_is(small, store, tmp_path, number, begins):
    script = tmp_path / "command.py"
    script.write_text(COMMAND)
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    where = ["--out", str(store.results), "--cache", str(store.cache)]
    process = subprocess.Popen(
        [sys.executable, str(script), "study", "run", str(small), *where, "--workers", "2"],
        env=os.environ | {"PYTHONPATH": path, "STUDY_WAIT": "0.4"}, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    if begins:
        wait_for(lambda: len(begun(store)) >= begins)
    else:
        wait_for(lambda: len(in_session(process.pid)) >= 3)  # multiprocessing's own process, and a first worker
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does: every process of the group gets it
    else:
        process.send_signal(number)
    _, told = process.communicate(timeout=60)
    done = status(load_study(small), store)["done"]
    assert told == f"Stopped: {done} of 16 cells are done. The same command goes on from there.\n"
    assert process.returncode == 128 + number
    assert 0 < done < 16 if begins else done == 0
    wait_for(lambda: not in_session(process.pid))


def test_without_a_terminal_a_line_now_and_then_says_how_much_time_is_left(monkeypatch, capsys):
    monkeypatch.delenv("SMI_PROGRESS", raising=False)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)  # a notebook gets a bar, and other tests import it
    clock = count(0, 45)  # seconds; it is read once at the start and once a step
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    steps = progress.track(iter(range(40)), "study s", 504, unit="cells", before=464)
    assert list(steps) == list(range(40))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 20  # of 40 steps, every second one is more than a minute after the last line
    assert lines[0] == "study s: 466 of 504 cells, 2 min so far, about 28 min left"  # 38 cells of 45 s
    assert lines[-1] == "study s: 504 of 504 cells, 30 min so far"
    monkeypatch.setenv("SMI_PROGRESS", "0")
    assert list(progress.track([1, 2], "s")) == [1, 2]
    assert capsys.readouterr().err == ""
    assert [progress.spoken(s) for s in (40, 700, 9000)] == ["40 s", "12 min", "2.5 h"]


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
        store.cell(study.cells[0]).unlink()
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


def test_a_scheduler_that_goes_away(small, store, monkeypatch):
    study = load_study(small)
    monkeypatch.setattr(study_pieces, "WAIT", 0.3)
    with cluster(only={}) as running:
        threading.Timer(1.5, running.close).start()
        with pytest.raises(InputError, match="The Dask scheduler went away"):
            run_study(study, store, scheduler=running.scheduler_address, pieces=study_pieces)
    assert status(study, store)["failed"] == 0, "a cell is not at fault where a cluster ends"


def test_a_full_disk_ends_the_study_and_fails_no_cell(small, store, monkeypatch):
    study = load_study(small)
    monkeypatch.setenv("STUDY_FULL", "1")
    with cluster(only={}) as running, pytest.raises(InputError, match=r"No space left on device\. Make room in"):
        run_study(study, store, scheduler=running.scheduler_address, pieces=study_pieces)
    assert status(study, store) == {"done": 0, "failed": 0, "missing": 16}


def test_folders_that_cannot_be_written_to(small, store, tmp_path):
    (tmp_path / "file").touch()
    for results, cache in ((tmp_path / "file", store.cache), (store.results, tmp_path / "file" / "cache")):
        with pytest.raises(InputError, match=r"Nothing can be written to .*file"):
            run_study(load_study(small), Store(results, cache), pieces=study_pieces)


@pytest.mark.skipif(os.name != "posix", reason="locks are of POSIX")
def test_one_run_at_a_time(small, store):
    store.results.mkdir()
    with smi.study.run._alone(store.results), pytest.raises(InputError, match="Another run is at work on"):
        run_study(load_study(small), store, pieces=study_pieces)
    with smi.study.run._alone(store.results):  # it was given back
        assert not list(store.results.iterdir()), "nothing that would be committed with the results"


def test_damaged_files_of_the_cache_are_made_again(small, store, monkeypatch):
    data = PrivateSet(noise(40, 1, 32, 32), torch.arange(40) % 10, 10)
    domain = Domain("tiny", [str(i) for i in range(10)], PrivateData(data, data), PublicImages(data.images))
    monkeypatch.setattr(stages, "_domain", lambda *_: domain)
    cell = next(c for c in load_study(small).cells if c.source == "clean")

    def made():
        victim = stages.make_victim(cell, store)
        files = {"victim": Path(victim), "samples": Path(stages.make_cell_samples(cell, store, victim, "digits"))}
        return files, [load_tensors(file, kind)[0] for kind, file in files.items()]

    files, before = made()
    for file in files.values():
        content = file.read_bytes()
        file.unlink()  # the tensors that were read are views of the old file
        file.write_bytes(content[:-100])
    with pytest.warns(UserWarning, match="is damaged: it is removed") as warned:
        again, after = made()
    assert again == files
    assert len(warned) == 2
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0)
    stamps = [file.stat().st_mtime_ns for file in files.values()]
    made()
    assert [file.stat().st_mtime_ns for file in files.values()] == stamps, "what is whole stays"


def test_a_file_that_is_not_whole_counts_as_missing(small, store):
    study = load_study(small)
    store.results.mkdir()
    store.cell(study.cells[0]).write_text('{"config": ')
    assert outcome(store.cell(study.cells[0])) == "missing"


def rows():
    base = {"domain": "d", "source": "smi", "defense": "ibau", "n": 3, "acc_before": 0.98, "asr_before": 1.0,
            "seconds": 1.0}  # fmt: skip
    values = [("a", 0, 0.9, 0.1, 0.9), ("a", 1, 0.8, 0.3, 0.7), ("b", 0, 0.95, 0.0, 1.0)]
    names = ("attack", "seed", "acc", "asr", "der")
    return [base | dict(zip(names, value, strict=True)) for value in values]


def test_summary_gives_mean_and_worst():
    first, second = summarise(rows())
    assert (first["attack"], first["cells"], first["worst_acc"], first["worst_asr"], first["worst_der"]) == (
        "a", 2, 0.8, 0.3, 0.7,
    )  # fmt: skip
    assert first["acc"] == pytest.approx(0.85)
    assert second["cells"] == 1
    assert len(summarise(rows(), by=("source",))) == 1
    assert "| a | smi | ibau | 2 | 85.0 (80.0) | 20.0 (30.0) | 80.0 (70.0) |" in as_markdown(summarise(rows()))
    assert as_csv(rows()).splitlines()[0] == (
        "domain,attack,source,defense,seed,n,acc_before,asr_before,acc,asr,der,seconds"
    )


def test_the_commands(small, store, tmp_path):
    run_study(load_study(small), store, pieces=study_pieces)
    where = [str(small), "--out", str(store.results), "--cache", str(store.cache)]
    runner = CliRunner()
    assert runner.invoke(cli, ["study", "status", *where]).output.strip() == "16 done, 0 failed, 0 missing"
    found = runner.invoke(cli, ["study", *where])  # run is what it does unless told otherwise
    assert found.exit_code == 0, found.output
    assert "0 cells computed, 16 were there, 0 failed" in found.output
    csv = tmp_path / "all.csv"
    found = runner.invoke(cli, ["study", "table", *where, "--csv", str(csv), "--by", "source"])
    assert "| smi | 8 |" in found.output
    assert len(csv.read_text().splitlines()) == 17
    assert runner.invoke(cli, ["study", "table", *where, "--csv", str(csv)]).exit_code == 2
    picture = tmp_path / "picture.png"
    assert runner.invoke(cli, ["study", "plot", *where, str(picture)]).exit_code == 0
    assert picture.stat().st_size > 1000
    assert runner.invoke(cli, ["study", "plot", *where, str(tmp_path / "b.png"), "--defense", "nad"]).exit_code == 2
    assert len(read_rows(load_study(small), store)) == 16


def test_the_quick_study_from_victims_to_table(tmp_path):
    """The real thing, small: every stage as in a study of hours."""
    where = ["quick", "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    runner = CliRunner()
    found = runner.invoke(cli, ["study", *where, "--workers", "2"])
    assert found.exit_code == 0, found.output
    assert "6 cells computed, 0 were there, 0 failed" in found.output
    store = Store(tmp_path / "out", tmp_path / "cache")
    done = {(row["attack"], row["source"]): row for row in read_rows(load_study("quick"), store)}
    assert len(done) == 6
    for row in done.values():
        assert row["asr_before"] > 0.9
        assert row["n"] == (0 if row["source"] == "none" else 100)
    # Ten images a class are few; what must hold is that a removal removes, and that one without samples is measured.
    assert all(row["asr"] < 0.5 for (_, source), row in done.items() if source == "clean")
    assert len(list((tmp_path / "cache" / "victims").iterdir())) == 2
