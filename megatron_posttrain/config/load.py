"""YAML files, parents and `key.sub=value` overrides to a validated config; mistakes name the key and its file."""

import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from megatron_posttrain.errors import UserError, nearest, nearest_file

ConfigType = TypeVar("ConfigType", bound=BaseModel)


def load_config(
    schema: type[ConfigType], file: str | Path | None, overrides: Sequence[str] = (), *, resolve: bool = True
) -> ConfigType:
    """Reads `file` (its `defaults:` parents first), applies overrides, validates against `schema`. `resolve`: `${key}`
    is replaced by that key's value; else it stays as it is written. Raises UserError for a missing file, bad YAML, an
    unknown key (with the nearest valid one) or a bad value."""
    tree = _read(Path(file), ()) if file is not None else OmegaConf.create({})
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key:
            raise UserError(f"override '{override}': expected key.sub=value")
        try:
            OmegaConf.update(tree, key, yaml.safe_load(value) if value else None, merge=False, force_add=True)
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise UserError(f"override '{override}': {str(error).splitlines()[0]}") from None
    try:
        plain = OmegaConf.to_container(tree, resolve=resolve)
    except OmegaConfBaseException as error:
        raise UserError(f"{file}: {str(error).splitlines()[0]}") from None
    where = f"{file}: " if file is not None else ""
    try:
        config = schema.model_validate(plain)
    except ValidationError as error:
        raise UserError("\n".join(where + _explain(schema, e) for e in error.errors())) from None
    if ignored := list(_ignored(config)):
        raise UserError("\n".join(where + text for text in ignored))
    return config


def _ignored(config: Any) -> Iterator[str]:
    """What was set and would have no effect. A value equal to the default may stay: a run's own config has all keys."""
    if not getattr(config, "mixes", True) and config.data.weights:
        yield f"key 'data.train': weights of sources would be ignored by {config.command}; allowed: paths"
    for key, why in getattr(config, "ignored", {}).items():
        *parents, name = key.split(".")
        section: Any = config
        for parent in parents:
            section = getattr(section, parent)
        value, default = getattr(section, name), type(section).model_fields[name].get_default(call_default_factory=True)
        if isinstance(value, BaseModel):
            changed = value.model_dump(exclude_defaults=True)
            yield from (f"key '{key}.{sub}' would be ignored: {why}; remove it" for sub in changed)
        elif value != default:
            yield f"key '{key}' would be ignored: {why}; remove it"


def to_yaml(config: BaseModel) -> str:
    """The resolved config as YAML, enough to run it again."""
    return yaml.safe_dump(config.model_dump(mode="json", by_alias=True), sort_keys=False)


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def describe(schema: type[BaseModel]) -> Iterator[str]:
    """One line a key: `key = default   description`; what `--help` shows."""
    for key, default, text in keys(schema):
        yield f"  {key + ' = ' + default:46} {text}".rstrip()


def keys(schema: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(key, default as one writes it in YAML, or "(required)", allowed values and description) of every key."""
    for name, info in schema.model_fields.items():
        nested = _section(info.annotation)
        default = None if info.is_required() else info.get_default(call_default_factory=True)
        name = info.alias or name
        if nested is None or not (info.is_required() or isinstance(default, BaseModel)):
            shown = "(required)" if info.is_required() else _short(default)
            yield prefix + name, shown, "; ".join(filter(None, (_allowed(info.annotation), info.description)))
        if nested is not None:  # of a list's entries, or of a section that may be null, as well
            yield from keys(nested, f"{prefix}{name}{'[]' if typing.get_origin(info.annotation) is list else ''}.")


def _read(file: Path, seen: tuple[Path, ...]) -> DictConfig:
    if not file.is_file():
        raise UserError(f"config file {file} does not exist{nearest_file(file)}")
    if file.resolve() in seen:
        raise UserError(f"{file}: `defaults` go in a circle")
    try:
        loaded = OmegaConf.load(file)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, DictConfig):
        raise UserError(f"{file}: expected a mapping of keys, found {type(OmegaConf.to_container(loaded)).__name__}")
    parents = loaded.pop("defaults", None) or []
    tree = OmegaConf.create({})
    for parent in parents:
        tree.merge_with(_read(file.parent / parent, (*seen, file.resolve())))
    tree.merge_with(loaded)
    return tree


def _section(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *typing.get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _allowed(annotation: Any) -> str:
    values: list[str] = []
    for candidate in (annotation, *typing.get_args(annotation)):
        if typing.get_origin(candidate) is typing.Literal:
            values += [str(v) for v in typing.get_args(candidate)]
    return " | ".join(values)


def _short(value: Any) -> str:
    """A default as one would write it in YAML."""
    if isinstance(value, list):
        value = [v.model_dump(exclude_defaults=True) if isinstance(v, BaseModel) else v for v in value]
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")


def _explain(schema: type[BaseModel], error: Any) -> str:
    location = [str(part) for part in error["loc"] if part not in ("number", "by step")]  # pydantic's, of a schedule
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        names = _names_at(schema, location[:-1])
        parent = ".".join(location[:-1])
        elsewhere = [name for name, *_ in keys(schema)]
        same = next((name for name in elsewhere if name.rsplit(".", 1)[-1] == location[-1]), None)
        hint = f"; did you mean '{same}'?" if same else nearest(location[-1], names)
        return f"unknown key '{key}'{hint} (allowed{f' under {parent}' if parent else ''}: {', '.join(names)})"
    if error["type"] == "missing":
        required = [name for name, default, _ in keys(schema) if default == "(required)"]
        inside = [name for name in required if name.startswith(f"{key}.")]
        return f"key '{key}' is missing" + (f"; it needs {', '.join(inside)}" if inside else "")
    return f"key '{key}': {error['msg'][:1].lower() + error['msg'][1:]}, found {error['input']!r}"


def _names_at(schema: type[BaseModel], location: Sequence[str]) -> list[str]:
    current: type[BaseModel] = schema
    for part in location:
        if part in current.model_fields:
            current = _section(current.model_fields[part].annotation) or current
    return [info.alias or name for name, info in current.model_fields.items()]
