"""Script: reads JSON lines [expected, response], answers `true` or `false`; see `_Worker` in math.py."""

import json
import logging
import resource
import signal
import sys

from math_verify import parse, verify

MEMORY_LIMIT = 4 << 30  # bytes


def equivalent(expected: str, response: str) -> bool:
    """Whether math-verify finds them equal, without its own timeouts, which are signals with handlers."""
    gold = parse(f"\\boxed{{{expected}}}", parsing_timeout=None) or parse(expected, parsing_timeout=None)
    texts = [response]
    if "\n" not in response:
        texts.append(f"\\boxed{{{response}}}")  # an answer alone: bare LaTeX is only read inside something
    return any(verify(gold, parse(text, parsing_timeout=None), timeout_seconds=None) for text in texts)


def main() -> None:
    logging.disable()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    # The default action ends the process, even inside one long operation of the interpreter. CPU time, so that
    # a busy machine changes no reward.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    limit = float(sys.argv[1])
    parse("\\boxed{\\frac{1}{2}}", parsing_timeout=None)  # builds the LaTeX parser, once
    print("ready", flush=True)
    for line in sys.stdin:
        expected, response = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, limit)
        try:
            equal = equivalent(expected, response)
        except Exception:  # raised on some texts that are no mathematics
            equal = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        print("true" if equal else "false", flush=True)


if __name__ == "__main__":
    main()
