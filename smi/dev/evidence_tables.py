"""The tables of the pages that `smi.dev.evidence` writes: functions of the results and of words."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from smi.dev.committed import Committed
from smi.errors import InputError
from smi.sources import sources
from smi.study.results import Row, summarise
from smi_kernels import Registry

REMOVALS = {"ibau": "I-BAU", "ft": "fine-tuning", "anp": "ANP", "clp": "CLP"}
LABELS = {"wanet": "WaNet"}
DOMAINS = {"cifar10": "CIFAR-10", "gtsrb": "43 traffic signs"}
TRIGGERS = {
    "badnets": "a patch", "blended": "a blended pattern", "trojan_watermark": "a watermark", "sig": "stripes",
    "input_aware": "an input-aware pattern", "wanet": "a warp",
}  # fmt: skip

NETWORKS = {"small_vgg": "", "elu_vgg": " on a VGG with ELU", "small_preact": " on a pre-activation ResNet"}

Made = Callable[..., str]
tables: Registry[Made] = Registry("table")
"""Tables by name."""


def _rates(row: Row) -> list[str]:
    """ACC, ASR and DER of a summary, with the worst in brackets."""
    return [f"{100 * row[name]:.1f} ({100 * row[f'worst_{name}']:.1f})" for name in ("acc", "asr", "der")]


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    made = ["| " + " | ".join(cells) + " |" for cells in (head, *lines)]
    return "\n".join([made[0], "|---" * len(head) + "|", *made[1:]])


def _label(source: str) -> str:
    return "none" if source == "none" else sources[source].label


@tables.register("demo")
def demo(results: Committed) -> str:
    """Mean and worst over the seeds of the demo."""
    labels = {
        "none": ("none", "no defense"),
        "public": ("public images, pseudo-labels", "fine-tuning"),
        "latent": ("latent inversion, no stability", "I-BAU, robust solver"),
        "smi": ("**SMI, no clean data**", "I-BAU, robust solver"),
        "clean": ("clean samples (control)", "I-BAU, robust solver"),
    }
    records = json.loads((results.folder / "demo.json").read_text(encoding="utf-8"))
    rows = [{"source": "none", "der": 0.0} | record["before"] for record in records]
    rows += [{"source": "smi"} | record["after"] for record in records]
    rows += [{"source": name} | rates for record in records for name, rates in record["controls"].items()]
    by = {row["source"]: _rates(row) for row in summarise(rows, ("source",))}
    by["none"][2] = ""
    return _table(["samples", "removal", "ACC %", "ASR %", "DER %"], [[*labels[name], *by[name]] for name in labels])


@tables.register("removals")
def removals(results: Committed, *studies: str) -> str:
    """Mean and worst by removal and source, of ``STUDY`` or ``TITLE=STUDY`` side by side: I-BAU first, best DER."""
    titles = [study.rpartition("=")[0] for study in studies]
    found = [
        {(row["defense"], row["source"]): row for row in summarise(results.chosen(path), ("defense", "source"))}
        for path in (study.rpartition("=")[2] for study in studies)
    ]
    order = sorted(found[0], key=lambda pair: (pair[0] != "ibau", pair[0], -found[0][pair]["der"]))
    head = [f"{title}: ACC %|ASR %|DER %" if title else "ACC %|ASR %|DER %" for title in titles]
    lines = [
        [REMOVALS[removal], _label(source), *(rate for of in found for rate in _rates(of[removal, source]))]
        for removal, source in order
    ]
    return _table(["removal", "samples", *"|".join(head).split("|")], lines)


def _by_source(results: Committed, study: str, extras: Sequence[str]) -> list[list[str]]:
    """Lines of a source, mean and worst, best DER first, and the mean of each extra ``WORD.COLUMN``."""
    lines = []
    for row in sorted(summarise(results.rows(study), ("source",)), key=lambda row: -row["der"]):
        paths = [f"{study}.{row['source']}.{extra}" for extra in extras]
        lines.append([_label(row["source"]), *_rates(row), *(f"{results.number(path):.1f}" for path in paths)])
    return lines


def _extra_heads(extras: Sequence[str]) -> list[str]:
    named = (extra.rpartition(".") for extra in extras)
    pairs = ((word.removeprefix("-"), word.startswith("-"), column) for word, _, column in named)
    return [f"{'without ' * out}{LABELS.get(word, word)}: {column.upper()} %" for word, out, column in pairs]


@tables.register("sources")
def by_source(results: Committed, study: str, *extras: str) -> str:
    """Mean and worst by source, and means of what else is named, as ``WORD.COLUMN``."""
    head = ["samples", "ACC %", "ASR %", "DER %", *_extra_heads(extras)]
    return _table(head, _by_source(results, study, extras))


@tables.register("forgotten")
def forgotten(results: Committed, *arguments: str) -> str:
    """The same of studies below each other, with the share of the weights that their solver forgets first."""
    studies, extras = ([a for a in arguments if ("." in a) == dotted] for dotted in (False, True))
    lines = []
    for study in studies:
        (share,) = {record["config"]["defense"]["solver"]["forget"] for record in results.records(study)}
        lines += [[str(share), *line] for line in _by_source(results, study, extras)]
    return _table(["forgotten", "samples", "ACC %", "ASR %", "DER %", *_extra_heads(extras)], lines)


@tables.register("attacks")
def attacks(results: Committed, study: str) -> str:
    """ACC / ASR attack by attack before and after removal, where there is one seed."""
    shown = {"clean": "clean samples", "smi": "SMI", "latent": "latent inversion", "public": "public", "none": "CLP"}
    rows = results.rows(study)
    by = {(row["attack"], row["source"]): row for row in rows}
    names = list(dict.fromkeys(row["attack"] for row in rows))
    if len(by) != len(rows) or set(by) != {(name, source) for name in names for source in shown}:
        raise InputError(
            f"{study} has not one row of each attack and source. Needed are the sources {', '.join(shown)}."
        )
    lines = [
        [name, _both(by[name, "clean"], "_before"), *(_both(by[name, source], "") for source in shown)]
        for name in names
    ]
    return _table(["attack", "before", *shown.values()], lines)


@tables.register("attacked")
def attacked(results: Committed, path: str) -> str:
    """ACC / ASR model by model before and after removal, with reconstructions and with clean samples."""
    by = {(row["domain"], row["architecture"], row["attack"], row["source"]): row for row in results.chosen(path)}
    order = [*DOMAINS, *NETWORKS, *TRIGGERS]
    models = sorted({key[:3] for key in by}, key=lambda model: [*map(order.index, model)])
    head = ["accuracy / attack success in percent", "before", "300 or 430 reconstructions", "as many clean samples"]
    lines = [
        [
            f"{DOMAINS[domain]}{NETWORKS[network]}, {TRIGGERS[attack]}",
            _both(by[domain, network, attack, "smi"], "_before"),
            *(_both(by[domain, network, attack, source], "") for source in ("smi", "clean")),
        ]
        for domain, network, attack in models
    ]
    return _table(head, lines)


def _both(row: Row, when: str) -> str:
    return f"{100 * row[f'acc{when}']:.1f} / {100 * row[f'asr{when}']:.1f}"
