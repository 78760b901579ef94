"""Answers that raters hand in, and the key of their study, as `personalize study-results` reads them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.hostile_inputs.runner import Case, Right, anything
from personalize_core.study import answers as answer_files
from personalize_core.study.design import Key
from tests.mutated import mutants
from tests.study import test_results as tests
from tests.study.test_results import PAPERS, one_rater

MUTANTS = {"answers": 60, "key": 20}
RATERS = 3
SPOILT = "rater_1.json"


def read(folder: Path) -> Any:
    """The table of all answers, and the files that it is of."""
    return answer_files.read(answer_files.among([folder / "input"], set()), PAPERS)


def whole(found: Any) -> bool:
    table, files = found
    return len(files) == RATERS and table.height == sum(len(each.answers) for each in files)


def case(name: str, spoil: Callable[[Path], Any], right: Right, holds: Callable[[Any], bool] = whole) -> Case:
    """`spoil` changes one of the raters' files."""

    def give(folder: Path) -> None:
        (folder / "input").mkdir()
        for number in range(RATERS):
            (folder / "input" / f"rater_{number}.json").write_text(json.dumps(one_rater(PAPERS, number)))
        spoil(folder / "input" / SPOILT)

    return Case(f"answers/{name}", give, read, right, holds, (SPOILT,))


def of(content: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(content)


def instead(make: Callable[[Path], Any]) -> Callable[[Path], Any]:
    return lambda path: (path.unlink(), make(path))


def prepare(folder: Path) -> None:
    """A study's key and its answers need no model."""


def cases(folder: Path) -> Iterator[Case]:
    plain = json.dumps(one_rater(PAPERS, 1)).encode()
    for name, content in {
        "as saved": plain,
        "with a mark": b"\xef\xbb\xbf" + plain,
        "with empty lines": b"\r\n\r\n" + plain + b"\r\n\r\n",
    }.items():
        yield case(name, of(content), "accepted")
    spoilers: list[Callable[[dict], str]] = [
        tests.cut_off,
        tests.of_another_study,
        tests.of_images_never_together,
        tests.of_a_pair_that_is_not_there,
        tests.twice_the_same_pair,
        tests.of_a_question_never_asked,
        tests.of_no_choice,
        tests.without_a_number,
        tests.with_too_many,
        tests.with_another_key,
        tests.no_json,
        tests.nothing,
    ]
    for spoil in spoilers:
        yield case(spoil.__name__, of(spoil(one_rater(PAPERS, 1)).encode()), "refused")
    for name, content in {
        "utf-16": plain.decode().encode("utf-16"),
        "utf-16 without a mark": plain.decode().encode("utf-16-le"),
        "latin-1": plain.replace(b'"name": ""', b'"name": "Ren\xe9"'),
        "zeros": bytes(100),
        "a pickle": b"\x80\4\x95" + bytes(30),
        "html": b"<!DOCTYPE html><html></html>",
        "100,000 brackets": b"[" * 100_000,
        "100,000 braces": b'{"answers":' * 100_000,
        "20 MB": b'{"name": "' + b"x" * 20_000_000 + b'"}',
        "20 MB of spaces": plain + b" " * 20_000_000,
        "a number of 5000 digits": plain.replace(b'"questions": ', b'"questions": ' + b"9" * 5000),
        "half a character": plain.replace(b'"name": ""', b'"name": "\\ud800"'),
        "a name of 100,000 characters": plain.replace(b'"name": ""', b'"name": "' + b"x" * 100_000 + b'"'),
        "another rater's name": plain.replace(b'"rater": "', b'"rater": "../'),
        "infinite seconds": plain.replace(b"2.5", b"1e999"),
        "seconds below 0": plain.replace(b"2.5", b"-1"),
        "true as a number": plain.replace(b"2.5", b"true"),
    }.items():
        yield case(name, of(content), "refused")
    for name, make in {
        "a FIFO": os.mkfifo,
        "a device": lambda path: os.symlink("/dev/zero", path),
        "a folder": Path.mkdir,
        "a dangling link": lambda path: os.symlink("/nowhere", path),
        "a link to itself": lambda path: os.symlink(path.name, path),
    }.items():
        yield case(name, instead(make), "refused")
    for number, mutant in enumerate(mutants(plain, MUTANTS["answers"], seed=6)):
        yield case(f"mutated {number}", of(mutant), "either")
    for number, mutant in enumerate(mutants(PAPERS.model_dump_json().encode(), MUTANTS["key"], seed=7)):
        yield Case(
            f"answers/mutated key {number}",
            lambda folder, mutant=mutant: (folder / "input").write_bytes(mutant),
            lambda folder: Key.read(folder / "input"),
            "either",
            anything,
            ("input",),
        )
