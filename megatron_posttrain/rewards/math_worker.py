"""Script: reads JSON lines [expected, response], answers `true` or `false`; see `_Worker` in math.py."""

import json
import logging
import resource
import signal
import sys

from math_verify import parse, verify

MEMORY_LIMIT = 4 << 30  # bytes


def main() -> None:
    logging.disable()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    # The alarm's default action ends the process, even inside one long operation of the interpreter.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    limit = float(sys.argv[1])
    print("ready", flush=True)
    for line in sys.stdin:
        expected, response = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, limit)
        # Without its own timeouts, which are signals with handlers.
        gold = parse(f"\\boxed{{{expected}}}", parsing_timeout=None) or parse(expected, parsing_timeout=None)
        texts = [response]
        if "\n" not in response:
            texts.append(f"\\boxed{{{response}}}")  # an answer alone: bare LaTeX is only read inside something
        equal = any(verify(gold, parse(text, parsing_timeout=None), timeout_seconds=None) for text in texts)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print("true" if equal else "false", flush=True)


if __name__ == "__main__":
    main()
