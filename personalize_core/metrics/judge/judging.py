"""Images to rows of a table of scores, by a judge's answers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from personalize_core.concepts.concept import Concept
from personalize_core.errors import InputError
from personalize_core.files.stamps import sha256
from personalize_core.metrics import tables
from personalize_core.metrics.judge import rubric
from personalize_core.metrics.judge.kept_answers import Answer, KeptAnswers
from personalize_core.metrics.judge.questions import Judge, Question, Refused, Showing, ShownImage, Stopped
from personalize_core.metrics.references import ALONE, reference_sets, why_none_held_out
from personalize_core.metrics.tables import HELD_OUT, TRAINED_ON

CONCEPT_PRESERVATION, PROMPT_FOLLOWING = "judge_cp", "judge_pf"
MOST_REFUSED = 20  # questions, while none has been answered: then none will be
Progress = Callable[[int, int], None]


class Table(Protocol):
    """Where scores go: `scoring.Scored` is one."""

    absent: list[dict[str, Any]]  # metric, encoder, image (None: all of each), reason

    def add(self, row: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Asking:
    """A judge, how it is asked, and where its answers are kept."""

    judge: Judge
    showing: Showing
    kept: KeptAnswers
    progress: Progress = lambda done, total: None  # images that were judged, of how many


def judge_images(
    found: Table,
    root: Path,
    about: Sequence[Mapping[str, Any]],
    concept: Concept,
    concept_images: Sequence[Path],
    asking: Asking,
    without_identity: Set[int] = frozenset(),
    held_out: Sequence[Path] | None = None,
) -> None:
    """Prompt following and concept preservation of sampled images, two questions or more about each.

    Args:
        found: takes the rows.
        about: what the rows of each image begin with; `image`, `prompt` and `prompt_index` among it.
        without_identity, held_out: as `scoring.score_grid` takes them.

    Raises:
        InputError: the judge answers no question, or an image cannot be read.
    """
    showing = asking.showing
    sets = reference_sets(concept_images, held_out)
    if why := why_none_held_out(concept_images, held_out):
        found.absent.append(_absence(asking.judge, CONCEPT_PRESERVATION, None, why))
    first = {
        kind: [(path, _shown(path, showing)) for path in some[: showing.concept_images]] for kind, some in sets.items()
    }
    tasks = []
    for row in about:
        text = str(row["prompt"]).replace("{}", concept.class_noun)
        of_concept = {} if row["prompt_index"] in without_identity else first
        tasks.append(_Task(root / row["image"], row, text, of_concept))
    _collect(found, tasks, concept.class_noun, asking)


def judge_concept_images(
    found: Table,
    root: Path,
    concept: Concept,
    concept_images: Sequence[Path],
    asking: Asking,
    held_out: Sequence[Path] | None = None,
) -> None:
    """Concept preservation of the concept images themselves, each beside the first of its others.

    held_out: as `scoring.score_references` takes them.
    """
    showing = asking.showing
    sets = reference_sets(concept_images, held_out)
    if why := why_none_held_out(concept_images, held_out):
        found.absent.append(_absence(asking.judge, CONCEPT_PRESERVATION, None, why))
    if len(concept_images) < 2 and not held_out:
        names = [tables.compared(CONCEPT_PRESERVATION, False, kind == TRAINED_ON) for kind in sets]
        found.absent += [_absence(asking.judge, name, None, ALONE) for name in names]
        return
    real = {"concept": concept.name, "method": tables.CEILING, "variant": tables.CEILING}
    tasks = []
    for kind, references in sets.items():
        own = sets[{HELD_OUT: TRAINED_ON, TRAINED_ON: HELD_OUT}[kind]] if len(sets) > 1 else references
        shown = [(path, _shown(path, showing)) for path in references[: showing.concept_images + 1]]
        for index, path in enumerate(own):
            row = real | {"image_index": index, "image": path.relative_to(root).as_posix()}
            tasks.append(_Task(path, row | {"image_sha256": sha256(path)}, None, {kind: shown}))
    _collect(found, tasks, concept.class_noun, asking)


# -- asking -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """One image, and what is asked about it."""

    path: Path
    row: Mapping[str, Any]
    prompt: str | None  # None: it has none
    references: Mapping[str, Sequence[tuple[Path, ShownImage]]]  # of tables' references -> concept images in order


@dataclass(frozen=True)
class _Score:
    """The mean of a judge's answers about one image, or why there is none."""

    metric: str
    answers: Sequence[Answer | Refused]
    more: Mapping[str, Any]  # columns of its row


def _shown(path: Path, showing: Showing) -> ShownImage:
    return ShownImage.of(path, showing.image_size)


def _collect(found: Table, tasks: Sequence[_Task], class_noun: str, asking: Asking) -> None:
    """Ask about all images, several at once; rows come in the images' order."""
    judge, enough = asking.judge, _Refusals()
    asking.progress(0, len(tasks))
    done = 0
    for task, scores in zip(tasks, _in_threads(tasks, class_noun, asking, enough), strict=True):
        for score in scores:
            numbers = [one.score for one in score.answers if isinstance(one, Answer) and one.score is not None]
            if len(numbers) < len(score.answers):  # a mean over fewer answers than were asked for is another score
                why = next(filter(None, (_why_absent(one, judge.tries) for one in score.answers)))
                found.absent.append(_absence(judge, score.metric, task.row["image"], why))
                continue
            measured = {
                "metric": score.metric,
                "encoder": judge.name,
                "encoder_sha256": judge.weights,
                "preprocessing": str(asking.showing),
                "headline": True,
                "score": sum(numbers) / len(numbers) / rubric.MOST,
            }
            found.add({**task.row, **score.more, **measured})
        done += 1
        asking.progress(done, len(tasks))
    enough.check_any_answer()


def _in_threads(
    tasks: Sequence[_Task], class_noun: str, asking: Asking, enough: _Refusals
) -> Iterator[Sequence[_Score]]:
    """In the tasks' order. After the first error no further question is asked, and no thread waits to ask again."""
    failed = threading.Event()

    def ask(task: _Task) -> Sequence[_Score]:
        if failed.is_set():
            return ()  # of a task after the one whose error is raised
        try:
            return _scores(task, class_noun, asking, enough)
        except Stopped:
            return ()  # because of the error of another task
        except BaseException:
            failed.set()
            asking.judge.stop()
            raise

    pool = ThreadPoolExecutor(max(1, min(asking.judge.at_once, len(tasks))), "judge")
    try:
        asked: list[Future[Sequence[_Score]]] = [pool.submit(ask, task) for task in tasks]
        for one in asked:
            yield one.result()
    finally:
        asking.judge.stop()
        pool.shutdown(cancel_futures=True)


def _scores(task: _Task, class_noun: str, asking: Asking, enough: _Refusals) -> Sequence[_Score]:
    """All that is asked about one image."""
    image, many, found = _shown(task.path, asking.showing), range(asking.showing.repetitions), []
    if task.prompt is not None:
        text = rubric.prompt_following(task.prompt)
        answers = [_answer(Question(text, [image], number), asking, enough) for number in many]
        found.append(_Score(PROMPT_FOLLOWING, answers, {"text": task.prompt, "pairs": 1}))
    text = rubric.concept_preservation(class_noun)
    for kind, references in task.references.items():
        beside = [one for path, one in references if path != task.path][: asking.showing.concept_images]
        questions = [Question(text, [reference, image], number) for reference in beside for number in many]
        answers = [_answer(question, asking, enough) for question in questions]
        name = tables.compared(CONCEPT_PRESERVATION, False, kind == TRAINED_ON)
        found.append(_Score(name, answers, {"references": kind, "pairs": len(beside)}))
    return found


def _answer(question: Question, asking: Asking, enough: _Refusals) -> Answer | Refused:
    """What was kept of this question, or what the judge answers; an answer that cannot be read is asked for again."""
    if kept := asking.kept.read(asking.judge, question):
        enough.answered()
        return kept
    unreadable: list[str] = []
    why = ""
    for _ in range(asking.judge.tries):
        try:
            said = asking.judge.ask(question)
        except Refused as refused:
            enough.answered() if refused.by_model else enough.refused(refused)
            return refused
        enough.answered()
        try:
            verdict = rubric.read(said)
        except rubric.Unreadable as error:
            unreadable.append(said)
            why = str(error)
            continue
        answer = Answer(verdict.score, verdict.reason)
        asking.kept.write(asking.judge, question, answer, unreadable)
        return answer
    answer = Answer(None, why)
    asking.kept.write(asking.judge, question, answer, unreadable)
    return answer


class _Refusals:
    """Counts them, for a judge that refuses every question is set up wrongly."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count, self._last, self._any_answer = 0, "", False

    def answered(self) -> None:
        self._any_answer = True

    def refused(self, why: Refused) -> None:
        with self._lock:
            self._count, self._last = self._count + 1, str(why)
        if self._count >= MOST_REFUSED:
            self.check_any_answer()

    def check_any_answer(self) -> None:
        """Raise InputError if questions were refused and none was answered."""
        if self._count and not self._any_answer:
            raise InputError(
                f"the judge answered no question and refused {self._count}; of the last one: {self._last}. Look at the "
                "section judge of params.yaml"
            )


def _why_absent(one: Answer | Refused, tries: int) -> str:
    """Why an answer is no score; empty if it is one."""
    if isinstance(one, Refused):
        return str(one)
    often = f", {tries} times" if tries > 1 else ""
    return "" if one.score is not None else f"the judge's answer could not be read{often}: {one.reason}"


def _absence(judge: Judge, metric: str, image: str | None, reason: str) -> dict[str, Any]:
    return {"metric": metric, "encoder": judge.name, "image": image, "reason": reason}
