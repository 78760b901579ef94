"""params.yaml, encoders: what scores are computed with."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from personalize_core.workspace.sections import Names, Section, each_once

TextVariant = Literal["class_phrase", "slot_deleted", "full_prompt"]


class Encoders(Section):
    """What the scores are computed with. The first encoder of each list is the headline: rankings and figures show it,
    the others stand beside it in the tables."""

    text_image: Names  # for CLIP-T and CLIP-I
    identity: Names  # for DINO
    segmenter: str | None = None  # for masked CLIP-I and DINO; None: they are not measured
    texts: Annotated[list[TextVariant], Field(min_length=1), AfterValidator(each_once)] = [
        "class_phrase",
        "slot_deleted",
    ]  # for CLIP-T; see metrics/tables.py
    masc: str | None = None  # for MaSC, by the segmenter's masks; None: it is not measured

    @model_validator(mode="after")
    def _masks_for_masc(self) -> Encoders:
        if self.masc and not self.segmenter:
            raise ValueError("masc needs masks: name a segmenter beside it")
        return self
