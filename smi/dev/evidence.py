"""The numbers and tables of the pages, made from the committed results: a maintainer's tool.

    python -m smi.dev.evidence            # write them into README.md and notebooks/results/README.md
    python -m smi.dev.evidence --check    # show what would change, and exit 1 if anything would

Comments, which are not shown, say what stands between them. All other words of a page are free, and so are breaks of
lines, but for one right before a comment in a sentence:

    <!-- n: digits.ibau.smi.asr -->10.3<!-- /n -->
    <!-- table: removals digits -->
    <!-- end -->

A number is a path of words (`smi.dev.committed`) and a column, whose mean is shown: ``digits.ibau.smi.asr``.
``.min``, ``.max`` or ``.median`` after it is another number, ``:0`` says how many decimals. Other numbers, and tables,
have a name and arguments: the functions in `numbers` and `tables`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, median

import click

from smi.analysis.correlation import rank_correlation
from smi.dev.committed import Committed
from smi.dev.evidence_tables import Made, tables
from smi.errors import InputError, unknown_name
from smi.runtime.files import write_atomic
from smi_kernels import Registry

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path("notebooks/results")
PAGES = (Path("README.md"), RESULTS / "README.md")
AGGREGATES: dict[str, Callable[[Sequence[float]], float]] = {"min": min, "max": max, "median": median}

numbers: Registry[Made] = Registry("number")
"""Numbers with a name, of the results and of words."""


def _said(value: float, digits: int = 1) -> str:
    return f"{value:.{digits}f}".replace("-", "−")


def _interval(mean: float, low: float, high: float, part: str, digits: int) -> str:
    """A number and its interval, or a part of that."""
    said = {"mean": _said(mean, digits), "range": f"{_said(low, digits)} to {_said(high, digits)}"}
    said["both"] = f"{said['mean']} ({said['range']})"
    if part not in said:
        raise unknown_name("part", part, said)
    return said[part]


@numbers.register("ahead")
def ahead(results: Committed, path: str, other: str, part: str = "both") -> str:
    """Points of DER by which removals are ahead of others, and its 95 % interval over attacks; or "mean", "range"."""
    found = results.ahead(path, other)
    return _interval(100 * found.mean, 100 * found.low, 100 * found.high, part, 1)


@numbers.register("correlation")
def correlation(results: Committed, path: str, part: str = "both") -> str:
    """Of ``PATH.COLUMN`` with DER, ranked within each victim, and its 95 % interval; or "mean", "range"."""
    rows, column = results.column(path)
    victims = [(row["attack"], row["seed"]) for row in rows]
    found = rank_correlation([row[column] for row in rows], [row["der"] for row in rows], victims, within=True)
    return _interval(found.rho, found.low, found.high, part, 2)


@numbers.register("minus")
def minus(results: Committed, path: str, other: str) -> str:
    """The mean of ``PATH.COLUMN`` less another."""
    return _said(results.number(path) - results.number(other))


@numbers.register("most")
def most(results: Committed, path: str, other: str) -> str:
    """The same attack by attack; the largest."""
    (where, _, column), (less, _, _) = path.rpartition("."), other.rpartition(".")
    attacks = {row["attack"] for row in results.chosen(where)}
    return _said(max(results.number(f"{where}.{a}.{column}") - results.number(f"{less}.{a}.{column}") for a in attacks))


@numbers.register("smaller")
def smaller(results: Committed, path: str, other: str) -> str:
    """For how many victims ``PATH.COLUMN`` is smaller than another: "11 of 12"."""
    pair = [results.column(each) for each in (path, other)]
    first, second = ({(row["attack"], row["seed"]): row[column] for row in rows} for rows, column in pair)
    return f"{sum(first[victim] < second[victim] for victim in first)} of {len(first)}"


@numbers.register("count")
def count(results: Committed, path: str) -> str:
    """How many rows a path stands for."""
    return str(len(results.chosen(path)))


@numbers.register("named")
def named(results: Committed, path: str, which: str) -> str:
    """How many rows have the attacked class among the signs ("right"), or only others ("wrong")."""
    signs = [(row["signs"].split(), row["target"].replace("all", "anywhere")) for row in results.chosen(path)]
    found = {
        "right": sum(target in said for said, target in signs),
        "wrong": sum(bool(said) and target not in said for said, target in signs),
    }
    if which not in found:
        raise unknown_name("kind of sign", which, found)
    return str(found[which])


def made(results: Committed, kind: str, asked: str) -> str:
    """What stands between the comments of a kind, "n" or "table", that ask for this."""
    name, *arguments = asked.split()
    if kind == "table":
        return tables[name](results, *arguments)
    if arguments or name in numbers:
        return numbers[name](results, *arguments)
    path, _, digits = name.partition(":")
    column, _, aggregate = path.rpartition(".")
    if aggregate not in AGGREGATES:
        column, aggregate = path, ""
    return _said(results.number(column, AGGREGATES.get(aggregate, fmean)), int(digits or 1))


COMMENT = re.compile(r"<!--(.*?)(?:-->|\Z)", re.DOTALL)
BEGINS = re.compile(r"\s*([-*+>]|\d+[.)])?\s*")  # of a line before anything that is shown
ALLOWED = (
    "`<!-- n: NUMBER -->…<!-- /n -->` in a sentence, and `<!-- table: TABLE -->` and `<!-- end -->`, each on a line"
)


def page(text: str, results: Committed, name: str = "page") -> str:
    """A page with its numbers and tables as they are to be. Raises `InputError` with the line of a bad comment."""
    parts, end, marks = [], 0, list(COMMENT.finditer(text))
    for begin, close in zip(marks[::2], [*marks[1::2], None], strict=False):
        where = f"{name}, line {text.count(chr(10), 0, begin.start()) + 1}: {begin[0].split(chr(10))[0]}"
        kind, _, asked = (word.strip() for word in begin[1].partition(":"))
        closes = {"n": "/n", "table": "end"}.get(kind)
        if closes is None or not asked or close is None or close[1].strip() != closes:
            raise InputError(f"{where} is no comment of a number or a table. Allowed: {ALLOWED}.")
        try:
            _check_place(text, kind, begin, close)
            wanted = made(results, kind, asked)
        except (InputError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{where}: {error}") from error
        inside = text[begin.end() : close.start()]
        if kind == "table":
            indent = _before(text, begin)
            wanted = "".join(f"\n{indent}{row}" for row in wanted.split("\n")) + f"\n{indent}"
        elif inside.split() == wanted.split():
            wanted = inside  # only lines are broken elsewhere
        parts += [text[end : begin.end()], wanted]
        end = close.start()
    return "".join([*parts, text[end:]])


def _check_place(text: str, kind: str, begin: re.Match[str], close: re.Match[str]) -> None:
    """Markdown takes a line that begins with a comment for HTML, and ends the paragraph there."""
    for mark in (begin, close):
        before = _before(text, mark)
        if kind == "n" and BEGINS.fullmatch(before):
            raise InputError("a line begins with a comment, which ends the paragraph. Put a word before it.")
        if kind == "table" and before.strip():
            raise InputError("a table's comments are to be on lines of their own.")


def _before(text: str, mark: re.Match[str]) -> str:
    """What stands before a comment on its line."""
    return text[text.rfind("\n", 0, mark.start()) + 1 : mark.start()]


@click.command(help=__doc__)
@click.option("--check", is_flag=True, help="Write nothing; exit 1 where a page is not as it is to be.")
def main(check: bool) -> None:
    """Bring the pages up to date."""
    results, differ = Committed(ROOT / RESULTS), False
    for path in PAGES:
        text = (ROOT / path).read_text(encoding="utf-8")
        try:
            wanted = page(text, results, str(path))
        except InputError as error:
            raise click.ClickException(str(error)) from error
        differ |= text != wanted
        if check:
            lines = difflib.unified_diff(
                text.splitlines(), wanted.splitlines(), str(path), "as it is to be", lineterm=""
            )
            click.echo("\n".join(lines), nl=text != wanted)
        elif text != wanted:
            write_atomic(ROOT / path, wanted)
            click.echo(f"wrote {path}")
    if check and differ:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
