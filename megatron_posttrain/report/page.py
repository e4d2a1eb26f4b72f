"""The page: a template with the data inside it, compressed. It asks nothing of the network."""

import base64
import gzip
import html
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_posttrain.report import collect, samples

TEMPLATE = Path(__file__).with_name("page.html")


def build(roots: Sequence[Path]) -> str:
    """The page about everything in and below `roots`. Raises UserError where there is nothing to tell about."""
    directories = collect.find(roots)
    content: dict[str, Any] = {"runs": [], "evaluations": [], "curations": [], "pipelines": []}
    chunks: list[str] = []
    for name, directory in zip(collect.label(directories), directories, strict=True):
        about: dict[str, Any] = {"name": name, "chunk": None}
        if (found := samples.read(directory)) is not None:
            about["chunk"] = len(chunks) + 1
            chunks.append(_script(about["chunk"], found))
        for mark, (kind, read) in collect.MARKS.items():
            if (directory / mark).is_file():
                content[kind].append(about | read(directory))
    title = ", ".join(root.absolute().name for root in roots)
    content |= {"title": title, "made": datetime.now(UTC).isoformat(timespec="minutes")}
    page = TEMPLATE.read_text(encoding="utf-8").replace("{{title}}", html.escape(title))
    return page.replace("{{data}}", "\n".join([_script(0, content), *chunks]))


def _script(number: int, content: Any) -> str:
    """Data that the page unpacks when it is needed: gzip, as base64."""
    plain = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    packed = base64.b64encode(gzip.compress(plain.encode("utf-8", "replace"), 6, mtime=0)).decode()
    return f'<script type="application/octet-stream" id="data-{number}">{packed}</script>'
