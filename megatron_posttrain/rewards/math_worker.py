"""Module to run: reads JSON lines [expected, response], answers `true` or `false`; see `_Worker` in math.py."""

import json
import logging
import resource
import signal
import sys

from megatron_posttrain.rewards.equivalence import graded
from megatron_posttrain.rewards.symbolic import equivalent

MEMORY_LIMIT = 4 << 30  # bytes


def main() -> None:
    logging.disable()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    # The default action ends the process, even inside one long operation of the interpreter. CPU time, so that
    # a busy machine changes no reward.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    limit = float(sys.argv[1])
    equivalent("\\frac{1}{2}", "0.5")  # builds the LaTeX parser, once
    print("ready", flush=True)
    for line in sys.stdin:
        expected, response = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, limit)
        try:
            equal = graded(expected, response)
        except Exception:  # raised on some texts that are no mathematics
            equal = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        print("true" if equal else "false", flush=True)


if __name__ == "__main__":
    main()
