"""YAML that people write, as typed values; what is wrong is said by key."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from personalize_core.errors import InputError, listed

Values = dict[str, Any]
M = TypeVar("M", bound=BaseModel)

YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C a ninth of the time; every step of a cell reads params.yaml


def validated(kind: type[M], path: Path) -> M:
    """A file of YAML as `kind`.

    Raises:
        InputError: it is not YAML, or a key or value is wrong; the message says which.
    """
    try:
        values = yaml.load(path.read_text(), Loader=YAML)
        if not isinstance(values, dict):
            raise InputError(
                f"{path} must hold keys and their values, a line for each; they are {listed(keys_of(kind))}"
            )
        return kind.model_validate(values)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        raise InputError(f"{path}: {_explain(error, kind)}") from None


def build(kind: type, values: Values, where: str) -> Any:
    """Options made from values that a person wrote.

    Raises:
        InputError: an unknown key or a value that is not allowed; the message lists what is.
    """
    try:
        return kind(**(values or {}))
    except ValidationError as error:
        raise InputError(f"{where}: {_explain(error, kind)}") from None


def _explain(error: ValidationError, kind: Any) -> str:
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    fields = keys_of(kind)
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return unknown_key(key, fields if len(first["loc"]) == 1 else [])
    if first["type"] == "missing":
        return f"the key {key!r} is missing"
    said = first["msg"].removeprefix("Value error, ")
    return f"{key} = {first['input']!r}: {said}" if key else said  # no key: several that contradict each other


def unknown_key(key: str, known: list[str]) -> str:
    return f"there is no key {key!r}; {f'known are {listed(known)}' if known else 'take it out, or mend its spelling'}"


def as_written(value: Any) -> str:
    """A value as it stands in a line of YAML."""
    return yaml.safe_dump(value, default_flow_style=True).splitlines()[0]


def keys_of(kind: Any) -> list[str]:
    return list(getattr(kind, "__pydantic_fields__", {}))
