"""What a study shows: which images stand against each other, under which question.

The questions are those of the papers. Personalized Residuals (arXiv:2405.12978, sec. 4.3) asks two,
each with "not sure" as a third answer: a prompt and two images, and three concept images and two images.
AttnDreamBooth (arXiv:2406.05000) asks one, a forced choice on identity and text together.

A pair is two images of one cell (concept, prompt, image index), so both start from the same noise. Images made
elsewhere stand in pairs of the same prompt.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from personalize_core.concepts import concept_files
from personalize_core.concepts.concept import SLOT
from personalize_core.errors import InputError, listed
from personalize_core.files.atomic import read_json
from personalize_core.files.outside import MOST_RESULT, is_there, read_text
from personalize_core.files.stamps import sha256, stamp_of
from personalize_core.sampling.grid import DESCRIPTION, located
from personalize_core.workspace import commands
from personalize_core.workspace.external_columns import registered
from personalize_core.workspace.store import Store

FORMAT = "personalize study 1"
QuestionName = Literal["text", "image", "both"]
Answer = Literal["left", "right", "not_sure"]


@dataclass(frozen=True)
class Question:
    """What a rater is asked about two images."""

    ask: str  # {} is the class noun
    hint: str  # a sentence before the first question of this kind
    shows_text: bool
    shows_concept_images: bool
    may_be_unsure: bool


QUESTIONS: dict[QuestionName, Question] = {
    "text": Question(
        "Which image fits the text better?",
        "You see a text and two images. Say which of the two fits the text better.",
        shows_text=True,
        shows_concept_images=False,
        may_be_unsure=True,
    ),
    "image": Question(
        "Which image looks more like the {} in the reference images?",
        "You see reference images of one thing, and two other images. Say in which of the two it looks more like the "
        "thing in the reference images; where it is and what is around it does not matter.",
        shows_text=False,
        shows_concept_images=True,
        may_be_unsure=True,
    ),
    "both": Question(
        "Which image better shows this {} as the text says?",
        "You see reference images of one thing, a text, and two other images. Choose the image that you find better, "
        "both in likeness to the thing in the reference images and in following the text.",
        shows_text=True,
        shows_concept_images=True,
        may_be_unsure=False,
    ),
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Request(BaseModel):
    """What the person who runs the study asks for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    variants: list[str]  # the first is compared with each of the others
    questions: list[QuestionName] = ["text", "image"]
    concepts: list[str] = []  # empty: every concept for which all variants have a grid
    pairs: Annotated[int, Field(gt=0)] = 40  # of each comparison, in the page; a rater sees some of them
    per_rater: Annotated[int, Field(gt=0)] = 40  # questions that one rater answers, at most
    concept_images: Annotated[int, Field(gt=0)] = 3  # of the concept, shown beside the images; the papers show three
    seed: Annotated[int, Field(ge=0)] = 0
    title: Annotated[str, Field(min_length=1, max_length=100)] = "Which image is better?"

    @model_validator(mode="after")
    def _sensible(self) -> Request:
        for what, names in {"variant": self.variants, "question": self.questions, "concept": self.concepts}.items():
            if twice := [name for name, count in Counter(names).items() if count > 1]:
                raise ValueError(f"the {what} {twice[0]!r} is given twice; a study shows each once")
        if len(self.variants) < 2:
            raise ValueError("a study compares a variant with one or more others; name at least two")
        if not self.questions:
            raise ValueError(f"a study asks something; the questions are {listed(get_args(QuestionName))}")
        return self


class ConceptShown(_Strict):
    name: str
    class_noun: str
    concept_images: list[str]  # file names of those that raters see


class Cell(_Strict):
    """One place in the grid, the same for every variant."""

    concept: Annotated[int, Field(ge=0)]  # place in Key.concepts
    prompt_index: Annotated[int, Field(ge=0)]
    image_index: Annotated[int, Field(ge=0)]
    text: str  # the prompt as raters read it, with the class noun in the concept's place


class StudyImage(_Strict):
    variant: str
    cell: Annotated[int, Field(ge=0)]
    sha256: str  # of the grid's file


class Comparison(_Strict):
    first: str
    second: str


class Key(_Strict):
    """Everything about a study, and above all which image is whose: what the page must not say.

    A pair's number is comparison * len(cells) + cell; an image's number is its place in `images`, whose order is
    random, so that it tells nothing.
    """

    format: Literal["personalize study 1"]
    study: str  # names all the rest of this: answers carry it
    title: str
    base_model: str
    questions: list[QuestionName]
    comparisons: list[Comparison]
    concepts: list[ConceptShown]
    left_out: list[str]  # concepts of the workspace without a grid of every variant
    cells: list[Cell]
    images: list[StudyImage]
    each: Annotated[int, Field(gt=0, multiple_of=2)]  # pairs of a comparison that a rater sees under one question
    seed: int
    made_elsewhere: list[str] = []  # of the variants, external columns, whose pairs share the prompt alone

    @field_validator("cells", "comparisons", "questions", "images")
    @classmethod
    def _not_empty(cls, value: list) -> list:
        if not value:
            raise ValueError("there must be at least one")
        return value

    @model_validator(mode="after")
    def _whole(self) -> Key:
        if self.study != self._identity():
            raise ValueError("it was changed after it was written")
        return self

    def _identity(self) -> str:
        new = {"made_elsewhere"} if not self.made_elsewhere else set()  # keys of earlier versions stay what they are
        return stamp_of(self.model_dump(mode="json", exclude={"study", *new}))

    @classmethod
    def of(cls, **fields: Any) -> Key:
        """The key of a new study, which gets its name from all that it holds."""
        unnamed = cls.model_construct(format=FORMAT, study="", **fields)
        return cls(format=FORMAT, study=unnamed._identity(), **fields)

    @classmethod
    def read(cls, path: Path) -> Key:
        """Raises InputError where it is missing, damaged or was changed."""
        try:
            if not is_there(path):
                raise InputError(
                    f"there is no {path}; name the study_key.json that `personalize study` wrote with --key"
                )
            return cls.model_validate_json(read_text(path, MOST_RESULT))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise InputError(
                f"{path} is not the key of a study{f' at {where!r}' if where else ''}: "
                f"{first['msg'].removeprefix('Value error, ')}; take the file that `personalize study` wrote"
            ) from None

    @property
    def questions_per_rater(self) -> int:
        return self.each * len(self.comparisons) * len(self.questions)

    def pairs(self) -> list[tuple[int, int]]:
        """The two images of every pair, by its number: the first variant's, the second's."""
        where = {(image.variant, image.cell): number for number, image in enumerate(self.images)}
        return [
            (where[comparison.first, cell], where[comparison.second, cell])
            for comparison in self.comparisons
            for cell in range(len(self.cells))
        ]


def design(store: Store, request: Request) -> Key:
    """Choose what is shown. Concepts take turns; what is chosen of each follows from the seed.

    Raises:
        InputError: a variant or concept is unknown or has no grid, grids were sampled differently or share no prompt,
            an image is missing, or there is too little for even one pair on either side.
    """
    grids, left_out = _grids(store, request)
    first = next(iter(grids.values()))[request.variants[0]]
    made_elsewhere = {variant for by_variant in grids.values() for variant, grid in by_variant.items() if grid.external}
    generator = np.random.default_rng([request.seed, 0x57D7])
    concepts, cells = [], []
    for number, (name, by_variant) in enumerate(grids.items()):
        described, files = store.concept(name), concept_files.concept_images(store.concept_folder(name))
        chosen = generator.permutation(len(files))[: request.concept_images]
        concept_images = sorted(files[index].name for index in chosen)
        concepts.append(ConceptShown(name=name, class_noun=described.class_noun, concept_images=concept_images))
        of_first = by_variant[request.variants[0]]
        place: dict[str, int] = {}  # of a text among the prompts
        for index, template in enumerate(of_first.about["templates"]):
            place.setdefault(template.replace(SLOT, described.class_noun), index)
        cells.append(
            [
                Cell(concept=number, prompt_index=place[text], image_index=i, text=text)
                for text in of_first.images
                for i in range(min(len(grid.images.get(text, ())) for grid in by_variant.values()))
            ]
        )
    cells = _taking_turns(cells, generator)[: request.pairs]
    each = _each(request, len(cells))

    paths = [
        (variant, number, grids[concepts[cell.concept].name][variant].path(cell))
        for variant in request.variants
        for number, cell in enumerate(cells)
    ]
    if missing := next(((variant, path) for variant, _, path in paths if not path.is_file()), None):
        variant, path = missing
        raise InputError(
            f"{path} is missing; `personalize score` finds out which images of an external column there are"
            if variant in made_elsewhere
            else f"{path} is missing from its grid; remove {path.parents[1]} and `personalize evaluate` samples it "
            "again"
        )
    images = [StudyImage(variant=variant, cell=number, sha256=sha256(path)) for variant, number, path in paths]
    return Key.of(
        title=request.title,
        base_model=first.about["base_model"],
        questions=request.questions,
        comparisons=[Comparison(first=request.variants[0], second=other) for other in request.variants[1:]],
        concepts=concepts,
        left_out=left_out,
        cells=cells,
        images=[images[index] for index in generator.permutation(len(images))],
        each=each,
        seed=request.seed,
        made_elsewhere=[variant for variant in request.variants if variant in made_elsewhere],
    )


def image_paths(store: Store, key: Key) -> list[Path]:
    """Where the grids keep the images of the study, in the order of `Key.images`.

    Raises:
        InputError: a grid is gone, or has other prompts by now.
    """
    methods, paths = method_of(store), []
    grids: dict[tuple[str, str], _Grid | None] = {}
    for image in key.images:
        cell = key.cells[image.cell]
        where = (concept := key.concepts[cell.concept]).name, image.variant
        if where not in grids:
            folder = store.grid(methods.get(image.variant, image.variant), concept.name)
            grids[where] = _read(store, folder, image.variant, concept.class_noun)
        grid = grids[where]
        if grid is None or cell.image_index >= len(grid.images.get(cell.text, ())):
            raise InputError(f"the grid of {concept.name!r} by {image.variant!r} is another than the study's by now")
        paths.append(grid.path(cell))
    return paths


@dataclass(frozen=True)
class _Grid:
    """A variant's images of one concept."""

    folder: Path
    about: dict[str, Any]  # grid.json
    images: dict[str, list[Path]]  # the prompt as raters read it -> its images, in order

    @property
    def external(self) -> bool:
        return "external" in self.about

    def path(self, cell: Cell) -> Path:
        return self.images[cell.text][cell.image_index]


def method_of(store: Store) -> dict[str, str]:
    """Variant -> the method whose grids hold it; an external column's label stands for both."""
    params = store.params
    variants = {variant: method for method in params.method_names for variant in params.sampling_variants(method)}
    return variants | {label: label for label, _ in registered(store)}


def _grids(store: Store, request: Request) -> tuple[dict[str, dict[str, _Grid]], list[str]]:
    """Concept -> variant -> grid, of concepts with a grid of each variant, sampled alike; and the other concepts."""
    methods = method_of(store)
    if unknown := [variant for variant in request.variants if variant not in methods]:
        raise InputError(f"params.yaml has no variant {unknown[0]!r}; its variants are {listed(methods)}")
    grids: dict[str, dict[str, _Grid]] = {}
    left_out = []
    for concept in request.concepts or store.concept_names():
        noun = store.concept(concept).class_noun
        found = {
            variant: _read(store, store.grid(methods[variant], concept), variant, noun) for variant in request.variants
        }
        there = {variant: grid for variant, grid in found.items() if grid}
        if len(there) == len(found):
            _check_alike(list(there.values()))
            if set.intersection(*(set(grid.images) for grid in there.values())):
                grids[concept] = there
            elif request.concepts:
                raise InputError(f"of {concept!r} the variants {listed(request.variants)} share no prompt")
            else:
                left_out.append(concept)
        elif request.concepts:
            lacking = next(variant for variant, grid in found.items() if grid is None)
            makes = commands.grid(store, concept, methods[lacking])
            raise InputError(f"there is no grid of {concept!r} by {lacking!r}; run `{makes}`")
        else:
            left_out.append(concept)
    if not grids:
        raise InputError(
            f"no concept has a grid of all of {listed(request.variants)} with a prompt in common; `personalize run` "
            "samples what is missing, and `personalize score` adds images made elsewhere"
        )
    _check_alike([by_variant[request.variants[0]] for by_variant in grids.values()])
    return grids, left_out


def _read(store: Store, folder: Path, variant: str, class_noun: str) -> _Grid | None:
    path = folder / DESCRIPTION
    if not path.is_file():
        return None
    try:
        about = read_json(path)
        if variant not in about["variants"]:
            return None
        images: dict[str, list[Path]] = {}
        for image in located(folder, about, store.root):
            text = about["templates"][image.prompt].replace(SLOT, class_noun)
            if image.variant == variant:
                images.setdefault(text, []).append(image.path)
    except (ValueError, KeyError, TypeError, IndexError):
        raise InputError(f"{path} is damaged; remove {folder} and `personalize evaluate` samples it again") from None
    return _Grid(folder, about, images)


def _check_alike(grids: list[_Grid]) -> None:
    """Raise unless those sampled here were sampled from the same prompts, from the same noise, in the same way."""
    grids = [grid for grid in grids if not grid.external]
    named = {
        "templates": "prompts",
        "images_per_prompt": "numbers of images",
        "base_model": "base models",
        "sampling": "sampling",
        "seed": "seeds",  # absent, with `sampling`, in grids of an earlier version
    }
    for grid in grids[1:]:
        for name, plural in named.items():
            if grid.about.get(name) != grids[0].about.get(name):
                raise InputError(
                    f"{grids[0].folder} and {grid.folder} were sampled from different {plural}, so their images "
                    "make no pairs; `personalize evaluate` samples both as in params.yaml"
                )


def _taking_turns(cells: list[list[Cell]], generator: np.random.Generator) -> list[Cell]:
    """Each concept's cells in a random order, one concept after the other, so that any beginning is balanced."""
    shuffled = [[own[index] for index in generator.permutation(len(own))] for own in cells]
    longest = max(len(own) for own in shuffled)
    return [own[turn] for turn in range(longest) for own in shuffled if turn < len(own)]


def _each(request: Request, cells: int) -> int:
    """Pairs of each comparison under each question that a rater sees: even, so that each side comes equally often."""
    kinds = (len(request.variants) - 1) * len(request.questions)
    by_patience, by_images = request.per_rater // (2 * kinds) * 2, cells // (2 * len(request.questions)) * 2
    if not by_patience:
        raise InputError(
            f"{request.per_rater} questions per rater are too few for {kinds} kinds of comparison, each with both "
            f"sides equally often; allow at least {2 * kinds} with --per-rater, or compare fewer variants"
        )
    if not by_images:
        raise InputError(
            f"{cells} pairs of each comparison are too few: no rater sees a pair twice, and every question needs two; "
            "sample more prompts or more images per prompt, or raise --pairs"
        )
    return min(by_patience, by_images)
