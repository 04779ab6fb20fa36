"""Hands the pieces of a study to Dask workers, and keeps going when one of them fails.

On a cluster, workers must see the same files under the same paths, and run one task at a time (one thread each). They
may be tagged with a Dask resource, so that a study takes those that have it and leaves the others alone. SLURM, by
dask-jobqueue:

    from pathlib import Path
    from dask_jobqueue import SLURMCluster
    from smi.study import Store, load_study, run_study
    store = Store(Path("/shared/results"), Path("/shared/cache"), device="cuda")  # where the workers run models
    cluster = SLURMCluster(
        cores=1, processes=1, memory="8GB", walltime="04:00:00",
        job_extra_directives=["--gres=gpu:1"], worker_extra_args=["--resources GPU=1"],
    )
    cluster.scale(jobs=8)
    run_study(load_study("digits"), store, scheduler=cluster.scheduler_address, resource="GPU")

Kubernetes, by dask-kubernetes and its operator, with that ``store``; a volume of the claim "shared" holds the files:

    from dask_kubernetes.operator import KubeCluster, make_cluster_spec
    command = "dask worker --nthreads 1 --resources GPU=1"
    spec = make_cluster_spec(name="smi", image="REGISTRY/smi", n_workers=8, worker_command=command)
    pod = spec["spec"]["worker"]["spec"]
    pod["volumes"] = [{"name": "shared", "persistentVolumeClaim": {"claimName": "shared"}}]
    pod["containers"][0]["volumeMounts"] = [{"name": "shared", "mountPath": "/shared"}]
    pod["containers"][0]["resources"] = {"limits": {"nvidia.com/gpu": "1"}}
    cluster = KubeCluster(custom_cluster_spec=spec)
    # from a pod with that volume:
    run_study(load_study("digits"), store, scheduler=cluster.scheduler_address, resource="GPU")

Workers on Linux CPUs are 1.7 times as fast with the allocator's settings of `EARLY` in their environment before they
start (measured on two cores without bfloat16); those that a study starts itself have them.
"""

from __future__ import annotations

import errno
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

from smi.errors import InputError
from smi.runtime.files import remove_leftovers
from smi.runtime.memory import KEPT
from smi.runtime.progress import track
from smi.study import stages
from smi.study.records import Record, append, tidy, waiting
from smi.study.results import known, outcome
from smi.study.spec import Cell, Scenario, Study
from smi.study.stages import Store

if TYPE_CHECKING:
    from distributed import Client, Future

QUIET = {"SMI_PROGRESS": "0"}  # workers do not show progress
EARLY = {  # what a worker needs before it starts: its allocator and its OpenMP read it once
    "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE",
    # What `keep_freed` does, and one heap for all threads. Dask's default, to return memory at once, cost two fifths
    # of the time.
    "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(KEPT), "MALLOC_TRIM_THRESHOLD_": str(KEPT),
}  # fmt: skip
ANSWER = 30.0  # seconds that a scheduler has to answer
PATIENCE = 60.0  # seconds that a cluster has to show a worker
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}  # not the fault of a cell


class Stages(Protocol):
    """What computes the pieces: the module `smi.study.stages`, or another in tests."""

    def make_prior(self, scenario: Scenario, store: Store) -> str:
        """See `stages.make_prior`."""

    def make_victim(self, cell: Cell, store: Store) -> str:
        """See `stages.make_victim`."""

    def make_cell_samples(self, cell: Cell, store: Store, victim: str, prior: str | None) -> str:
        """See `stages.make_cell_samples`."""

    def run_cell(self, cell: Cell, store: Store, victim: str, samples: str) -> Record:
        """See `stages.run_cell`."""


@dataclass(frozen=True)
class StudyOutcome:
    """What a run did: cells that were there before, that it finished, and that failed."""

    before: int
    finished: int
    failed: int


def run_study(
    study: Study,
    store: Store,
    *,
    scheduler: str | None = None,
    workers: int = 2,
    resource: str | None = None,
    retry: bool = False,
    pieces: Stages = stages,
) -> StudyOutcome:
    """Compute the cells that are missing. Whatever was finished before stays as it is.

    A cell that fails is recorded with its error and does not stop the rest. May be interrupted at any time.

    Args:
        study: Whose cells.
        store: Where results and cache lie, and where models run.
        scheduler: Address of a Dask scheduler ``tcp://…`` whose workers see the same files and run one task at a time
            each (``--nthreads 1``); None starts ``workers`` processes here.
        workers: Processes that are started where there is no scheduler.
        resource: A Dask resource of which every task takes one unit, so that only workers started with
            ``--resources "NAME=1"`` get any.
        retry: Whether cells that failed are computed again.
        pieces: What computes the cells.

    Raises:
        InputError: Where Dask is not installed, another run is at work on the same results, a domain's files are not
            there, files cannot be written, or the cluster has no worker or goes away.
    """
    if resource is not None and scheduler is None:
        raise InputError("A resource says which workers of a cluster are meant. Name the cluster's scheduler, too.")
    for folder in (store.results, store.cache):
        _check_writable(folder)
    with _alone(store.results):
        records = known(study, store)
        with _writing(store):
            for key in waiting(store.running).keys() & records.keys():  # left by a run that was killed
                _add(records[key], study, store)
        states = {cell: outcome(cell, records) for cell in study.cells}
        todo = [cell for cell, state in states.items() if state == "missing" or (retry and state == "failed")]
        for scenario in {cell.scenario for cell in todo}:
            scenario.check_present()
        before, failed = len(study) - len(todo), 0
        if todo:
            with _client(scheduler, workers) as client:
                futures = submit(client, todo, store, pieces, resource)
                if scheduler is not None:
                    _await_worker(client, scheduler, resource)
                    completed = _completed(futures, lambda: _await_worker(client, scheduler, resource))
                else:
                    completed = _completed(futures)  # Dask starts a worker again that dies
                done = track(completed, f"study {study.name}", len(study), unit="cells", before=before)
                failed = sum(_has_failed(future, found, futures[future], study, store) for future, found in done)
        with _writing(store):
            tidy(store.found(study))
            with suppress(OSError):  # another study's cells are in it
                store.running.rmdir()
    return StudyOutcome(before, len(todo) - failed, failed)


def _has_failed(future: Future[Any], found: Any, cell: Cell, study: Study, store: Store) -> bool:
    """Record what a cell gave, or that it has failed. Raises `InputError` where it is not the cell that is at fault."""
    error = CancelledError() if future.cancelled() else future.exception()
    if isinstance(error, CancelledError):
        raise InputError("The Dask scheduler went away. Start it, and then the same study: it goes on from here.")
    with _writing(store):
        if isinstance(error, OSError) and error.errno in DISK:
            raise error
        if error is not None:
            found = stages.names_of(cell) | {"error": f"{type(error).__name__}: {error}"}
        _add(found, study, store)
    future.release()
    return error is not None


def _add(record: Record, study: Study, store: Store) -> None:
    """Give a record its line."""
    append(store.found(study), record)
    (store.running / f"{record['key']}.json").unlink(missing_ok=True)


@contextmanager
def _writing(store: Store) -> Iterator[None]:
    """Raises `InputError` where a file cannot be written in the block."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"A file could not be written: {error}. Make room in {store.results} and {store.cache}, and start the "
            "same study: it goes on from here."
        ) from error


def submit(
    client: Client, cells: list[Cell], store: Store, pieces: Stages, resource: str | None = None
) -> dict[Future[Any], Cell]:
    """One future a cell; what cells share is computed once. Every task takes one unit of ``resource``.

    Of the tasks that can run, those nearest to a result go first: a study that is stopped has finished cells to show,
    and not just the pieces of all of them.
    """

    def task(nearness: int, function: Any, *args: Any) -> Future[Any]:
        return client.submit(function, *args, pure=False, priority=nearness, resources=resource and {resource: 1})

    priors: dict[Scenario, Future[Any]] = {}
    shared: dict[str, Future[Any]] = {}
    made = {}
    for cell in cells:
        if cell.needs_prior and cell.scenario not in priors:
            priors[cell.scenario] = task(0, pieces.make_prior, cell.scenario, store)
        if cell.victim_key not in shared:
            shared[cell.victim_key] = task(0, pieces.make_victim, cell, store)
        victim = shared[cell.victim_key]
        if cell.samples_key not in shared:
            prior = priors[cell.scenario] if cell.needs_prior else None
            shared[cell.samples_key] = task(1, pieces.make_cell_samples, cell, store, victim, prior)
        made[task(2, pieces.run_cell, cell, store, victim, shared[cell.samples_key])] = cell
    return made


def _completed(
    futures: Iterable[Future[Any]], check: Callable[[], object] = lambda: None
) -> Iterator[tuple[Future[Any], Any]]:
    """The futures as they complete, with what they give. ``check`` is called whenever none did for `PATIENCE`.

    It may raise.
    """
    from distributed import as_completed

    left = set(futures)
    while left:
        try:
            for future, found in as_completed(list(left), timeout=PATIENCE, with_results=True, raise_errors=False):
                left.discard(future)
                yield future, found
        except TimeoutError:
            check()


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"Nothing can be written to {folder}: {error.strerror}. Choose another folder.") from error


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other runs off the same results, for they would compute the same cells. Ends with the process at the latest.

    The folder itself is locked, so that there is no lock file. Where the file system has no such locks, or this is
    Windows, nothing is locked, and what is lost is time (`smi.study.records`).
    """
    if os.name != "posix":
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise InputError(
            f"Another run is at work on {folder}. Wait for its end, stop it, or choose another folder."
        ) from error
    except OSError:
        pass
    try:
        yield
    finally:
        os.close(handle)


@contextmanager
def _client(scheduler: str | None, workers: int) -> Iterator[Client]:
    """A client of a running cluster, or of one that lives as long as the block does."""
    try:
        import dask
        from distributed import Client, LocalCluster
    except ModuleNotFoundError as error:
        raise InputError(
            f"The cells of a study are computed by Dask, and {error.name} is not installed. To install it: pip install "
            '"distributed>=2024.8".'
        ) from error

    if scheduler is not None:
        try:
            client = Client(scheduler, timeout=ANSWER)
        except (OSError, ValueError) as error:
            raise InputError(
                f"No Dask scheduler answers at {scheduler} ({error}). Start one with `dask scheduler`, which tells its "
                "address, such as tcp://HOST:8786."
            ) from error
        with client:
            yield client
        return
    with _same_environment():
        early = dask.config.set({"distributed.nanny.pre-spawn-environ": EARLY})
        with _later() as came, _own_interrupts(), early:
            cluster = LocalCluster(
                n_workers=workers, threads_per_worker=1, processes=True, memory_limit=0,
                dashboard_address="127.0.0.1:0",  # any free port: with None a second study warns that 8787 is taken
                env=QUIET, silence_logs=50,
            )  # fmt: skip
        with cluster:
            for number in came:
                signal.raise_signal(number)
            with Client(cluster) as client:
                yield client


@contextmanager
def _later() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM do nothing in the block; yields which came. A second one acts at once.

    Dask cannot tidy up a cluster that is half started.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came  # signals are for the main thread
        return

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        signal.signal(number, before[number])

    before = {int(number): signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _same_environment() -> Iterator[None]:
    """Afterwards this process's environment is what it was; Dask starts workers by changing it."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _own_interrupts() -> Iterator[None]:
    """Processes that are started by what starts in the block do not get Ctrl-C: it is for this one, which ends them.

    A terminal sends it to all of them, and each worker would die with a traceback. A blocked signal is inherited, by
    the cluster's thread and from there by every worker, also by one that replaces another later.
    """
    if os.name != "posix":
        yield
        return
    resource_tracker.ensure_running()  # multiprocessing's own process; starting it later would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _await_worker(client: Client, scheduler: str, resource: str | None) -> None:
    """Wait until there is a worker for the tasks. Raises `InputError` after `PATIENCE`: they would wait for ever."""
    remote: Any = client.scheduler  # a connection: it has the scheduler's methods
    end = time.monotonic() + PATIENCE
    while True:
        found = client.sync(remote.identity)["workers"].values()
        if any(resource is None or worker["resources"].get(resource, 0) >= 1 for worker in found):
            return
        if time.monotonic() > end:
            kind, option = (
                (f" with the resource {resource!r}", f' --resources "{resource}=1"') if resource else ("", "")
            )
            raise InputError(
                f"For {PATIENCE:.0f} s the scheduler {scheduler} has had no worker{kind} ({len(found)} in all). "
                f"Start one: dask worker {scheduler} --nthreads 1{option}"
            )
        time.sleep(0.2)
