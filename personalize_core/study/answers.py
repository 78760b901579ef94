"""What raters hand in: one JSON file each, checked against the study's key before anything is counted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import polars as pl
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from personalize_core.errors import InputError
from personalize_core.files.outside import MOST_ANSWERS, is_folder, read_text
from personalize_core.study.design import QUESTIONS, Answer, Key, QuestionName

COLUMNS: dict[str, tuple[pl.DataType, str]] = {
    "study": (pl.String(), "which study: a hash of all that it shows"),
    "rater": (pl.String(), "random name of the rater, chosen by the page"),
    "order": (pl.Int64(), "place among the rater's own answers, from 0"),
    "question": (pl.String(), "text (fits the text), image (looks like the concept), or both (one forced choice)"),
    "first": (pl.String(), "the variant that the study compares with each of the others"),
    "second": (pl.String(), "the variant that it stood against"),
    "pair": (pl.Int64(), "number of the two images; under one question every rater of a pair saw the same two"),
    "concept": (pl.String(), "name of the concept"),
    "prompt_index": (pl.Int64(), "place in the prompt list, from 0"),
    "image_index": (pl.Int64(), "which image of this prompt, from 0"),
    "left": (pl.String(), "the variant that stood on the left"),
    "answer": (pl.String(), "what was pressed: left, right or not_sure"),
    "preferred": (pl.String(), "first, second, or not sure"),
    "seconds": (pl.Float64(), "from the moment that both images stood there to the answer"),
}
SCHEMA = pl.Schema({name: dtype for name, (dtype, _) in COLUMNS.items()})


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Given(_Strict):
    """One answer."""

    question: QuestionName
    pair: Annotated[int, Field(ge=0)]
    left: Annotated[int, Field(ge=0)]
    right: Annotated[int, Field(ge=0)]
    answer: Answer
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class AnswerFile(_Strict):
    """What the page writes."""

    format: Literal["personalize study answers 1"]
    study: str
    rater: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
    name: Annotated[str, Field(max_length=80)]
    automated: bool  # written by a browser that a program drove
    questions: Annotated[int, Field(gt=0)]  # how many this rater was to answer
    started: str
    saved: str
    answers: list[Given]


def among(given: Sequence[Path], others: set[str]) -> list[Path]:
    """Files as given and, for a folder, all of its JSON files; without files of the names that are no answers."""
    found = [path for one in given for path in (sorted(one.glob("*.json")) if is_folder(one) else [one])]
    return [path for path in dict.fromkeys(found) if path.name not in others]


def read(paths: Sequence[Path], key: Key) -> tuple[pl.DataFrame, list[AnswerFile]]:
    """All answers, a row for each, and the files that they came from, one per rater.

    Of two files of one rater the longer counts, where it goes on from the other.

    Raises:
        InputError: a file is damaged, belongs to another study, says what its page cannot have asked, contradicts
            another file of the same rater, or mixes people with programs; or there are no answers at all.
    """
    if not paths:
        raise InputError("no file of answers was given; name those that the study's page saved")
    of_rater: dict[str, tuple[Path, AnswerFile]] = {}
    for path in paths:
        answers = read_file(path, key)
        earlier = of_rater.get(answers.rater)
        if earlier is None:
            of_rater[answers.rater] = (path, answers)
            continue
        shorter, longer = sorted([earlier, (path, answers)], key=lambda one: len(one[1].answers))
        if longer[1].answers[: len(shorter[1].answers)] != shorter[1].answers:
            raise InputError(
                f"{earlier[0]} and {path} are of one rater and contradict each other; give only the one that counts"
            )
        of_rater[answers.rater] = longer
    files = [answers for _, answers in sorted(of_rater.values(), key=lambda one: one[1].rater)]
    if len({answers.automated for answers in files}) > 1:
        machine = next(path for path, answers in of_rater.values() if answers.automated)
        raise InputError(f"{machine} was answered by a program and others by people; they are not counted together")
    table = pl.DataFrame([row for answers in files for row in _rows(answers, key)], schema=SCHEMA, orient="row")
    if table.is_empty():
        raise InputError("these files hold no answer yet")
    return table, files


def read_file(path: Path, key: Key) -> AnswerFile:
    """One rater's answers, checked; raises InputError that names the file."""
    try:
        text = read_text(path, MOST_ANSWERS).strip()  # copied text may have empty lines
        answers = AnswerFile.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(
            f"{path} is damaged or no file of answers{f' (at {where})' if where else ''}: {first['msg']}; ask the "
            "rater for the file again"
        ) from None
    if answers.study != key.study:
        raise InputError(f"{path} answers another study ({answers.study}, not {key.study}); give that study's --key")
    if fault := _fault(answers, key):
        raise InputError(f"{path} is damaged: {fault}; ask the rater for the file again")
    return answers


def _fault(answers: AnswerFile, key: Key) -> str | None:
    """What cannot have come from this study's page."""
    pairs, seen = key.pairs(), set()
    if answers.questions != key.questions_per_rater or len(answers.answers) > answers.questions:
        return f"it should hold at most {key.questions_per_rater} answers"
    for number, given in enumerate(answers.answers, start=1):
        if given.pair >= len(pairs) or {given.left, given.right} != set(pairs[given.pair]):
            return f"answer {number} is about images that the study never showed together"
        if given.question not in key.questions:
            return f"answer {number} is to a question that the study never asked"
        if given.answer == "not_sure" and not QUESTIONS[given.question].may_be_unsure:
            return f"answer {number} is 'not sure', which the page did not offer"
        if given.pair in seen:
            return f"answer {number} is about a pair that was answered before"
        seen.add(given.pair)
    return None


def _rows(answers: AnswerFile, key: Key) -> list[tuple]:
    rows = []
    for order, given in enumerate(answers.answers):
        comparison, cell = key.comparisons[given.pair // len(key.cells)], key.cells[given.pair % len(key.cells)]
        left, right = key.images[given.left].variant, key.images[given.right].variant
        chosen = {"left": left, "right": right, "not_sure": None}[given.answer]
        preferred = {comparison.first: "first", comparison.second: "second", None: "not sure"}[chosen]
        rows.append(
            (
                key.study,
                answers.rater,
                order,
                given.question,
                comparison.first,
                comparison.second,
                given.pair,
                key.concepts[cell.concept].name,
                cell.prompt_index,
                cell.image_index,
                left,
                given.answer,
                preferred,
                given.seconds,
            )
        )
    return rows
