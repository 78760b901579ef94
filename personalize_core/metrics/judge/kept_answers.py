"""Answers of judges, kept in a file each, so that nothing is asked twice: by a rerun, or about an image seen before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from personalize_core.files.atomic import read_record, write_json
from personalize_core.files.stamps import stamp_of
from personalize_core.metrics.judge import rubric
from personalize_core.metrics.judge.questions import Judge, Question

MARK = "personalize judge answer 1"
MOST_KEPT = 2_000  # characters of an answer that could not be read


@dataclass(frozen=True)
class Answer:
    """What came of a question."""

    score: int | None  # 0 to rubric.MOST; None: no answer could be read
    reason: str  # the judge's; or why its last answer could not be read


@dataclass(frozen=True)
class KeptAnswers:
    """A folder of them. A file's name says all that an answer depends on. Delete one to have it asked for again."""

    folder: Path

    def read(self, judge: Judge, question: Question) -> Answer | None:
        """None if it was never asked, or its file is damaged."""
        found = read_record(self._path(judge, question))
        score, reason = found.get("score"), found.get("reason")
        known = score is None or (isinstance(score, int) and 0 <= score <= rubric.MOST)
        if found.get("mark") != MARK or not known or not isinstance(reason, str):
            return None
        return Answer(score, reason)

    def write(self, judge: Judge, question: Question, answer: Answer, unreadable: Sequence[str] = ()) -> None:
        """Atomically. unreadable: the answers that could not be read."""
        write_json(
            self._path(judge, question),
            {
                "mark": MARK,
                "asked": _depends_on(judge, question),
                "score": answer.score,
                "reason": answer.reason,
                "unreadable": [text[:MOST_KEPT] for text in unreadable],
            },
        )

    def _path(self, judge: Judge, question: Question) -> Path:
        name = stamp_of(_depends_on(judge, question))
        return self.folder / name[:2] / f"{name}.json"


def _depends_on(judge: Judge, question: Question) -> dict[str, Any]:
    return {"judge": dict(judge.answers_depend_on), "question": question.asks}
