"""Which concept images are held out: by their names alone, in a way that anybody can repeat."""

from __future__ import annotations

import hashlib

import pytest

from personalize_core.concepts.held_out import how_many, split
from personalize_core.errors import InputError

NAMES = ["00.jpg", "01.jpg", "02.jpg", "garden.png", "kitchen.png", "straße.webp", "z.bmp"]


def files(names: list[str]) -> dict[str, str]:
    return {name: f"bytes of {name}" for name in names}


def first_by_digest(names: list[str], count: int) -> set[str]:
    digests = sorted((hashlib.sha256(bytes(name, "utf-8")).hexdigest(), name) for name in names)
    return {name for _, name in digests[:count]}


@pytest.mark.parametrize("wanted", [1, 2, 3])
def test_those_whose_names_have_the_least_digest_are_held_out(wanted):
    found = split(files(NAMES), wanted)
    assert set(found.held_out) == first_by_digest(NAMES, wanted)
    assert sorted(found.trained_on + found.held_out) == sorted(NAMES)
    assert not set(found.trained_on) & set(found.held_out)


def test_other_bytes_under_the_same_names_and_another_order_change_nothing():
    other = {name: f"other bytes of {name}" for name in reversed(NAMES)}
    assert split(other, 2) == split(files(NAMES), 2)


def test_an_added_image_is_held_out_only_if_its_name_comes_among_the_first():
    before = split(files(NAMES), 2)
    seen = set()
    for number in range(40):
        added = f"new_{number}.jpg"
        after = set(split(files([*NAMES, added]), 2).held_out)
        assert after == first_by_digest([*NAMES, added], 2)
        assert after == set(before.held_out) or (added in after and len(after & set(before.held_out)) == 1)
        seen.add(added in after)
    assert seen == {True, False}


@pytest.mark.parametrize(
    ("images", "wanted", "count"),
    [
        (5, 2, 0),  # too few
        (6, 2, 2),
        (6, 5, 3),  # three stay
        (6, 1000, 3),
        (10, 0, 0),
        (10, 0.25, 3),  # 2.5, rounded up
        (12, 0.25, 3),
        (6, 0.01, 1),  # at least one
        (5, 0.5, 0),
        (20, 0.99, 17),
    ],
)
def test_how_many_are_held_out(images, wanted, count):
    assert how_many(images, wanted) == count
    assert len(split(files([f"{n}.png" for n in range(images)]), wanted).held_out) == count


def test_the_same_image_is_never_both_trained_on_and_held_out():
    held_out, trained_on = split(files(NAMES), 2).held_out, split(files(NAMES), 2).trained_on
    with pytest.raises(InputError, match="are the same image"):
        split(files(NAMES) | {held_out[0]: "same", trained_on[0]: "same"}, 2)
    assert split(files(NAMES) | dict.fromkeys(held_out, "same"), 2).held_out == held_out
    assert split(files(NAMES) | {held_out[0]: "same", trained_on[0]: "same"}, 0).held_out == ()
