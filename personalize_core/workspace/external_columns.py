"""External columns: folders of images made elsewhere that stand beside the methods in a comparison.

data/external/LABEL/CONCEPT.yaml says where the images of a column lie and how they are to be read. They are only read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field

from personalize_core.errors import InputError, listed, shown
from personalize_core.external.layouts import read_listing
from personalize_core.external.listing import Listing
from personalize_core.files.atomic import write_bytes
from personalize_core.files.outside import is_there, user_path
from personalize_core.files.typed_yaml import validated
from personalize_core.methods import METHOD_NAMES
from personalize_core.workspace.sections import Section
from personalize_core.workspace.store import REFERENCES, Store, is_label

Text = Annotated[str, Field(min_length=1, max_length=1000)]
BESIDE_METHODS = ("class_nouns", "together")  # folders of data/analyses that stand beside those of methods
LABEL = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}")  # a folder's name, a partition key and a variant's name at once


class ExternalColumn(Section):
    """One concept's images of an external column."""

    folder: Text  # of the images; relative to the workspace, or absolute
    layout: Text | None = None  # None: the one that the folder looks like
    options: dict[str, str] = {}  # of the layout
    mention: Text | None = None  # what stands for the concept in the prompts; None: the placeholder or the class noun
    source: Text | None = None  # what made the images; None: what the layout says of it, else not known

    def listing(self, store: Store) -> Listing:
        """Raises InputError where the folder is gone or is not as its layout wants it."""
        return read_listing(self.path(store), self.layout, self.options)

    def path(self, store: Store) -> Path:
        return store.root / user_path(self.folder)


def check_label(store: Store, label: str) -> None:
    """Raise InputError unless `label` can name an external column beside this workspace's methods and variants."""
    if not LABEL.fullmatch(label):
        raise InputError(
            f"{shown(label)} cannot be a column's label; use 1 to 63 lower-case letters, digits, '-', '_' and '.', "
            "beginning with a letter or digit, such as 'flux-lora'"
        )
    variants = {name for method in store.params.method_names for name in store.params.variants.get(method, {})}
    if label in (*METHOD_NAMES, REFERENCES, *BESIDE_METHODS) or label in variants or not is_label(label):
        raise InputError(f"{label!r} is a name that this project uses, such as a method's; choose another label")


def read_column(store: Store, label: str, concept: str) -> ExternalColumn:
    """Raises InputError where there is no such column, or its description is damaged."""
    path = store.external(label, concept)
    if not is_there(path):
        known = [each for each, of in registered(store) if of == concept]
        raise InputError(
            f"there is no external column {label!r} of {concept!r}; there are {listed(known)}. "
            f"`personalize score FOLDER --concept {concept} --as {label}` adds it"
        )
    return validated(ExternalColumn, path)


def register(store: Store, label: str, concept: str, column: ExternalColumn) -> None:
    """Keep the description of a column.

    Raises:
        InputError: the label cannot be used, or stands for another folder of this concept already.
    """
    check_label(store, label)
    path = store.external(label, concept)
    if is_there(path):
        before = read_column(store, label, concept)
        if before.path(store).resolve() != column.path(store).resolve():
            raise InputError(
                f"{label!r} stands for {before.folder} already, and not for {column.folder}; choose another label, or "
                f"remove {path}"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    values = column.model_dump(exclude_defaults=True)
    write_bytes(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True).encode())


def registered(store: Store) -> list[tuple[str, str]]:
    """(label, concept) of every external column, sorted."""
    return sorted(_found(store))


def _found(store: Store) -> Iterator[tuple[str, str]]:
    known = set(store.concept_names())
    for path in (store.data / "external").glob("*/*.yaml"):
        if LABEL.fullmatch(path.parent.name) and path.stem in known:
            yield path.parent.name, path.stem
