"""Options of commands without a config file that say how rows are read, as `data.columns` and `data.omissions` do."""

import argparse
import json
from typing import Any

import yaml

from megatron_posttrain.config.schema import check_columns

Columns = dict[str, str | list[str]]


def add_row_arguments(parser: argparse.ArgumentParser) -> None:
    add_columns(parser)
    parser.add_argument(
        "--omissions", choices=("refuse", "allow"), default="refuse", help="as data.omissions (default: refuse)"
    )


def add_columns(parser: argparse.ArgumentParser, name: str = "--columns", text: str = "as data.columns") -> None:
    parser.add_argument(name, type=_columns, default={}, metavar="MAP", help=f"{text}: '{{prompt: question.stem}}'")


def parsed(text: str) -> Any:
    """What YAML says, null where it is none."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None


def _columns(text: str) -> Columns:
    found = parsed(text)
    if not isinstance(found, dict) or not all(map(_is_name, found.values())):
        raise argparse.ArgumentTypeError(f"{text!r} must be a map such as '{{prompt: question, answer: [a, b]}}'")
    try:
        check_columns(found)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return found


def _is_name(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def json_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"""{text!r} must be a JSON object such as '{{"ignore_case": true}}'""")
    return found
