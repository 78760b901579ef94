"""Where each thing lies. The only place that joins these paths."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from filelock import FileLock

from personalize_core.concept import Concept, check_name
from personalize_core.errors import InputError, listed
from personalize_core.intake import read_concept
from personalize_core.params import Params

REFERENCES = "real_images"  # the table of the concept's own photographs, scored against each other
SCORES = "scores.parquet"  # in a folder of scores


@dataclass(frozen=True)
class Store:
    """A workspace: the folder with params.yaml and data/. The method comes first in paths, as DVC's stages need it."""

    root: Path
    protocol: str | None = None  # a file of data/protocols that replaces params.yaml's section `sampling`

    @cached_property
    def params(self) -> Params:
        params = Params.read(self.root / "params.yaml")
        return params.under(self.data / "protocols" / f"{self.protocol}.yaml") if self.protocol else params

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def concepts(self) -> Path:
        return self.data / "concepts"

    def concept_folder(self, concept: str) -> Path:
        check_name(concept)
        return self.concepts / concept

    def concept(self, name: str) -> Concept:
        """Raises InputError if there is no such concept, or its description is damaged."""
        folder = self.concept_folder(name)
        if not folder.is_dir():
            raise InputError(
                f"there is no concept {name!r} in {self.concepts}; there are {listed(self.concept_names())}. "
                "Add one with `personalize add PHOTOS --class-noun NOUN`"
            )
        return read_concept(folder)

    def concept_names(self) -> list[str]:
        """Every folder that describes a concept, sorted."""
        found = self.concepts.glob("*/concept.yaml")
        return sorted(path.parent.name for path in found if not path.parent.name.startswith("."))

    def prompts(self, name: str) -> Path:
        return self.data / "prompts" / f"{name}.txt"

    def latents(self, concept: str, preprocessing: str = "") -> Path:
        """Of the photographs prepared in one way, by its key; without a key, the folder with all of them."""
        return self.data / "latents" / concept / preprocessing

    def class_images(self, class_noun: str) -> Path:
        return self.data / "class_images" / _folder_name(class_noun)

    def regularization(self, class_noun: str) -> Path:
        """Photographs of other things of that kind, put there by hand."""
        return self.data / "regularization" / _folder_name(class_noun)

    def class_latents(self, class_noun: str, preprocessing: str) -> Path:
        """Of the class images prepared in one way; no class noun has a dot."""
        return self.data / "class_images" / f"{_folder_name(class_noun)}.latents" / preprocessing

    def real_class_latents(self, class_noun: str, preprocessing: str) -> Path:
        """The same, of the photographs that were put there by hand."""
        return self.data / "class_images" / f"{_folder_name(class_noun)}.real" / preprocessing

    def artifact(self, method: str, concept: str) -> Path:
        return self.data / "artifacts" / method / concept

    def grid(self, method: str, concept: str) -> Path:
        return self.data / "grids" / method / concept

    def scores(self, method: str, concept: str) -> Path:
        return self.data / "metrics" / method / concept

    def comparison(self) -> Path:
        return self.data / "comparison"

    def report(self) -> Path:
        """Beside the comparison that it tells of."""
        return self.comparison().with_name("report")

    def samples(self, method: str, concept: str, request: str) -> Path:
        return self.data / "samples" / method / concept / request

    def work(self, *names: str) -> Path:
        """For checkpoints and locks: never versioned, and free to be deleted while nothing runs."""
        return self.data.joinpath(".work", *names)

    @contextmanager
    def alone(self, *names: str) -> Iterator[None]:
        """Only one process at a time, whichever of the doors it came through."""
        path = self.work("locks", "-".join(names) + ".lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path):
            yield


def _folder_name(class_noun: str) -> str:
    return class_noun.lower().replace(" ", "_")
