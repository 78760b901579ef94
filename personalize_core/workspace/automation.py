"""params.yaml, automation: what the pipeline does by itself."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from personalize_core.concepts.concept import check_name
from personalize_core.files.http import LOOPBACK
from personalize_core.workspace.cron import check_cron
from personalize_core.workspace.sections import Names, Section, each_once

# What holds a secret: the name of a variable of the environment, never the secret itself.
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,99}$")]
Address = Annotated[str, Field(pattern=r"^[^@\s<>,;]+@[^@\s<>,;]+$", max_length=320)]


class Email(Section):
    """Messages by SMTP."""

    to: Annotated[list[Address], Field(min_length=1)]
    sender: Address
    host: Annotated[str, Field(min_length=1, max_length=255)] = "localhost"
    port: Annotated[int, Field(ge=1, le=65535)] = 25
    security: Literal["none", "starttls", "tls"] = "none"
    user: Annotated[str, Field(min_length=1)] | None = None
    password: Variable | None = None  # the environment's variable that holds it

    @model_validator(mode="after")
    def _safe(self) -> Email:
        if (self.user is None) != (self.password is None):
            raise ValueError("user and password come together; password names a variable of the environment")
        if self.user and self.security == "none" and self.host not in LOOPBACK:
            raise ValueError(f"the password would travel to {self.host} in clear; set security to starttls or tls")
        return self


class Notify(Section):
    """Who is told of what failed, and of what a night has brought."""

    webhook: Variable | None = None  # the environment's variable that holds its URL, as of Slack's incoming webhooks
    email: Email | None = None
    command: Annotated[list[str], Field(min_length=1)] | None = None  # it reads the message as JSON from its input
    link: Annotated[str, Field(pattern=r"^https?://\S+$", max_length=1000)] = "http://127.0.0.1:3000"  # where the UI is
    digest: Annotated[str, Field(pattern=r"^([01][0-9]|2[0-3]):[0-5][0-9]$")] | None = "07:00"  # of the night, each day

    @property
    def channels(self) -> tuple[str, ...]:
        """Those that are configured."""
        return tuple(name for name in ("webhook", "email", "command") if getattr(self, name) is not None)


class Automation(Section):
    """What the pipeline does by itself. No result depends on it."""

    arrival: Annotated[str, Field(min_length=1)] = "data/concepts"  # a folder, or an address that fsspec understands
    continuous: bool = False  # train a concept as soon as it has settled, and not only at night
    nightly: Annotated[str, AfterValidator(check_cron)] = "0 2 * * *"  # cron: when whatever is out of date is trained
    together: bool = False  # one run for all stale methods of a concept, which loads the base model once
    notify: Notify = Notify()
    keep_runs: Annotated[int, Field(ge=1, le=36500)] | None = None  # days; None: Dagster's history keeps all runs
    protocols: Annotated[list[str], AfterValidator(each_once)] = []  # of data/protocols: those with assets of their own
    repeats: Annotated[int, Field(ge=0, le=100)] = 0  # further trainings with assets of their own
    # Where a static server serves data/: grids then are links in Dagster's history, in place of copies.
    base_url: Annotated[str, Field(pattern=r"^https?://[^\s()<>\[\]\"'`]+$")] | None = None
    canary: dict[str, Names] = {}  # concept -> methods: the cells that are run again after an upgrade

    @field_validator("canary")
    @classmethod
    def _concept_names(cls, cells: dict[str, list[str]]) -> dict[str, list[str]]:
        for concept in cells:
            check_name(concept)
        return cells
