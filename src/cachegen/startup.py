"""A script's first second, in which it imports torch: interrupted then, it ends in one line, as it does later.

And torch's threads sleep while they wait for each other.

Standard library only, so that it is there before anything that takes long.
"""

from __future__ import annotations

import os
import signal

EXIT_INTERRUPTED = 130  # 128 + SIGINT


def guard_imports(module_name: str) -> None:
    """Let an interrupt end the process in one line until `end_guard`, and torch's threads sleep while they wait.

    Args:
        module_name: `__name__` of the script; nothing is done where another module imports it.
    """
    if module_name == "__main__":
        # OpenMP's threads spin for one that another process keeps from its processor: with two on two processors, one
        # of them busy, a prefill took ten times as long. OpenMP reads this when torch loads it; GOMP_SPINCOUNT and
        # KMP_BLOCKTIME, where set, say more.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Where a shell ignores interrupts for a job in the background, so does the job.
    if module_name == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def end_guard() -> None:
    """Let an interrupt be a KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(*_: object) -> None:
    os.write(2, b"error: interrupted\n")
    os._exit(EXIT_INTERRUPTED)  # an exception could be swallowed by a module that is being imported
