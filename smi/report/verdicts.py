"""What a report says first: a decision, with its reason."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from smi.defenses.base import Evidence
from smi.demo import Demo
from smi.detection import Detection
from smi.erasure.scan import FEW
from smi.report.sections import defense_name, kinds, most_unusual, named, percent, reason

if TYPE_CHECKING:
    from smi.report.removal import Removal


def verdict(demo: Demo) -> str:
    """One sentence on how the demo went."""
    before, after = demo.before, demo.row("smi").result.after
    if before.asr < 0.5:
        head = "There was hardly a backdoor to remove"
    elif after.asr <= 0.1:
        lost = before.acc - after.acc
        price = ", at a price in accuracy" if lost <= 0.1 else ", but so is much of the accuracy"
        head = "The backdoor is removed" + (price if lost > 0.03 else "")
    else:
        head = "The backdoor is weakened, not removed" if after.asr <= before.asr / 2 else "The backdoor is still there"
    return (
        f"{head}: attack success went from {percent(before.asr)} to {percent(after.asr)} and accuracy from "
        f"{percent(before.acc)} to {percent(after.acc)}, without any clean data."
    )


def removal_verdict(removal: Removal) -> str:
    """What a defender can tell: whether there are signs of a backdoor and why, and what the removal did."""
    same = percent(removal.agreement.float().mean().item())
    evidence, names = removal.cleaned.repair.evidence, removal.suspect.classes
    if evidence is not None:
        kind = "" if removal.held_out is None else "held-out "
        kept = f"The repaired model gives {same} of the {kind}reconstructions the label that the suspect model gave."
        return f"{evidence_verdict(evidence, names)} {kept}" if evidence.treated else evidence_verdict(evidence, names)
    head = "" if removal.detection is None else detection_verdict(removal.detection, removal.suspect.classes) + " "
    kind = "" if removal.held_out is None else "held-out "
    kept = f"the repaired model gives {same} of the {kind}reconstructions the label that the suspect model gave"
    return f"{head}Repaired by {defense_name(removal.cleaned.repair.defense)}: {kept}."


STEADIED = (
    "The model was tuned to keep its answers under random changes of an image, which takes some backdoors that no "
    "search shows."
)
UNKNOWN = (
    f"Whether there is a backdoor cannot be said: with fewer than {FEW} classes there is nothing to see one against."
)


def evidence_verdict(evidence: Evidence, classes: Sequence[str]) -> str:
    """The decision of a removal that looks for triggers, with its reason."""
    found, treated = evidence.detection, evidence.treated
    if not treated:
        return f"{detection_verdict(found, classes)} Nothing was erased. {STEADIED}"
    erased, left = (", ".join(named(label, classes) for label in chosen) for chosen in (treated, evidence.left))
    how = "were tuned against, and the direction of each class's strongest was erased"
    if evidence.unerased:
        alone = ", ".join(named(label, classes) for label in evidence.unerased)
        how = f"were tuned against, without erasing those to {alone}"
    if not evidence.left and not found.reached:
        why = "because that was asked for" if evidence.asked else "all the same, for that costs little"
        return f"{detection_verdict(found, classes)} The triggers to {erased} {how} {why}. {STEADIED}"
    sign = most_unusual(found.scan, evidence.left or found.reached)
    why = f"{named(sign, classes)} is reached unusually easily. {reason(found, sign)} is a sign"
    if evidence.left:
        return (
            f"There are signs of a backdoor, and something unusual is left: {why}. The triggers to {erased} "
            f"{how}, but a new search on the repaired model still reaches {left} more easily than it should. Do not "
            "rely on this model."
        )
    return (
        f"There are signs of a backdoor, and after the removal none is left: {why}. The triggers to {erased} "
        f"{how}, and a new search on the repaired model finds nothing unusual there. The attacker's own trigger is "
        "not known, so how much of it still works cannot be measured here."
    )


def detection_verdict(found: Detection, classes: Sequence[str]) -> str:
    """Whether the suspect shows a backdoor, with the reason."""
    scan = found.scan
    if not found.conclusive:
        return UNKNOWN
    if found.reached:
        sign = most_unusual(scan, found.reached)
        others = ", ".join(named(label, classes) for label in found.reached if label != sign)
        more = f" Also unusual: {others}." if others else ""
        return (
            f"There are signs of a backdoor: {named(sign, classes)} is reached unusually easily. "
            f"{reason(found, sign)} is a sign.{more}"
        )
    label = scan.classes[int(scan.excess().amax(0).argmax())]
    absorbs = ""
    if label == scan.absorbing:
        absorbs = " Random changes send most of the images that they move to that class, so it is easy to reach anyhow."
    return (
        "No sign of a backdoor was found: no class is reached by an unusually small trigger of any kind that was "
        f"searched ({kinds(scan)}). Closest comes {named(label, classes)}: {reason(found, label)} "
        f"would be a sign.{absorbs} That is no proof: triggers of other kinds do not show "
        "this way."
    )
