"""What was trained at one image size samples at another, or says why not; the sizes that an XL's U-Net is told of.

No test here knows a method's name.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from personalize_core.artifacts import saving
from personalize_core.base_model.hooks import hooked
from personalize_core.concepts.images import ConceptLatents
from personalize_core.errors import InputError
from personalize_core.training.loop import add_gradients, noisy_rows
from tests.conftest import disturbed, sample_latents
from tests.every_method.cases import LEARNING, of_default

ON_XL = [case for case in LEARNING if case.kind == "xl"]
WHOLE = [16.0, 16.0, 0.0, 0.0, 16.0, 16.0]


def sized_images() -> ConceptLatents:
    """Latents without deviation whose first number says which image they are of, as their sizes do."""

    def numbered(number: float) -> torch.Tensor:
        mean = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(int(number)))
        mean[:, 0, 0, 0] = number
        return torch.stack([mean, torch.zeros_like(mean)], dim=1)

    numbers, of_class = (1.0, 2.0, 3.0), (4.0, 5.0)
    return ConceptLatents(
        [numbered(n) for n in numbers],
        [numbered(n) for n in of_class],
        sizes=[torch.tensor([by_hand(n)]) for n in numbers],
        class_sizes=[torch.tensor([by_hand(n)]) for n in of_class],
    )


def by_hand(number: float) -> list[float]:
    return [20 + number, 30 + number, number, 2 * number, 16.0, 16.0]


@of_default
def test_at_another_image_size_an_artifact_samples_or_is_refused_by_both_sizes(case, base, concept, tmp_path):
    saving.save(tmp_path, case.name, disturbed(case.make(base, concept)), base, seed=0)
    larger = case.base(image_size=24)
    restored = saving.restore(tmp_path, larger)
    try:
        latents = sample_latents(restored, larger, [restored.say("a photo of a {}")], steps=1)
    except InputError as error:
        assert all(said in str(error) for said in ("16 pixels", "of 24", "image_size", "train it again"))
    else:
        assert latents.shape == (1, 4, 12, 12)


@pytest.mark.parametrize("rows_at_once", [1, 8])
@pytest.mark.parametrize("case", ON_XL, ids=str)
def test_the_unet_is_told_the_sizes_of_the_rows_that_it_denoises(case, rows_at_once, concept):
    base = case.base()
    method, images = disturbed(case.make(base, concept), by=0.03).train(), sized_images()
    for stage in method.stages():
        told: list[list[list[float]]] = []

        def look(unet: Any, args: tuple, kwargs: dict[str, Any], told: list = told) -> None:
            told.append(kwargs["added_cond_kwargs"]["time_ids"].tolist())

        with (stage.attach or method.attach)(base), hooked(base.unet.register_forward_pre_hook(look, with_kwargs=True)):
            rows = noisy_rows(method, base, images, stage, seed=0, index=0)
            count = len(rows.t)
            parts = [slice(start, start + rows_at_once) for start in range(0, count, rows_at_once)]
            add_gradients(stage, method, base, rows, parts)
        expected = [by_hand(number) for number in rows.batch.latents[:, 0, 0, 0].tolist()]
        seen = {tuple(row) for call in told for row in call} - {tuple(WHOLE)}
        assert seen == {tuple(row) for row in expected} and len(seen) > 1
        for part in parts:  # rows behind those of the part, if any, are a method's own
            own = expected[part]
            calls = [call for call in told if call[: len(own)] == own]
            assert calls and all(row == WHOLE for call in calls for row in call[len(own) :])
        assert all(any(call[: len(expected[part])] == expected[part] for part in parts) for call in told)
