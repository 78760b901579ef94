"""params.yaml, automation: what the pipeline does by itself."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field, field_validator

from personalize_core.concepts.concept import check_name
from personalize_core.methods import check_method
from personalize_core.workspace.cron import check_cron
from personalize_core.workspace.sections import Names, Section


class Automation(Section):
    """What the pipeline does by itself. No result depends on it."""

    arrival: Annotated[str, Field(min_length=1)] = "data/concepts"  # a folder, or an address that fsspec understands
    continuous: bool = False  # train a concept as soon as it has settled, and not only at night
    nightly: Annotated[str, AfterValidator(check_cron)] = "0 2 * * *"  # cron: when whatever is out of date is trained
    canary: dict[str, Names] = {}  # concept -> methods: the cells that are run again after an upgrade

    @field_validator("canary")
    @classmethod
    def _known_cells(cls, cells: dict[str, list[str]]) -> dict[str, list[str]]:
        for concept, methods in cells.items():
            check_name(concept)
            for method in methods:
                check_method(method)
        return cells
