"""YAML that people write, as typed values; what is wrong is said by key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from personalize_core.errors import InputError, listed, shown
from personalize_core.files.bounds import NO_NUMBER, beyond_limits, switches_for_numbers
from personalize_core.files.outside import read_yaml

Values = dict[str, Any]
M = TypeVar("M", bound=BaseModel)

MOST_PROBLEMS = 10  # in one message
_OF_NUMBERS = {"greater_than", "greater_than_equal", "less_than", "less_than_equal", "multiple_of"}  # types of errors
SECRET = "secret"  # type of an error about a value that no message may repeat


def validated(kind: type[M], path: Path) -> M:
    """A file of YAML as `kind`.

    Raises:
        InputError: it cannot be read, it is not YAML, or keys or values are wrong; the message says which.
    """
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold keys and their values, a line for each; they are {listed(keys_of(kind))}")
    wrong = list(switches_for_numbers(values, kind))
    try:
        made = kind.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{path}: {_first([*wrong, *_explain(error, kind)])}") from None
    if wrong:
        raise InputError(f"{path}: {_first(wrong)}")
    return made


def build(kind: type, values: Values, where: str) -> Any:
    """Options made from values that a person wrote.

    Raises:
        InputError: an unknown key or a value that is not allowed; the message lists what is.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{where} = {shown(values)}: it should be keys and their values")
    wrong = list(switches_for_numbers(values, kind))
    try:
        made = kind(**{str(key): value for key, value in values.items()})
    except ValidationError as error:
        raise InputError(f"{where}: {_first([*wrong, *_explain(error, kind)])}") from None
    if wrong := [*wrong, *_beyond_limits(made)]:
        raise InputError(f"{where}: {_first(wrong)}")
    return made


def _beyond_limits(made: Any) -> Iterator[str]:
    for key in keys_of(type(made)):
        value = getattr(made, key)
        if isinstance(value, int | float) and not isinstance(value, bool) and (wrong := beyond_limits(key, value)):
            yield f"{key} = {shown(value)}: {wrong}"


def _explain(error: ValidationError, kind: Any) -> list[str]:
    return [_explain_one(each, kind) for each in error.errors(include_url=False)]


def _first(problems: list[str]) -> str:
    said = list(dict.fromkeys(problems))
    beyond = [f"and {len(said) - MOST_PROBLEMS} more"] if len(said) > MOST_PROBLEMS else []
    return "; ".join([*said[:MOST_PROBLEMS], *beyond])


def _explain_one(error: Any, kind: Any) -> str:
    key = ".".join(str(part)[:100] for part in error["loc"])
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return unknown_key(key, keys_of(kind) if len(error["loc"]) == 1 else [])
    if error["type"] == "missing":
        return f"the key {key!r} is missing"
    said = error["msg"].removeprefix("Value error, ")
    if error["type"] in ("model_type", "dataclass_type", "dict_type"):  # pydantic names our classes, and Python's
        said = "it should be keys and their values"
        if error["input"] is None:  # a line that ends at the colon
            said += "; write them below it, or {} for none"
    if error["type"] == SECRET:
        return f"{key}: {said}" if key else said
    if isinstance(error["input"], bool) and error["type"] in _OF_NUMBERS:  # of 1 or 0: see switches_for_numbers
        said = NO_NUMBER
    return f"{key} = {shown(error['input'])}: {said}" if key else said  # no key: several that contradict each other


def unknown_key(key: str, known: list[str]) -> str:
    mend = f"known are {listed(known)}" if known else "take it out, or mend its spelling"
    return f"there is no key {shown(key)}; {mend}"


def as_written(value: Any) -> str:
    """A value as it stands in a line of YAML."""
    return yaml.safe_dump(value, default_flow_style=True).splitlines()[0]


def keys_of(kind: Any) -> list[str]:
    return list(getattr(kind, "__pydantic_fields__", {}))
