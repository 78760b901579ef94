"""What all sections of params.yaml share."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from personalize_core.errors import listed

MOST_SEED = 2**63 - 1  # what every generator of random numbers takes


class Section(BaseModel):
    """A part of params.yaml: an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def each_once(names: list[str]) -> list[str]:
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ValueError(f"{listed(map(repr, twice))} stands there more than once; name each once")
    return names


Names = Annotated[list[str], Field(min_length=1), AfterValidator(each_once)]
