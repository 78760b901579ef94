"""What another program saved is read, and draws here what it draws there: exported, loaded and saved by the library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from personalize_core import steps
from personalize_core.base_model.model import BaseModel
from personalize_core.concepts.concept import Concept
from personalize_core.errors import InputError
from personalize_core.methods import method_class
from personalize_core.methods.shared.interchange import read_foreign
from personalize_core.workspace.recipes import load_base
from tests import tiny_workspace
from tests.artifacts.test_export import fresh_pipeline, trained
from tests.conftest import disturbed, sample_latents, tiny_base

CONCEPT = Concept("v", "<v>", "teddy bear")


@pytest.fixture
def concept() -> Concept:
    return CONCEPT


def imported(name: str, base: BaseModel, path: Path, **chosen: Any) -> Any:
    kind: Any = method_class(name)
    return read_foreign(kind, kind.Config(**chosen), base, CONCEPT, path).eval()


def check_same(one: Any, other: Any, base: BaseModel) -> None:
    prompts = [one.say("a photo of {} on the beach")]
    expected = sample_latents(one, base, prompts)
    torch.testing.assert_close(sample_latents(other, base, prompts), expected, atol=2e-4, rtol=2e-4)
    untrained = method_class(type_name(one))(one.config, base, CONCEPT)
    assert (sample_latents(untrained, base, prompts) - expected).abs().max() > 0.01


def type_name(method: Any) -> str:
    return type(method).__module__.split(".")[-2]


def refusal(name: str, base: BaseModel, path: Path, **chosen: Any) -> str:
    with pytest.raises(InputError) as refused:
        imported(name, base, path, **chosen)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# -- embeddings -----------------------------------------------------------------------------------------------


WITH_EMBEDDING = {
    "textual_inversion": {},
    "ti_db": {},
    "custom_diffusion": {},
    "attn_dreambooth": {},
    "core": {},
    "dti": {},
    "dco": {},
    "class_diffusion": {},
    "personalized_residuals": {"train_embedding": True},
}


@pytest.mark.parametrize("name", WITH_EMBEDDING)
def test_every_exported_embedding_is_there_for_diffusers_and_for_the_user_interfaces(name, concept, tmp_path):
    base = tiny_base()
    method = trained(name, base, concept, **WITH_EMBEDDING[name])
    how = method.export(base, tmp_path)
    assert "embeddings/v.safetensors" in how and "'embedding:v'" in how
    ((word, theirs),) = load_file(tmp_path / "learned_embeds.safetensors").items()
    ((key, uis),) = load_file(tmp_path / "embeddings" / "v.safetensors").items()
    assert (word, key) == ("<v>", "emb_params")
    assert torch.equal(uis, method.embedding.vector[None]) and torch.equal(theirs, uis)


def as_the_web_ui_reads(path: Path) -> tuple[str, torch.Tensor]:
    """Name and (n, D) vectors, by the rules of AUTOMATIC1111's loader and of ComfyUI's, which must agree."""
    data = load_file(path)
    assert "string_to_param" not in data and not {"clip_g", "clip_l"} & data.keys()
    assert len(data) == 1  # the web UI refuses others; ComfyUI takes the first
    vectors = next(iter(data.values()))
    return path.stem, vectors[None] if vectors.ndim == 1 else vectors


def test_the_user_interfaces_find_one_vector_of_the_text_encoders_width(base, concept, tmp_path):
    trained("textual_inversion", base, concept).export(base, tmp_path)
    name, vectors = as_the_web_ui_reads(tmp_path / "embeddings" / "v.safetensors")
    assert name == "v" and vectors.shape == (1, base.text_width) and vectors.dtype == torch.float32


@pytest.mark.parametrize("layout", ["learned_embeds.safetensors", "embeddings/v.safetensors"])
def test_an_embedding_comes_back_through_diffusers(layout, base, concept, tmp_path):
    method = trained("textual_inversion", base, concept)
    method.export(base, tmp_path)
    pipe = fresh_pipeline(base)
    pipe.load_textual_inversion(tmp_path / layout, token="<v>")
    row = pipe.text_encoder.get_input_embeddings().weight[pipe.tokenizer.convert_tokens_to_ids("<v>")].detach()
    again = tmp_path / "learned_embeds.safetensors"
    save_file({"<another word>": row[None].clone()}, again)  # as diffusers' script saves it
    for path in (again, tmp_path):  # the file, or its folder
        check_same(method, imported("textual_inversion", base, path), base)


def test_an_embedding_of_one_dimension_or_half_precision_is_read(base, tmp_path):
    vector = torch.arange(32.0) / 8
    save_file({"emb_params": vector.half()}, tmp_path / "a.safetensors")
    method = imported("textual_inversion", base, tmp_path / "a.safetensors")
    assert torch.equal(method.embedding.vector, vector) and method.embedding.vector.dtype == torch.float32


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"emb_params": torch.ones(1, 768)}, "is 768 wide, this base model's words are 32"),
        ({"emb_params": torch.ones(8, 32)}, "is 8 vectors; a concept here is one"),
        ({"a": torch.ones(1, 32), "b": torch.ones(1, 32)}, "holds 2 tensors, a and b"),
    ],
)
def test_an_embedding_that_does_not_fit_is_refused(tensors, said, tmp_path):
    save_file(tensors, tmp_path / "a.safetensors")
    assert said in refusal("textual_inversion", tiny_base(), tmp_path / "a.safetensors")


class Trap:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("ending", [".pt", ".bin", ".ckpt"])
@pytest.mark.parametrize("name", ["textual_inversion", "lora_dreambooth", "custom_diffusion", "oft"])
@pytest.mark.parametrize("in_folder", [False, True])
def test_a_pickle_is_refused_unread(ending, name, in_folder, tmp_path):
    path = tmp_path / "files" / f"embedding{ending}"
    path.parent.mkdir()
    torch.save({"string_to_param": {"*": Trap(tmp_path / "sprung")}}, path)
    said = refusal(name, tiny_base(), path.parent if in_folder else path)
    assert f"embedding{ending} is a pickle, which can run any program" in said
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "name", ["textual_inversion", "lora_dreambooth", "custom_diffusion", "oft", "dreambooth", "ti_db"]
)
def test_what_is_not_there_or_damaged_is_refused(name, tmp_path):
    base = tiny_base()
    said = refusal(name, base, tmp_path)
    assert "does not exist" in said or "holds no" in said
    (tmp_path / "a.safetensors").write_bytes(b"not one")
    said = refusal(name, base, tmp_path / "a.safetensors")
    assert any(words in said for words in ("no safetensors file, or a damaged one", "holds no", "does not exist"))


@pytest.mark.parametrize("name", ["neti", "vico", "xti", "base_model", "attn_dreambooth", "core"])
def test_a_method_without_a_format_that_holds_all_it_learns_says_so(name, tmp_path):
    assert "nothing can be imported for " in refusal(name, tiny_base(), tmp_path)


# -- low-rank changes -----------------------------------------------------------------------------------------


def saved_by_diffusers(method: Any, base: BaseModel, folder: Path) -> Path:
    """Exported, loaded and saved again."""
    method.export(base, folder)
    pipe = fresh_pipeline(base)
    pipe.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")
    layers: Any = get_peft_model_state_dict(pipe.unet, adapter_name="default_0")
    StableDiffusionPipeline.save_lora_weights(folder / "again", unet_lora_layers=layers)
    return folder / "again"


@pytest.mark.parametrize("name", ["lora_dreambooth", "personalized_residuals"])
def test_a_lora_comes_back_through_diffusers(name, base, concept, tmp_path):
    method = trained(name, base, concept)
    check_same(method, imported(name, base, saved_by_diffusers(method, base, tmp_path)), base)


def test_residuals_come_back_beside_their_embedding(base, concept, tmp_path):
    chosen = {"train_embedding": True, "targets": ("to_k", "to_v", "proj_in")}
    method = trained("personalized_residuals", base, concept, **chosen)
    method.export(base, tmp_path)
    check_same(method, imported("personalized_residuals", base, tmp_path, **chosen), base)


def test_a_kohya_lora_with_an_alpha_of_its_own_is_scaled_by_it(concept, tmp_path):
    base = tiny_base()
    method = trained("lora_dreambooth", base, concept, rank=4)
    method.export(base, tmp_path)
    ours = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    theirs = {}
    for name, tensor in ours.items():
        layer, side = name.removeprefix("unet.").rsplit(".lora_", 1)
        end = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}[side]
        theirs[f"lora_unet_{layer.replace('.', '_')}.{end}"] = tensor * (2.0 if side == "B.weight" else 1.0)
        theirs[f"lora_unet_{layer.replace('.', '_')}.alpha"] = torch.tensor(2.0)  # half the rank
    save_file(theirs, tmp_path / "kohya.safetensors")
    check_same(method, imported("lora_dreambooth", base, tmp_path / "kohya.safetensors"), base)


def test_layers_that_a_lora_leaves_alone_and_smaller_ranks_are_filled_with_nothing(concept, tmp_path):
    base = tiny_base()
    method = trained("lora_dreambooth", base, concept, rank=4)
    small = []
    for name, change in method.changes.named_children():
        with torch.no_grad():
            if "attn1" in name:
                change.B.zero_()  # no change
            elif name.endswith("to_q"):
                change.B[:, 2:] = 0  # rank 2
                small.append(f"unet.{name.replace('/', '.')}")
    method.export(base, tmp_path)
    tensors = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if ".attn1." not in name}
    for layer in small:
        tensors[f"{layer}.lora_A.weight"] = tensors[f"{layer}.lora_A.weight"][:2].clone()
        tensors[f"{layer}.lora_B.weight"] = tensors[f"{layer}.lora_B.weight"][:, :2].clone()
    save_file(tensors, tmp_path / "few.safetensors")
    check_same(method, imported("lora_dreambooth", base, tmp_path / "few.safetensors", rank=9), base)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("unet.down_blocks.0.attentions.0.proj_in.lora_A.weight", "does not hold two factors for each layer"),
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_magnitude_vector", "of DoRA"),
        (
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
            "does not hold two factors for each layer",
        ),
    ],
)
def test_a_lora_that_is_more_than_this_method_learns_is_refused(name, said, concept, tmp_path):
    base = tiny_base()
    trained("lora_dreambooth", base, concept).export(base, tmp_path)
    tensors = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    save_file(tensors | {name: torch.ones(4, 16)}, tmp_path / "more.safetensors")
    assert said in refusal("lora_dreambooth", base, tmp_path / "more.safetensors")


def test_a_lora_of_other_layers_or_of_too_high_a_rank_is_refused_for_residuals(concept, tmp_path):
    base = tiny_base()
    trained("lora_dreambooth", base, concept).export(base, tmp_path)
    assert "does not fit" in refusal("personalized_residuals", base, tmp_path)
    trained("personalized_residuals", base, concept, rank_fraction=0.5).export(base, tmp_path)
    assert "of rank 8, but the method's configuration has room for 1" in refusal(
        "personalized_residuals", base, tmp_path
    )


# -- whole networks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", [False, True], ids=["unet", "unet and text encoder"])
def test_a_pipeline_that_diffusers_saved_comes_back(encoder, base, concept, tmp_path):
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    method = trained("dreambooth", base, concept, train_text_encoder=encoder)
    method.export(base, tmp_path)
    changed: Any = {"unet": UNet2DConditionModel.from_pretrained(tmp_path / "unet")}
    if encoder:
        changed["text_encoder"] = CLIPTextModel.from_pretrained(tmp_path / "text_encoder")
    fresh_pipeline(base, **changed).save_pretrained(tmp_path / "again")
    again = imported("dreambooth", base, tmp_path / "again")
    assert again.config.train_text_encoder == encoder  # found out by comparing
    check_same(method, again, base)


def test_a_unets_own_folder_will_do(base, concept, tmp_path):
    method = trained("dreambooth", base, concept)
    method.export(base, tmp_path)
    check_same(method, imported("dreambooth", base, tmp_path / "unet"), base)


def test_a_unet_and_an_embedding_come_back_together(base, concept, tmp_path):
    method = trained("ti_db", base, concept)
    method.export(base, tmp_path)
    check_same(method, imported("ti_db", base, tmp_path), base)


def test_a_unet_of_another_shape_is_refused(concept, tmp_path):
    convolutional, linear = tiny_base(linear=False), tiny_base(linear=True)
    trained("dreambooth", convolutional, concept).export(convolutional, tmp_path)
    said = refusal("dreambooth", linear, tmp_path)
    assert "does not fit this base model" in said and "proj_in.weight is" in said


# -- attention processors, rotations --------------------------------------------------------------------------


def through_attention_processors(base, folder):
    """What was exported, as diffusers saves it again, in `again` beside it."""
    pipe = fresh_pipeline(base)
    pipe.unet.load_attn_procs(
        folder, weight_name="pytorch_custom_diffusion_weights.safetensors", _pipeline=pipe, use_safetensors=True
    )
    pipe.unet.save_attn_procs(folder / "again", safe_serialization=True)
    (folder / "learned_embeds.safetensors").rename(folder / "again" / "learned_embeds.safetensors")


def test_class_diffusion_comes_back_through_diffusers(base, concept, tmp_path):
    method = trained("class_diffusion", base, concept)
    method.export(base, tmp_path)
    through_attention_processors(base, tmp_path)
    check_same(method, imported("class_diffusion", base, tmp_path / "again"), base)


def test_weights_of_the_whole_cross_attention_are_no_class_diffusion(concept, tmp_path):
    base = tiny_base()
    trained("custom_diffusion", base, concept, trained="attn2").export(base, tmp_path)
    assert "does not fit" in refusal("class_diffusion", base, tmp_path)


def test_a_preference_comes_back_through_diffusers_with_its_rank(base, concept, tmp_path):
    method = trained("dco", base, concept, rank=3)
    method.export(base, tmp_path)
    pipe = fresh_pipeline(base)
    pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    kinds: Any = StableDiffusionPipeline
    kinds.save_lora_weights(
        tmp_path / "again", unet_lora_layers=get_peft_model_state_dict(pipe.unet, adapter_name="default_0")
    )
    (tmp_path / "learned_embeds.safetensors").rename(tmp_path / "again" / "learned_embeds.safetensors")
    again = imported("dco", base, tmp_path / "again")
    assert again.config.rank == 3
    check_same(method, again, base)


def test_a_preference_without_its_word_or_with_other_layers_is_refused(concept, tmp_path):
    base = tiny_base()
    trained("personalized_residuals", base, concept, train_embedding=True).export(base, tmp_path)
    assert "this method changes the U-Net's attention projections alone" in refusal("dco", base, tmp_path)
    trained("dco", base, concept).export(base, tmp_path / "dco")
    (tmp_path / "dco" / "learned_embeds.safetensors").unlink()
    assert "does not exist" in refusal("dco", base, tmp_path / "dco")


@pytest.mark.parametrize("which", ["kv", "attn2"])
def test_custom_diffusion_comes_back_through_diffusers(which, base, concept, tmp_path):
    method = trained("custom_diffusion", base, concept, trained=which)
    method.export(base, tmp_path)
    through_attention_processors(base, tmp_path)
    again = imported("custom_diffusion", base, tmp_path / "again")
    assert again.config.trained == which
    check_same(method, again, base)


@pytest.mark.parametrize("chosen", [{}, {"block_share": True}, {"r": 2}, {"coft": True}], ids=str)
def test_a_rotation_comes_back_through_peft(chosen, base, concept, tmp_path):
    method = trained("oft", base, concept, **chosen)
    method.export(base, tmp_path)
    model = PeftModel.from_pretrained(fresh_pipeline(base).unet, str(tmp_path / "oft"))
    model.save_pretrained(str(tmp_path / "again"))
    check_same(method, imported("oft", base, tmp_path / "again"), base)


def test_an_adapter_that_computes_something_else_is_refused(concept, tmp_path):
    base = tiny_base()
    trained("oft", base, concept).export(base, tmp_path)
    path = tmp_path / "oft" / "adapter_config.json"
    about = json.loads(path.read_text())
    for change, said in [
        ({"use_cayley_neumann": True}, "with use_cayley_neumann"),
        ({"peft_type": "LORA"}, "of type LORA, not OFT"),
        ({"r": 0, "oft_block_size": 4}, "has blocks of one size"),
    ]:
        path.write_text(json.dumps(about | change))
        assert said in refusal("oft", base, tmp_path)


# -- the workspace --------------------------------------------------------------------------------------------


def test_what_was_imported_is_sampled_and_scored_and_never_trained_over(tmp_path):
    store = tiny_workspace.make(tmp_path)
    base = load_base(store)
    kind: Any = method_class("textual_inversion")
    disturbed(kind(kind.Config(), base, store.concept("rex"))).export(base, tmp_path / "out")
    file = tmp_path / "out" / "embeddings" / "rex.safetensors"
    report = steps.import_artifact(store, "rex", "textual_inversion", file)
    assert report.metrics == {"parameters": 32.0, "restored_samples_otherwise_by": 0.0} and not report.skipped
    described = json.loads((report.path / "config.json").read_text())
    assert described["imported"] == "rex.safetensors" and described["seed"] is None
    assert steps.train(store, "rex", "textual_inversion").skipped
    assert not steps.sample_grid(store, "rex", "textual_inversion").skipped
    assert steps.score(store, "rex", "textual_inversion").metrics["clip_t"]
    assert steps.export(store, "rex", "textual_inversion", tmp_path / "again").path.is_dir()
    exported = [(tmp_path / name / "embeddings" / "rex.safetensors").read_bytes() for name in ("out", "again")]
    assert exported[0] == exported[1]
    with pytest.raises(InputError, match="has learned 'rex' already; .* remove"):
        steps.import_artifact(store, "rex", "textual_inversion", file)
    with pytest.raises(InputError, match="none.safetensors does not exist"):
        steps.import_artifact(store, "cup", "textual_inversion", tmp_path / "none.safetensors")
    assert not store.artifact("textual_inversion", "cup").exists()
