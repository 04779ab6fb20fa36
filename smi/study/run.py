"""Hands the pieces of a study to Dask workers, and keeps going when one of them fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from smi.progress import track
from smi.study import stages
from smi.study.results import outcome
from smi.study.spec import Cell, Place, Study
from smi.study.stages import Store

if TYPE_CHECKING:
    from distributed import Client, Future

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "SMI_PROGRESS": "0"}


class Stages(Protocol):
    """What computes the pieces: the module `smi.study.stages`, or another in tests."""

    def make_prior(self, place: Place, store: Store) -> str:
        """See `stages.make_prior`."""

    def make_victim(self, cell: Cell, store: Store) -> str:
        """See `stages.make_victim`."""

    def make_cell_samples(self, cell: Cell, store: Store, victim: str, prior: str) -> str:
        """See `stages.make_cell_samples`."""

    def run_cell(self, cell: Cell, store: Store, victim: str, samples: str) -> str:
        """See `stages.run_cell`."""


@dataclass(frozen=True)
class Ran:
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
    retry: bool = False,
    pieces: Stages = stages,
) -> Ran:
    """Compute the cells that are missing. Whatever was finished before stays as it is.

    scheduler: address of a Dask scheduler ``tcp://…`` whose workers see the same files and run one task at a time each
    (``--nthreads 1``); None starts ``workers`` processes here. retry: whether cells that failed are computed again.
    A cell that fails is recorded with its error and does not stop the rest. May be interrupted at any time.
    """
    store.results.mkdir(parents=True, exist_ok=True)
    states = {cell: outcome(store.cell(cell)) for cell in study.cells}
    todo = [cell for cell, state in states.items() if state == "missing" or (retry and state == "failed")]
    for cell in todo:
        store.cell(cell).unlink(missing_ok=True)
    if not todo:
        return Ran(len(study), 0, 0)
    failed = 0
    with _client(scheduler, workers) as client:
        futures = submit(client, todo, store, pieces)
        for future in track(_completed(futures), f"study {study.name}", len(todo)):
            error = future.exception()
            if error is not None:
                failed += 1
                stages.record_error(futures[future], store, error)
            future.release()
    return Ran(len(study) - len(todo), len(todo) - failed, failed)


def submit(client: Client, cells: list[Cell], store: Store, pieces: Stages) -> dict[Future, Cell]:
    """One future a cell; what cells share is computed once."""
    priors: dict[Place, Future] = {}
    shared: dict[str, Future] = {}
    made = {}
    for cell in cells:
        if cell.place not in priors:
            priors[cell.place] = client.submit(pieces.make_prior, cell.place, store, pure=False)
        if cell.victim_key not in shared:
            shared[cell.victim_key] = client.submit(pieces.make_victim, cell, store, pure=False)
        if cell.samples_key not in shared:
            shared[cell.samples_key] = client.submit(
                pieces.make_cell_samples, cell, store, shared[cell.victim_key], priors[cell.place], pure=False
            )
        future = client.submit(
            pieces.run_cell, cell, store, shared[cell.victim_key], shared[cell.samples_key], pure=False
        )
        made[future] = cell
    return made


def _completed(futures: dict[Future, Cell]) -> Iterator[Any]:
    from distributed import as_completed

    yield from as_completed(list(futures))


@contextmanager
def _client(scheduler: str | None, workers: int) -> Iterator[Client]:
    """A client of a running cluster, or of one that lives as long as the block does."""
    from distributed import Client, LocalCluster

    if scheduler is not None:
        with Client(scheduler, timeout=30) as client:
            client.run(stages.one_thread)
            yield client
        return
    with (
        LocalCluster(
            n_workers=workers, threads_per_worker=1, processes=True, dashboard_address=None, memory_limit=0,
            env=ENVIRONMENT, silence_logs=50,
        ) as cluster,
        Client(cluster) as client,
    ):  # fmt: skip
        yield client
