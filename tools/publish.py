#!/usr/bin/env python
"""A model card for what a run left, and its upload to a hub.

    python tools/publish.py runs/sft --license apache-2.0 --evaluation runs/evaluation
    python tools/publish.py runs/sft --license apache-2.0 --upload NAME/MODEL --dry-run

Writes README.md into the run's hf/ (or adapter/, with --adapter): base model, recipe (the resolved config), data files
with their SHA-256, last figures of the training, results of `evaluate`, versions, and the SHA-256 of every file that
goes. --upload sends that directory, after the list is printed; with --dry-run nothing is written or sent.
Exit status: 0 done, 1 failed, 2 bad input.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_posttrain.errors import UserError, nearest_file
from megatron_posttrain.evaluation.compare import leaderboard

PACKAGES = ("megatron-posttrain", "megatron-core", "torch", "transformers")
FIGURES = ("step", "loss", "accuracy", "reward", "kl", "tokens")
CARD = "README.md"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN_DIR", help="a run's output")
    add("--adapter", action="store_true", help="its adapter/, not hf/")
    add(
        "--license",
        required=True,
        metavar="NAME",
        help="of the model, as the hub names it: apache-2.0, mit, other, ...",
    )
    add("--language", default="en", metavar="CODE", help="ISO 639-1 (default: en)")
    add("--evaluation", nargs="+", default=[], metavar="DIR", help="directories that `evaluate` wrote (default: none)")
    add("--upload", metavar="NAME/MODEL", help="repository to send it to; made where there is none (default: nothing)")
    add("--public", action="store_true", help="a repository that is made is public (default: private)")
    add("--dry-run", action="store_true", help="print the card and what would go; write and send nothing")
    args = parser.parse_args()
    try:
        place = args.run / ("adapter" if args.adapter else "hf")
        if not (place / ("adapter_config.json" if args.adapter else "config.json")).is_file():
            raise UserError(f"{place}: no model of a run there{nearest_file(args.run)}")
        files = sorted(p for p in place.rglob("*") if p.is_file() and p.name != CARD and ".cache" not in p.parts)
        text = card(args, files)
        print(text if args.dry_run else f"{place / CARD}: {len(text):,} characters")
        total = sum(file.stat().st_size for file in files)
        for file in files:
            print(f"{file.stat().st_size:>15,}  {file.relative_to(place)}")
        print(f"{total:>15,}  bytes in {len(files)} files and {CARD}, for {args.upload or 'no repository'}")
        if not args.dry_run:
            (place / CARD).write_text(text, encoding="utf-8")
            if args.upload:
                upload(args, place)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def upload(args: argparse.Namespace, place: Path) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        api = HfApi()
        api.create_repo(args.upload, private=not args.public, exist_ok=True)
        print(api.upload_folder(repo_id=args.upload, folder_path=place, commit_message="Upload model"))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(f"--upload {args.upload}: {error}") from None


def card(args: argparse.Namespace, files: list[Path]) -> str:
    file = args.run / "config.yaml"
    if not file.is_file():
        raise UserError(f"{file}: no such file; every run of a training command leaves one")
    config: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    base = str(config["model"]["path"])
    head: dict[str, Any] = {"license": args.license, "language": [args.language], "library_name": "transformers"}
    head |= {"pipeline_tag": "text-generation", "tags": ["megatron_posttrain"]}
    if base.count("/") == 1 and not Path(base).exists():
        head["base_model"] = base
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# {args.run.resolve().name}",
        f"Trained from `{Path(base).name if Path(base).exists() else base}` with {versions}.",
        f"## Training\n\n{figures(args.run)}\n\n```yaml\n{recipe(file)}\n```",
        f"## Data\n\n{table(['file', 'bytes', 'SHA-256'], data(config))}",
    ]
    if args.evaluation:
        parts.append(
            f"## Evaluation\n\nAccuracy with half its 95% interval.\n\n```\n{leaderboard(args.evaluation)}\n```"
        )
    rows = [[str(f.name), f"{f.stat().st_size:,}", digest(f)] for f in files]
    return "\n\n".join([*parts, f"## Files\n\n{table(['file', 'bytes', 'SHA-256'], rows)}"]) + "\n"


def recipe(file: Path) -> str:
    """The resolved config without the directories of the machine that it ran on."""
    return re.sub(r"(?<![\w./])/(?:[^\s/]+/)+", ".../", file.read_text(encoding="utf-8")).strip()


def data(config: dict[str, Any]) -> list[list[str]]:
    """Name, size and digest of the training files, as far as they are files."""
    train = config["data"]["train"]
    entries = train if isinstance(train, list) else [train]
    names = [str(entry["path"] if isinstance(entry, dict) else entry) for entry in entries]
    return [
        [Path(n).name, f"{Path(n).stat().st_size:,}", digest(Path(n))]
        if Path(n).is_file()
        else [n, "-", "no local file"]
        for n in names
    ]


def figures(run: Path) -> str:
    """The last line of metrics.jsonl."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines() if (run / "metrics.jsonl").exists() else []
    last = json.loads(lines[-1]) if lines else {}
    found = {name: last[name] for name in FIGURES if last.get(name) is not None}
    return "Last step: " + ", ".join(
        f"{n} {v:,.4g}" if isinstance(v, float) else f"{n} {v:,}" for n, v in found.items()
    )


def digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


if __name__ == "__main__":
    sys.exit(main())
