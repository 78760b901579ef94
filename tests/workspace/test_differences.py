"""What differs between what a result was made from and what there is now, in words that a person knows."""

from __future__ import annotations

from typing import Any

import pytest

from personalize_core.files.atomic import FORMAT
from personalize_core.files.stamps import spelled_out, stamp_of
from personalize_core.workspace.lineage.differences import differences, why_stale
from personalize_core.workspace.lineage.records import EDITED


def recorded(of: dict[str, Any]) -> dict[str, Any]:
    return {"format": FORMAT, "stamp": str(stamp_of(of)), "made_from": spelled_out(of)}


def class_images(steps: int = 2, source: str = "f", images: int = 8) -> dict[str, Any]:
    sampled = stamp_of({"sampling": {"steps": steps}, "sources": stamp_of({"sample": source})})
    return {"class_images": stamp_of({"encoded": stamp_of({"sampled": sampled}), "images": images})}


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ({"seed": 5}, {"seed": 6}, ["seed changed: 5 -> 6"]),
        ({"sampling": {"steps": 2, "eta": 0}}, {"sampling": {"steps": 3}},
         ["sampling changed: steps 2 -> 3 and eta 0 -> not there"]),
        ({"latents": stamp_of({"files": {"0.png": "a", "1.png": "b", "2.png": "c"}})},
         {"latents": stamp_of({"files": {"0.png": "x", "1.png": "b", "3.png": "d"}})},
         ["concept images changed: 0.png, removed 2.png and added 3.png"]),
        ({"sources": stamp_of({"train": "a", "methods/oft/method": "b", "names.yaml": "c"})},
         {"sources": stamp_of({"train": "a", "methods/oft/method": "x", "names.yaml": "y"})},
         ["code changed: methods/oft/method.py and names.yaml"]),
        ({"config": "Config(lr=0.1, words=('a, b=1', 'c'), inner=Inner(steps=3))"},
         {"config": "Config(lr=5e-06, words=('a, b=1', 'c'), inner=Inner(steps=4), new=None)"},
         ["recipe changed: lr 0.1 -> 5e-06, inner.steps 3 -> 4 and new not there -> None"]),
        ({"variants": {"lag": "Sampling(lag=True)", "old": "Sampling(lag=False)"}},
         {"variants": {"lag": "Sampling(lag=False)"}},
         ["sampling options changed: lag lag True -> False and old"]),
        ({"vae": "a", "base_model": "b"}, {"vae": "x", "base_model": "y"}, ["base model changed"]),
        ({"image_size": 512, "latents": stamp_of({"image_size": 512})},
         {"image_size": 768, "latents": stamp_of({"image_size": 768})}, ["image size changed: 512 -> 768"]),
        ({"latents": stamp_of({"image_size": "a3"})}, {"image_size": 768, "latents": stamp_of({"image_size": 768})},
         ["image size changed: the base model's own -> 768"]),
        ({"image_size": "a3"}, {"image_size": "b4"}, ["image size changed"]),
        ({"again": stamp_of({"seed": 5}), "seed": 7}, {"again": stamp_of({"seed": 6}), "seed": 8},
         ["seed changed: 5 -> 6 and 7 -> 8"]),
        ({"class_images": ""}, class_images(), ["class images changed"]),
        (class_images(steps=2), class_images(steps=3), ["class images changed: sampling steps 2 -> 3"]),
        (class_images(source="f"), class_images(source="e"), ["class images changed: code sample.py"]),
        (class_images(images=8), class_images(images=9), ["class images changed: number 8 -> 9"]),
        ({"what_comes": [1]}, {"what_comes": [2]}, ["what comes changed"]),
    ],
)  # fmt: skip
def test_each_kind_of_thing_is_named_once_with_what_a_person_may_know(before, now, said):
    assert differences(spelled_out(before), now) == said
    assert why_stale(recorded(before), stamp_of(now)) == "; ".join(said)
    assert why_stale(recorded(before), stamp_of(before)) is None


def test_of_many_a_few_are_named():
    files = {f"{index}.png": str(index) for index in range(20)}
    (said,) = differences({"files": files}, {"files": {}})
    assert said.endswith("removed 5.png and 14 more") and said.count("removed") == 6


def test_a_stamp_that_stands_beside_what_it_is_not_of_is_said_to_be_edited():
    edited = recorded({"seed": 5}) | {"stamp": "0" * 16}
    assert why_stale(edited, stamp_of({"seed": 5})) == EDITED
