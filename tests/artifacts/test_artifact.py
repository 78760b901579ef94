"""An artifact says what it is, and is restored only onto the base model that it was trained on."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from personalize_core.artifacts import description, saving
from personalize_core.concepts.concept import Concept
from personalize_core.errors import InputError
from personalize_core.methods import method_class
from tests.conftest import disturbed, tiny_base
from tests.mutated import outcomes, put

NAME = "personalized_residuals"  # one with options in its config


@pytest.fixture
def base():
    return tiny_base()


@pytest.fixture
def saved(base, tmp_path):
    kind: Any = method_class(NAME)
    method = disturbed(kind(kind.Config(steps=5, initial="gaussian"), base, Concept("bear", "<bear>", "teddy bear")))
    saving.save(tmp_path, NAME, method, base, seed=7)
    return method


def change(folder, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(folder, base) -> str:
    with pytest.raises(InputError) as refused:
        saving.restore(folder, base)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_it_says_what_was_trained_on_what_and_how(saved, tmp_path):
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["method"] == NAME and config["seed"] == 7 and config["format"] == 1
    assert config["concept"] == {"name": "bear", "placeholder": "<bear>", "class_noun": "teddy bear"}
    assert config["phrase"] == "<bear> teddy bear"
    assert config["config"]["steps"] == 5 and config["config"]["initial"] == "gaussian"
    assert config["base_model"] == {
        "name": "tiny",
        "revision": "local",
        "weights_hash": "tiny",
        "prediction_type": "epsilon",
        "rare_word": "sks",
    }
    assert set(config["versions"]) == {"torch", "diffusers", "transformers"}


def test_it_comes_back_as_it_was_ready_to_sample(saved, base, tmp_path):
    torch.manual_seed(99)
    restored = saving.restore(tmp_path, base)
    assert all(torch.equal(tensor, saved.state_dict()[name]) for name, tensor in restored.state_dict().items())
    assert (restored.config, restored.concept) == (saved.config, saved.concept)
    assert not restored.training and not any(parameter.requires_grad for parameter in restored.parameters())


def test_saving_twice_gives_the_same_bytes(saved, base, tmp_path):
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    saving.save(tmp_path, NAME, saved, base, seed=7)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_restoring_does_not_touch_torchs_random_state(saved, base, tmp_path):
    before = torch.random.get_rng_state()
    saving.restore(tmp_path, base)
    assert torch.equal(torch.random.get_rng_state(), before)


# -- what is refused -------------------------------------------------------------------------------------------


def test_an_artifact_of_another_base_model(saved, base, tmp_path):
    base.name, base.weights_hash = "other", "0123"
    assert refusal(tmp_path, base) == (
        f"{tmp_path} was trained on the base model 'tiny' (tiny), not on 'other' (0123); load that one, or train again"
    )


def test_an_artifact_of_another_base_model_that_was_imported(saved, base, tmp_path):
    change(tmp_path, imported="bear.safetensors")
    base.name, base.weights_hash = "other", "0123"
    assert refusal(tmp_path, base).endswith("; load that one, or remove it and import again")


def test_an_artifact_of_another_method(saved, base, tmp_path):
    assert saving.restore(tmp_path, base, NAME).phrase == saved.phrase
    with pytest.raises(InputError) as refused:
        saving.restore(tmp_path, base, "oft")
    assert str(refused.value) == (
        f"{tmp_path} holds what {NAME} has learned, not oft; put it where {NAME}'s artifacts lie, or remove it and "
        "train oft"
    )


def test_a_folder_without_an_artifact(base, tmp_path):
    assert refusal(tmp_path, base) == f"{tmp_path} holds no artifact; train it first, with `personalize train`"
    assert "holds no artifact" in refusal(tmp_path / "none", base)


def test_an_artifact_of_another_format(saved, base, tmp_path):
    change(tmp_path, format=2)
    assert refusal(tmp_path, base) == (f"{tmp_path} was written in format 2, this version reads 1; train it again")


def test_an_artifact_of_an_unknown_method(saved, base, tmp_path):
    change(tmp_path, method="lora")
    assert "there is no method 'lora'; the methods are" in refusal(tmp_path, base)


def test_an_artifact_with_an_option_that_there_is_not_any_more(saved, base, tmp_path):
    change(tmp_path, config={"stepps": 1})
    said = refusal(tmp_path, base)
    assert said.startswith(f"{tmp_path / 'config.json'}: there is no key 'stepps'; known are adaptive, rank_fraction")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": 1}'])
def test_an_artifact_whose_description_is_damaged(content, saved, base, tmp_path):
    (tmp_path / "config.json").write_text(content)
    assert refusal(tmp_path, base) == f"{tmp_path} holds a damaged artifact; remove the folder and train again"


@pytest.mark.parametrize(
    "changes",
    [
        {"method": []},
        {"config": []},
        {"concept": "v"},
        {"concept": {"name": "v"}},
        {"concept": {"name": 1, "placeholder": [], "class_noun": {}}},
        {"base_model": "tiny"},
        {"base_model": {"name": "tiny"}},
        {"format": "1"},
    ],
)
def test_an_artifact_whose_description_says_something_of_another_type(changes, saved, base, tmp_path):
    change(tmp_path, **changes)
    assert refusal(tmp_path, base) == f"{tmp_path} holds a damaged artifact; remove the folder and train again"


def test_a_mutated_description_is_read_or_refused(saved, base, tmp_path):
    content = (tmp_path / "config.json").read_bytes()

    def read(changed: bytes) -> object:
        put(tmp_path / "config.json", changed)
        return description.check(tmp_path, NAME, base.name, base.weights_hash)

    accepted, refused = outcomes(content, read)
    assert accepted > 100 and refused > 1000


def test_weights_with_a_mutated_header_are_read_or_refused(saved, base, tmp_path):
    content = (tmp_path / "weights.safetensors").read_bytes()
    numbers = int.from_bytes(content[:8], "little") + 8  # where they begin; any of them may be another

    def read(changed: bytes) -> object:
        put(tmp_path / "weights.safetensors", changed + content[numbers:])
        return saving.restore(tmp_path, base)

    accepted, refused = outcomes(content[:numbers], read, count=200)
    assert accepted + refused == 200 and refused > 100


@pytest.mark.parametrize("content", [b"", b"not safetensors", None])
def test_an_artifact_whose_weights_are_damaged_or_gone(content, saved, base, tmp_path):
    if content is None:
        (tmp_path / "weights.safetensors").unlink()
    else:
        (tmp_path / "weights.safetensors").write_bytes(content)
    assert refusal(tmp_path, base) == f"{tmp_path} holds a damaged artifact; remove the folder and train again"


def test_weights_of_another_shape(saved, base, tmp_path):
    kind: Any = method_class(NAME)
    other = kind(kind.Config(rank_fraction=0.5), base, Concept("bear", "<bear>", "teddy bear"))
    saving.save_tensors(tmp_path / "weights.safetensors", other.state_dict())
    assert refusal(tmp_path, base) == f"{tmp_path} holds a damaged artifact; remove the folder and train again"
