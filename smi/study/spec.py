"""What a study consists of: a TOML file, checked as a whole before anything runs, and the cells that it stands for."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any, TypeVar, cast

from smi.attacks import Attack, attacks
from smi.defenses import Defense, defenses
from smi.domains import check_source, public_classes
from smi.errors import InputError, unknown_name
from smi.models.classifiers import TrainConfig
from smi.runtime.precision import PRECISIONS
from smi.sources import sources

AUTO = "auto"  # the precision that is a machine's own
NO_SAMPLES = "none"  # the source of a defense that needs none
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A domain and what the defender has there.

    Paths stay as they are written, so that a study names the same cells wherever it lies; relative ones start at the
    current folder.

    Attributes:
        domain: As `load_domain` takes it.
        public: As `load_domain` takes it; None for the domain's own public images.
        prior: As `load_prior` takes it, or "fit" for one trained on the public images.
        train: Of the classifiers.
        precision: In which models run, see `smi.runtime.precision.precision`.
    """

    domain: str
    public: str | None = None
    prior: str = "fit"
    train: TrainConfig = field(default_factory=TrainConfig)
    precision: str = AUTO

    def __post_init__(self) -> None:
        for name, value in (("public", self.public), ("prior", self.prior)):
            if not (isinstance(value, str) or (value is None and name == "public")):
                raise InputError(f"{name} of {self.domain!r} is {value!r}. Allowed: a name or a path, in quotes.")
        public_classes(self.public or "")
        if self.precision not in PRECISIONS:
            raise unknown_name("precision", self.precision, PRECISIONS)

    @property
    def config(self) -> dict[str, Any]:
        """Its settings as JSON; the precision where one was asked for."""
        own = asdict(self)
        return own if self.precision != AUTO else {k: v for k, v in own.items() if k != "precision"}

    @property
    def identity(self) -> dict[str, Any]:
        """Its domain, and the settings that are not the default."""
        return {"domain": self.domain} | changed(asdict(self), asdict(Scenario(domain=self.domain)))

    def check_present(self) -> None:
        """Raises `InputError` for a name that does not exist or a file that is not there; nothing is read."""
        check_source(self.domain)
        if self.public is not None and public_classes(self.public) is None:
            check_source(self.public)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One line of the table: a victim, samples and a removal."""

    scenario: Scenario
    attack_name: str
    attack: Attack
    source: str
    defense_name: str
    defense: Defense
    per_class: int = 30
    seed: int

    @property
    def needs_prior(self) -> bool:
        """Whether its samples come from the scenario's prior."""
        return self.source != NO_SAMPLES and sources[self.source].needs_prior

    @property
    def config(self) -> dict[str, Any]:
        """Everything that the result depends on, as JSON: all settings, and versions that are not 1."""
        return {
            **self.scenario.config,
            "attack": _named(self.attack_name, self.attack.settings(), self.attack.version),
            "seed": self.seed,
            "source": self.source,
            "per_class": self.per_class,
            "defense": _named(self.defense_name, asdict(self.defense), self.defense.version),
        } | ({} if self._source_version == 1 else {"source_version": self._source_version})

    @property
    def key(self) -> str:
        """Names the cell: a hash of names, of settings that are not the default, and of versions that are not 1.

        So a new setting that is off makes no other cells.
        """
        own = changed(asdict(self.defense), asdict(type(self.defense)()))
        return digest(self._samples | {"defense": _named(self.defense_name, own, self.defense.version)})

    @property
    def victim_key(self) -> str:
        """The same for all cells of one victim."""
        return digest(self._victim)

    @property
    def samples_key(self) -> str:
        """The same for all cells that are repaired with the same samples."""
        return digest(self._samples)

    @property
    def _victim(self) -> dict[str, Any]:
        own = changed(self.attack.settings(), type(self.attack)().settings())
        return self.scenario.identity | {
            "attack": _named(self.attack_name, own, self.attack.version),
            "seed": self.seed,
        }

    @property
    def _samples(self) -> dict[str, Any]:
        own = changed({"per_class": self.per_class}, {"per_class": Cell.per_class})
        return self._victim | {"source": _named(self.source, own, self._source_version)}

    @property
    def _source_version(self) -> int:
        return 1 if self.source == NO_SAMPLES else sources[self.source].version

    @property
    def title(self) -> str:
        """For messages."""
        return f"{self.scenario.domain} {self.attack_name} {self.source} {self.defense_name} seed {self.seed}"


def changed(settings: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that are not as in ``default``; of nested ones those inside.

    >>> changed({"lr": 0.1, "schedule": {"rounds": 3, "batch": 8}}, {"lr": 0.1, "schedule": {"rounds": 5, "batch": 8}})
    {'schedule': {'rounds': 3}}
    """
    made: dict[str, Any] = {}
    for name, value in settings.items():
        usual = default.get(name, ...)
        if isinstance(value, Mapping) and isinstance(usual, Mapping):
            value, usual = changed(value, usual), {}
        if _plain(value) != _plain(usual):
            made[name] = value
    return made


def _plain(value: Any) -> Any:
    """As JSON has it, which knows no tuples."""
    return list(value) if isinstance(value, tuple) else value


def _named(name: str, settings: Mapping[str, Any], version: int) -> dict[str, Any]:
    return {**settings, "name": name} | ({} if version == 1 else {"version": version})


def digest(config: Mapping[str, Any]) -> str:
    """A hash of what JSON can hold, independent of the order of keys."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:20]


@dataclass(frozen=True)
class Study:
    """A name and its cells, none of them twice."""

    name: str
    cells: tuple[Cell, ...]

    def __len__(self) -> int:
        return len(self.cells)


def shipped() -> list[str]:
    """Names of the studies that come with the package."""
    return sorted(file.name.removesuffix(".toml") for file in _folder().iterdir() if file.name.endswith(".toml"))


def _folder() -> Any:
    return resources.files("smi") / "study" / "shipped"


def load_study(name_or_path: str | Path, *, precision: str = AUTO) -> Study:
    """The study of a shipped name, or of a TOML file.

    Args:
        name_or_path: Which.
        precision: In which models run, where the file does not say. The cells of another precision are other cells.

    Raises:
        InputError: For anything in it that cannot be run.
    """
    path = Path(name_or_path)
    if path.suffix == ".toml":
        if not path.is_file():
            raise InputError(f"There is no file {path}. Check the path.")
        text, name = path.read_text(encoding="utf-8"), path.stem
    else:
        name = str(name_or_path)
        if name not in shipped():
            raise unknown_name("study", name, shipped())
        text = (_folder() / f"{name}.toml").read_text(encoding="utf-8")
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{name_or_path} is not TOML: {error}. See the shipped studies for examples.") from error
    return Study(name, tuple(_cells({"precision": precision} | table, str(name_or_path))))


_KEYS = {"seeds", "per_class", "attacks", "domain", "train", "attack", "defense", "grid", "precision"}


def _cells(table: Mapping[str, Any], where: str) -> Iterator[Cell]:
    unknown = set(table) - _KEYS
    missing = {"seeds", "attacks", "domain", "grid"} - set(table)
    if unknown or missing:
        raise InputError(
            f"{where}: unknown keys {sorted(unknown)}, missing keys {sorted(missing)}. Allowed: {sorted(_KEYS)}."
        )
    train = _with(TrainConfig(), table.get("train", {}), f"{where}: train")
    scenarios = [
        _scenario(name, {"precision": table["precision"]} | own, train, where) for name, own in table["domain"].items()
    ]
    chosen = [(n, _with(attacks[n](), table.get("attack", {}).get(n, {}), f"{where}: attack.{n}"))
              for n in table["attacks"]]  # fmt: skip
    seen = set()
    for grid in table["grid"]:
        pairs = [_pair(source, name, table, where) for source, name in product(grid["sources"], grid["defenses"])]
        for scenario, (attack_name, attack), (source, defense_name, defense), seed in product(
            scenarios, chosen, pairs, table["seeds"]
        ):
            cell = Cell(
                scenario=scenario, attack_name=attack_name, attack=attack, source=source, defense_name=defense_name,
                defense=defense, per_class=table.get("per_class", Cell.per_class), seed=seed,
            )  # fmt: skip
            if cell.key not in seen:
                seen.add(cell.key)
                yield cell


def _scenario(name: str, own: Mapping[str, Any], train: TrainConfig, where: str) -> Scenario:
    own = dict(own)
    train = _with(train, own.pop("train", {}), f"{where}: domain.{name}.train")
    return _with(Scenario(domain=name, train=train), own, f"{where}: domain.{name}")


def _pair(source: str, name: str, table: Mapping[str, Any], where: str) -> tuple[str, str, Defense]:
    defense = _with(defenses[name](), table.get("defense", {}).get(name, {}), f"{where}: defense.{name}")
    if defense.needs_samples == (source == NO_SAMPLES):
        needs = "needs samples" if defense.needs_samples else "takes no samples"
        raise InputError(f"{where}: {name} {needs}, but the source is {source!r}. Put it into a grid of its own.")
    if source != NO_SAMPLES:
        sources[source]
    return source, name, defense


def _with(base: T, settings: Mapping[str, Any], where: str) -> T:
    """A dataclass with some fields replaced; a table stands for settings of a nested one."""
    assert is_dataclass(base)
    allowed = [f.name for f in fields(base)]
    made: dict[str, Any] = {}
    for name, value in settings.items():
        if name not in allowed:
            raise InputError(f"{where} has no setting {name!r}. Allowed: {', '.join(allowed)}.")
        made[name] = _with(getattr(base, name), value, f"{where}.{name}") if isinstance(value, dict) else value
    return cast(T, replace(cast(Any, base), **made))
