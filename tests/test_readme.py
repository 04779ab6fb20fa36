"""The tables of the README and of the evidence are the committed results, and the picture is the notebook's."""

from __future__ import annotations

import base64
import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from smi.analysis import rank_correlation
from smi.analysis.detected import NONE
from smi.analysis.study import ANALYSIS_COLUMNS, stored_analysis
from smi.sources import sources
from smi.study import summarise
from smi.study.results import Difference, Row, as_csv, compare, from_csv, stored

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "notebooks/results"
README = (ROOT / "README.md").read_text()
EVIDENCE = (RESULTS / "README.md").read_text()
ROWS = {
    "none": "no defense",
    "public": "public images, pseudo-labels | fine-tuning",
    "latent": "latent inversion, no stability | I-BAU, robust solver",
    "smi": "**SMI, no clean data** | I-BAU, robust solver",
    "clean": "clean samples (control) | I-BAU, robust solver",
}

REMOVALS = {
    "ibau": "I-BAU",
    "ft": "fine-tuning",
    "anp": "ANP",
    "clp": "CLP",
}


def rates(record: dict[str, Any], row: str) -> dict[str, float]:
    if row == "none":
        return record["before"]
    return record["after"] if row == "smi" else record["controls"][row]


def cell(values: Sequence[float], worst: Callable[[Sequence[float]], float]) -> str:
    return f"{100 * sum(values) / len(values):.1f} ({100 * worst(values):.1f})"


def table(records: Sequence[dict[str, Any]]) -> str:
    """Mean and worst over seeds, in per cent."""
    lines = ["| samples | removal | ACC % | ASR % | DER % |", "|---|---|---|---|---|"]
    for row, label in ROWS.items():
        found = [rates(record, row) for record in records]
        acc, asr = cell([f["acc"] for f in found], min), cell([f["asr"] for f in found], max)
        der = "" if row == "none" else cell([f["der"] for f in found], min)
        lines.append(f"| {'none | ' if row == 'none' else ''}{label} | {acc} | {asr} | {der} |")
    return "\n".join(lines)


def test_the_table_is_that_of_the_committed_runs() -> None:
    records = json.loads((RESULTS / "demo.json").read_text())
    assert [record["seed"] for record in records] == [10, 11, 12, 13, 14]
    settings = [record["settings"] for record in records]
    assert all(s == settings[0] for s in settings), "the settings must be the same for every seed"
    assert table(records) in README, f"the README's table should be:\n{table(records)}"


def study_table(rows: Sequence[Row]) -> str:
    """Mean and worst over attacks and seeds by removal and source, in percent: I-BAU first, best DER."""
    found = summarise(rows, ("defense", "source"))
    found.sort(key=lambda row: (row["defense"] != "ibau", row["defense"], -row["der"]))
    assert {row["cells"] for row in found} == {36}
    lines = ["| removal | samples | ACC % | ASR % | DER % |", "|---|---|---|---|---|"]
    for row in found:
        rates = [f"{100 * row[name]:.1f} ({100 * row[f'worst_{name}']:.1f})" for name in ("acc", "asr", "der")]
        label = "none" if row["source"] == "none" else sources[row["source"]].label
        lines.append("| " + " | ".join([REMOVALS[row["defense"]], label, *rates]) + " |")
    return "\n".join(lines)


def kept_rows(name: str, cells: int) -> list[Row]:
    """The rows of a committed table, which are those of the cells beside it."""
    kept = (RESULTS / f"{name}.csv").read_text()
    found = as_csv(row for _, row in stored(RESULTS / f"{name}.jsonl"))
    assert sorted(found.splitlines()) == sorted(kept.splitlines())
    rows = from_csv(kept)
    assert len(rows) == cells
    return rows


def test_the_study_is_the_committed_cells_and_the_readmes_table_is_the_study() -> None:
    made = study_table(kept_rows("digits", 504))
    assert made in README, f"the README's table should be:\n{made}"


def interval(found: Difference, word: str = "") -> str:
    return f"{100 * found.mean:.1f} {word}({100 * found.low:.1f} to {100 * found.high:.1f})".replace("-", "−")


def victims(rows: Sequence[Row]) -> dict[tuple[Any, Any], tuple[Any, Any]]:
    """Their rates before removal, which tell one training of a victim from another."""
    return {(row["attack"], row["seed"]): (row["acc_before"], row["asr_before"]) for row in rows}


def ibau_rows() -> list[Row]:
    """I-BAU's of `digits`."""
    rows = from_csv((RESULTS / "digits.csv").read_text())
    return [row for row in rows if row["defense"] == "ibau"]


def gained(rows: Sequence[Row], others: Sequence[Row], source: str, other: str, cells: int) -> Difference:
    """How far removals with a source are ahead of other removals of the same victims with another."""
    pairs = [
        row | {"source": name, "defense": ""}
        for name, some, wanted in (("rows", rows, source), ("others", others, other))
        for row in some if row["source"] == wanted
    ]  # fmt: skip
    found = compare(pairs, "rows", "others")
    assert found.cells == cells
    return found


def absent(said: Sequence[str], text: str) -> list[str]:
    """What is said is to be in the text, wherever lines end."""
    return [words for words in said if words not in " ".join(text.split())]


def paragraph(text: str, starts: str, mark: str) -> str:
    """The part of a text that begins so, up to the next ``mark``."""
    (found,) = [part for part in text.split(mark) if part.startswith(starts)]
    return found


def test_what_the_readme_says_of_the_study() -> None:
    kept = from_csv((RESULTS / "digits.csv").read_text())
    met = {(row["attack"], row["seed"], row["acc_before"], row["asr_before"]) for row in kept}
    assert len(met) == 36, "all removals meet the same victims"
    ibau = ibau_rows()
    said = [interval(compare(ibau, "clean", "smi"), "points of DER below clean samples** ")]
    said[0] = said[0].replace("** (", "** (95 % interval over attacks ")
    for source in ("latent", "public", "random", "pixel", "deepinversion"):
        ahead = compare(ibau, "smi", source)
        assert ahead.cells == 36
        said.append(f"by {interval(ahead)}")
    by = {(row["attack"], row["source"]): row for row in summarise(ibau, ("attack", "source"))}
    for source in ("smi", "clean"):
        left = {row["seed"]: row["asr"] for row in ibau if (row["attack"], row["source"]) == ("smooth", source)}
        said.append("{:.0f}, {:.0f} and {:.0f} %".format(*(100 * left[seed] for seed in (20, 21, 22))))
    excess = {attack: 100 * (by[attack, "smi"]["asr"] - by[attack, "clean"]["asr"]) for attack, _ in by}
    assert max(excess, key=excess.__getitem__) == "wanet"
    rest = [row for row in ibau if row["attack"] != "wanet"]
    said.append(interval(compare(rest, "clean", "smi")))
    said.append(f"at most {max(value for attack, value in excess.items() if attack != 'wanet'):.1f} points")
    seeds = {r["seed"]: r["der"] for r in summarise([r for r in ibau if r["source"] == "clean"], ("seed",))}
    said.append(", ".join(f"{100 * seeds[seed]:.1f}" for seed in (20, 21)) + f" and {100 * seeds[22]:.1f}")
    assert absent(said, README) == [], said

    means = {row["source"]: 100 * row["asr"] for row in summarise(ibau, ("source",))}
    said = [f"(SMI {means['smi']:.1f}, clean samples {means['clean']:.1f})"]
    above = {source: sorted(name for name, of in by if of == source and by[name, of]["asr"] > 0.15) for source in means}
    assert above["smi"] == above["clean"] == ["smooth", "wanet"]
    asr = {pair: f"{100 * row['asr']:.0f}" for pair, row in by.items()}
    said.append(f"with SMI's samples WaNet {asr['wanet', 'smi']} and smooth {asr['smooth', 'smi']}")
    said.append(f"with clean ones {asr['wanet', 'clean']} and {asr['smooth', 'clean']}")
    weakest, second = sorted(met, key=lambda victim: victim[3])[:2]
    said.append(f"`{weakest[0]}`, seed {weakest[1]}, {100 * weakest[3]:.0f} % before the removal")
    said.append(f"at least {100 * second[3]:.0f}")
    assert absent(said, paragraph(EVIDENCE, "Attack by attack", "\n## ")) == [], said


def test_what_is_said_of_distillation() -> None:
    # There fine-tuning distils and I-BAU does not; in `digits`, on the same victims, it is the other way round.
    one = kept_rows("distillation", 36)
    attacked = {(row["attack"], row["seed"]) for row in one}
    rows = from_csv((RESULTS / "digits.csv").read_text())
    other = [r for r in rows if (r["attack"], r["seed"]) in attacked and r["source"] in ("clean", "smi")]
    other = [r for r in other if r["defense"] in ("ft", "ibau")]
    assert victims(one) == victims(other)
    without, held = (
        {(r["source"], r["defense"]): r for r in summarise(rows, ("source", "defense"))} for rows in (one, other)
    )
    said = [f"{100 * rows['smi', 'ibau']['acc']:.1f}" for rows in (held, without)]
    said.append(f"{100 * (held['clean', 'ibau']['acc'] - without['clean', 'ibau']['acc']):.1f}")
    said.append(f"{100 * without['smi', 'ft']['asr']:.0f} %")
    for source in ("clean", "smi"):
        warp = [
            [r for r in rows if (r["attack"], r["source"], r["defense"]) == ("wanet", source, "ibau")]
            for rows in (other, one)
        ]
        said += [f"{100 * sum(r['asr'] for r in rows) / len(rows):.0f}" for rows in warp]
    # The same removals held four times as firmly.
    firm, ibau = kept_rows("firm", 72), ibau_rows()
    assert victims(firm) == victims(ibau)
    said += [interval(gained(ibau, firm, source, source, 36)) for source in ("clean", "smi")]
    assert absent(said, paragraph(EVIDENCE, "Distillation", "- **")) == [], said


FRESH = {"restarted": 0.7, "forgetting": 0.8}  # of the weights


def trusted_table(rows: Sequence[Row]) -> str:
    """Mean and worst over attacks and seeds by source, what is left of WaNet, and DER without it."""
    header = "| samples | ACC % | ASR % | DER % | WaNet: ASR % | without WaNet: DER % |"
    lines = [header, "|---" * 6 + "|"]
    by = {(row["attack"], row["source"]): row for row in summarise(rows, ("attack", "source"))}
    rest = {r["source"]: r for r in summarise([r for r in rows if r["attack"] != "wanet"], ("source",))}
    for found in sorted(summarise(rows, ("source",)), key=lambda row: -row["der"]):
        rates = [f"{100 * found[rate]:.1f} ({100 * found[f'worst_{rate}']:.1f})" for rate in ("acc", "asr", "der")]
        source = found["source"]
        last = [f"{100 * by['wanet', source]['asr']:.1f}", f"{100 * rest[source]['der']:.1f}"]
        assert found["cells"] == 36
        lines.append("| " + " | ".join([sources[source].label, *rates, *last]) + " |")
    return "\n".join(lines)


def test_what_is_said_of_trusted_answers() -> None:
    rows = kept_rows("trusted", 324)
    made = trusted_table(rows)
    assert made in EVIDENCE, f"the table should be:\n{made}"
    ibau = ibau_rows()
    assert victims(rows) == victims(ibau)
    said = []
    for source, label in (("clean", "clean samples"), ("smi", "SMI's"), ("deepinversion", "DeepInversion's")):
        said.append(f"{label} {interval(gained(rows, ibau, source, source, 36))}")
    said.append(interval(compare(rows, "clean", "smi"), "below clean samples "))
    said += [
        f"by {interval(compare(rows, 'smi', source))}" for source in ("deepinversion", "pixel", "random", "public")
    ]
    said.append(interval(compare(rows, "latent", "smi"), "ahead of SMI "))
    assert absent(said, paragraph(EVIDENCE, "Held to less", "\n## ")) == [], said


def fresh_table(studies: dict[str, list[Row]]) -> str:
    """Mean and worst over attacks and seeds by what is forgotten and source, and what is left of two attacks."""
    lines = [
        "| forgotten | samples | ACC % | ASR % | DER % | WaNet: ASR % | smooth: ASR % |",
        "|---" * 7 + "|",
    ]
    for name, rows in studies.items():
        assert {cell["config"]["defense"]["solver"]["forget"] for cell, _ in stored(RESULTS / f"{name}.jsonl")} == {
            FRESH[name]
        }
        by = {(row["attack"], row["source"]): row for row in summarise(rows, ("attack", "source"))}
        for found in sorted(summarise(rows, ("source",)), key=lambda row: -row["der"]):
            rates = [f"{100 * found[rate]:.1f} ({100 * found[f'worst_{rate}']:.1f})" for rate in ("acc", "asr", "der")]
            left = [f"{100 * by[attack, found['source']]['asr']:.1f}" for attack in ("wanet", "smooth")]
            label = sources[found["source"]].label
            assert found["cells"] == 36
            lines.append("| " + " | ".join([str(FRESH[name]), label, *rates, *left]) + " |")
    return "\n".join(lines)


def test_what_is_said_of_the_fresh_start() -> None:
    studies = {name: kept_rows(name, 72) for name in FRESH}
    made = fresh_table(studies)
    assert made in EVIDENCE, f"the table should be:\n{made}"
    alone = [row for row in ibau_rows() if row["source"] in ("clean", "smi")]
    fresh = studies["restarted"]
    assert victims(fresh) == victims(studies["forgetting"]) == victims(alone)
    said = [interval(gained(fresh, alone, source, source, 36)) for source in ("clean", "smi")]
    said.append(interval(compare(fresh, "clean", "smi")))
    for attack in ("sig", "label_consistent"):
        left = [
            [row["asr"] for row in rows if (row["attack"], row["source"]) == (attack, "smi")] for rows in (fresh, alone)
        ]
        said.append("{:.0f} % ({:.0f} % without)".format(*(100 * sum(rates) / len(rates) for rates in left)))
    assert absent(said, paragraph(EVIDENCE, "From a fresh start", "\n## ")) == [], said


def colour_table(studies: dict[str, Sequence[Row]]) -> str:
    """Mean and worst over attacks and seeds by source, in percent, of studies side by side."""
    found = [
        {(row["defense"], row["source"]): row for row in summarise(rows, ("defense", "source"))}
        for rows in studies.values()
    ]
    lines = ["| removal | samples | " + " | ".join(f"{name}: ACC % | ASR % | DER %" for name in studies) + " |"]
    lines.append("|---|---" + "|---" * 3 * len(studies) + "|")
    for removal, source in sorted(found[0], key=lambda pair: (pair[0] != "ibau", -found[0][pair]["der"])):
        cells = [
            f"{100 * of[removal, source][name]:.1f} ({100 * of[removal, source][f'worst_{name}']:.1f})"
            for of in found for name in ("acc", "asr", "der")
        ]  # fmt: skip
        label = "none" if source == "none" else sources[source].label
        lines.append("| " + " | ".join([REMOVALS[removal], label, *cells]) + " |")
    return "\n".join(lines)


def seed_table(rows: Sequence[Row]) -> str:
    """ACC / ASR of each attack before and after removal, in percent, where there is one seed."""
    shown = ("clean", "smi", "latent", "public", "none")
    by = {(row["attack"], row["source"]): row for row in rows}
    assert len(by) == len(rows) == len(shown) * len({attack for attack, _ in by})
    lines = ["| attack | before | clean samples | SMI | latent inversion | public | CLP |", "|---" * 7 + "|"]
    for attack in dict.fromkeys(attack for attack, _ in by):
        one = by[attack, "clean"]
        rates = [
            (one["acc_before"], one["asr_before"]),
            *((r["acc"], r["asr"]) for r in (by[attack, s] for s in shown)),
        ]
        lines.append("| " + " | ".join([attack, *(f"{100 * acc:.1f} / {100 * asr:.1f}" for acc, asr in rates)]) + " |")
    return "\n".join(lines)


def test_what_is_said_of_colour() -> None:
    signs, things = (kept_rows(name, 4 * 3 * (6 + 1)) for name in ("gtsrb", "cifar10_firm"))
    again = seed_table(kept_rows("cifar10", 4 * 5))
    assert again in EVIDENCE.replace("\n  |", "\n|"), f"the table should be:\n{again}"
    made = colour_table({"signs": signs, "CIFAR-10": things})
    assert made in EVIDENCE, f"the table should be:\n{made}"
    of_signs, of_things = (
        {(r["attack"], r["source"]): r for r in summarise(rows, ("attack", "source"))} for rows in (signs, things)
    )
    said = []
    for attack in ("badnets", "trojan_watermark", "blended", "wanet"):
        said += [f"{100 * of_signs[attack, source]['asr']:.1f}" for source in ("smi", "clean")]
    for source in ("smi", "clean", "latent", "public"):
        lost = [r["acc_before"] - r["acc"] for r in signs if (r["defense"], r["source"]) == ("ibau", source)]
        said.append(f"{100 * sum(lost) / len(lost):.1f}")
    for attack in ("blended", "trojan_watermark"):
        said.append(f"{100 * of_things[attack, 'clean']['asr']:.0f} %")
        said.append(f"{100 * of_things[attack, 'none']['asr']:.0f} %")
    with_ibau = [row for row in signs if row["defense"] == "ibau"]
    below = compare([row for row in things if row["defense"] == "ibau"], "clean", "smi")
    pairs = [("clean", "smi"), *(("smi", source) for source in ("latent", "public", "deepinversion", "pixel"))]
    ahead = [compare(with_ibau, *pair) for pair in pairs]
    assert {found.cells for found in (below, *ahead)} == {12}
    said += [f"by {interval(found)}" for found in ahead]
    said.append(f"SMI is {100 * below.mean:.1f} below clean samples")
    deep = [row for _, row in stored(RESULTS / "resnet18.jsonl")]
    assert {row["source"] for row in deep} == {"none"}
    left = sorted(100 * row["asr"] for row in deep)
    said.append(f"CLP leaves {left[0]:.0f} % of the watermark and {left[1]:.0f} to {left[-1]:.0f} % of the others")
    assert absent(said, paragraph(EVIDENCE, "In colour", "\n## ")) == [], said


def test_what_the_readme_says_of_the_former_detection() -> None:
    with (RESULTS / "detection.csv").open() as file:
        rows = list(csv.DictReader(file))
    victims, clean = ([row for row in rows if (row["attack"] == NONE) == sound] for sound in (False, True))
    hits = sum(row["flagged"] == "target" for row in victims)
    assert not any(row["flagged"] == "other" for row in victims)
    assert not any(row["flagged"] != "no" for row in clean)
    said = [f"found {hits} of {len(victims)} models", f"no alarm on {len(clean)} clean ones"]
    assert absent(said, README) == [], said


def test_the_analysis_is_that_of_the_committed_cells_and_what_is_said_of_it() -> None:
    rows = stored_analysis(RESULTS / "digits.jsonl")
    kept = (RESULTS / "digits_analysis.csv").read_text()
    rows.sort(
        key=lambda row: kept.index(as_csv([row], ANALYSIS_COLUMNS).partition("\n")[2])
    )  # the intervals depend on it
    assert as_csv(rows, ANALYSIS_COLUMNS) == kept
    ibau = [row for row in rows if row["defense"] == "ibau"]
    victims = [(row["attack"], row["seed"]) for row in ibau]
    said = []
    for column in ("frechet", "score_joint"):
        found = rank_correlation([r[column] for r in ibau], [r["der"] for r in ibau], victims, within=True)
        said += [f"{value:.2f}".replace("-", "−") for value in (found.rho, found.low, found.high)]
    for source in ("smi", "latent", "input", "random"):
        known = [row["judge_accuracy"] for row in ibau if row["source"] == source]
        said.append(f"{100 * sum(known) / len(known):.0f} %")
    far = {(r["source"], r["attack"]): r["frechet"] for r in ibau}
    attacks = {attack for _, attack in far}
    named = {
        "clean": "for clean samples", "latent": "for latent inversion", "smi": "for SMI",
        "input": "with a stable input alone", "random": "for random images",
    }  # fmt: skip
    for source, words in named.items():
        said.append(f"{sum(far[source, attack] for attack in attacks) / len(attacks):.1f} {words}")
    nearer = {s: sum(far[s, attack] < far["latent", attack] for attack in attacks) for s in ("smi", "input")}
    said += [f"for {nearer['smi']} of 12 victims", f"({nearer['input']} of 12)"]
    shown = [(r["source"], 1 - r["residual_target"]) for r in ibau if r["residual_target"] is not None]
    pixel = sorted(100 * value for source, value in shown if source == "pixel")
    other = max(100 * value for source, value in shown if source != "pixel")
    said.append(f"show half ({pixel[0]:.0f} to {pixel[-1]:.0f} %), at most {other:.0f} % by any other source")
    present = {r["attack"]: r["presence_target"] for r in ibau if r["source"] == "smi"}
    assert {attack for attack, value in present.items() if value} == {"wanet", "input_aware"}
    said.append(f"in {100 * present['input_aware']:.0f} % for `input_aware`")
    assert present["wanet"] == 1
    assert {row["seed"] for row in rows} == {20}
    (random,) = [r["presence_target"] for r in ibau if (r["source"], r["attack"]) == ("random", "wanet")]
    said.append(f"{100 * random:.0f} % of random images")
    assert absent(said, paragraph(EVIDENCE, "What the samples are like", "\n## ")) == [], said


def test_the_picture_is_the_notebooks() -> None:
    notebook = json.loads((ROOT / "notebooks/00_start_here.ipynb").read_text())
    (saved,) = [c for c in notebook["cells"] if c["metadata"].get("saves") == "story.png"]
    (png,) = [o["data"]["image/png"] for o in saved["outputs"] if "image/png" in o.get("data", {})]
    assert base64.b64decode(png) == (ROOT / "notebooks/pictures/story.png").read_bytes()
