"""The toys' own scripts: rows of thinking-mode fusion, and a served model that is asked."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launch import ROOT

RECIPES = ROOT / "examples/recipes"


def reasons(message: dict[str, str]) -> bool:
    return message["content"] != "<think></think>" + message["content"].rpartition("</think>")[2]


def test_fusion_rows_obey_the_last_flag(tmp_path: Path) -> None:
    def row(question: str, answer: str) -> str:
        return json.dumps(
            {"messages": [{"role": r, "content": c} for r, c in (("user", question), ("assistant", answer))]}
        )

    samples = [row(f"{n}+0=", f"<think>{n}</think>{n}") for n in range(40)] + [row("9", "<think></think>9")]
    (tmp_path / "sft.jsonl").write_text("\n".join(samples))
    line = [sys.executable, RECIPES / "qwen3/fuse.py", tmp_path / "sft.jsonl", tmp_path, "--empty", "<think></think>"]
    said = subprocess.run(line, check=True, capture_output=True, text=True).stdout
    assert "from 40 of 41 responses" in said
    rows = [json.loads(line)["messages"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [sum(len(r) == n for r in rows) for n in (2, 4)] == [80, 80]
    looks_back = 0
    for messages in rows:
        thinks = True
        for asked, said in zip(messages[::2], messages[1::2], strict=True):
            flag = asked["content"].partition(" ")[2]
            thinks = thinks if not flag else flag == "/think"
            assert reasons(said) == thinks
            assert said["content"].endswith(asked["content"].partition("+")[0])
        looks_back += not flag and not thinks
    assert looks_back > 5  # a last turn that only an earlier one tells not to think


class Server(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        content = f"<think>5</think>{len(asked['messages'])} "
        body = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
        self.send_response(200 if self.path == "/v1/chat/completions" else 404)
        self.end_headers()
        self.wfile.write(body)


def test_a_served_model_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(RECIPES))
    import ask

    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address, row = f"http://127.0.0.1:{server.server_port}", dict[str, Any](messages=[{"role": "user", "content": "x"}])
    try:
        assert [ask.ask(address, row | {"answer": answer})["right"] for answer in ("1", "5")] == [True, False]
    finally:
        server.shutdown()
    ended = subprocess.Popen([sys.executable, "-c", "raise SystemExit(2)"])
    with pytest.raises(SystemExit, match="ended with status 2"):
        ask.wait("http://127.0.0.1:9", ended, 60)
