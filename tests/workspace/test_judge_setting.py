"""params.yaml, judge: what is taken, what is refused, and that no message repeats a key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from personalize_core.errors import InputError
from personalize_core.workspace.judge_setting import Judge
from personalize_core.workspace.params import Params
from tests.workspace.test_params import GOOD

REMOTE: dict[str, Any] = {"address": "https://api.example.com/v1", "model": "gpt-x", "key_variable": "OPENAI_API_KEY"}
LOCAL: dict[str, Any] = {"local": {"model": "owner/name", "revision": "0123456789" * 4}}
SECRETS = [
    "sk-proj-4f9a8b7c6d5e",
    "hf_AbCdEfGhIjKlMnOp",
    "AIzaSyA-0123456789",
    "Bearer 4f9a8b7c6d5e",
    "gsk_4f9a8b7c6d5e0",
]


@pytest.fixture
def read(tmp_path: Path):
    def reading(judge: Any) -> Judge | None:
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(GOOD | {"judge": judge}))
        return Params.read(tmp_path / "params.yaml").judge

    return reading


def refusal(act) -> str:
    with pytest.raises(InputError) as refused:
        act()
    return str(refused.value)


def test_no_judge_is_asked_unless_one_is_named(read, tmp_path):
    assert read(None) is None
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(GOOD))
    assert Params.read(tmp_path / "params.yaml").judge is None


@pytest.mark.parametrize(
    "judge",
    [
        REMOTE,
        LOCAL,
        {"local": {"model": "/models/tiny"}},
        {"address": "http://10.0.0.7:8000/v1", "model": "Qwen/Qwen2.5-VL-7B-Instruct"},
        {"address": "http://localhost:8000/v1", "model": "hf-internal-testing/tiny", "key_variable": "LOCAL_KEY"},
        REMOTE | {"repetitions": 3, "temperature": 1.0, "concept_images": 4, "image_size": 1024, "detail": "low"},
        REMOTE | {"temperature": None, "detail": None, "requests_at_once": 16, "timeout": 600},
    ],
)
def test_what_is_taken(judge, read):
    found = read(judge)
    assert found.model_dump(exclude_unset=True) == judge


@pytest.mark.parametrize(
    ("judge", "said"),
    [
        ({}, "write either address and model, or local"),
        (REMOTE | LOCAL, "write either address and model, or local"),
        ({"address": "https://api.example.com/v1"}, "address and model come together"),
        (LOCAL | {"model": "x"}, "address and model come together"),
        (LOCAL | {"key_variable": "KEY"}, "a local model wants no key"),
        (LOCAL | {"temperature": 1.0}, "most probable answer"),
        (LOCAL | {"repetitions": 2}, "most probable answer"),
        ({"local": {"model": "owner/name", "revision": "main"}}, "judge.local.revision"),
        (REMOTE | {"repetitions": 0}, "judge.repetitions = 0"),
        (REMOTE | {"temperature": -1}, "judge.temperature"),
        (REMOTE | {"image_size": True}, "judge.image_size"),
        (REMOTE | {"detail": "best"}, "judge.detail"),
        (REMOTE | {"rubric": 2}, "there is no key 'judge.rubric'"),
        (REMOTE | {"address": "api.example.com"}, "address should be like https://api.openai.com/v1"),
        (REMOTE | {"address": "ftp://api.example.com"}, "address should be like"),
        (REMOTE | {"address": "https://exa mple.com/v1"}, "address should be like"),
        (REMOTE | {"address": "https://api.example.com:http/v1"}, "address should be like"),
        (REMOTE | {"address": "http://api.example.com/v1"}, "would travel to api.example.com in clear"),
        ("gpt-x", "it should be keys and their values, or null"),
        ([REMOTE], "it should be keys and their values, or null"),
    ],
)
def test_what_is_refused(judge, said, read):
    assert said in refusal(lambda: read(judge))


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("place", ["model", "address", "key_variable", "api_key", "local", "whole", "url"])
def test_a_key_in_the_file_is_refused_and_not_repeated(place, secret, read):
    judge: Any = REMOTE | {place: secret}
    if place == "local":
        judge = {"local": {"model": secret}}
    elif place == "whole":
        judge = secret
    elif place == "url":
        judge = REMOTE | {"address": f"https://user:{secret.replace(' ', '')}@api.example.com/v1"}
    said = refusal(lambda: read(judge))
    assert secret not in said and secret[3:] not in said and "judge" in said


@pytest.mark.parametrize("value", ["openai_api_key", "4f9a8b7c6d5e4f9a", "${OPENAI_API_KEY}", "A" * 65, "KEY\n"])
def test_only_the_name_of_a_variable_is_taken_for_one(value, read):
    said = refusal(lambda: read(REMOTE | {"key_variable": value}))
    assert "never the key itself" in said and value not in said


def test_scores_depend_on_who_is_asked_and_how_and_on_nothing_else(read):
    plain = read(REMOTE).scored_by
    assert read(REMOTE | {"key_variable": "OTHER", "requests_at_once": 9, "timeout": 9}).scored_by == plain
    for changed in ({"model": "y"}, {"address": "https://other.example.com/v1"}, {"detail": None}, {"image_size": 64}):
        assert read(REMOTE | changed).scored_by != plain
