"""Tokenises FILE into CACHE with two workers, however few cores there are; says whether it built, and the digest."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from megatron_posttrain.data import cache
from tests.helpers.chat_tokenizers import CHATML, byte_tokenizer

if __name__ == "__main__":
    built: list[Any] = []
    build = cache._build
    cache._build = lambda *arguments: (built.append(arguments), build(*arguments))[1]  # type: ignore[assignment]
    os.sched_getaffinity = lambda process: {0, 1}  # type: ignore[assignment]
    encoder = cache.Encoder(byte_tokenizer(CHATML), {}, "refuse", "all-assistant")
    found = cache.tokenized(sys.argv[1], encoder, Path(sys.argv[2]))
    print(json.dumps({"built": len(built), "digest": found.digest}))
