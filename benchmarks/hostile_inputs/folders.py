"""Folders of concepts that arrive, in data/concepts and elsewhere: a bad one is its own reason, a good one arrives."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.hostile_inputs.runner import Case
from personalize_core.errors import printable
from personalize_core.workspace import arrival
from personalize_core.workspace.store import Store
from tests.mutated import mutants
from tests.watching import concept
from tests.workspace.test_arrival import DESCRIBED, SPOILED

MUTANTS = 30  # of concept.yaml
BAD_NAMES = (b"Dog 7", b"a|b", b"dog...7", b"dog\xe9", b"x" * 64, b"-dog", b"[red]", b"a\nb", "犬".encode())


def here(folder: Path) -> dict[str, str | None]:
    """Each folder of data/concepts after two looks, with the reason why it is no concept."""
    store = Store(folder / "workspace")
    store.data.mkdir(parents=True, exist_ok=True)
    store.concepts.symlink_to(folder / "input")
    arrival.look(store)
    return {name: found.problem for name, found in arrival.look(store).items()}


def elsewhere(folder: Path) -> dict[str, str | None]:
    """The same, of folders that arrive elsewhere and are brought."""
    store = Store(folder / "workspace")
    for _ in range(2):
        there = arrival.listing(str(folder / "input"))
        arrival.bring(store, str(folder / "input"), there, gone=[])
    return dict.fromkeys(store.concept_names()) | arrival.refusals(store)


LOOKS = {"here": here, "elsewhere": elsewhere}


def case(name: str, look: str, spoil: Callable[[Path], Any], reason: str, bad: str = "bad") -> Case:
    """A folder that cannot be used, between two that can."""

    def give(folder: Path) -> None:
        for each in ("a-good-one", "z-good-one"):
            concept(folder / "input", each)
        spoil(concept(folder / "input", "bad"))

    def holds(found: dict[str, str | None]) -> bool:
        said = found.get(bad) or ""
        others = {name: problem for name, problem in found.items() if name != bad}
        return reason in said and 10 < len(said) < 4000 and others == {"a-good-one": None, "z-good-one": None}

    return Case(f"folders/{look}: {name}", give, LOOKS[look], "accepted", holds)


def reason_elsewhere(name: str, reason: str) -> str:
    """What is no regular file there is refused before it is copied; see tests/workspace/test_arrival.py."""
    if name.startswith(("fifo-", "device-", "lost-", "loop-", "folder-")):  # and an empty folder is no file
        return ""
    return reason


def renamed(name: bytes) -> Callable[[Path], Any]:
    return lambda folder: os.rename(folder, os.fsencode(folder.parent) + b"/" + name)


def prepare(folder: Path) -> None:
    """Every case makes its own folders."""


def cases(folder: Path) -> Iterator[Case]:
    for look in LOOKS:
        for name, (spoil, reason) in SPOILED.items():
            yield case(name, look, spoil, reason_elsewhere(name, reason) if look == "elsewhere" else reason)
        for name in BAD_NAMES:
            known = printable(os.fsdecode(name))
            yield case(f"name {name!r}", look, renamed(name), "cannot be a concept's name", known)
        for number, content in enumerate(mutants(DESCRIBED.format(name="bad").encode(), MUTANTS, seed=2)):
            yield mutated(f"mutated concept.yaml {number}", look, content)


def mutated(name: str, look: str, content: bytes) -> Case:
    """It may still describe a concept."""

    def spoil(folder: Path) -> None:
        (folder / "concept.yaml").write_bytes(content)

    plain = case(name, look, spoil, "")

    def holds(found: dict[str, str | None]) -> bool:
        said = found["bad"]
        others = {name: problem for name, problem in found.items() if name != "bad"}
        return (said is None or 10 < len(said) < 4000) and others == {"a-good-one": None, "z-good-one": None}

    return Case(plain.name, plain.give, plain.read, "accepted", holds)
