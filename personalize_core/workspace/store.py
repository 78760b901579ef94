"""Where each thing lies. The only place that joins these paths."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from personalize_core.base_model.loading import aside
from personalize_core.concepts.concept import Concept, check_name
from personalize_core.concepts.concept_files import read_concept
from personalize_core.errors import InputError, listed
from personalize_core.files.atomic import machine
from personalize_core.files.snapshot import memoized
from personalize_core.methods import METHOD_NAMES, method_of

if TYPE_CHECKING:
    from personalize_core.workspace.params import Params
    from personalize_core.workspace.protocols import Protocol

REFERENCES = "real_images"  # the table of the concept's own concept images, scored against each other
SCORES = "scores.parquet"  # in a folder of scores
OWN_DEVICE = "PERSONALIZE_OWN_DEVICE"  # the environment's variable: "1" where no other process uses this one's device
PAGE, FIGURES = "report.html", "figures"  # in the folder of a report
AGREEMENT = "agreement.parquet"  # in a folder of agreement
ABSENT = "absent.json"  # beside it: which scores could not be computed, and why


def is_label(name: str) -> bool:
    """Is it the label of an external column? Else it is a method, an ablation or REFERENCES."""
    return name != REFERENCES and method_of(name) not in METHOD_NAMES


@dataclass(frozen=True)
class Store:
    """A workspace: the folder with params.yaml and data/. The method comes first in paths, as DVC's stages need it.

    What is sampled and scored by a protocol lies apart from what params.yaml asks for, and from any other protocol's;
    they share artifacts. What is trained again, for the noise of training, lies apart altogether.
    """

    root: Path
    protocol: str | None = None  # a file of data/protocols that replaces params.yaml's section `sampling`
    repeat: int = 0  # which training: 0 is the artifact itself, the others differ in their seed alone

    def again(self, repeat: int) -> Store:
        """The same workspace, for another training."""
        return replace(self, repeat=repeat)

    def without_protocol(self) -> Store:
        """The same workspace by params.yaml alone: what is trained depends on no protocol."""
        return replace(self, protocol=None)

    @cached_property
    def described_protocol(self) -> Protocol | None:
        """Raises InputError if there is no such protocol, or it is damaged."""
        from personalize_core.workspace.protocols import read_protocol

        return read_protocol(self.data / "protocols" / f"{self.protocol}.yaml") if self.protocol else None

    @cached_property
    def params(self) -> Params:
        """params.yaml, with the protocol's sampling and encoders in place of its own."""
        from personalize_core.workspace.params import Params

        params, protocol = Params.read(self.root / "params.yaml"), self.described_protocol
        if not protocol:
            return params
        return params.model_copy(update={"sampling": protocol, "encoders": protocol.encoders or params.encoders})

    @property
    def training_seed(self) -> int:
        return self.params.seed + self.repeat

    @property
    def sampling_seed(self) -> int:
        """Of the noise that images start from: the same for every training."""
        own = self.described_protocol and self.described_protocol.seed
        return self.params.seed if own is None else own

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def trained(self) -> Path:
        """Where artifacts and all that is made from them lie."""
        return self.data / "repeats" / str(self.repeat) if self.repeat else self.data

    @property
    def sampled(self) -> Path:
        """Where grids and all that is made from them lie."""
        return self.trained / "under" / self.protocol if self.protocol else self.trained

    @property
    def concepts(self) -> Path:
        return self.data / "concepts"

    def protocol_names(self) -> list[str]:
        return sorted(path.stem for path in (self.data / "protocols").glob("*.yaml"))

    def concept_folder(self, concept: str) -> Path:
        check_name(concept)
        return self.concepts / concept

    @memoized
    def concept(self, name: str) -> Concept:
        """Raises InputError if there is no such concept, or its description is damaged."""
        folder = self.concept_folder(name)
        if not folder.is_dir():
            raise InputError(
                f"there is no concept {name!r} in {self.concepts}; there are {listed(self.concept_names())}. "
                "Add one with `personalize add FOLDER --class-noun NOUN`"
            )
        return read_concept(folder)

    def concept_names(self) -> list[str]:
        """Every folder that describes a concept, sorted."""
        found = self.concepts.glob("*/concept.yaml")
        return sorted(path.parent.name for path in found if not path.parent.name.startswith("."))

    def prompts(self, name: str) -> Path:
        return self.data / "prompts" / f"{name}.txt"

    def prompt_collection(self, name: str) -> Path:
        """A folder of lists that is not shipped: whoever may use it puts it there."""
        return self.data / "prompts" / name

    def latents(self, concept: str, preprocessing: str = "") -> Path:
        """Of the concept images prepared in one way, by its key; without a key, the folder with all of them."""
        return self.data / "latents" / concept / preprocessing

    def class_images(self, class_noun: str) -> Path:
        return self.data / "class_images" / _folder_name(class_noun)

    def regularization(self, class_noun: str) -> Path:
        """Concept images of other things of that kind, put there by hand."""
        return self.data / "regularization" / _folder_name(class_noun)

    def class_latents(self, class_noun: str, preprocessing: str) -> Path:
        """Of the class images prepared in one way; no class noun has a dot."""
        return self.data / "class_images" / f"{_folder_name(class_noun)}.latents" / preprocessing

    def real_class_latents(self, class_noun: str, preprocessing: str) -> Path:
        """The same, of the concept images that were put there by hand."""
        return self.data / "class_images" / f"{_folder_name(class_noun)}.real" / preprocessing

    def artifact(self, method: str, concept: str) -> Path:
        return self.trained / "artifacts" / method / concept

    def external(self, label: str, concept: str) -> Path:
        """The description of an external column."""
        return self.data / "external" / label / f"{concept}.yaml"

    @property
    def external_columns(self) -> Path:
        """What is made of all external columns."""
        return self.sampled / "external_columns"

    def grid(self, method: str, concept: str) -> Path:
        """Of an external column, which has its label for a method: the list of its images."""
        return self._beside("images", method, concept) or self.sampled / "grids" / method / concept

    def scores(self, method: str, concept: str) -> Path:
        return self._beside("metrics", method, concept) or self.sampled / "metrics" / method / concept

    def _beside(self, kind: str, name: str, concept: str) -> Path | None:
        """What is made of an external column lies apart from what is made of methods, as DVC's stages need it."""
        return self.external_columns / kind / name / concept if is_label(name) else None

    @property
    def judge_answers(self) -> Path:
        """What judges answered, by what they were asked; for all columns, protocols and repeats."""
        return self.data / "judge_answers"

    def comparison(self) -> Path:
        return self.sampled / "comparison"

    def training_costs(self, method: str, concept: str) -> Path:
        """What was measured, in a file of its own: it differs from run to run, as no artifact may."""
        return self.trained / "costs" / method / concept / "training.json"

    def sampling_costs(self, method: str, concept: str) -> Path:
        return self.sampled / "costs" / method / concept / "sampling.json"

    def scoring_costs(self, method: str, concept: str) -> Path:
        return self.sampled / "costs" / method / concept / "scoring.json"

    def costs(self) -> Path:
        """The table of all costs, beside the comparison that it belongs to."""
        return self.sampled / "costs" / "costs.parquet"

    def making(self, folder: Path) -> Path:
        """How a folder of results came to be: when, by which program, on what. It differs from run to run too."""
        return self.data / "costs" / "making" / folder.relative_to(self.data).with_suffix(".json")

    def analyses(self, method: str, concept: str) -> Path:
        return self.sampled / "analyses" / method / concept

    def agreement(self) -> Path:
        """How well each metric predicts the answers of a study, beside the comparison."""
        return self.comparison().with_name("agreement")

    def report(self) -> Path:
        """Beside the comparison that it tells of."""
        return self.comparison().with_name("report")

    def samples(self, method: str, concept: str, request: str) -> Path:
        return self.data / "samples" / method / concept / request

    def checkpoints(self, method: str, concept: str) -> Path:
        return self.work("checkpoints", method, concept, *([str(self.repeat)] if self.repeat else []))

    def work(self, *names: str) -> Path:
        """For checkpoints and locks: never versioned, and free to be deleted while nothing runs."""
        return self.data.joinpath(".work", *names)

    @contextmanager
    def alone(self, *names: str, waiting: Callable[[], AbstractContextManager[None]] = nullcontext) -> Iterator[None]:
        """Only one process at a time, whichever of the entry points it came through.

        waiting: entered while another process has to be waited for.
        """
        path = self._lock(*names)
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            with waiting():
                lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def is_under_way(self, *names: str) -> bool:
        """Is a process at the work that `alone` keeps others from?"""
        path = self._lock(*names)
        if not path.is_file():
            return False
        try:
            with FileLock(path, blocking=False):
                return False
        except Timeout:
            return True

    def _lock(self, *names: str) -> Path:
        return self.work("locks", "+".join(names) + ".lock")  # no method or concept has a + in its name

    @contextmanager
    def device(self) -> Iterator[None]:
        """What this process computes on, for one process at a time, also where many machines share the workspace.

        Load what lies on it within: who waits for a graphics card must hold nothing there.

        A scheduler that gives every process a device of its own says so in the environment; nothing is waited for then.
        """
        if os.environ.get(OWN_DEVICE) == "1":
            yield
            return
        cards = os.environ.get("CUDA_VISIBLE_DEVICES", "").replace("/", "_")  # which of them a process sees
        with self.alone("device", machine(), cards, waiting=aside):
            yield


def _folder_name(class_noun: str) -> str:
    return class_noun.lower().replace(" ", "_")
