"""Results that were damaged after they were made: they are refused, or made again with the bytes that they had."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from benchmarks.hostile_inputs import workspaces
from benchmarks.hostile_inputs.runner import Case, Right, anything
from personalize_core import steps
from personalize_core.files.atomic import MANIFEST
from personalize_core.workspace.store import Store
from tests.mutated import mutants

MUTANTS = 14  # of each of MUTATED
METHOD, CONCEPT = workspaces.METHODS[1], workspaces.CONCEPT
TIMED = ("costs", "report", ".work")  # folders of data/ that state seconds, or notes on what has been looked at
ARTIFACT, GRID = f"artifacts/{METHOD}/{CONCEPT}", f"grids/{METHOD}/{CONCEPT}"
SCORES, COMPARISON = f"metrics/{METHOD}/{CONCEPT}", "comparison"
GIVEN = ("workspace/params.yaml", "workspace/data/concepts", "workspace/data/prompts")
MUTATED = (
    f"{ARTIFACT}/config.json",
    f"{ARTIFACT}/manifest.json",
    f"{GRID}/grid.json",
    f"{GRID}/manifest.json",
    f"{SCORES}/absent.json",
    f"{SCORES}/manifest.json",
)


@cache
def made(root: Path) -> dict[str, bytes]:
    """What a run leaves, without manifests and what states seconds: path -> content."""
    found = {}
    for path in sorted((root / "data").rglob("*")):
        name = path.relative_to(root / "data")
        if path.is_file() and path.name != MANIFEST and name.parts[0] not in TIMED:
            found[name.as_posix()] = path.read_bytes()
    return found


def look(folder: Path) -> list[str]:
    """`personalize plan` and `personalize explain`: what they say is wrong."""
    store = Store(folder / "workspace")
    planned = [f"{cell.first}: {cell.why}" for cell in steps.plan(store)]
    return [*planned, *steps.explain(store, store.scores(METHOD, CONCEPT)).all_problems()]


def sample(folder: Path) -> dict[str, bytes]:
    store = Store(folder / "workspace")
    steps.sample_grid(store, CONCEPT, METHOD)
    return made(store.root)


def compare(folder: Path) -> dict[str, bytes]:
    store = Store(folder / "workspace")
    steps.compare(store)
    steps.report(store)
    return made(store.root)


def run(folder: Path) -> dict[str, bytes]:
    store = Store(folder / "workspace")
    workspaces.chain(store)
    return made(store.root)


READERS: dict[str, Callable[[Path], Any]] = {"look": look, "sample": sample, "compare": compare, "run": run}
ANSWERS_FOR = {"sample": GRID, "compare": COMPARISON, "run": ""}  # what a step makes: the beginnings of paths


def case(name: str, how: str, source: Path, damage: Callable[[Path], Any], told: bool = True) -> Case:
    """`told`: whether `look` must say something, since the damage is to what a result is."""

    def give(folder: Path) -> None:
        damage(workspaces.copied(source, folder) / "data")

    def as_made(found: dict[str, bytes]) -> bool:
        of_step = ANSWERS_FOR[how]
        kept = {path: content for path, content in made(source).items() if path.startswith(of_step)}
        same = all(found.get(path) == content for path, content in kept.items())
        return same or (how == "compare" and left_out(found))

    holds = as_made if how != "look" else bool if told else anything
    right: Right = "either"
    return Case(f"results/{how}: {name}", give, READERS[how], right, holds, originals=GIVEN)


def left_out(found: dict[str, bytes]) -> bool:
    """Does the comparison say that what was damaged is missing from it?"""
    return f"{METHOD}/{CONCEPT}" in json.loads(found[f"{COMPARISON}/summary.json"])["missing"]


def change(name: str, to: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    return lambda data: (data / name).write_bytes(to((data / name).read_bytes()))


def json_with(name: str, **values: Any) -> Callable[[Path], Any]:
    return change(name, lambda content: json.dumps(json.loads(content) | values).encode())


def not_a_number(content: bytes) -> bytes:
    tensors = {name: torch.full_like(tensor, torch.nan) for name, tensor in load(content).items()}
    again = save(tensors)
    return again + bytes(max(0, len(content) - len(again)))


def swap(one: str, other: str) -> Callable[[Path], Any]:
    def damage(data: Path) -> None:
        first, second = (data / one).read_bytes(), (data / other).read_bytes()
        (data / one).write_bytes(second)
        (data / other).write_bytes(first)

    return damage


def instead(name: str, make: Callable[[Path], Any]) -> Callable[[Path], Any]:
    return lambda data: ((data / name).unlink(), make(data / name))


IMAGE = f"{GRID}/{METHOD}/00_00.png"
DAMAGES: dict[str, Callable[[Path], Any]] = {
    "weights NaN of the same size": change(f"{ARTIFACT}/weights.safetensors", not_a_number),
    "weights with a bit flipped": change(f"{ARTIFACT}/weights.safetensors", lambda it: it[:-1] + bytes([it[-1] ^ 1])),
    "weights cut": change(f"{ARTIFACT}/weights.safetensors", lambda it: it[: len(it) // 2]),
    "weights gone": lambda data: (data / ARTIFACT / "weights.safetensors").unlink(),
    "config of another concept": json_with(f"{ARTIFACT}/config.json", concept={"name": 7}),
    "config of no type": json_with(f"{ARTIFACT}/config.json", config=[], base_model=None),
    "config nested deeply": change(f"{ARTIFACT}/config.json", lambda it: b"[" * 100_000),
    "config a list": change(f"{ARTIFACT}/config.json", lambda it: b"[]"),
    "manifest without hashes": json_with(f"{ARTIFACT}/manifest.json", files={"weights.safetensors": {}}),
    "manifest a list": change(f"{ARTIFACT}/manifest.json", lambda it: b"[]"),
    "manifest cut": change(f"{GRID}/manifest.json", lambda it: it[: len(it) // 2]),
    "manifest a FIFO": instead(f"{GRID}/manifest.json", os.mkfifo),
    "manifest of scores nested deeply": change(f"{SCORES}/manifest.json", lambda it: b'{"a":' * 100_000),
    "two images swapped": swap(IMAGE, f"{GRID}/{METHOD}/00_01.png"),
    "an image gone": lambda data: (data / IMAGE).unlink(),
    "an image empty": change(IMAGE, lambda it: b""),
    "an image that is a device": instead(IMAGE, lambda path: os.symlink("/dev/zero", path)),
    "grid.json of other templates": json_with(f"{GRID}/grid.json", templates=7),
    "grid.json a list": change(f"{GRID}/grid.json", lambda it: b"[]"),
    "scores cut": change(f"{SCORES}/scores.parquet", lambda it: it[: len(it) // 2]),
    "scores empty": change(f"{SCORES}/scores.parquet", lambda it: b""),
    "scores a FIFO": instead(f"{SCORES}/scores.parquet", os.mkfifo),
    "reasons a number": change(f"{SCORES}/absent.json", lambda it: b"7"),
    "reasons of no shape": change(f"{SCORES}/absent.json", lambda it: b'[{"x": 1}, 7]'),
}


def prepare(folder: Path) -> None:
    workspaces.finished(folder / "finished")


def cases(folder: Path) -> Iterator[Case]:
    source = folder / "finished"
    made(source)  # once, for all forks
    for how in READERS:
        yield case("nothing damaged", how, source, lambda data: None, told=False)
        for name, damage in DAMAGES.items():
            yield case(name, how, source, damage)
    ways = ("look", "sample", "compare", "look", "sample", "compare", "run")
    for name in MUTATED:
        content = (source / "data" / name).read_bytes()
        for number, mutant in enumerate(mutants(content, MUTANTS, seed=5)):
            how = ways[number % len(ways)]

            def write(data: Path, name: str = name, mutant: bytes = mutant) -> None:
                (data / name).write_bytes(mutant)

            described = mutant != content and not name.endswith("manifest.json")
            yield case(f"mutated {name} {number}", how, source, write, told=described)
