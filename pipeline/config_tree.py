"""A config file and overrides as a plain tree, before pydantic sees it, and what is wrong with it in a sentence."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.errors import ConfigError

Tree = dict[str, Any]


def read_tree(file: Path, *, sections: Sequence[str]) -> Tree:
    """Section → its keys, as the file has them. Raises ConfigError."""
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read as a config file: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid YAML: {' '.join(str(error).split())}.") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{file} must hold sections ({', '.join(sections)}), not a {type(tree).__name__}.")
    # A section that is named but left empty (`serve:`) reads as None; it means "all defaults".
    return {key: {} if value is None else value for key, value in tree.items()}


def apply_override(tree: Tree, override: str) -> None:
    """`section.key=value` on top, the value as YAML has it. Raises ConfigError."""
    name, separator, text = override.partition("=")
    section, dot, key = name.strip().partition(".")
    if not separator or not dot or not key:
        raise ConfigError(f"--set {override!r} does not read as section.key=value.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {override!r}: the value is not valid YAML.") from None
    values = tree.setdefault(section, {})
    if not isinstance(values, dict):
        raise ConfigError(f"{section} in the config file must hold keys, not a {type(values).__name__}.")
    values[key] = value


def explained(error: ValidationError, config: type[BaseModel]) -> ConfigError:
    """The first problem as one sentence."""
    first = error.errors()[0]
    # Union members (`int | "auto"`) append their own name to the location; the user only knows section.key.
    where = [str(part) for part in first["loc"][:2]]
    name = ".".join(where)
    if first["type"] == "extra_forbidden":
        valid = list(_fields(config, where[:-1]))
        near = difflib.get_close_matches(where[-1], valid, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"valid names are {', '.join(valid)}."
        return ConfigError(f"Unknown config key {name}; {hint}")
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return ConfigError(f"Config {name}: {message}." if name else f"Config: {message}.")
    return ConfigError(f"Config {name}: {message} (it is {first['input']!r}).")


def _fields(config: type[BaseModel], where: Sequence[str]) -> Mapping[str, Any]:
    if not where:
        return config.model_fields
    section = config.model_fields[where[0]].annotation
    assert isinstance(section, type) and issubclass(section, BaseModel)
    return section.model_fields
