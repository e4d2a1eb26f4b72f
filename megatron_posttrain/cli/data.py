"""`data FILE...`: what files hold, how they would be read, and which tokens of the first rows count."""

import argparse
import json
import sys
from collections import Counter
from typing import Any, get_args

import numpy as np

from megatron_posttrain.cli.row_options import add_row_arguments
from megatron_posttrain.data.rows import Reader, Row, read_records
from megatron_posttrain.data.tokenize import TrainOn, encode_conversation, encode_prompt, load_tokenizer
from megatron_posttrain.errors import UserError

COUNTED, PLAIN = "\x1b[32m", "\x1b[0m"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="JSON lines or array, CSV (.gz, .zst too), Parquet, a dataset")
    add("--json", action="store_true", help="a list of {file, form, use, rows, columns_ignored}")
    add("--tokenizer", metavar="DIR", help="Hugging Face directory: token lengths, and the first rows' tokens")
    on = "all-assistant"
    add("--train-on", choices=get_args(TrainOn), default=on, help=f"as data.train_on (default: {on})")
    add("--rows", type=int, default=2, metavar="N", help="rows to show (default: 2)")
    add_row_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Exit status: 0 when every file can be read, else 2."""
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    found: list[dict[str, Any]] = []
    refused = 0
    for file in args.files:
        try:
            rows, about = _read(file, args.columns)
            found.append(about)
            if not args.json:
                _show(rows, about, tokenizer, args)
        except UserError as error:
            refused += 1
            print(f"error: {error}", file=sys.stderr)
    if args.json:
        print(json.dumps(found, ensure_ascii=False, indent=1))
    return 2 if refused else 0


def _read(file: str, columns: dict[str, str | list[str]]) -> tuple[list[Row], dict[str, Any]]:
    rows: list[Row] = []
    forms: Counter[tuple[str, str]] = Counter()
    reader = Reader(columns, "any")
    for row, _ in read_records(file, reader):
        rows.append(row)
        if row.form is not None:
            forms[row.form.name, row.form.use] += 1
    if not rows:
        raise UserError(f"{file}: no rows in it")
    names, uses = zip(*forms, strict=True)
    about = {
        "file": file,
        "form": ", ".join(dict.fromkeys(names)),
        "use": ", ".join(dict.fromkeys(uses)),
        "rows": len(rows),
        "columns_ignored": sorted(reader.ignored),
    }
    return rows, about


def _show(rows: list[Row], about: dict[str, Any], tokenizer: Any, args: argparse.Namespace) -> None:
    print(f"{about['file']}: {about['rows']:,} rows of the form {about['form']}, for {about['use']}")
    if about["columns_ignored"]:
        print(f"  not read: {', '.join(about['columns_ignored'])}")
    keyed = sum(row.answer is not None for row in rows)
    if keyed:
        print(f"  with an answer: {keyed:,}")
    if tokenizer is not None:
        encoded = [_encode(tokenizer, row, args) for row in rows]
        asked = [len(ids) for ids, mask in encoded if mask is None]
        taught = [(len(ids), sum(map(bool, mask))) for ids, mask in encoded if mask is not None]
        for name, lengths in (
            ("tokens a prompt", asked),
            ("tokens a row", [length for length, _ in taught]),
            ("of them counted", [count for _, count in taught]),
        ):
            if lengths:
                shown = ", ".join(f"{p}%: {np.percentile(lengths, p):,.0f}" for p in (0, 50, 90, 99, 100))
                print(f"  {name}: {shown}")
    for number, row in enumerate(rows[: args.rows]):
        print(f"  --- {row.source}" + (f", answer {row.answer!r}" if row.answer is not None else ""))
        if tokenizer is not None:
            print(_marked(tokenizer, *encoded[number]))
        else:
            print(json.dumps([*row.messages, *row.chosen], ensure_ascii=False)[:1000])


def _encode(tokenizer: Any, row: Row, args: argparse.Namespace) -> tuple[list[int], list[float] | None]:
    """Tokens of a row and how much each counts, None for a prompt; of two answers the chosen one."""
    messages = [*row.messages, *row.chosen]
    roles = [message["role"] for message in messages]
    if roles[-1] != "assistant" and (row.answer is not None or "assistant" not in roles):
        return encode_prompt(tokenizer, messages, row.source, row.options, args.omissions), None
    conversation = encode_conversation(tokenizer, messages, row.source, row.options, args.omissions, args.train_on)
    return conversation.token_ids, conversation.loss_mask


def _marked(tokenizer: Any, ids: list[int], mask: list[float] | None) -> str:
    """The tokens' text; those that count in colour on a terminal, within « » elsewhere, a weight in front."""
    mask = mask or [0] * len(ids)
    begin, end = (COUNTED, PLAIN) if sys.stdout.isatty() else ("«", "»")
    pieces: list[str] = []
    start = 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or mask[i] != mask[start]:
            text = tokenizer.decode(ids[start:i], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            weight = "" if mask[start] in (0, 1) else f"{mask[start]:g}x "
            pieces.append(f"{begin}{weight}{text}{end}" if mask[start] else text)
            start = i
    return "".join(pieces)
