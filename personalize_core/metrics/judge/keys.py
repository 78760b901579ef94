"""The key of a judge's server, which is in no file."""

from __future__ import annotations

import os

from personalize_core.errors import InputError


def key_of(variable: str | None) -> str | None:
    """The key in that environment variable; None where none is named.

    Raises:
        InputError: the variable is not set, or holds what cannot be a key.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        state = "is not set" if not key else "holds what cannot be a key"
        raise InputError(
            f"the environment's variable {variable}, which judge.key_variable names, {state} in this process; set it "
            "where this command, `dvc repro` or Dagster is started, or write `judge: null` into params.yaml"
        )
    return key
