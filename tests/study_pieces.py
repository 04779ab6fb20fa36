"""Stand-ins for the pieces of a study: they log what they do, wait a little, and fail where they are told to.

Workers import this module: it must not need pytest.
"""

import errno
import os
import time
from collections import Counter

from distributed import get_worker

from smi.runtime.files import write_atomic
from smi.study.records import once
from smi.study.stages import names_of

SMALL = """
seeds = [1, 2]
attacks = ["badnets", "blended"]
per_class = 3

[domain.digits]
prior = "digits"

[train]
epochs = 2

[attack.badnets]
size = 3

[defense.ft.schedule]
rounds = 2

[[grid]]
sources = ["clean", "smi"]
defenses = ["ft"]

[[grid]]
sources = ["smi"]
defenses = ["ft", "ibau"]

[[grid]]
sources = ["none"]
defenses = ["clp"]
"""

WAIT = float(os.environ.get("STUDY_WAIT", "0"))


def log(store, line):
    with (store.cache / "log").open("a") as file:
        file.write(f"{line} {os.getpid()} {get_worker().name}\n")


def logged(store, word):
    lines = (store.cache / "log").read_text().splitlines()
    return Counter(line.split()[1] for line in lines if line.startswith(f"{word} "))


def make_prior(scenario, store):
    log(store, "prior")
    return "prior"


def make_victim(cell, store):
    file = store.cache / f"victim-{cell.victim_key}"
    if not file.exists():
        log(store, f"victim {cell.victim_key}")
        if cell.attack_name == "blended" and os.environ.get("STUDY_BREAK"):
            raise ValueError("no such attack today")
        time.sleep(WAIT)
        write_atomic(file, "")
    return str(file)


def make_cell_samples(cell, store, victim, prior):
    log(store, f"samples {cell.samples_key}")
    assert os.path.exists(victim)
    return "samples"


def run_cell(cell, store, victim, samples):
    return once(store.running, cell.key, lambda: measured(cell, store))


def measured(cell, store):
    log(store, f"begin {cell.key}")
    if os.environ.get("STUDY_FULL"):
        raise OSError(errno.ENOSPC, "No space left on device")
    time.sleep(WAIT)
    rates = {"acc": 0.9, "asr": 0.1, "ra": 0.8}
    log(store, f"end {cell.key}")
    return names_of(cell) | {
        "n": 3, "before": {"acc": 0.98, "asr": 1.0, "ra": 0.0}, "after": rates | {"der": 0.91},
        "seconds": {"samples": 1.0, "repair": 2.0}, "finished": time.time_ns(),
    }  # fmt: skip
