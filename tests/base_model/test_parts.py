"""Which parts a folder has and whether they fit together, of tiny Stable Diffusions 1, 2 and XL; or one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.models.attention_processor import Attention
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from personalize_core.base_model.loading import identify, load_base_model
from personalize_core.errors import InputError
from tests.conftest import stock_pipeline, tiny_parts, tiny_xl_parts

FAMILIES: dict[str, Callable[[], dict[str, Any]]] = {
    "sd1": lambda: tiny_parts(False),
    "sd2": lambda: tiny_parts(True, "v_prediction"),
    "xl": tiny_xl_parts,
}
NETWORKS: dict[str, tuple[str, ...]] = {family: ("text_encoder", "vae", "unet") for family in ("sd1", "sd2")}
NETWORKS["xl"] = ("text_encoder", "text_encoder_2", "vae", "unet")
EACH_NETWORK = [(family, part) for family, parts in NETWORKS.items() for part in parts]
SCHEDULERS = (
    DDIMScheduler, DDPMScheduler, DEISMultistepScheduler, DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, LCMScheduler, LMSDiscreteScheduler,
    PNDMScheduler, UniPCMultistepScheduler,
)  # fmt: skip
NOT_READ = {  # settings that only tell readers, or other programs, about a file
    "_class_name", "_diffusers_version", "transformers_version", "architectures", "model_type", "dtype", "backend",
    "tokenizer_class", "feature_extractor", "image_encoder", "safety_checker", "requires_safety_checker",
}  # fmt: skip


@pytest.fixture(autouse=True)
def forget_loaded_models() -> Iterator[None]:
    load_base_model.cache_clear()
    yield
    load_base_model.cache_clear()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each family, as diffusers' pipelines save them."""
    root = tmp_path_factory.mktemp("families")
    for family, parts in FAMILIES.items():
        stock_pipeline(parts()).save_pretrained(root / family)
    return root


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda family: Path(shutil.copytree(saved / family, tmp_path / family))


def refusal(folder: Path) -> str:
    """The one sentence."""
    load_base_model.cache_clear()
    with pytest.raises(InputError) as refused:
        load_base_model(str(folder), "cpu")
    said = str(refused.value)
    assert "\n" not in said and str(folder) in said
    return said


def change(path: Path, **settings: Any) -> None:
    config = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({name: value for name, value in config.items() if value != "absent"}))


# -- weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "part"), EACH_NETWORK)
def test_a_weight_that_a_part_lacks_is_refused_by_name(copy, family, part):
    folder = copy(family)
    (path,) = (folder / part).glob("*.safetensors")
    tensors = load_file(path)
    lost = next(name for name in tensors if name.endswith(("fc1.weight", "conv1.weight")))
    save_file({name: each for name, each in tensors.items() if name != lost}, path, metadata={"format": "pt"})
    assert refusal(folder).startswith(f"{path} lacks the weight ") and lost.removeprefix("text_model.") in refusal(
        folder
    )


@pytest.mark.parametrize(("family", "part"), EACH_NETWORK)
def test_a_weight_that_is_not_finite_is_refused_by_name(copy, family, part):
    folder = copy(family)
    (path,) = (folder / part).glob("*.safetensors")
    tensors = load_file(path)
    [*tensors.values()][-1].view(-1)[0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    assert refusal(folder).startswith(f"{path} holds numbers that are not finite, in ")


def test_a_unet_without_the_layers_of_pooled_text_and_sizes(copy):
    folder = copy("xl")
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    tensors = {name: each for name, each in load_file(path).items() if not name.startswith("add_embedding.")}
    save_file(tensors, path, metadata={"format": "pt"})
    assert f"{path} lacks 4 weights, first add_embedding.linear_1.weight," in refusal(folder)


# -- parts of different base models ----------------------------------------------------------------------------


def test_the_unet_of_xl_and_one_text_encoder(saved, copy):
    folder = copy("sd1")
    shutil.rmtree(folder / "unet")
    shutil.copytree(saved / "xl/unet", folder / "unet")
    said = refusal(folder)
    assert "its U-Net is told of pooled text and of image sizes" in said and "has no text_encoder_2; take all" in said


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_two_text_encoders_and_a_unet_that_is_told_of_text_alone(saved, copy, family):
    folder = copy("xl")
    shutil.rmtree(folder / "unet")
    shutil.copytree(saved / family / "unet", folder / "unet")
    said = refusal(folder)
    assert "it has a second text encoder" in said and "its U-Net is told of text alone" in said


@pytest.mark.parametrize("named", [[None, None], "absent"], ids=["none", "not named"])
def test_a_second_text_encoder_that_the_index_does_not_name(copy, named):
    folder = copy("xl")
    change(folder / "model_index.json", text_encoder_2=named)
    assert "it has a second text encoder, as Stable Diffusion XL, and model_index.json names none" in refusal(folder)


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_a_second_text_encoder_that_is_named_and_not_there(copy, family):
    folder = copy(family)
    change(folder / "model_index.json", text_encoder_2=["transformers", "CLIPTextModelWithProjection"])
    assert "it has no text_encoder_2/config.json and tokenizer_2/tokenizer.json" in refusal(folder)


def test_the_first_text_encoder_in_the_seconds_place(copy):
    folder = copy("xl")
    shutil.rmtree(folder / "text_encoder_2")
    shutil.copytree(folder / "text_encoder", folder / "text_encoder_2")
    assert "text_encoder_2/model.safetensors lacks the weight text_projection.weight" in refusal(folder)


def of_width(width: int, vocabulary: int, kind: Any = CLIPTextModel, projection: int = 24) -> Any:
    with torch.random.fork_rng():
        return kind(
            CLIPTextConfig(
                vocab_size=vocabulary,
                hidden_size=width,
                intermediate_size=16,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=77,
                projection_dim=projection,
            )
        )


@cache
def vocabulary() -> int:
    return len(FAMILIES["sd1"]()["tokenizer"])


@pytest.mark.parametrize(("family", "wide"), [("sd1", "32"), ("sd2", "32"), ("xl", "48")])
def test_a_text_encoder_of_another_width_than_the_unet_reads(copy, family, wide):
    folder = copy(family)
    of_width(64, vocabulary()).save_pretrained(folder / "text_encoder")
    widths = "encoders are 64 and 16" if family == "xl" else "encoder is 64"
    assert f"its text {widths} wide, and its U-Net reads text that is {wide} wide; take all" in refusal(folder)


def test_a_second_text_encoder_of_another_width_or_projection(copy):
    folder = copy("xl")
    for width, projection, said in (
        (32, 24, "its text encoders are 32 and 32 wide, and its U-Net reads text that is 48 wide"),
        (16, 40, "projection (40 wide) and six sizes (48) are not what its U-Net is told of (72)"),
    ):
        encoder = of_width(width, vocabulary(), CLIPTextModelWithProjection, projection)
        encoder.save_pretrained(folder / "text_encoder_2")
        assert said in refusal(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_unet_for_inpainting_reads_what_no_autoencoder_here_makes(copy, family):
    folder = copy(family)
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_in.weight"] = torch.zeros(16, 9, 3, 3)
    save_file(tensors, path, metadata={"format": "pt"})
    change(folder / "unet/config.json", in_channels=9)
    assert "a U-Net that reads 9 channels and makes 4, and an autoencoder of 4" in refusal(folder)


@pytest.mark.parametrize(("family", "encoder", "tokenizer"), [
    ("sd1", "text_encoder", "tokenizer"), ("xl", "text_encoder", "tokenizer"), ("xl", "text_encoder_2", "tokenizer_2"),
])  # fmt: skip
def test_a_tokenizer_with_more_tokens_than_its_text_encoder_knows(copy, family, encoder, tokenizer):
    folder, few = copy(family), vocabulary() - 5
    kind = CLIPTextModelWithProjection if encoder == "text_encoder_2" else CLIPTextModel
    of_width(16 if encoder == "text_encoder_2" else 32, few, kind).save_pretrained(folder / encoder)
    assert f"{folder / tokenizer} has {vocabulary()} tokens, and its text encoder knows {few}" in refusal(folder)


# -- settings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("written", "said"), [
    ("absent", "sample_size is None in its config.json; write the side in pixels as image_size in params.yaml"),
    (None, "sample_size is None in its config.json"),
    ([8, 16], "sample_size is [8, 16] in its config.json"),
    ("big", "unet/config.json: sample_size is 'big', and should be a whole number or a list"),
    ([8, 8], None),
])  # fmt: skip
def test_the_side_of_images_that_a_unet_says(copy, family, written, said):
    folder = copy(family)
    change(folder / "unet/config.json", sample_size=written)
    if said is None:
        assert load_base_model(str(folder), "cpu").image_size == 16
    else:
        assert said in refusal(folder)


@pytest.mark.parametrize("written", ["absent", [8, 16]])
def test_a_unet_that_does_not_say_a_side_makes_images_of_the_side_that_is_asked_for(copy, written):
    folder = copy("sd1")
    change(folder / "unet/config.json", sample_size=written)
    assert load_base_model(str(folder), "cpu", image_size=24).latent_shape == (4, 12, 12)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_scheduler_of_another_prediction_is_refused(copy, family):
    folder = copy(family)
    change(folder / "scheduler/scheduler_config.json", prediction_type="sample")
    assert "scheduler_config.json: prediction_type is 'sample', and base models are loaded here" in refusal(folder)


@pytest.mark.parametrize("name", ["class_embed_type", "num_class_embeds", "encoder_hid_dim_type"])
def test_a_unet_that_is_told_of_something_else_is_refused(copy, name):
    folder = copy("sd1")
    change(folder / "unet/config.json", **{name: 3})
    assert f"unet/config.json: {name} is 3, so the U-Net is told of something beside the text" in refusal(folder)


@pytest.mark.parametrize("content", ["[]", "{}", "{ not", ""])
@pytest.mark.parametrize(("family", "file"), [
    *((family, file) for family in FAMILIES for file in ("model_index.json", "unet/config.json")),
    *(("xl", f"{part}/config.json") for part in ("text_encoder", "text_encoder_2", "vae")),
    *(("xl", f"{part}/tokenizer.json") for part in ("tokenizer", "tokenizer_2")),
    *(("xl", f"{part}/tokenizer_config.json") for part in ("tokenizer", "tokenizer_2")),
    ("xl", "scheduler/scheduler_config.json"),
])  # fmt: skip
def test_a_damaged_file_of_settings_is_named(copy, family, file, content):
    folder = copy(family)
    (folder / file).write_text(content)
    if content == "{}" and file in ("model_index.json", "scheduler/scheduler_config.json", "unet/config.json"):
        try:  # it says nothing, or diffusers' defaults, which another file may contradict
            load_base_model(str(folder), "cpu")
        except InputError as error:
            assert str(folder) in str(error)
        return
    assert str((folder / file).parent) in refusal(folder)


def wrong(value: Any) -> Any:
    """A value of another type than any that a setting of this one may have."""
    if value is None:
        return {"x": 1}
    if isinstance(value, bool):
        return "maybe"
    return {int: "wide", float: "wide", str: 5, list: "wide", dict: 3}[type(value)]


def files_of_settings() -> list[tuple[str, str]]:
    """All that a Stable Diffusion XL has; of the others those in which they differ."""
    parts = ["text_encoder", "text_encoder_2", "vae", "unet"]
    of_tokenizers = [f"{each}/{file}" for each in ("tokenizer", "tokenizer_2") for file in
                     ("tokenizer.json", "tokenizer_config.json")]  # fmt: skip
    others = ["model_index.json", "unet/config.json"]
    of_xl = ["model_index.json", "scheduler/scheduler_config.json", *(f"{part}/config.json" for part in parts)]
    return [
        *(("xl", file) for file in [*of_xl, *of_tokenizers]),
        *((one, file) for one in ("sd1", "sd2") for file in others),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "file"), files_of_settings())
def test_whatever_setting_has_another_type_it_is_refused(copy, family, file):
    folder = copy(family)
    path = folder / file
    whole = json.loads(path.read_text())
    assert whole
    for name, value in whole.items():
        path.write_text(json.dumps(whole | {name: wrong(value)}))
        load_base_model.cache_clear()
        if name in NOT_READ:
            try:
                load_base_model(str(folder), "cpu")
            except InputError:
                pass
        else:
            said = refusal(folder)
            assert str(path) in said or str(path.parent) in said, name


# -- what is right ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_that_is_whole_is_what_its_parts_say(copy, family):
    base = load_base_model(str(copy(family)), "cpu")
    assert base.is_told_sizes == (family == "xl")
    assert base.prediction_type == ("v_prediction" if family == "sd2" else "epsilon")


NULLS = (  # in unet/config.json of the published Stable Diffusion XL
    "class_embed_type", "cross_attention_norm", "encoder_hid_dim", "encoder_hid_dim_type",
    "mid_block_only_cross_attention", "num_attention_heads", "num_class_embeds", "time_cond_proj_dim",
    "time_embedding_act_fn", "time_embedding_dim", "timestep_post_act", "upcast_attention",
)  # fmt: skip


def test_what_the_published_xl_leaves_open_is_off(copy):
    folder = copy("xl")
    before = load_base_model(str(folder), "cpu").unet
    change(folder / "unet/config.json", **dict.fromkeys(NULLS))
    load_base_model.cache_clear()
    after = load_base_model(str(folder), "cpu").unet
    assert after is not before and str(after) == str(before)
    assert {bool(each.upcast_attention) for each in after.modules() if isinstance(each, Attention)} == {False}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_scheduler_of_any_kind_gives_its_noise_schedule(copy, kind):
    """Fine-tuned models come with the scheduler that their authors sample with."""
    folder, given = copy("sd1"), kind(beta_schedule="scaled_linear", beta_end=0.012, beta_start=0.00085)
    given.save_pretrained(folder / "scheduler")
    assert torch.equal(load_base_model(str(folder), "cpu").scheduler.alphas_cumprod, given.alphas_cumprod)


def test_a_folder_of_stable_diffusion_1_needs_no_index(copy):
    folder = copy("sd1")
    before = identify(str(folder)).weights_hash
    (folder / "model_index.json").unlink()
    assert load_base_model(str(folder), "cpu").weights_hash == before
