"""Running studies: nothing is lost or done twice, whatever is killed, stopped or full."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import study_pieces
from study_pieces import SMALL

import smi.study.run
from smi.errors import InputError
from smi.runtime import progress
from smi.study import Store, load_study, run_study, status
from smi.study.records import read
from smi.study.results import errors, known
from smi.study.run import submit


def test_shared_pieces_are_computed_once_failures_are_recorded_and_a_rerun_does_what_is_missing(
    small, store, monkeypatch
):
    study = load_study(small)
    monkeypatch.setenv("STUDY_BREAK", "1")
    ran = run_study(study, store, workers=2, pieces=study_pieces)
    assert (ran.before, ran.finished, ran.failed) == (0, 8, 8)
    assert status(study, store) == {"done": 8, "failed": 8, "missing": 0}
    assert {error for _, error in errors(study, store)} == {"ValueError: no such attack today"}
    assert set(study_pieces.logged(store, "victim").values()) == {1}
    assert set(study_pieces.logged(store, "samples").values()) == {1}
    monkeypatch.delenv("STUDY_BREAK")
    ran = run_study(study, store, pieces=study_pieces)
    assert (ran.before, ran.finished, ran.failed) == (16, 0, 0)  # failed cells wait until one asks for them
    ran = run_study(study, store, retry=True, pieces=study_pieces)
    assert (ran.before, ran.finished, ran.failed) == (8, 8, 0)
    assert status(study, store)["done"] == 16
    assert set(study_pieces.logged(store, "end").values()) == {1}


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


def test_a_prior_is_made_only_for_sources_that_look_at_it(small, store):
    small.write_text(SMALL.replace('["clean", "smi"]', '["clean", "public"]').replace('["smi"]', '["clean"]'))
    run_study(load_study(small), store, pieces=study_pieces)
    assert status(load_study(small), store)["failed"] == 0
    assert "prior" not in (store.cache / "log").read_text()


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
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
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
    done = known(study, store)  # some may still wait for their line
    assert 0 < len(done) < len(study), "the study must have been killed in mid-run, or this test shows nothing"
    with store.found(study).open("a") as file:
        file.write('{"key": "a line that was cut')

    again = start(tmp_path)
    output, _ = again.communicate(timeout=120)
    assert f"before={len(done)}, finished={len(study) - len(done)}, failed=0" in output
    assert status(study, store) == {"done": len(study), "failed": 0, "missing": 0}
    again = read(store.found(study))
    assert all(again[key] == record for key, record in done.items()), "what was finished stays as it is"
    assert len(store.found(study).read_text().splitlines()) == len(study), "in order, and nothing else"
    starts = Counter(key for key, _ in begun(store))
    assert all(starts[key] == 1 for key in done if key not in lost(store)), "run twice"
    assert sum(starts.values()) <= len(study) + 1 + 2 * 2, "more was repeated than was in flight"


def lost(store):
    """Cells that were begun more often than they ended: what was in flight when something was killed."""
    ends = study_pieces.logged(store, "end")
    return {key for key, count in Counter(key for key, _ in begun(store)).items() if count > ends[key]}


COMMAND = """
import sys, study_pieces, smi.study
from functools import partial
from smi.cli.main import main
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
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
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


def first_environment():
    return Path("/proc/self/environ").read_bytes()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_workers_start_with_what_their_allocator_reads_once_and_nothing_of_it_stays_here():
    before = dict(os.environ)
    with smi.study.run._client(None, 1) as client:
        pairs = [entry.partition("=") for entry in client.submit(first_environment).result().decode().split("\0")]
    assert smi.study.run.EARLY.items() <= {name: value for name, _, value in pairs}.items()
    assert dict(os.environ) == before


def test_what_a_kill_left_of_a_write_is_removed_unless_it_may_be_going_on(small, store):
    (store.cache / "victims").mkdir()
    store.results.mkdir()
    killed = "import os, sys; from pathlib import Path; from smi.runtime.files import write_atomic\n"
    killed += "os.fsync = lambda handle: os._exit(9); write_atomic(Path(sys.argv[1]), b'half')"
    for file in (store.results / "a.json", store.cache / "victims" / "b.safetensors"):
        assert subprocess.run([sys.executable, "-c", killed, str(file)]).returncode == 9
    old, new = (next(folder.iterdir()) for folder in (store.results, store.cache / "victims"))
    os.utime(old, (0, 0))
    run_study(load_study(small), store, pieces=study_pieces)
    assert not old.exists()
    assert new.exists()
    os.utime(new, (0, 0))
    run_study(load_study(small), store, pieces=study_pieces)
    assert list(store.cache.glob("*/*")) == []


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
