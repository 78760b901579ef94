"""Evaluation protocols: what is sampled and how it is scored, a file of data/protocols for each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from personalize_core.concepts.prompt_lists import read_list
from personalize_core.errors import InputError, listed
from personalize_core.files.outside import is_there, read_json
from personalize_core.files.typed_yaml import validated
from personalize_core.workspace.encoder_settings import Encoders
from personalize_core.workspace.sampling_settings import PromptList, Sampling
from personalize_core.workspace.sections import MOST_SEED

CATALOGUE = "dataset.json"  # in a collection's folder: its concepts, and the list of each


class Protocol(Sampling):
    """A published protocol, or one of ours: it takes the place of params.yaml's sections `sampling` and `encoders`.

    What it leaves out, seed and encoders, params.yaml says. It trains nothing.
    """

    title: str
    source: str  # where its numbers come from
    notes: tuple[str, ...] = ()  # what is uncertain, and where we depart from the source
    concepts: tuple[str, ...] = ()  # their names; none, or written as "all": all of the workspace
    chosen: str = ""  # how the source chose its concepts, in words
    prompts: tuple[PromptList, ...] = ()
    collection: str | None = None  # in place of `prompts`: a folder of data/prompts that is not ours to ship
    seed: Annotated[int, Field(ge=0, le=MOST_SEED)] | None = None  # of the initial noise; training keeps params.yaml's
    encoders: Encoders | None = None

    @field_validator("concepts", mode="before")
    @classmethod
    def _all(cls, written: Any) -> Any:
        return () if written == "all" else written

    @model_validator(mode="after")
    def _one_source_of_prompts(self) -> Protocol:
        if bool(self.prompts) == bool(self.collection):
            raise ValueError("write either prompts or a collection: they say which lists are sampled")
        return self


@dataclass(frozen=True)
class Prompts:
    """What is sampled of one concept."""

    name: str  # of the list
    templates: list[str]
    without_identity: frozenset[int]  # places in the list, from 0, that identity metrics skip


def read_protocol(path: Path) -> Protocol:
    """A file of data/protocols.

    Raises:
        InputError: there is no such protocol, or it is damaged.
    """
    if not is_there(path):
        known = sorted(path.stem for path in path.parent.glob("*.yaml"))
        raise InputError(f"there is no protocol {path.stem!r} in {path.parent}; there are {listed(known)}")
    return validated(Protocol, path)


def read_prompts(path: Path, rows: PromptList) -> Prompts:
    """A list of data/prompts, as a protocol or params.yaml uses it.

    Raises:
        InputError: there is no such list, it is damaged, or it has no such row.
    """
    templates = read_list(path)
    if beyond := [row for row in rows.without_identity if row > len(templates)]:
        raise InputError(
            f"{path} has {len(templates)} prompts, and no row {beyond[0]} that identity metrics could skip; correct "
            "without_identity"
        )
    return Prompts(rows.name, templates, frozenset(row - 1 for row in rows.without_identity))


def read_collection(folder: Path, protocol: str) -> dict[str, Path]:
    """Concept -> its list of prompts, as the folder's own catalogue has it: that of CustomConcept101.

    A list of objects with "instance_data_dir", a folder of the concept's name, and "prompt_filename".

    Raises:
        InputError: the folder is not there, or its catalogue is damaged.
    """
    path = folder / CATALOGUE
    if not is_there(path):
        raise InputError(
            f"the prompts of protocol {protocol!r} may not be shipped with this project: their licence allows "
            f"noncommercial research only; where it suits you, copy or link the folder that holds their "
            f"{CATALOGUE} and prompts/ to {folder}"
        )
    try:
        entries = read_json(path)
        return {Path(entry["instance_data_dir"]).name: folder / entry["prompt_filename"] for entry in entries}
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{path} is in another format ({error!r}); it should list objects with 'instance_data_dir' "
            "and 'prompt_filename'"
        ) from None
