"""params.yaml is read whole or refused with the key that is wrong."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from personalize_core import methods
from personalize_core.errors import InputError
from personalize_core.methods import ABLATION_NAMES, METHOD_NAMES, ablation_changes, check_method, method_class
from personalize_core.params import Params, Sampling, build

GOOD: dict[str, Any] = {
    "base_model": "mini",
    "seed": 3,
    "sampling": {"sampler": "ddim", "steps": 20, "guidance": 4.0, "images_per_prompt": 2, "prompts": "mini"},
    "class_images": {"sampler": "ddim", "steps": 20, "guidance": 4.0},
    "encoders": {"text_image": "mini-clip", "identity": "mini-identity"},
    "methods": {"dreambooth": {"mini": {"steps": 7}}, "textual_inversion": {}},
    "variants": {"personalized_residuals": {"plain": {}, "local": {"lag": True}}},
}


@pytest.fixture
def read(tmp_path):
    """Params from the good ones with a change, given as a path of keys and a value (None: take it out)."""

    def reading(*keys, value: Any = None) -> Params:
        values = yaml.safe_load(yaml.safe_dump(GOOD))
        section = values
        for key in keys[:-1]:
            section = section[key]
        if keys and value is None:
            del section[keys[-1]]
        elif keys:
            section[keys[-1]] = value
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
        return Params.read(tmp_path / "params.yaml")

    return reading


def refusal(act) -> str:
    with pytest.raises(InputError) as refused:
        act()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_the_projects_own_file_is_read(request):
    params = Params.read(request.config.rootpath / "params.yaml")
    for method in params.method_names:
        params.config(method)
        assert params.sampling_variants(method)


def test_a_recipe_is_the_published_one_and_what_params_change_for_this_base_model(read):
    params = read()
    default = method_class("dreambooth").Config()
    assert params.config("dreambooth") == method_class("dreambooth").Config(steps=7)
    assert params.config("textual_inversion") == method_class("textual_inversion").Config()
    assert read("base_model", value="sd-1.4").config("dreambooth") == default


def test_a_method_without_variants_has_one_of_its_own_name(read):
    assert list(read().sampling_variants("dreambooth")) == ["dreambooth"]
    variants = read().sampling_variants("personalized_residuals")
    assert [variants[name].lag for name in ("plain", "local")] == [False, True]


def test_methods_come_in_the_files_order(read):
    assert read().method_names == ["dreambooth", "textual_inversion"]


# -- what is refused -------------------------------------------------------------------------------------------


def test_a_file_that_is_not_there(tmp_path):
    assert refusal(lambda: Params.read(tmp_path / "params.yaml")) == (
        f"{tmp_path / 'params.yaml'} does not exist; run this in the project's folder, or name the folder with --root"
    )


@pytest.mark.parametrize("text", ["", "just words", "- a\n- list", "3"])
def test_a_file_that_holds_something_else(text, tmp_path):
    (tmp_path / "params.yaml").write_text(text)
    said = refusal(lambda: Params.read(tmp_path / "params.yaml"))
    assert said.startswith(f"{tmp_path / 'params.yaml'} must hold") and "base_model" in said


def test_a_file_that_is_not_yaml_says_where(tmp_path):
    (tmp_path / "params.yaml").write_text("seed: {1\nb: ]")
    said = refusal(lambda: Params.read(tmp_path / "params.yaml"))
    assert "params.yaml is not YAML" in said and "line 2" in said


def test_a_file_that_is_not_text(tmp_path):
    (tmp_path / "params.yaml").write_bytes(b"\xff\xfe\x00seed")
    assert "params.yaml is not YAML" in refusal(lambda: Params.read(tmp_path / "params.yaml"))


def test_an_unknown_key_with_the_known_ones(read):
    said = refusal(lambda: read("sede", value=1))
    assert "params.yaml: there is no key 'sede'; known are base_model, " in said and "seed" in said
    assert "there is no key 'sampling.step'" in refusal(lambda: read("sampling", "step", value=1))


def test_a_missing_key(read):
    assert refusal(lambda: read("seed")).endswith("params.yaml: the key 'seed' is missing")
    assert refusal(lambda: read("encoders", "identity")).endswith("the key 'encoders.identity' is missing")


@pytest.mark.parametrize(
    ("keys", "value", "said"),
    [
        (("seed",), "many", "seed = 'many': Input should be a valid integer"),
        (("sampling", "steps"), 0, "sampling.steps = 0: Input should be greater than 0"),
        (("sampling", "steps"), 2.5, "sampling.steps = 2.5: Input should be a valid integer"),
        (("sampling", "guidance"), -1, "sampling.guidance = -1: Input should be greater than or equal to 0"),
        (("sampling", "sampler"), "euler", "sampling.sampler = 'euler': Input should be 'ddim' or 'dpm-solver++'"),
        (("precision",), "fp16", "precision = 'fp16': Input should be 'fp32' or 'bf16'"),
        (("methods",), ["dreambooth"], "methods = ['dreambooth']: Input should be a valid dictionary"),
    ],
    ids=str,
)
def test_a_value_of_the_wrong_kind_with_what_it_should_be(keys, value, said, read):
    assert said in refusal(lambda: read(*keys, value=value))


@pytest.mark.parametrize("section", ["methods", "variants"])
def test_an_unknown_method_with_the_known_ones(section, read):
    said = refusal(lambda: read(section, "dreamboth", value={}))
    assert f"{section} = " in said or section in said
    assert "there is no method 'dreamboth'; the methods are base_model, textual_inversion, dreambooth" in said


def test_an_unknown_option_of_a_method_with_the_known_ones(read):
    said = refusal(lambda: read("methods", "dreambooth", "mini", "step", value=3).config("dreambooth"))
    assert said.startswith("params.yaml, methods.dreambooth.mini: there is no key 'step'; known are prior_preservation")
    said = refusal(
        lambda: read("variants", "personalized_residuals", "local", "lagg", value=True).sampling_variants(
            "personalized_residuals"
        )
    )
    assert said == (
        "params.yaml, variants.personalized_residuals.local: there is no key 'lagg'; "
        "known are lag and lag_unconditional"
    )


def test_a_value_that_a_method_does_not_take(read):
    for option, value in (("steps", 0), ("lr", -1.0), ("lr", "fast"), ("train_text_encoder", "perhaps")):
        params = read("methods", "dreambooth", "mini", option, value=value)
        assert f"methods.dreambooth.mini: {option} = {value!r}: Input should be" in refusal(
            lambda params=params: params.config("dreambooth")
        )


def test_asking_for_an_unknown_method():
    assert refusal(lambda: method_class("lora")) == refusal(lambda: check_method("lora"))
    assert refusal(lambda: check_method("lora")).endswith(
        "the methods are " + ", ".join(METHOD_NAMES[:-1]) + " and " + METHOD_NAMES[-1]
    )


# -- protocols -------------------------------------------------------------------------------------------------


def test_a_protocol_replaces_how_pictures_are_drawn_and_nothing_else(read, tmp_path):
    protocol = {"sampler": "dpm-solver++", "steps": 50, "guidance": 6.0, "images_per_prompt": 4, "prompts": "full"}
    (tmp_path / "full.yaml").write_text(yaml.safe_dump(protocol))
    params = read()
    under = params.under(tmp_path / "full.yaml")
    assert under.sampling == Sampling(**protocol)
    assert under.model_copy(update={"sampling": params.sampling}) == params


def test_an_unknown_protocol_with_the_known_ones(read, tmp_path):
    (tmp_path / "full.yaml").touch()
    params = read()
    said = refusal(lambda: params.under(tmp_path / "ful.yaml"))
    assert said == f"there is no protocol 'ful' in {tmp_path}; there are full and params"


def test_a_protocol_with_a_wrong_key_is_named(read, tmp_path):
    (tmp_path / "full.yaml").write_text("step: 3")
    assert "full.yaml: " in refusal(lambda: read().under(tmp_path / "full.yaml"))


def test_options_may_be_left_out_altogether():
    kind = method_class("dreambooth").Config
    assert build(kind, {}, "here") == kind()


# -- ablations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ABLATION_NAMES)
def test_every_ablation_is_a_recipe_of_its_method_that_differs_from_the_methods_own(name):
    kind = method_class(name)
    changed = build(kind.Config, ablation_changes(name), name)
    assert changed != kind.Config()
    assert isinstance(changed, kind.Config) and kind is method_class(name.partition("@")[0])


def test_no_ablation_is_written_twice():
    """YAML would keep the last of them, without a word."""
    lines = (Path(methods.__file__).parent / "ablations.yaml").read_text().splitlines()
    assert len([line for line in lines if line and line[0].isalpha()]) == len(methods.ABLATIONS)
    names = [line.split(":")[0].strip() for line in lines if line.startswith("  ") and line[2].isalpha()]
    assert len(names) == len(ABLATION_NAMES)


def test_an_ablation_stands_on_its_methods_recipe_for_the_base_model(read):
    params = read("ablations", value={"dreambooth@without_prior": {"mini": {"lr": 0.5}}, "oft@coft": {}})
    plain, ablation = params.config("dreambooth"), params.config("dreambooth@without_prior")
    assert ablation == dataclasses.replace(plain, prior_preservation=False, lr=0.5)
    assert params.config("oft@coft").coft
    assert params.method_names == [*params.methods, "dreambooth@without_prior", "oft@coft"]


def test_an_ablation_that_is_not_known_is_refused_with_those_that_are(read):
    assert refusal(lambda: check_method("vico@mask")) == (
        "vico has no ablation 'mask'; it has without_image_attention, without_mask and without_regularizer"
    )
    assert refusal(lambda: check_method("xti@x")).endswith("it has none")
    assert "vico has no ablation 'mask'" in refusal(lambda: read("ablations", value={"vico@mask": {}}))
    assert "is a method; write it under methods" in refusal(lambda: read("ablations", value={"vico": {}}))
