"""Processes that run one after the other beside the tests, which wait for them at the end.

The interpreter's checks and the compiler take minutes on one core, most tests less than one: together they use two.
"""

import os
import subprocess
from concurrent.futures import Future, ThreadPoolExecutor

_pool = ThreadPoolExecutor(1)
_begun: dict[tuple, Future] = {}


def _run(command, environment):
    environment = os.environ | dict(environment)
    for name in [name for name, value in environment.items() if value is None]:
        del environment[name]
    # Standard error too, where a crash would be reported.
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900
    )
    return done.returncode, done.stdout


def begin(command, environment):
    """Queue a process: words of the command, and pairs of variables and values (None: not set)."""
    key = (tuple(command), tuple(environment))
    if key not in _begun:
        _begun[key] = _pool.submit(_run, *key)
    return _begun[key]


def outcome(command, environment):
    """Exit code and output of a process, begun now if it was not before."""
    return begin(command, environment).result()
