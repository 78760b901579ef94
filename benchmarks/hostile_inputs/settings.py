"""What a user writes: params.yaml, protocols, descriptions of concepts, lists of prompts and nouns."""

from __future__ import annotations

import copy
import functools
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.hostile_inputs import workspaces
from benchmarks.hostile_inputs.runner import Case, Right, anything
from personalize_core import steps
from personalize_core.analyses.class_nouns import nouns_of
from personalize_core.concepts.concept_files import read_concept
from personalize_core.concepts.prompt_lists import read_list
from personalize_core.errors import together
from personalize_core.workspace.params import Params
from personalize_core.workspace.protocols import read_protocol
from personalize_core.workspace.store import Store
from tests.files.test_outside import LAUGHS as FEW_LAUGHS
from tests.mutated import mutants
from tests.workspace.test_arrival import LAUGHS
from tests.workspace.test_cron import BAD, GOOD
from tests.workspace.test_protocols import SHORT

MUTANTS = 50  # of each of three kinds of file
PARAMS, PROTOCOL = "params.yaml", "data/protocols/short.yaml"
LIST, CONCEPT = "data/prompts/two.txt", f"data/concepts/{workspaces.CONCEPT}/concept.yaml"
DESCRIBED = 'placeholder: "<rex>"\nclass_noun: dog\n'
GIVEN = tuple(f"workspace/{name}" for name in (PARAMS, "data/concepts", "data/prompts", "data/protocols"))
DEEP, DEEPER = "[" * 100_000, "{a: " * 100_000


def check(folder: Path) -> Params:
    """`personalize check`."""
    store = Store(folder / "workspace")
    if problems := steps.problems_of_workspace(store):
        raise together(problems)
    return store.params


READERS: dict[str, Callable[[Path], Any]] = {
    PARAMS: lambda folder: Params.read(folder / "input"),
    PROTOCOL: lambda folder: read_protocol(folder / "input"),
    LIST: lambda folder: read_list(folder / "input"),
    CONCEPT: lambda folder: read_concept(folder),
}


def in_workspace(
    name: str, source: Path, where: str, content: bytes | Callable[[Path], Any], right: Right, **more: Any
) -> Case:
    """`personalize check` of a workspace with another file at this place, or something else that is no file."""

    def give(folder: Path) -> None:
        path = workspaces.copied(source, folder) / where
        path.parent.mkdir(exist_ok=True)
        if callable(content):
            path.unlink(missing_ok=True)
            content(path)
        else:
            path.write_bytes(content)

    return Case(f"settings/{name}", give, check, right, **{"named": (Path(where).name,), "originals": GIVEN, **more})


def changed(values: dict, place: str, value: Any) -> bytes:
    found = copy.deepcopy(values)
    *outer, key = place.split(".") if place != "methods.textual_inversion" else ["methods", "textual_inversion"]
    functools.reduce(operator.getitem, outer, found)[key] = value
    return yaml.safe_dump(found, allow_unicode=True).encode()


ANY_FILE: dict[str, bytes] = {  # whichever settings it is: no YAML, or too much of it
    "empty": b"",
    "only a comment": b"# nothing\n",
    "a word": b"dog",
    "a list": b"- a\n- b\n",
    "null": b"null",
    "a number": b"3",
    "latin-1": b"title: caf\xe9\n",
    "utf-16": "title: x\n".encode("utf-16"),
    "utf-16 without a mark": "title: x\n".encode("utf-16-le"),
    "utf-32": "title: x\n".encode("utf-32"),
    "a pickle": b"\x80\4\x95" + bytes(30),
    "zeros": bytes(100),
    "100,000 brackets": DEEP.encode(),
    "100,000 braces": DEEPER.encode(),
    "100,000 dashes": b"- " * 100_000,
    "billion laughs": LAUGHS.encode(),
    "two to the 25": FEW_LAUGHS.encode(),
    "an alias of itself": b"a: &a [*a]\n",
    "merge keys": b"<<: {seed: 1}\nseed: 2\n",
    "a tag of Python's": b"seed: !!python/object/apply:os.system [true]\n",
    "a timestamp that is none": b"seed: 2026-99-99\n",
    "two documents": b"seed: 1\n---\nseed: 2\n",
    "tabs": b"seed:\n\t- 1\n",
    "a list as a key": b"[a]: 1\n",
    "5 MB": b"# " + b"x" * 5_000_000,
    "a number of 5000 digits": b"seed: " + b"9" * 5000,
    "html": b"<!DOCTYPE html><html></html>",
    "control characters": b"seed: \x07\x1b[2J\n",
}

NO_FILE: dict[str, Callable[[Path], Any]] = {
    "a FIFO": os.mkfifo,
    "a device": lambda path: os.symlink("/dev/zero", path),
    "a folder": Path.mkdir,
    "a dangling link": lambda path: os.symlink("/nowhere/file", path),
    "a link to itself": lambda path: os.symlink(path.name, path),
}


def values_of_params(source: Path) -> Iterator[Case]:
    """Single values of params.yaml that it cannot have, and some that it can."""
    values = yaml.safe_load((source / PARAMS).read_text())
    base, inf, nan = values["base_model"], float("inf"), float("nan")
    numbers = (True, None, "many", inf, nan, -1, 10**30, 1e308, 2.5, [1], {}, "1e3", "")
    for key in ("seed", "sampling.steps", "sampling.images_per_prompt", "class_images.steps"):
        for value in numbers:
            yield in_workspace(
                f"{key} = {value!r}", source, PARAMS, changed(values, key, value), "refused", named=(key,)
            )
    for value in (True, None, "many", inf, nan, -1, 1e38, 1e308, [1]):
        content = changed(values, "sampling.guidance", value)
        yield in_workspace(f"guidance = {value!r}", source, PARAMS, content, "refused", named=("guidance",))
    for key, wrong in {
        "steps": (True, 0, -1, inf, nan, 10**9, 10**30, 1.5, "x", None),
        "batch_size": (True, 0, 10**6, inf, "x"),
        "lr": (True, -1.0, inf, nan, 1e38, "x", []),
    }.items():
        for value in wrong:
            content = changed(values, "methods", {**values["methods"], "textual_inversion": {base: {key: value}}})
            yield in_workspace(f"{key} = {value!r}", source, PARAMS, content, "refused", named=(key,))
    for place, value, said in (
        ("base_model", "", "base_model"),
        ("base_model", "x" * 300, "x" * 20),
        ("base_model", "x" * 1_000_000, "base_model"),
        ("base_model", "/nowhere", "/nowhere"),
        ("base_model", "~nobody-of-this-name/x", "~nobody-of-this-name/x"),
        ("base_model", "a\0b", "a\\x00b"),
        ("base_model", "../" * 500, "base_model"),
        ("base_model", 7, "base_model"),
        ("sampling.prompts", "x" * 300, "x" * 20),
        ("sampling.prompts", "../../../etc/passwd", "prompt"),
        ("sampling.prompts", "none", "none"),
        ("sampling.prompts", 7, "prompts"),
        ("sampling.sampler", "euler", "sampler"),
        ("sampling.step", 3, "sampling.step"),
        ("sede", 3, "sede"),
        ("precision", "fp16", "precision"),
        ("encoders.text_image", ["x" * 300], "x" * 20),
        ("encoders.text_image", ["clip-b32:" + "x" * 300], "x" * 20),
        ("encoders.text_image", [], "text_image"),
        ("encoders.text_image", ["/nowhere", "/nowhere"], "text_image"),
        ("encoders.identity", ["mini-clip"], "mini-clip"),
        ("encoders.segmenter", "sam", "sam"),
        ("methods", [], "methods"),
        ("methods", {"dreamboth": {}}, "dreamboth"),
        ("methods", {"oft": {"Mini": {}}}, "Mini"),
        ("methods", {"oft": {base: {"r": 7}}}, "7"),
        ("variants", {"oft": {"../x": {}}}, "../x"),
        ("variants", {"oft": {"x" * 200: {}}}, "xxx"),
        ("variants", {"dreambooth": {"x": {"lag": True}}}, "lag"),
        ("automation", {"canary": {"rex": ["none"]}}, "none"),
        ("automation", {"arival": "x"}, "arival"),
    ):
        name = f"{place} = {str(value)[:30]!r} of {len(str(value))} characters"
        yield in_workspace(name, source, PARAMS, changed(values, place, value), "refused", named=(said,))
    for cron in (*BAD, *GOOD):
        content, right = changed(values, "automation", {"nightly": cron}), "refused" if cron in BAD else "accepted"
        yield in_workspace(f"nightly = {cron!r}", source, PARAMS, content, right, named=("nightly",))
    for key, value in (("seed", 0), ("seed", 2**40), ("sampling.guidance", 0), ("sampling.steps", 1000)):
        same = functools.partial(has, key=key, value=value)
        yield in_workspace(f"{key} = {value}", source, PARAMS, changed(values, key, value), "accepted", holds=same)
    whole = (source / PARAMS).read_bytes()
    yield in_workspace("a mark before it", source, PARAMS, b"\xef\xbb\xbf" + whole, "accepted")
    yield in_workspace("CRLF", source, PARAMS, whole.replace(b"\n", b"\r\n"), "accepted")
    yield in_workspace("a key twice", source, PARAMS, whole + b"\nseed: 99\n", "refused", named=("seed",))
    twice = whole.replace(b"methods:\n", b"methods:\n  base_model: {}\n")
    yield in_workspace("a method twice", source, PARAMS, twice, "refused", named=("base_model",))


def has(params: Params, key: str, value: Any) -> bool:
    return functools.reduce(getattr, key.split("."), params) == value


LISTS: dict[str, tuple[bytes, list[str] | None]] = {
    "plain": (b"a photo of a {}\n", ["a photo of a {}"]),
    "a mark": (b"\xef\xbb\xbfa photo of a {}\n", ["a photo of a {}"]),
    "a mark before a comment": (b"\xef\xbb\xbf# mine\na {}\n", ["a {}"]),
    "CRLF": (b"a {}\r\n\r\n# b\r\nthe {}\r\n", ["a {}", "the {}"]),
    "no end of line": (b"a {}", ["a {}"]),
    "other languages": ("{} 在海滩上\nein {} für dich".encode(), ["{} 在海滩上", "ein {} für dich"]),
    "brackets": (b"a {} [/blur] (x:1.2)\n", ["a {} [/blur] (x:1.2)"]),
    "latin-1": (b"a caf\xe9 with {}\n", None),
    "utf-16": ("a {}\n".encode("utf-16"), None),
    "utf-16 without a mark": ("a {}\n".encode("utf-16-be"), None),
    "empty": (b"", None),
    "only comments": (b"# a {}\n\n", None),
    "no slot": (b"a photo of a dog\n", None),
    "two slots": (b"a {} and a {}\n", None),
    "a named slot": (b"a {red} dog\n", None),
    "zeros": (bytes(100), None),
    "a pickle": (b"\x80\4\x95{}\n", None),
    "5 MB": (b"a {}\n" * 1_000_000, None),
    "a line of 4 MB": (b"x" * 4_100_000, None),
}


def lists(source: Path) -> Iterator[Case]:
    for name, (content, templates) in LISTS.items():
        right: Right = "refused" if templates is None else "accepted"

        def holds(found: list[str], templates: list[str] | None = templates) -> bool:
            return found == templates

        yield alone(f"prompts: {name}", LIST, content, right, holds)
        yield in_workspace(f"check with prompts: {name}", source, LIST, content, right)
    long = f"a {{}} {'by a very red mug ' * 30}\n".encode()
    yield in_workspace("check with prompts: too long", source, LIST, long, "refused", named=("'two'",))
    for name, content, nouns in (
        ("nouns: a mark", b"\xef\xbb\xbfdog\ncat\n", ["cat", "dog"]),
        ("nouns: CRLF", b"dog\r\nred_mug\r\n", ["dog", "red mug"]),
        ("nouns: latin-1", b"caf\xe9\n", None),
        ("nouns: utf-16", "dog\n".encode("utf-16"), None),
        ("nouns: none", b"7\n{}\n", None),
        ("nouns: empty", b"", None),
        ("nouns: 5 MB", b"dog\n" * 1_250_000, None),
    ):
        right = "accepted" if nouns else "refused"
        yield Case(
            f"settings/{name}",
            lambda folder, content=content: (folder / "input").write_bytes(content),
            lambda folder: nouns_of(str(folder / "input")),
            right,
            lambda found, nouns=nouns: found == nouns,
            ("input",),
        )
    for name, make in NO_FILE.items():
        yield Case(
            f"settings/nouns: {name}",
            lambda folder, make=make: make(folder / "input"),
            lambda folder: nouns_of(str(folder / "input")),
            "refused",
            named=("input",),
        )


def alone(
    name: str,
    kind: str,
    content: bytes,
    right: Right,
    holds: Callable[[Any], bool] = anything,
    named: Sequence[str] = (),
) -> Case:
    """The file by itself, read by the function that reads it."""
    inside = "concept.yaml" if kind == CONCEPT else "input"

    def give(folder: Path) -> None:
        (folder / inside).write_bytes(content)

    # a concept is named by its folder
    named = named or (inside, "concept 'case'")
    return Case(f"settings/{name}", give, READERS[kind], right, holds, named, originals=(inside,))


def prepare(folder: Path) -> None:
    workspaces.plain(folder / "plain")


def cases(folder: Path) -> Iterator[Case]:
    source = folder / "plain"
    yield in_workspace("nothing wrong", source, CONCEPT, DESCRIBED.encode(), "accepted")
    for where in (PARAMS, PROTOCOL, CONCEPT):
        for name, content in ANY_FILE.items():
            yield in_workspace(f"{where}: {name}", source, where, content, "refused")
    for where in (PARAMS, PROTOCOL, CONCEPT, LIST):
        for name, make in NO_FILE.items():
            yield in_workspace(f"{where}: {name}", source, where, make, "refused")
    yield from values_of_params(source)
    yield from protocols(source)
    yield from lists(source)
    for kind, content in (
        (PARAMS, (source / PARAMS).read_bytes()),
        (PROTOCOL, yaml.safe_dump(SHORT).encode()),
        (CONCEPT, DESCRIBED.encode()),
    ):
        for number, mutant in enumerate(mutants(content, MUTANTS, seed=3)):
            yield alone(f"mutated {kind} {number}", kind, mutant, "either")


def protocols(source: Path) -> Iterator[Case]:
    for change in ({}, {"notes": ["[/x] [red]"]}, {"title": "[/x]"}):
        content = yaml.safe_dump(SHORT | change).encode()
        yield in_workspace(f"protocol with {change}", source, PROTOCOL, content, "accepted")
    for change, said in (
        ({"title": None}, "title"),
        ({"step": 3}, "step"),
        ({"steps": float("inf")}, "steps"),
        ({"steps": 1500}, "steps"),
        ({"eta": 1.5}, "eta"),
        ({"eta": float("nan")}, "eta"),
        ({"seed": -1}, "seed"),
        ({"seed": True}, "seed"),
        ({"guidance": float("inf")}, "guidance"),
        ({"images_per_prompt": 10**30}, "images_per_prompt"),
        ({"prompts": None}, "prompts"),
        ({"collection": "x"}, "collection"),
        ({"concepts": 7}, "concepts"),
        ({"prompts": [{"name": "two"}, {"name": "two"}]}, "list"),
    ):
        values = {key: value for key, value in (SHORT | change).items() if value is not None}
        content = yaml.safe_dump(values).encode()
        yield in_workspace(f"protocol with {change}", source, PROTOCOL, content, "refused", named=(said,))
