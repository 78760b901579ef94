"""params.yaml is read whole or refused with the key that is wrong."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from personalize_core import methods
from personalize_core.errors import InputError, listed
from personalize_core.files.typed_yaml import build, keys_of
from personalize_core.methods import (
    ABLATION_NAMES,
    METHOD_NAMES,
    ablation_changes,
    check_method,
    method_class,
    recipe_class,
)
from personalize_core.workspace.params import Params

GOOD: dict[str, Any] = {
    "base_model": "mini",
    "seed": 3,
    "sampling": {"sampler": "ddim", "steps": 20, "guidance": 4.0, "images_per_prompt": 2, "prompts": "mini"},
    "class_images": {"sampler": "ddim", "steps": 20, "guidance": 4.0},
    "encoders": {"text_image": ["mini-clip"], "identity": ["mini-identity"]},
    "methods": {"dreambooth": {"mini": {"steps": 7}}, "textual_inversion": {}},
    "variants": {"personalized_residuals": {"plain": {}, "local": {"lag": True}}},
}


@pytest.fixture
def read(tmp_path):
    """Params from the good ones with a change, given as a path of keys and a value (None: take it out), or sections."""

    def reading(*keys, value: Any = None, **sections: Any) -> Params:
        values = yaml.safe_load(yaml.safe_dump(GOOD | sections))
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
    kind: Any = recipe_class("dreambooth")
    default = kind()
    assert params.config("dreambooth") == kind(steps=7)
    assert params.config("textual_inversion") == recipe_class("textual_inversion")()
    assert read("base_model", value="sd-1.4").config("dreambooth") == default


def test_a_method_without_variants_has_one_of_its_own_name(read):
    assert list(read().sampling_variants("dreambooth")) == ["dreambooth"]
    variants = read().sampling_variants("personalized_residuals")
    assert [variants[name].sampling.lag for name in ("plain", "local")] == [False, True]


@pytest.mark.parametrize("value", [0, 2, 1000, 0.25])
def test_images_are_held_out_by_number_or_share(read, value):
    assert read("held_out", value=value).held_out == value
    assert read().held_out == 0


@pytest.mark.parametrize("value", [-1, 1001, 1.0, 2.5, -0.5, True, "2", [2], float("nan"), {}])
def test_what_is_no_number_of_images_and_no_share_is_refused(read, value):
    said = refusal(lambda: read("held_out", value=value))
    assert "held_out = " in said and "a number of images, from 0 to 1000, or a share of them between 0 and 1" in said


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
    assert "params.yaml is text in UTF-16; save it as UTF-8" in refusal(lambda: Params.read(tmp_path / "params.yaml"))


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
        (("encoders", "identity"), "dino-s16", "encoders.identity = 'dino-s16': Input should be a valid list"),
        (("encoders", "identity"), [], "encoders.identity = []: List should have at least 1 item"),
        (
            ("encoders", "text_image"),
            ["clip-b32", "clip-b32"],
            "encoders.text_image = ['clip-b32', 'clip-b32']: 'clip-b32' stands there more than once",
        ),
        (
            ("encoders", "texts"),
            ["prompt"],
            "encoders.texts.0 = 'prompt': Input should be 'class_phrase', 'slot_deleted' or 'full_prompt'",
        ),
        (("precision",), "fp16", "precision = 'fp16': Input should be 'fp32' or 'bf16'"),
        (("optimizer",), "sgd", "optimizer = 'sgd': Input should be 'adamw' or 'adamw8bit'"),
        (("compile",), "inductor", "compile = 'inductor': Input should be a valid boolean"),
        (("micro_batch",), 0, "micro_batch = 0: it should be a number of rows, 1 or more; auto"),
        (("micro_batch",), True, "micro_batch = True: it should be a number of rows, 1 or more; auto"),
        (("micro_batch",), "most", "micro_batch = 'most': it should be a number of rows, 1 or more; auto"),
        (("methods",), ["dreambooth"], "methods = ['dreambooth']: it should be keys and their values"),
    ],
    ids=str,
)
def test_a_value_of_the_wrong_kind_with_what_it_should_be(keys, value, said, read):
    assert said in refusal(lambda: read(*keys, value=value))


@pytest.mark.parametrize(
    ("section", "value", "key"),
    [
        ("ablations", None, "ablations"),
        ("automation", None, "automation"),
        ("methods", {"dreambooth": None}, "methods.dreambooth"),
        ("methods", {"dreambooth": {"mini": None}}, "methods.dreambooth.mini"),
    ],
)
def test_a_section_with_nothing_behind_its_colon_with_what_to_write(section, value, key, read):
    assert f"{key} = None: it should be keys and their values; write them below it, or {{}} for none" in refusal(
        lambda: read(**{section: value})
    )


@pytest.mark.parametrize("section", ["methods", "variants"])
def test_an_unknown_method_with_the_known_ones(section, read):
    said = refusal(lambda: read(section, "dreamboth", value={}))
    assert f"{section} = " in said or section in said
    assert f"there is no method 'dreamboth'; the methods are {', '.join(METHOD_NAMES[:4])}" in said


def test_an_unknown_option_of_a_method_with_the_known_ones(read):
    said = refusal(lambda: read("methods", "dreambooth", "mini", "step", value=3).config("dreambooth"))
    assert said.startswith("params.yaml, methods.dreambooth.mini: there is no key 'step'; known are adaptive, prior_p")
    said = refusal(
        lambda: read("variants", "personalized_residuals", "local", "lagg", value=True).sampling_variants(
            "personalized_residuals"
        )
    )
    assert said == (
        "params.yaml, variants.personalized_residuals.local: there is no key 'lagg'; "
        "known are lag, lag_unconditional, personalization_guidance and consistency_guidance"
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


# -- strategies of sampling --------------------------------------------------------------------------------------


def with_variant(read, method: str, **options: Any) -> Any:
    """The one variant of a method, with these options."""
    return read("variants", value={method: {"chosen": options}}).sampling_variants(method)["chosen"]


@pytest.mark.parametrize(
    "method", ["textual_inversion", "core", "attn_dreambooth", "ti_db", "custom_diffusion", "vico", "dti"]
)
def test_test_time_optimization_stands_beside_the_options_of_any_method_with_one_embedding(method, read):
    variant = with_variant(read, method, test_time_optimization={"steps": 7, "cer_axis": "feature"})
    assert (variant.refinement.steps, variant.refinement.cer_axis, variant.refinement.batch_size) == (7, "feature", 6)
    assert variant.sampling == recipe_class(method).Sampling() and variant.name == "chosen"
    assert with_variant(read, method).refinement is None
    assert with_variant(read, method, test_time_optimization={}).refinement is not None


def test_it_stands_beside_lag_where_the_recipe_trains_an_embedding(read):
    variant = with_variant(read, "personalized_residuals@token_embedding", lag=True, test_time_optimization={})
    assert variant.sampling.lag and variant.refinement
    said = refusal(lambda: with_variant(read, "personalized_residuals", test_time_optimization={}))
    assert "does not apply to personalized_residuals: it learns none; it applies to textual_inversion, " in said


@pytest.mark.parametrize(("method", "held"), [("oft", "none"), ("neti", "none"), ("xti", "16"), ("base_model", "none")])
def test_test_time_optimization_is_refused_where_there_is_not_one_embedding(method, held, read):
    assert refusal(lambda: with_variant(read, method, test_time_optimization={})) == (
        f"params.yaml, variants.{method}.chosen: test_time_optimization refines the one text embedding that was "
        f"learned, for each prompt, and does not apply to {method}: it learns {held}; it applies to "
        "textual_inversion, custom_diffusion, vico, dco, class_diffusion, attn_dreambooth, ti_db, core and dti"
    )


def test_what_test_time_optimization_does_not_know_is_refused_with_what_it_knows(read):
    said = refusal(lambda: with_variant(read, "core", test_time_optimization={"step": 3}))
    assert said.startswith(
        "params.yaml, variants.core.chosen.test_time_optimization: there is no key 'step'; known are cer_weight, "
    )
    said = refusal(lambda: with_variant(read, "core", test_time_optimization={"steps": 0}))
    assert "chosen.test_time_optimization: steps = 0: Input should be greater than 0" in said
    said = refusal(lambda: with_variant(read, "core", test_time_optimization={"cer_weight": 0, "car_weight": 0}))
    assert "would refine nothing" in said
    said = refusal(lambda: with_variant(read, "core", test_time_optimization=True))
    assert said.endswith("test_time_optimization = True: it should be options, or {} for the published ones")
    said = refusal(lambda: with_variant(read, "core", test_time_optimisation={}))
    assert said.endswith(
        "there is no key 'test_time_optimisation'; known are test_time_optimization, personalization_guidance and "
        "consistency_guidance"
    )


BY_WEIGHTS = (
    "lora_dreambooth, dreambooth, custom_diffusion, oft, dco, personalized_residuals, class_diffusion, "
    "attn_dreambooth, ti_db and core"
)


@pytest.mark.parametrize("strategy", ["personalization_guidance", "consistency_guidance"])
def test_guidance_by_weights_stands_beside_the_options_of_methods_that_sample_by_weights(strategy, read):
    for method in ("dreambooth", "core", "oft"):
        assert with_variant(read, method).guidance is None
        assert with_variant(read, method, **{strategy: {}}).guidance is not None
    both = with_variant(read, "core", test_time_optimization={}, **{strategy: {}})
    assert both.refinement and both.guidance
    said = refusal(lambda: with_variant(read, "t_lora", **{strategy: {}}))
    assert said.startswith(f"params.yaml, variants.t_lora.chosen: {strategy} ") and said.endswith(
        "and does not apply to t_lora: it does not sample by weights that take the place of the base model's; it "
        f"applies to {BY_WEIGHTS}"
    )
    said = refusal(lambda: with_variant(read, "oft", lag=True, **{strategy: {}}))
    assert said.startswith(f"params.yaml, variants.oft.chosen: {strategy} needs weights")


def test_one_guidance_by_weights_is_chosen_with_values_that_it_takes(read):
    variant = with_variant(read, "oft", personalization_guidance={"omega": 0.3})
    assert variant.guidance.omega == 0.3
    said = refusal(lambda: with_variant(read, "oft", personalization_guidance={}, consistency_guidance={}))
    assert said.endswith("personalization_guidance and consistency_guidance both say how it is guided; leave one out")
    said = refusal(lambda: with_variant(read, "oft", personalization_guidance={"omega": 1.5}))
    assert "personalization_guidance: omega = 1.5: Input should be less than or equal to 1" in said


@pytest.mark.parametrize(
    ("method", "why"),
    [
        ("dreambooth", "it changes the whole U-Net, and between the transformers no location looks at words"),
        ("core", "it changes the whole U-Net, and between the transformers no location looks at words"),
        ("textual_inversion", "nothing that it learns acts inside the U-Net"),
        ("neti", "nothing that it learns acts inside the U-Net"),
    ],
)
def test_lag_is_refused_where_it_means_nothing_with_where_it_does(method, why, read):
    confinable = [name for name in METHOD_NAMES if "lag" in keys_of(recipe_class(name).Sampling)]
    assert refusal(lambda: with_variant(read, method, lag=True)) == (
        f"params.yaml, variants.{method}.chosen: lag keeps what was learned to the region that looks at the concept, "
        f"and does not apply to {method}: {why}; it applies to {listed(confinable)}"
    )


@pytest.mark.parametrize(
    ("option", "value", "owner"),
    [
        ("reference", 1, "vico"),
        ("uncond_mask", "own", "vico"),
        ("keep", 0.6, "custom_diffusion"),
        ("truncation", 8, "neti"),
        ("after_stage", "unet", "attn_dreambooth"),
    ],
)
def test_an_option_of_one_method_is_refused_for_the_others_with_what_it_does(option, value, owner, read):
    variant = with_variant(read, owner, **{option: value})
    assert getattr(variant.sampling, option) == value
    does = recipe_class(owner).Sampling.__pydantic_fields__[option].description  # type: ignore[attr-defined]
    for method in METHOD_NAMES:
        if method != owner:
            assert refusal(lambda method=method: with_variant(read, method, **{option: value})) == (
                f"params.yaml, variants.{method}.chosen: {option} {does}, and does not apply to {method}; "
                f"it applies to {owner}"
            )


def test_every_sampling_option_says_what_it_does():
    for name in METHOD_NAMES:
        kind: Any = recipe_class(name).Sampling
        assert all(field.description for field in kind.__pydantic_fields__.values()), name


def test_options_that_contradict_each_other_or_the_way_it_is_trained_are_refused(read):
    said = refusal(lambda: with_variant(read, "vico@without_image_attention", lag=True))
    assert said.startswith("params.yaml, variants.vico@without_image_attention.chosen: without image attention there")
    assert "says what lag does, which is off" in refusal(lambda: with_variant(read, "oft", lag_unconditional="off"))


@pytest.mark.parametrize(
    ("stage", "left_out"), [("embedding", "without_stage_1"), ("attention", "without_stage_2")], ids=str
)
def test_weights_after_a_stage_that_was_left_out_are_refused(stage, left_out, read):
    said = refusal(lambda: with_variant(read, f"attn_dreambooth@{left_out}", after_stage=stage))
    assert said == (
        f"params.yaml, variants.attn_dreambooth@{left_out}.chosen: after_stage: {stage} takes the weights as they were "
        f"after a stage that was left out ({stage}_steps = 0); choose another stage"
    )
    for other in {"embedding", "attention", "unet"} - {stage}:
        with_variant(read, f"attn_dreambooth@{left_out}", after_stage=other)
    for name in ("attn_dreambooth", "attn_dreambooth@without_stage_3"):
        assert with_variant(read, name, after_stage=stage).sampling.after_stage == stage


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("attn_dreambooth@without_stage_2", "it changes the whole U-Net, and between the transformers no location"),
        ("attn_dreambooth@without_stage_3", "without its last stage it changes the cross-attention alone, for which"),
        ("core@without_stage_2", "nothing that it learns acts inside the U-Net"),
    ],
)
def test_the_reason_why_lag_does_not_apply_is_that_of_the_ablation(name, why, read):
    assert f"does not apply to {name}: {why}" in refusal(lambda: with_variant(read, name, lag=True))


def test_a_misspelled_option_is_refused_also_where_another_method_is_run(read):
    variants = {"oft": {"oft_lag": {"lagg": True}}, "vico": {"vico": {}}}
    params = read("variants", value=variants)
    said = refusal(lambda: params.sampling_variants("vico"))
    assert said.startswith("params.yaml, variants.oft.oft_lag: there is no key 'lagg'; known are lag")
    assert (
        refusal(lambda: params.sampling_variants("dreambooth"))
        == said
        == refusal(lambda: params.sampling_variants("oft"))
    )
    wrong = {"core": {"core_tto": {"test_time_optimization": {"step": 3}}}}
    assert "there is no key 'step'" in refusal(lambda: read("variants", value=wrong).sampling_variants("vico"))
    no_value = {"vico": {"vico_5": {"reference": -1}}}
    assert "vico_5: reference = -1" in refusal(lambda: read("variants", value=no_value).sampling_variants("oft"))


def test_whether_an_option_applies_under_a_recipe_is_asked_only_of_the_method_that_is_run(read):
    params = read("variants", value={"personalized_residuals": {"residuals_tto": {"test_time_optimization": {}}}})
    assert list(params.sampling_variants("oft")) == ["oft"]
    assert "it learns none" in refusal(lambda: params.sampling_variants("personalized_residuals"))


@pytest.mark.parametrize("name", ["../x", "a/b", "..", "", "Oft", "oft lag", "oft\n", "-oft", "a" * 101])
def test_a_variant_whose_name_cannot_be_a_files_is_refused(name, read):
    said = refusal(lambda: read("variants", value={"oft": {name: {}}}))
    assert f"{name!r} cannot be the name of a variant of oft, since files are named after it" in said


def test_a_variant_with_the_name_of_another_method_is_refused(read):
    said = refusal(lambda: read("variants", value={"vico": {"oft": {}}}))
    assert said.endswith("a variant of vico cannot be called 'oft': that is another method's name")
    for name in ("vico", "oft@coft"):
        said = refusal(lambda name=name: read("variants", value={"oft": {name: {}}}))
        assert f"a variant of oft cannot be called {name!r}" in said
    assert read("variants", value={"oft@coft": {"oft@coft": {}}, "oft": {"oft": {}, "oft.2_lag-x": {}}})


def test_a_name_of_two_variants_is_refused(read):
    said = refusal(lambda: read("variants", value={"oft": {"lagged": {}}, "vico": {"lagged": {}}}))
    assert said.endswith(
        "oft and vico both have a variant 'lagged'; scores are summarised by this name, so give one of them another"
    )


def test_options_may_be_left_out_altogether():
    kind = recipe_class("dreambooth")
    assert build(kind, {}, "here") == kind()


# -- ablations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ABLATION_NAMES)
def test_every_ablation_is_a_recipe_of_its_method_that_differs_from_the_methods_own(name):
    kind = recipe_class(name)
    changed = build(kind, ablation_changes(name), name)
    assert changed != kind()
    assert isinstance(changed, kind) and kind is recipe_class(name.partition("@")[0])


ROOT = Path(methods.__file__).parents[2]
SHIPPED = yaml.safe_load((ROOT / "params.yaml").read_text())
BASE_MODELS = sorted({base for section in SHIPPED["methods"].values() for base in section} | {"sd-1.4", "sd-2.1-base"})
ITSELF = {  # what the miniature's recipe has already
    ("custom_diffusion@without_zoom", "mini"): "zoom = false",
    ("attn_dreambooth@without_rotation", "mini"): "rotate = false",
    ("core@without_rotation", "mini"): "rotate = false",
}


@pytest.mark.parametrize("base_model", BASE_MODELS)
@pytest.mark.parametrize("name", ABLATION_NAMES)
def test_every_ablation_can_be_trained_on_the_projects_own_recipes_or_says_that_it_is_its_method(name, base_model):
    params = Params.model_validate(SHIPPED | {"base_model": base_model})
    plain = name.partition("@")[0]
    if (name, base_model) in ITSELF:
        assert refusal(lambda: params.config(name)) == (
            f"{name} is {plain} itself on {base_model}: its recipe already has {ITSELF[name, base_model]}"
        )
    else:
        assert params.config(name) != params.config(plain)
        assert params.sampling_variants(name)


def test_an_ablation_that_its_own_section_undoes_is_refused_with_all_its_switches(read):
    undone = {"vico@without_image_attention": {"mini": {"image_attention": True}}}
    assert refusal(lambda: read("ablations", value=undone).config("vico@without_image_attention")) == (
        "vico@without_image_attention is vico itself on mini: its recipe already has image_attention = true and "
        "lr = 1.0e-05"
    )


@pytest.mark.parametrize(
    ("method", "off", "idle", "said"),
    [
        ("neti", {"positional_encoding": False}, {"sigma_t": 0.1}, "positional_encoding: false"),
        ("neti", {"positional_encoding": False}, {"sigma_l": 1.0, "time_anchors": 5}, "positional_encoding: false"),
        ("neti", {"rescale": "none"}, {"class_token_rule": "first"}, "rescale: none"),
        ("neti", {"nested_dropout": 0}, {"dropout_rows": 4}, "nested_dropout: 0"),
        ("vico", {"image_attention": False}, {"lr": 0.5}, "image_attention: false"),
        ("personalized_residuals", {"class_images": 0}, {"prior_weight": 0.5}, "class_images: 0"),
        ("custom_diffusion", {"regularization": "none"}, {"class_images": 9}, "regularization: none"),
        ("custom_diffusion", {"regularization": "none"}, {"prior_weight": 0.5}, "regularization: none"),
        ("custom_diffusion", {"regularization": "real"}, {"class_images": 9}, "regularization: real"),
        ("dreambooth", {"prior_preservation": False}, {"prior_weight": 2.0}, "prior_preservation: false"),
        ("oft", {"prior_preservation": False}, {"class_images": 9}, "prior_preservation: false"),
        ("lora_dreambooth", {"prior_preservation": False}, {"class_images": 9}, "prior_preservation: false"),
    ],
    ids=str,
)
def test_a_switch_that_another_leaves_nothing_to_do_is_refused(method, off, idle, said, read):
    kind = recipe_class(method)
    build(kind, off, "here")
    named = " and ".join(f"{name} = {value!r}" for name, value in idle.items())
    does, it = ("does", "it") if len(idle) == 1 else ("do", "them")
    refused = refusal(lambda: read("methods", value={method: {"mini": off | idle}}).config(method))
    assert refused == f"params.yaml, methods.{method}.mini: {named} {does} nothing with {said}; take {it} out"


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_no_ablation_is_written_twice(method):
    """Python would keep the last of them, without a word."""
    tree = ast.parse((Path(methods.__file__).parent / method / "recipe.py").read_text())
    tables: list[Any] = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ablations"
    ]
    written = [ast.literal_eval(key) for table in tables for key in table.keys if key]
    assert written == list(recipe_class(method).ablations)


def test_an_ablation_stands_on_its_methods_recipe_for_the_base_model(read):
    params = read("ablations", value={"dreambooth@without_prior": {"mini": {"lr": 0.5}}, "oft@coft": {}})
    plain, ablation = params.config("dreambooth"), params.config("dreambooth@without_prior")
    assert ablation == dataclasses.replace(plain, prior_preservation=False, lr=0.5)
    assert params.config("oft@coft").coft
    assert params.method_names == [*params.methods, "dreambooth@without_prior", "oft@coft"]


def test_an_ablation_that_is_not_known_is_refused_with_those_that_are(read):
    assert refusal(lambda: check_method("vico@mask")) == (
        "vico has no ablation 'mask'; it has without_image_attention, concatenation, addition, without_mask, "
        "without_regularizer and adaptive; to add it, write a section vico@mask under `ablations` in params.yaml"
    )
    assert "it has none; to add it, write" in refusal(lambda: check_method("base_model@x"))
    for nothing in ({}, {"mini": {}}):
        said = refusal(lambda nothing=nothing: read("ablations", value={"vico@mask": nothing}))
        assert "vico@mask is no ablation of the recipe, so its section says what it changes" in said
    assert "is a method; write it under methods" in refusal(lambda: read("ablations", value={"vico": {}}))


def test_a_name_that_no_recipe_has_is_an_ablation_of_ones_own(read):
    params = read(
        "ablations", value={"dreambooth@slow": {"mini": {"lr": 1e-5}}, "dreambooth@step_1.5-a": {"mini": {"steps": 3}}}
    )
    plain = params.config("dreambooth")
    assert params.config("dreambooth@slow") == dataclasses.replace(plain, lr=1e-5)
    assert params.config("dreambooth@step_1.5-a") == dataclasses.replace(plain, steps=3)
    assert params.method_names == [*params.methods, "dreambooth@slow", "dreambooth@step_1.5-a"]
    assert params.known_methods[:-2] == [*METHOD_NAMES, *ABLATION_NAMES]
    assert params.known_methods[-2:] == params.method_names[-2:]
    params.check_method("dreambooth@slow")
    assert list(params.sampling_variants("dreambooth@slow")) == ["dreambooth@slow"]
    asked = refusal(lambda: params.check_method("dreambooth@slowly"))
    assert "dreambooth has no ablation 'slowly'; it has without_prior, " in asked
    assert "adaptive, slow and step_1.5-a" in asked
    assert asked == refusal(lambda: params.config("dreambooth@slowly"))


@pytest.mark.parametrize("ablation", ["", "Big", "a/b", "a@b", ".a", "a b", "a.", "a..b", "a" * 51])
def test_an_ablation_is_called_what_a_folder_may_be_called(ablation, read):
    value = {f"dreambooth@{ablation}": {"mini": {"lr": 1e-5}}}
    assert "cannot be the name of an ablation" in refusal(lambda: read("ablations", value=value))


@pytest.mark.parametrize("ending", ["lag", "tto", "pg", "cg"])
def test_an_ablation_is_not_called_as_a_variant_with_a_way_of_sampling_is(ending, read):
    sections = {f"dreambooth@rank_{ending}": {"mini": {"lr": 1e-5}}}
    assert f"with _{ending} at the end it reads as one sampled with" in refusal(
        lambda: read("ablations", value=sections)
    )
    assert read("ablations", value={f"dreambooth@{ending}": {"mini": {"lr": 1e-5}}}).ablations


def test_an_ablation_of_ones_own_that_changes_nothing_is_refused(read):
    same = {"dreambooth@same": {"mini": {"lr": read().config("dreambooth").lr}}}
    assert refusal(lambda: read("ablations", value=same).config("dreambooth@same")) == (
        "dreambooth@same is dreambooth itself on mini: its recipe already has lr = 5.0e-06; take "
        "ablations.dreambooth@same out"
    )
    elsewhere = read("ablations", value={"dreambooth@other": {"sd-1.4": {"lr": 1e-5}}})
    assert "is dreambooth itself on mini: ablations.dreambooth@other says nothing of it; add" in refusal(
        lambda: elsewhere.config("dreambooth@other")
    )
    assert "dreambooth@other" not in elsewhere.method_names  # and nothing else is refused because of it
    unknown = {"dreambooth@typo": {"mini": {"learning_rate": 1e-5}}}
    assert "learning_rate" in refusal(lambda: read("ablations", value=unknown).config("dreambooth@typo"))


def test_an_ablation_of_ones_own_has_variants_and_stands_in_the_canary(read):
    own = {"ablations": {"dreambooth@slow": {"mini": {"lr": 1e-5}}}}
    guided = {"dreambooth@slow": {"slow_pg": {"personalization_guidance": {"omega": 0.5}}}}
    canary = {"canary": {"rex": ["dreambooth@slow"]}}
    params = read(**own, variants=guided, automation=canary)
    assert list(params.sampling_variants("dreambooth@slow")) == ["slow_pg"]
    assert "has no ablation 'slow'" in refusal(lambda: read(variants=guided))
    assert "has no ablation 'slow'" in refusal(lambda: read(automation=canary))
    taken = {"vico": {"dreambooth@slow": {}}}
    assert "that is another method's name" in refusal(lambda: read(**own, variants=taken))


@pytest.mark.parametrize("asked", [1, 8, "auto"])
def test_a_micro_batch_is_a_number_of_rows_or_chosen_by_itself(read, asked):
    assert read().micro_batch is None
    assert read("micro_batch", value=asked).micro_batch == asked
