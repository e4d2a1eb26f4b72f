"""Serve a model and ask it held-out questions over the network, as a user would: a recipe's last stage.

    python examples/recipes/ask.py MODEL OUT_DIR --data held/flags.jsonl

OUT_DIR gets answers.jsonl (question, answer, what was expected, seconds) and served.json: how many, how many of them
right, seconds until the server was ready. Rows may be conversations: asked up to their last answer, which is what was
expected. Exit status: 0 all were answered, 1 not.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import requests

# A small model on a machine that does other things too.
OPTIONS = ["--dtype", "float32", "--max-model-len", "512", "--kv-cache-memory-bytes", str(256 << 20)]


def ask(address: str, row: dict[str, Any], max_tokens: int = 48) -> dict[str, Any]:
    started, messages, expected = time.monotonic(), row["messages"], row.get("answer")
    if messages[-1]["role"] == "assistant":
        messages, expected = messages[:-1], expected or messages[-1]["content"]
    asked = {"model": "toy", "messages": messages, "temperature": 0, "max_tokens": max_tokens}
    found = requests.post(f"{address}/v1/chat/completions", json=asked, timeout=600)
    found.raise_for_status()
    answer = found.json()["choices"][0]["message"]["content"]
    right = answer.rpartition("</think>")[2].strip() == expected
    seconds = round(time.monotonic() - started, 3)
    return {
        "messages": messages,
        "answer": answer,
        "expected": expected,
        "right": right,
        "seconds": seconds,
    }


def wait(address: str, server: subprocess.Popen[bytes], seconds: float) -> None:
    """Until the server is ready to answer."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if server.poll() is not None:
            sys.exit(f"the server ended with status {server.returncode}, see above")
        with suppress(requests.ConnectionError, requests.Timeout):
            if requests.get(f"{address}/health", timeout=10).ok:
                return
        time.sleep(0.5)
    sys.exit(f"the server did not answer within {seconds:g} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="Hugging Face directory, or a run with hf/ in it")
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument(
        "--data", type=Path, required=True, metavar="FILE", help="rows of {messages, answer}, or conversations"
    )
    parser.add_argument("--questions", type=int, default=8, metavar="N", help="the first N rows (default: 8)")
    parser.add_argument("--max-tokens", type=int, default=48, metavar="N", help="of an answer (default: 48)")
    parser.add_argument("--vllm", nargs=argparse.REMAINDER, default=OPTIONS, metavar="OPTION", help="of vLLM's server; "
        f"the rest of the line (default: {' '.join(OPTIONS)})")  # fmt: skip
    args = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address, started = f"http://127.0.0.1:{port}", time.monotonic()
    line = ["serve", args.model, "--name", "toy", "--port", str(port), "--vllm", *args.vllm]
    server = subprocess.Popen([sys.executable, "-m", "megatron_posttrain", *line])
    try:
        wait(address, server, 900)
        ready = time.monotonic() - started
        rows = [json.loads(text) for text in args.data.read_text().splitlines()[: args.questions]]
        answers = [ask(address, row, args.max_tokens) for row in rows]
    finally:
        server.terminate()
        server.wait()
    for answer in answers:
        print(f"{answer['messages'][-1]['content']}  ->  {answer['answer']}   (expected {answer['expected']})")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "answers.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    figures = {
        "answers": len(answers),
        "right": sum(a["right"] for a in answers),
        "ready_after_seconds": round(ready, 1),
    }
    (args.out / "served.json").write_text(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
