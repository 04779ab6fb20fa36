"""The sections of a report, each HTML from the piece of a run that it shows, or nothing where there is none to show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from smi.defenses import Repair
from smi.defenses.base import Evidence
from smi.demo import Demo, example_stamps
from smi.detection import Detection
from smi.domains.base import Samples
from smi.erasure.scan import Scan
from smi.erasure.search import ANYWHERE, Found
from smi.plotting import report as figures
from smi.report.page import details, paragraph, picture, section, table
from smi.runtime.compute import predict

MOST_CLASSES = 20  # that a figure shows; tables show all
SHOWN = 5
SHORT = {"public": "public images", "latent": "latent MI", "smi": "SMI", "clean": "clean control"}
RATES = ("ACC", "ASR", "RA", "DER")
GLOSSARY = (
    "In percent. ACC: clean test images classified correctly (higher is better). ASR: images with the trigger that get "
    "the attacker's label (lower is better). RA: images with the trigger that keep their own label (higher). DER: "
    "attack success taken away less accuracy lost, on a scale where 50 is no effect and 100 is perfect."
)


def percent(rate: float) -> str:
    """A rate in [0, 1] with one digit, the sign kept on its line."""
    return f"{100 * rate:.1f}\u00a0%"


def defense_name(name: str) -> str:
    """A defense's name for readers."""
    return {"ibau": "I-BAU", "ft": "fine-tuning"}.get(name, name)


def result_rows(demo: Demo) -> list[tuple[str, str, list[str]]]:
    """Samples, removal and the four rates in percent, for every line of the table."""
    before = [f"{100 * rate:.1f}" for rate in (demo.before.acc, demo.before.asr, demo.before.ra)]
    rows = [("none", "no defense", [*before, "-"])]
    for row in demo.rows:
        rates = row.result.as_dict()
        rows.append(
            (row.label, defense_name(row.repair.defense), [f"{100 * rates[name.lower()]:.1f}" for name in RATES])
        )
    return rows


def results_section(demo: Demo) -> str:
    """The table of every run, SMI's shaded."""
    (_, first, rates), *others = result_rows(demo)
    rows: list[Any] = [[first, *rates], *([(label, removal), *rates] for label, removal, rates in others)]
    mark = 1 + [row.source for row in demo.rows].index("smi")
    shaded = f" Shaded: the method, with {len(demo.samples)} reconstructions and no clean data."
    return section("Result", table(["Samples", *RATES], rows, GLOSSARY + shaded, mark))


def trigger_section(demo: Demo) -> str:
    """The trigger on sample images, and what the models make of them."""
    clean, stamped = example_stamps(demo)
    models = (demo.victim, demo.row("smi").repair.model)
    suspect, repaired = ([demo.domain.classes[i] for i in predict(model, stamped).argmax(1)] for model in models)
    png = figures.stamps(clean, stamped, list(zip(suspect, repaired, strict=True)))
    alt = (
        f"{len(clean)} test images without and with the trigger. With it the suspect model says {', '.join(suspect)}; "
        f"the repaired model says {', '.join(repaired)}."
    )
    caption = (
        "Test images without and with the trigger, and what the two models say to the latter. Attacker and evaluator "
        "know the trigger; the defense was never shown it, nor any of these images."
    )
    return section("The trigger", picture(png, alt, caption))


def reconstructions_section(samples: Samples, classes: Sequence[str]) -> str:
    """Reconstructions of each class with their stability."""
    labels = range(min(len(classes), MOST_CLASSES))
    png = figures.reconstructions(samples, classes, labels, SHOWN)
    per_class = len(samples) // max(1, samples.num_classes)
    caption = f"{SHOWN} of the {per_class} images a class that the suspect model and the prior gave."
    alt = f"{caption} No real image of the task was used."
    if samples.scores is not None:
        medians = {label: samples.scores[samples.labels == label].median().item() for label in labels}
        best, worst = min(medians, key=medians.__getitem__), max(medians, key=medians.__getitem__)
        caption += (
            f" Below each its stability score{_unit(figures.score_unit(samples.scores))}, at the left the median of "
            "its class: how far the prediction moves under noise on image and weights; lower is more stable."
        )
        alt += (
            f" Class {classes[best]} is the most stable, median score {medians[best]:.2g}; class {classes[worst]} the "
            f"least, {medians[worst]:.2g}."
        )
    return section("Reconstructions", picture(png, alt, caption + _cut(len(classes), len(labels))))


def pattern_section(repair: Repair) -> str:
    """The universal δ that I-BAU found on the suspect model; nothing for a removal that looks for none."""
    if repair.delta is None:
        return ""
    caption = (
        "A pattern that is added to every image alike: orange darkens, purple brightens. Its L2 norm is at most "
        f"{repair.log['radius']:.1f}."
    )
    png = figures.pattern(repair.delta[0])
    return section("What the defender found", picture(png, "The universal pattern found.", caption))


def curves_section(repairs: Mapping[str, Repair]) -> str:
    """The loss of those removals that train, if there are any."""
    shown = {name: repair for name, repair in repairs.items() if repair.log.get("loss")}
    if not shown:
        return ""
    lines = {SHORT.get(name, name): repair.log["loss"] for name, repair in shown.items()}
    ends = "; ".join(f"loss of {name} from {values[0]:.2f} to {values[-1]:.2f}" for name, values in lines.items())
    unit = "step" if all(repair.evidence for repair in shown.values()) else "round"
    png = figures.curves(lines, unit)
    return section("How the removal went", picture(png, f"A curve: {ends}.", f"Mean loss of each {unit} of removal."))


def time_section(stages: Mapping[str, float], threads: int, *, resumed: bool = False) -> str:
    """Where the time went.

    Args:
        stages: Seconds by stage.
        threads: Of the CPU, that the model ran with.
        resumed: The time is that since the work was taken up again.
    """
    total, unit = sum(stages.values()), "thread" if threads == 1 else "threads"
    since = " since the work was resumed" if resumed else " in all"
    text = f"{total:.0f} seconds{since}, on {threads} {unit}."
    if len(stages) < 2:
        return section("Time", paragraph(text))
    longest = max(stages, key=stages.__getitem__)
    alt = f"Seconds by stage. The longest is {longest}, {stages[longest]:.1f} of {total:.1f} seconds."
    hatched = ""
    if any("/" in name for name in stages) and {"invert", "repair"} <= stages.keys():
        alone = stages["invert"] + stages["repair"]
        hatched = f" A removal alone is invert and repair, {alone:.0f} seconds. Hatched: controls."
    return section("Where the time went", picture(figures.stages(stages), alt, text + hatched))


def record_section(settings: Mapping[str, Any], circumstances: Mapping[str, Any]) -> str:
    """Settings, and where they ran, folded away."""
    return section("Settings", details("Settings of this run", settings), details("Where it ran", circumstances))


KINDS = {
    "additive": ("added patterns", "a pattern of L2 norm {:.2g} that is added"),
    "masked": ("patches", "a patch of {:.0f} pixels"),
    "smooth": ("smooth patterns", "a smooth pattern, {:.2g} strong, that is added"),
    "warped": ("warps", "a warp by {:.1f} pixels"),
}


def kinds(scan: Scan) -> str:
    """The kinds of triggers that were searched, in words."""
    return ", ".join(KINDS.get(one.family, (one.family,))[0] for one in scan.found)


def in_words(found: Found) -> str:
    """One trigger: what it is, and how large."""
    return KINDS.get(found.family, ("", f"a trigger ({found.family}) of size {{:.2g}}"))[1].format(found.size.item())


def reason(found: Detection, target: int) -> str:
    """What is unusual about a class, or about `ANYWHERE`: the trigger, what it does, and the limit."""
    scan, limit = found.scan, found.limit_of(target)
    one, excess = scan.strongest(target)
    where = "to another class" if target == ANYWHERE else "there"
    whose = "images of every class" if target == ANYWHERE else "all other images"
    said = f"{in_words(one)[0].upper()}{in_words(one)[1:]} sends {percent(one.reach.item())} of {whose} {where}"
    digits = 1 if f"{excess:.1f}" != f"{limit:.1f}" else 2  # "2.6; above 2.6" says nothing
    return f"{said}, {excess:.{digits}f} standard deviations from what is usual; above {limit:g}"


def most_unusual(scan: Scan, labels: Sequence[int]) -> int:
    """Of these classes the one that is the most unusual on the suspect."""
    return max(labels, key=lambda label: scan.strongest(label)[1])


def named(target: int, classes: Sequence[str]) -> str:
    """A class in words."""
    return "any other class" if target == ANYWHERE else f"class “{classes[target]}”"


def detection_section(found: Detection, classes: Sequence[str], evidence: Evidence | None = None) -> str:
    """The smallest trigger to every class, and what is unusual.

    Args:
        found: What the search found.
        classes: Names in the order of the labels.
        evidence: Of a removal that searched again after it.
    """
    scan, treated = found.scan, evidence.treated if evidence else []
    after = dict(zip(treated, evidence.excess_after(), strict=True)) if evidence else {}
    rows, order = [], scan.excess().amax(0).argsort(descending=True)[:MOST_CLASSES].tolist()
    for place in sorted(order):
        label = scan.classes[place]
        one, value = scan.strongest(label)
        row = [classes[label], in_words(one), percent(one.reach.item()), f"{value:.1f}"]
        if evidence:
            row += [f"{after[label]:.1f}" if label in after else ""]
        rows.append(row)
    note = (
        f"To every class the smallest trigger was searched in several kinds ({kinds(scan)}). Shown is the kind that is "
        "most unusual for the class."
    )
    caption = (
        "Excess: how much more easily the class is reached than the suspect's other classes let expect, in standard "
        f"deviations. Above {found.limit:g} the most unusual class counts as a sign. So do further ones that are "
        f"nearly as unusual, or above {found.others:g}."
    )
    if scan.absorbing is not None:
        caption += (
            f" Random changes send most of the images that they move to {named(scan.absorbing, classes)}. There the "
            f"limit is {found.absorbing:g}."
        )
    if treated:
        caption += " After: the excess of a new search on the repaired model."
    caption += _cut(len(scan.classes), len(rows))
    shown = [scan.classes[place] for place in sorted(order)]
    signs = [label for label in treated or found.reached if label in shown]
    mark = shown.index(most_unusual(scan, signs)) if signs else None
    head = ["Class", "Trigger", "Sends there", "Excess", *(["After"] if evidence else [])]
    return section("Is there a backdoor?", paragraph(note), table(head, rows, caption, mark))


def triggers_section(suspect: nn.Module, repair: Repair, samples: Samples, classes: Sequence[str]) -> str:
    """The triggers of the classes that a removal treated, on the suspect and on the repaired model."""
    if repair.evidence is None or not repair.evidence.treated:
        return ""
    pictures = [_found_trigger(suspect, repair, label, samples, classes) for label in repair.evidence.treated[:SHOWN]]
    return section("The triggers that were found", *pictures)


def _found_trigger(suspect: nn.Module, repair: Repair, label: int, samples: Samples, classes: Sequence[str]) -> str:
    """The most unusual trigger to a class on the suspect, and the smallest of its kind on the repaired model."""
    evidence = repair.evidence
    assert evidence is not None
    scan = evidence.detection.scan
    before = scan.strongest(label)[0]
    after = next(found for found in evidence.after if found.family == before.family)
    shown = samples.images[samples.labels != label]
    shown = shown[:: max(1, len(shown) // SHOWN)][:SHOWN]
    parts = []
    for one, model in ((before, "suspect"), (after.select(after.targets == label), "repaired")):
        stamped = one.stamp(shown)[0]
        said = [[classes[i] for i in predict(net, stamped).argmax(1)] for net in (suspect, repair.model)]
        caption = f"Found on the {model} model for {named(label, classes)}: {in_words(one)}."
        alt = f"{caption} The suspect says {', '.join(said[0])}; the repaired model says {', '.join(said[1])}."
        parts.append(picture(figures.stamps(shown, stamped, list(zip(*said, strict=True))), alt, caption))
    return "".join(parts)


def defender_section(same: Tensor, stability: tuple[Tensor, Tensor], samples: Samples, classes: Sequence[str]) -> str:
    """What can be known without clean data: agreement and stability, a row a class.

    Args:
        same: Bool ``[N]``, whether both models agree on a sample.
        stability: Scores ``[N]`` before and after.
        samples: What they were measured on, the removal's own or "held out" from it.
        classes: Names in the order of the labels.
    """
    head = ["Class", "Same label", "Stability, before → after"]
    rows: list[list[str]] = []
    for label, name in enumerate(classes):
        mine = samples.labels == label
        scores = " → ".join(f"{one[mine].median().item():.2g}" for one in stability)
        agreed = f"{100 * same[mine].float().mean().item():.0f}\u00a0%"
        rows.append([name, agreed, scores])
    caption = (
        "Same label: share of the class's reconstructions that both models label alike. Stability: their median score "
        "(lower is more stable)."
    )
    if samples.source == "held out":
        caption += f" Both on {len(samples)} reconstructions that the removal did not use."
    note = (
        "Accuracy and attack success cannot be measured without clean images and the trigger. What a "
        "defender can see is evidence, not proof."
    )
    return section("What a defender can know", paragraph(note), table(head, rows, caption))


def _unit(power: int) -> str:
    return " in units of 10" + str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")) if power else ""


def _cut(classes: int, shown: int) -> str:
    return "" if shown == classes else f" {shown} of {classes} classes are shown."
