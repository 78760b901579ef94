"""Every number of every configuration has bounds, and none is true, endless or no number."""

from __future__ import annotations

import copy
import functools
import operator
import types
import typing
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from personalize_core.errors import InputError
from personalize_core.files.bounds import cost_of_images, size_of, time_of
from personalize_core.files.typed_yaml import build
from personalize_core.methods import METHOD_NAMES, recipe_class
from personalize_core.methods.shared.options import Refinement
from personalize_core.workspace.params import Params
from personalize_core.workspace.sections import Section
from tests.mutated import outcomes, put


def numbers_of(kind: type) -> list[str]:
    """The fields that are a number, or a number or None."""
    hints: dict[str, Any] = typing.get_type_hints(kind)
    return [key for key, hint in hints.items() if {hint, *typing.get_args(hint)} & {int, float}]


KINDS = {name: recipe_class(name) for name in METHOD_NAMES}
CASES = [(kind, key) for kind in (*KINDS.values(), Refinement) for key in numbers_of(kind)]


@pytest.mark.parametrize("kind, key", CASES, ids=[f"{kind.__module__.rpartition('.')[2]}.{key}" for kind, key in CASES])
def test_a_number_of_a_recipe_is_no_switch_and_has_an_end(kind, key):
    for value in (True, float("nan"), float("inf"), -1, 10**30):
        with pytest.raises(InputError) as refused:
            build(kind, {key: value}, "params.yaml")
        assert str(refused.value).startswith("params.yaml: ") and len(str(refused.value)) < 1500
    for switch in (True, False):
        with pytest.raises(InputError, match=f"{key} = {switch}: it should be a number"):
            build(kind, {key: switch}, "params.yaml")


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("steps", 10**9, "steps = 1000000000: it should be at most 1,000,000; 1,000,000,000 steps take about 6 years"),
        ("batch_size", 10**6, "at most 1,024; a batch of 1,000,000 takes about 1,500 TB of memory"),
        ("class_images", 10**6, "at most 100,000; 1,000,000 images take about 23 days and 500 GB"),
        ("lr", 1e38, "at most 100"),
        ("steps", True, "steps = True: it should be a number"),
        ("lr", float("inf"), "finite number"),
    ],
)
def test_a_number_that_is_too_large_is_refused_with_what_it_would_cost(key, value, said):
    with pytest.raises(InputError) as refused:
        build(KINDS["dreambooth"], {key: value}, "params.yaml")
    assert said in str(refused.value)


SETTINGS = {
    "base_model": "mini",
    "seed": 0,
    "sampling": {"sampler": "ddim", "steps": 20, "guidance": 4.0, "images_per_prompt": 2, "prompts": "mini"},
    "class_images": {"sampler": "ddim", "steps": 20, "guidance": 4.0},
    "encoders": {"text_image": ["mini-clip"], "identity": ["mini-identity"]},
    "methods": {"textual_inversion": {"mini": {"steps": 400}}},
    "automation": {"nightly": "0 2 * * *", "canary": {"dog1": ["textual_inversion"]}},
    "variants": {},
}


@pytest.mark.parametrize(
    "place, value, said",
    [
        ("seed", -1, "seed = -1: Input should be greater than or equal to 0"),
        ("seed", 2**63, "seed"),
        ("seed", True, "seed = True: it should be a number"),
        ("sampling.steps", 1500, "sampling.steps = 1500: Input should be less than or equal to 1000"),
        ("class_images.steps", 1500, "class_images.steps = 1500"),
        ("sampling.steps", True, "sampling.steps = True: it should be a number"),
        ("sampling.guidance", float("inf"), "sampling.guidance"),
        ("sampling.guidance", 1e38, "sampling.guidance"),
        ("sampling.images_per_prompt", 10**9, "1,000,000,000 images take about 63 years and 500 TB"),
        ("sampling.images_per_prompt", 10**30, "at most 1000"),
        ("automation.nightly", "at night", "automation.nightly = 'at night': it is no cron expression"),
        ("automation.canary", {"dog1": ["nosuch"]}, "automation.canary.dog1: there is no method 'nosuch'"),
        (
            "methods",
            {"textual_inversion": {"Mini": {}}},
            "'methods.textual_inversion.Mini': there is no such base model",
        ),
        ("base_model", "x" * 10**6, "base_model"),
    ],
)
def test_what_params_yaml_cannot_mean_is_refused_with_its_key_when_it_is_read(place, value, said, tmp_path):
    values = copy.deepcopy(SETTINGS)
    *outer, key = place.split(".")
    functools.reduce(operator.getitem, outer, values)[key] = value
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(InputError) as refused:
        Params.read(tmp_path / "params.yaml")
    assert said in str(refused.value) and len(str(refused.value)) < 1000


def numbers_in(hint: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Places of all numbers in the sections of a type."""
    if hint in (int, float):
        yield place
    elif typing.get_origin(hint) in (typing.Union, types.UnionType, typing.Annotated):
        for each in typing.get_args(hint):
            yield from numbers_in(each, place)
    elif isinstance(hint, type) and issubclass(hint, Section):
        for key, inner in typing.get_type_hints(hint, include_extras=True).items():
            yield from numbers_in(inner, (*place, key))


NEEDED = {  # what a section cannot be without
    ("judge",): {"address": "http://localhost:8000/v1", "model": "m"},
    ("automation", "notify"): {
        "email": {"host": "mail.example.org", "to": ["a@example.org"], "sender": "b@example.org"}
    },
}


@pytest.mark.parametrize("place", sorted(set(numbers_in(Params))), ids=".".join)
@pytest.mark.parametrize("switch", [True, False])
def test_no_number_of_params_yaml_is_a_switch(switch, place, tmp_path):
    """Not even for a limit, of which True would be 1 and False 0."""
    values: dict[str, Any] = copy.deepcopy(SETTINGS)
    for section, needed in NEEDED.items():
        if place[: len(section)] == section:
            functools.reduce(operator.getitem, section[:-1], values)[section[-1]] = copy.deepcopy(needed)
    *outer, key = place
    section = values
    for name in outer:
        section = section.setdefault(name, {})
    section[key] = switch
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(InputError, match=f"{'.'.join(place)} = {switch}: it should be a number"):
        Params.read(tmp_path / "params.yaml")


def test_all_that_is_wrong_stands_in_one_message(tmp_path):
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(SETTINGS | {"seed": -1, "precision": "fp16", "more": 1}))
    with pytest.raises(InputError) as refused:
        Params.read(tmp_path / "params.yaml")
    assert all(key in str(refused.value) for key in ("seed", "precision", "more"))


def test_mutated_settings_are_read_or_refused(tmp_path):
    path = tmp_path / "params.yaml"

    def read(content: bytes) -> object:
        put(path, content)
        return Params.read(path)

    accepted, refused = outcomes(yaml.safe_dump(SETTINGS).encode(), read)
    assert accepted > 50 and refused > 1000


def test_costs_are_said_in_units_that_people_know():
    assert [time_of(5), time_of(300), time_of(86400), time_of(1e6)] == ["5 seconds", "5 minutes", "24 hours", "12 days"]
    assert [size_of(1e6), size_of(3e9), size_of(5e13)] == ["1 MB", "3 GB", "50 TB"]
    assert cost_of_images(1000) == "1,000 images take about 33 minutes and 500 MB"
