"""What the configurations of PEFT's adapters take, read from PEFT's source: to import PEFT is to import torch."""

from __future__ import annotations

import ast
import builtins
import typing
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from personalize_core.errors import InputError, listed, shown

MISSING = (
    "this method needs the package peft, which is not installed; install it with `pip install 'personalize[peft]'`"
)
MOST_RANK = 4096
_BASES = ("PeftConfig", "LycorisConfig")
# Beside the adapter they train or rebuild the base model, ask for what only a language model has, or mean one thing
# where PEFT could build a CUDA extension and another elsewhere (BOFT's butterfly factor, which is then 1).
LEFT_OUT = {
    "alora_invocation_tokens", "bias", "boft_n_butterfly_factor", "ensure_weight_tying", "fan_in_fan_out",
    "layer_replication", "megatron_config", "megatron_core", "modules_to_save", "qalora_group_size", "runtime_config",
    "save_projection", "target_modules_to_tie", "target_parameters", "trainable_token_indices", "use_qalora",
}  # fmt: skip


class _Object:
    """A type that PEFT defines itself: nothing that is written in params.yaml is of it."""


class _Names(dict[str, Any]):
    """What a name in an annotation means."""

    def __missing__(self, name: str) -> Any:
        return vars(typing).get(name) or vars(builtins).get(name) or _Object


def is_installed() -> bool:
    return find_spec("peft") is not None


def check_options(kind: str, values: Mapping[str, Any], where: str) -> None:
    """Check that PEFT's configuration of this kind of adapter takes these values.

    Args:
        kind: as PEFT's folder of it is called, e.g. "lora".
        where: what precedes a key in messages.

    Raises:
        InputError: PEFT is not installed, a key is unknown, or a value is of another type.
    """
    known = known_options(kind)
    for key, value in values.items():
        if key not in known:
            raise InputError(f"there is no key {shown(f'{where}.{key}')}; known are {listed(sorted(known))}")
        try:
            TypeAdapter(known[key], config=ConfigDict(strict=True, arbitrary_types_allowed=True)).validate_python(value)
        except ValidationError as error:
            said = " or ".join(dict.fromkeys(one["msg"] for one in error.errors(include_url=False)))
            raise InputError(f"{where}.{key} = {shown(value)}: {said}") from None
        if key == "r" and value > MOST_RANK:
            raise InputError(f"{where}.r = {shown(value)}: it should be at most {MOST_RANK:,}")


@cache
def known_options(kind: str) -> dict[str, Any]:
    """Key -> type, of all that can stand in params.yaml."""
    found = find_spec("peft")
    if found is None or found.origin is None:
        raise InputError(MISSING)
    tuners, annotated = Path(found.origin).parent / "tuners", []
    for file in (tuners / kind / "config.py", tuners / "lycoris_utils.py"):
        classes = [node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
        (own,) = [node for node in classes if any(ast.unparse(base) in _BASES for base in node.bases)]
        annotated += [node for node in own.body if isinstance(node, ast.AnnAssign)]
        if "LycorisConfig" not in map(ast.unparse, own.bases):
            break
    types = {ast.unparse(node.target): eval(ast.unparse(node.annotation), {}, _Names()) for node in annotated}
    return {key: each for key, each in types.items() if key not in LEFT_OUT and _Object.__name__ not in repr(each)}
