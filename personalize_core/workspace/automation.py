"""params.yaml, automation: what the pipeline does by itself."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from personalize_core.workspace.sections import Names, Section


class Automation(Section):
    """What the pipeline does by itself. No result depends on it."""

    arrival: Annotated[str, Field(min_length=1)] = "data/concepts"  # a folder, or an address that fsspec understands
    continuous: bool = False  # train a concept as soon as it has settled, and not only at night
    nightly: Annotated[str, Field(min_length=1)] = "0 2 * * *"  # cron: when whatever is out of date is trained
    canary: dict[str, Names] = {}  # concept -> methods: the cells that are run again after an upgrade
