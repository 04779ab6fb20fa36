"""``smi study``: run a study, see how far it is, and draw its table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from smi.cli.options import PRECISIONS, check_device
from smi.runtime.signals import Stopped, stoppable
from smi.runtime.threads import usable_cores

if TYPE_CHECKING:
    from smi.study import Store, Study

Command = TypeVar("Command", bound=Callable[..., Any])


class StudyCommands(click.Group):
    """``smi study NAME`` means ``smi study run NAME``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put ``run`` first where no command was named."""
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            args = ["run", *args]
        return super().parse_args(ctx, args)


@click.group(cls=StudyCommands, short_help="Attacks × sources × defenses × seeds, resumable.")
def study() -> None:
    """Run many removals and compare them. STUDY is a name that ships with smi (quick, digits) or a TOML file.

    \b
    Examples:
      smi study quick
      smi study status quick
      smi study table quick --csv quick.csv
    """


@dataclass(frozen=True)
class Where:
    """A study as it is named, and where its files lie."""

    name: str
    out: Path | None
    cache: Path | None
    precision: str

    def open(self) -> tuple[Study, Store]:
        """The study and its store."""
        from smi.study import Store, load_study
        from smi.study.stages import default_cache

        chosen = load_study(self.name, precision=self.precision)
        out, cache = self.out or Path(f"study-{chosen.name}"), self.cache or default_cache()
        return chosen, Store(out.absolute(), cache.absolute())

    def rows(self) -> tuple[list[Any], list[str]]:
        """The rows of the study, or of a file of cells, and an order of their sources."""
        from smi.errors import InputError
        from smi.study.records import refuse_former
        from smi.study.results import read_rows, stored
        from smi.study.spec import shipped

        file = Path(self.name)
        if file.suffix == ".jsonl" and file.is_file():
            rows = [row for _, row in stored(file)]
            return rows, [row["source"] for row in rows]
        if self.name not in shipped() and file.is_dir():
            refuse_former(file)
            raise InputError(f"{file} is a folder. Name a study, or a file {file / 'NAME.jsonl'} of its cells.")
        chosen, store = self.open()
        return read_rows(chosen, store), [cell.source for cell in chosen.cells]


def located(command: Command) -> Command:
    """The study and where its files lie, handed on as the first argument, a `Where`."""

    @wraps(command)
    def prepared(*, name: str, out: Path | None, cache: Path | None, precision: str, **options: Any) -> Any:
        return command(Where(name, out, cache, precision), **options)

    for option in (
        click.option("--precision", type=click.Choice(PRECISIONS), default="auto", show_default=True,
                     help="Number format of the models, where the study does not say; auto: bfloat16 where it is "
                     "quick. Cells of another precision are other cells."),
        click.option("--cache", type=click.Path(path_type=Path, file_okay=False),
                     help="Victims, priors and samples, shared by studies.  [default: ~/.cache/smi]"),
        click.option("--out", type=click.Path(path_type=Path, file_okay=False),
                     help="Folder of NAME.jsonl, which has a line a cell.  [default: study-NAME]"),
        click.argument("name", metavar="STUDY"),
    ):  # fmt: skip
        prepared = option(prepared)
    return prepared  # type: ignore[return-value]


@study.command()
@located
@click.option("--workers", type=click.IntRange(1, 1024), default=usable_cores, show_default="the cores usable here",
              help="Processes of one thread each.")  # fmt: skip
@click.option("--scheduler", help="Address of a running Dask scheduler, tcp://HOST:PORT, instead of own workers.")
@click.option("--resource", metavar="NAME", help="With --scheduler: use only workers that have this Dask resource.")
@click.option("--device", type=click.Choice(["cpu", "cuda", "mps"]), default="cpu", show_default=True,
              help="Where the workers run models; several can share one.")  # fmt: skip
@click.option("--retry", is_flag=True, help="Compute cells that failed again.")
def run(
    where: Where, workers: int, scheduler: str | None, resource: str | None,
    device: str, retry: bool,
) -> None:  # fmt: skip
    """Compute the cells that are missing. May be stopped (Ctrl-C) and run again at any time: what is done stays.

    The workers of a cluster must see the same files under the same paths, and run one task at a time. A resource is
    a tag of your choice, of which every task takes one unit.

    \b
    Example:
      dask scheduler
      dask worker tcp://HOST:8786 --nthreads 1 --resources "GPU=1"
      smi study digits --scheduler tcp://HOST:8786 --resource GPU --device cuda
    """
    from smi.study import run_study
    from smi.study.results import errors, status as count

    if scheduler is None:
        check_device(device)  # else it is the workers that need it
    chosen, store = where.open()
    store = replace(store, device=device)
    try:
        with stoppable():
            ran = run_study(chosen, store, scheduler=scheduler, workers=workers, resource=resource, retry=retry)
    except Stopped as stop:
        done = count(chosen, store)["done"]
        click.echo(f"Stopped: {done} of {len(chosen)} cells are done. The same command goes on from there.", err=True)
        raise SystemExit(128 + stop.signal) from None
    click.echo(f"{ran.finished} cells computed, {ran.before} were there, {ran.failed} failed: {store.found(chosen)}")
    if ran.failed:
        for title, error in errors(chosen, store)[:5]:
            click.echo(f"failed: {title}: {error.partition(chr(10))[0]}", err=True)
        raise SystemExit(1)


@study.command()
@located
def status(where: Where) -> None:
    """How many cells are done, failed and missing; why they failed."""
    from smi.study.results import errors, status as count

    chosen, store = where.open()
    found = count(chosen, store)
    click.echo(", ".join(f"{found[state]} {state}" for state in ("done", "failed", "missing")))
    for title, error in errors(chosen, store):
        click.echo(f"failed: {title}: {error.partition(chr(10))[0]}")


@study.command()
@located
@click.option(
    "--csv", "csv_file", type=click.Path(path_type=Path, dir_okay=False), help="One row a cell, to this file."
)
@click.option("--by", multiple=True, type=click.Choice(["domain", "attack", "source", "defense", "seed"]),
              help="What a row stands for; may be repeated.  [default: attack, source, defense]")  # fmt: skip
@click.option("--force", is_flag=True, help="Overwrite the CSV file.")
def table(where: Where, csv_file: Path | None, by: tuple[str, ...], force: bool) -> None:
    """The finished cells as a Markdown table of means and worst values; with --csv all of them as rows.

    In place of STUDY a file NAME.jsonl with cells of any study may be named.
    """
    from smi.runtime.files import output_file, write_atomic
    from smi.study.results import as_csv, as_markdown, summarise

    rows, _ = where.rows()
    if csv_file is not None:
        write_atomic(csv_file if force else output_file(csv_file), as_csv(rows))
    click.echo(as_markdown(summarise(rows, by or ("attack", "source", "defense"))))


@study.command()
@located
@click.argument("picture", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--defense", default="erasure", show_default=True)
@click.option("--force", is_flag=True, help="Overwrite the picture.")
def plot(where: Where, picture: Path, defense: str, force: bool) -> None:
    """A picture (.png, .svg, .pdf) of the attack success left and the accuracy lost with one defense.

    In place of STUDY a file NAME.jsonl with cells of any study may be named.
    """
    from smi.errors import InputError
    from smi.plotting.study import plot_rates
    from smi.runtime.files import output_file

    rows, order = where.rows()
    rows = [row for row in rows if row["defense"] == defense]
    if not rows:
        raise InputError(f"No cell with the defense {defense!r} is finished. Run the study first.")
    figure = plot_rates(rows, order)
    figure.savefig(picture if force else output_file(picture), dpi=120)
    click.echo(f"wrote {picture}")


@study.command()
@located
@click.option("--csv", "csv_file", type=click.Path(path_type=Path, dir_okay=False), required=True,
              help="One row a sample set and defense, to this file.")  # fmt: skip
@click.option("--plot", "picture", type=click.Path(path_type=Path, dir_okay=False),
              help="Similarity, stability and trigger presence, to this picture (.png, .svg, .pdf).")  # fmt: skip
@click.option("--force", is_flag=True, help="Overwrite the files.")
def analyse(where: Where, csv_file: Path, picture: Path | None, force: bool) -> None:
    """What the samples of finished cells are like: similarity to real images, stability, presence of the trigger.

    Trains a judge a seed and a detector an attack and seed, which it keeps in the cache; what they say is kept beside
    the cells, so that the cache may go.
    """
    from smi.analysis.study import ANALYSIS_COLUMNS, DEFENSE, analyse as measure, sample_sets
    from smi.errors import InputError
    from smi.plotting.analysis import overview
    from smi.runtime.files import output_file, write_atomic
    from smi.study.results import as_csv

    chosen, store = where.open()
    files = [file for file in (csv_file, picture) if file is not None]
    for file in files if not force else []:
        output_file(file)
    missing = sample_sets(chosen, store).missing
    rows = measure(chosen, store)
    if not rows:
        raise InputError(
            f"No sample set of {chosen.name} is ready: each needs its files in the cache and a done {DEFENSE} cell. "
            "Run the study first, with the same --cache."
        )
    write_atomic(csv_file, as_csv(rows, ANALYSIS_COLUMNS))
    if picture is not None:
        overview(rows).savefig(picture, dpi=120)
    click.echo(f"wrote {', '.join(map(str, files))}: {len(rows)} rows; {missing} sample sets were not ready")


@study.command()
@located
@click.option("--csv", "csv_file", type=click.Path(path_type=Path, dir_okay=False), required=True,
              help="One row a model, to this file.")  # fmt: skip
@click.option("--force", is_flag=True, help="Overwrite the file.")
def detect(where: Where, csv_file: Path, force: bool) -> None:
    """Whether the victims can be told from clean models without clean data: the smallest universal δ a class.

    Needs the victims in the cache; what is found is kept beside the cells.
    """
    from smi.analysis.detected import DETECTION_COLUMNS, detections
    from smi.runtime.files import output_file, write_atomic
    from smi.study.results import as_csv

    chosen, store = where.open()
    if not force:
        output_file(csv_file)
    rows, missing = detections(chosen, store)
    write_atomic(csv_file, as_csv(rows, DETECTION_COLUMNS))
    click.echo(f"wrote {csv_file}: {len(rows)} rows; {missing} victims were not ready")


@study.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option("--force", is_flag=True, help="Overwrite the files.")
def convert(folder: Path, force: bool) -> None:
    """Make FOLDER.jsonl of a FOLDER with a JSON file a cell, as former versions wrote it; the folder stays.

    For `smi study table` and `smi study plot`. A study does not go on from such cells: it computes its own.

    \b
    Example:
      smi study convert study-digits
      smi study table study-digits.jsonl --by source
    """
    from smi.runtime.files import output_file
    from smi.study.convert import convert as make

    file = folder.absolute().with_name(f"{folder.absolute().name}.jsonl")
    for path in (file, file.with_suffix(".analyses.jsonl")):
        output_file(path, force=force)
    cells, analyses = make(folder, file)
    click.echo(f"wrote {file}: {cells} cells, {analyses} analyses")
