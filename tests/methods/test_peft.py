"""Adapters of PEFT's library learn here what they learn in PEFT, and the base model comes out as it went in."""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from contextlib import nullcontext
from importlib import util
from typing import Any

import pytest
import torch
from peft import LoraConfig, OFTConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from pydantic import TypeAdapter
from torch import nn

from personalize_core.artifacts import saving
from personalize_core.base_model.model import BaseModel
from personalize_core.concepts.images import ConceptLatents
from personalize_core.errors import InputError
from personalize_core.files.typed_yaml import build
from personalize_core.methods.interface import Batch, Method, Stage, equal_shares
from personalize_core.methods.lora_dreambooth.method import LoRADreamBooth
from personalize_core.methods.lora_dreambooth.recipe import Config as LoRAConfig
from personalize_core.methods.oft.method import OFT
from personalize_core.methods.oft.recipe import Config as OFTRecipe
from personalize_core.methods.peft import peft_options
from personalize_core.methods.peft.method import KINDS, TARGETS, PEFTAdapter, described
from personalize_core.methods.peft.recipe import _NOT_HERE, OF_LORA, WITHIN, Config
from personalize_core.methods.recipe import Recipe
from personalize_core.training.loop import train
from tests.artifacts.test_export import check_same, fresh_pipeline
from tests.conftest import LAYERS, disturbed, equal_bits, predict, snapshot, tiny_base

PROMPT = "a photo of <v> dog on the beach"
STEPS, LR = 4, 1e-3
REST = 1e-6  # where W - s B_0 A_0 is computed here and there in another order
of_kinds = pytest.mark.parametrize("adapter", KINDS)
pytestmark = pytest.mark.filterwarnings("ignore:Invalid `oft_block_size`")


def make(base: BaseModel, concept: Any, adapter: Any = "lora", seed: int = 0, **chosen: Any) -> PEFTAdapter:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return PEFTAdapter(Config(**{"adapter": adapter, "steps": STEPS, "lr": LR} | chosen), base, concept)


class InPEFT(Method):
    """PEFT's own modules in the place of the U-Net's layers, for good, trained by the same loop."""

    def __init__(self, about: Any, base: BaseModel, concept: Any, stage: str = "adapter") -> None:
        super().__init__(Recipe(), base, concept)
        PEFT_TYPE_TO_TUNER_MAPPING[about.peft_type](base.unet, about, "default")
        learned = {name.replace(".", "/"): each for name, each in base.unet.named_parameters() if each.requires_grad}
        self.learned = nn.ParameterList([learned[name] for name in sorted(learned)])  # as ours, whose norms are summed
        self.unet, self.stage = [base.unet], stage  # the unet in a list, which is no child

    def named_in_peft(self) -> dict[str, nn.Parameter]:
        ours = {id(weight) for weight in self.learned}
        return {name: weight for name, weight in self.unet[0].named_parameters() if id(weight) in ours}

    def stages(self) -> list[Stage]:
        return [Stage(self.stage, STEPS, 1, [{"params": list(self.learned), "lr": LR}])]  # its name seeds the noise

    def batch(self, images: ConceptLatents, size: int, generator: torch.Generator) -> Batch:
        latents = images.instances(size, generator)
        return Batch(latents, [f"a photo of {self.phrase}"] * size, equal_shares(size), None)

    def attach(self, base: BaseModel) -> Any:
        return nullcontext()


def predictions(method: Method, base: BaseModel) -> torch.Tensor:
    context = base.encode([PROMPT, "the desert"], method.concept)
    with method.eval().attach(base):
        return predict(base, context)


def train_both(
    one: Method, base: BaseModel, other: Method, others_base: BaseModel, images: ConceptLatents, apart: float
) -> None:
    """Both from the same start; what they predict moves by far more than they may be apart."""
    before = predictions(one, base)
    torch.testing.assert_close(before, predictions(other, others_base), atol=apart, rtol=0)
    train(one, base, images, seed=3)
    train(other, others_base, images, seed=3)
    after = predictions(one, base)
    torch.testing.assert_close(after, predictions(other, others_base), atol=apart, rtol=0)
    assert (after - before).abs().max() > 1e-4


# -- the same as in PEFT ---------------------------------------------------------------------------------------


@of_kinds
def test_it_learns_what_peft_itself_learns_in_the_unet(adapter, base, concept, images):
    other_base = tiny_base(base.unet.config["use_linear_projection"])
    method = make(base, concept, adapter)
    torch.manual_seed(0)
    other = InPEFT(described(method.config), other_base, concept)
    own = {name.replace("/", "."): weight for name, weight in method.learned.items()}
    assert own.keys() == other.named_in_peft().keys()
    for name, weight in other.named_in_peft().items():
        assert torch.equal(own[name].data, weight.data)
    train_both(method, base, other, other_base, images, apart=REST if adapter in ("pissa", "olora") else 0)


def test_our_lora_is_pefts(base, concept, images):
    method = disturbed(LoRADreamBooth(LoRAConfig(rank=4, steps=STEPS, lr=LR), base, concept), by=0.1)
    other_base = tiny_base(base.unet.config["use_linear_projection"])
    about = LoraConfig(r=4, lora_alpha=4, target_modules=list(TARGETS))
    other = InPEFT(about, other_base, concept, "changes")
    named = {
        (path, side): tensor for path, each in method.changes.by_path() for side, tensor in each.named_parameters()
    }
    assert len(named) == len(other.learned)
    for name, weight in other.named_in_peft().items():
        path, side = re.fullmatch(r"(.*)\.lora_([AB])\.default\.weight", name).groups()  # type: ignore[union-attr]
        weight.data.copy_(named[path, side])
    train_both(method, base, other, other_base, images, apart=1e-6)
    for name, weight in other.named_in_peft().items():
        path, side = re.fullmatch(r"(.*)\.lora_([AB])\.default\.weight", name).groups()  # type: ignore[union-attr]
        torch.testing.assert_close(weight.data, named[path, side].data, atol=1e-6, rtol=0)


def test_our_oft_is_pefts(base, concept, images):
    """S is stored whole here, above the diagonal there, where its gradient is twice as long: AdamW's steps are the
    same, but for its eps beside numbers whose gradient is next to none.
    """
    recipe = OFTRecipe(r=4, steps=STEPS, lr=LR, prior_preservation=False)
    method, other_base = OFT(recipe, base, concept), tiny_base(base.unet.config["use_linear_projection"])
    for _, rotation in method.rotations.by_path():
        start = torch.randn(rotation.A.shape, generator=torch.Generator().manual_seed(0))
        rotation.A.data.copy_(0.1 * (start - start.mT))
    about = OFTConfig(r=4, oft_block_size=0, use_cayley_neumann=False, target_modules=list(TARGETS))
    other = InPEFT(about, other_base, concept, "rotations")
    above = {}
    for path, rotation in method.rotations.by_path():
        rows, columns = torch.triu_indices(*rotation.A.shape[1:], offset=1)
        above[path] = lambda rotation=rotation, rows=rows, columns=columns: rotation.skew()[:, rows, columns].detach()
    for name, weight in other.named_in_peft().items():
        weight.data.copy_(above[name.removesuffix(".oft_R.default.weight")]())
    train_both(method, base, other, other_base, images, apart=1e-6)


# -- the base model --------------------------------------------------------------------------------------------


@of_kinds
def test_the_base_model_is_no_other_after_an_adapter_is_made(adapter, base, concept):
    """PiSSA takes a part of each weight away, OLoRA in place; PEFT puts modules of its own around layers."""
    before, modules = snapshot(base), [(name, id(module)) for name, module in base.unet.named_modules()]
    context = base.encode([PROMPT], concept)
    expected = predict(base, context)
    method = make(base, concept, adapter)
    assert equal_bits(snapshot(base), before)
    assert not any(weight.requires_grad for weight in base.unet.parameters())
    with method.eval().attach(base):
        torch.testing.assert_close(predict(base, context), expected, atol=1e-5, rtol=0)
        assert equal_bits(snapshot(base), before)
    assert [(name, id(module)) for name, module in base.unet.named_modules()] == modules


@of_kinds
def test_at_rest_it_holds_no_weights_of_the_base_model(adapter, base, concept):
    method = make(base, concept, adapter)
    with method.attach(base):
        pass
    kept = {tensor.data_ptr() for tensor in (*method.adapter.root.parameters(), *method.adapter.root.buffers())}
    assert not kept
    assert {name.partition(".")[0] for name, _ in method.named_parameters()} == {"learned"}


@pytest.mark.parametrize("adapter", ["pissa", "olora"])
def test_a_start_from_the_weights_is_their_largest_part(adapter, base, concept):
    """PiSSA's B_0 A_0 is the best approximation of its rank; both leave the prediction as it was."""
    method = make(base, concept, adapter, config={"r": 2, "lora_alpha": 2})
    path = f"{LAYERS[0]}.transformer_blocks.0.attn2.to_k"
    key = path.replace(".", "/")
    W = base.unet.get_submodule(path).weight.double()  # type: ignore[union-attr, operator]
    start = (method.learned[f"{key}/lora_B/default/weight"] @ method.learned[f"{key}/lora_A/default/weight"]).double()
    U, S, Vh = torch.linalg.svd(W)
    if adapter == "pissa":
        torch.testing.assert_close(start, U[:, :2] * S[:2] @ Vh[:2], atol=1e-5, rtol=0)
    else:
        Q, R = torch.linalg.qr(W)
        torch.testing.assert_close(start, Q[:, :2] @ R[:2], atol=1e-5, rtol=0)


def test_in_bfloat16_it_starts_from_the_weights_as_the_checkpoint_has_them(concept):
    full, half = tiny_base(), tiny_base(dtype=torch.bfloat16)
    for adapter in ("dora", "pissa"):
        exact, rounded = make(full, concept, adapter), make(half, concept, adapter)
        assert equal_bits(rounded.state_dict(), exact.state_dict())


# -- where it acts ---------------------------------------------------------------------------------------------


def test_it_changes_all_attention_projections_unless_it_is_told_others(base, concept):
    paths = set(make(base, concept).adapter.modules)
    assert len(paths) == 8 * len(LAYERS) and all(".attn1." in path or ".attn2." in path for path in paths)
    some = make(base, concept, config={"target_modules": ["attn2.to_k", "proj_in"]}).adapter.modules
    expected = {f"{layer}.transformer_blocks.0.attn2.to_k" for layer in LAYERS} | {
        f"{layer}.proj_in" for layer in LAYERS
    }
    assert set(some) == expected
    within = {
        path for name in WITHIN for path in make(base, concept, config={"target_modules": [name]}).adapter.modules
    }
    assert all(path.startswith(tuple(f"{layer}." for layer in LAYERS)) for path in within)


@pytest.mark.parametrize("adapter", ["lora", "dora", "loha", "lokr", "oft", "hra"])
def test_convolutions_between_the_transformers_are_changed_as_in_peft(adapter, base, concept, images):
    config = {"target_modules": ["conv1", "time_emb_proj"]} | (
        {"r": 4, "oft_block_size": 0} if adapter == "oft" else {}
    )
    other_base, method = (
        tiny_base(base.unet.config["use_linear_projection"]),
        make(base, concept, adapter, config=config),
    )
    torch.manual_seed(0)
    train_both(method, base, InPEFT(described(method.config), other_base, concept), other_base, images, apart=0)


def test_lag_is_refused_for_what_lies_between_the_transformers(base, concept):
    method = disturbed(make(base, concept, config={"target_modules": ["conv1"]})).eval()
    method.sampling = method.config.Sampling(lag=True)
    with pytest.raises(InputError, match="lag keeps .* sample without lag"), method.attach(base):
        pass
    with pytest.raises(InputError, match="sample without lag"):
        Config(config={"target_modules": ".*attn1.*to_q"}).check(method.sampling)
    Config(config={"target_modules": ["to_q", "ff.net.2"]}).check(method.sampling)


def test_dropout_acts_in_training_alone(base, concept):
    method = disturbed(make(base, concept, config={"lora_dropout": 0.5})).requires_grad_(False)
    assert not method.config.samples_as_it_trains and make(base, concept).config.samples_as_it_trains
    context, found = base.encode([PROMPT], concept), {}
    for mode in (True, False):
        for seed in (0, 1):
            torch.manual_seed(seed)
            with method.train(mode).attach(base):
                found[mode, seed] = predict(base, context)
    assert not torch.equal(found[True, 0], found[True, 1])
    assert torch.equal(found[False, 0], found[False, 1])


def test_with_prior_preservation_class_images_count_their_weight(base, concept, images):
    method = make(base, concept, prior_preservation=True, prior_weight=0.25)
    batch = method.batch(images, 2, torch.Generator())
    assert list(batch.prompts) == ["a photo of <v> dog"] * 2 + ["a photo of dog"] * 2
    assert batch.weight.flatten().tolist() == [0.5, 0.5, 0.125, 0.125]
    assert method.config.class_images_needed == 200 and Config().class_images_needed == 0


# -- its options -----------------------------------------------------------------------------------------------


# Of every configuration of PEFT's: which model, and what for.
_SHARED = {"base_model_name_or_path", "revision", "peft_type", "task_type", "inference_mode", "auto_mapping"}
_SHARED |= {"peft_version"}


@of_kinds
def test_the_options_that_are_read_from_the_source_are_those_of_pefts_class(adapter):
    kind: Any = PEFT_TYPE_TO_CONFIG_MAPPING[KINDS[adapter].of]  # type: ignore[index]
    known = peft_options.known_options("lora" if adapter in OF_LORA else adapter)
    fields = {field.name for field in dataclasses.fields(kind)}
    objects = {name for name, hint in typing.get_type_hints(kind).items() if "peft." in repr(hint)}
    assert known.keys() == fields - objects - _SHARED - peft_options.LEFT_OUT
    about = kind(**KINDS[adapter].fills, target_modules=["to_q"])
    for name, hint in known.items():
        value = getattr(about, name)
        TypeAdapter(hint).validate_python(sorted(value) if isinstance(value, set) else value)


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"config": {"rank": 4}}, "here: there is no key 'config.rank'; known are .* lora_alpha, .* r, "),
        ({"config": {"r": "4"}}, "here: config.r = '4': Input should be a valid integer"),
        ({"config": {"r": True}}, "here: config.r = True: Input should be a valid integer"),
        ({"config": {"r": 10**6}}, "here: config.r = 1000000: it should be at most 4,096"),
        (
            {"config": {"target_modules": 3}},
            "here: config.target_modules = 3: Input should be a valid list or .*string",
        ),
        ({"config": {"bias": "all"}}, "there is no key 'config.bias'"),
        ({"adapter": "vera", "config": {"lora_alpha": 3}}, "there is no key 'config.lora_alpha'; known are d_initial"),
        ({"config": {"init_lora_weights": "eva"}}, "config.init_lora_weights = 'eva' needs more than the weights"),
        ({"config": ["r"]}, "config = .*: it should be keys and their values"),
        ({"adapter": "lorra"}, "adapter = 'lorra': Input should be 'lora', 'rslora'"),
        ({"prior_weight": 0.5}, "prior_weight = 0.5 does nothing with prior_preservation: false"),
    ],
    ids=str,
)
def test_a_wrong_option_is_refused_with_its_key(chosen, said):
    with pytest.raises(InputError, match=said):
        build(Config, chosen, "here")


@pytest.mark.parametrize("kind", _NOT_HERE)
def test_a_kind_that_cannot_be_offered_is_refused_with_the_reason(kind):
    assert kind.upper() in PEFT_TYPE_TO_CONFIG_MAPPING or kind.upper() in ("CARTRIDGE", "SHADOW")
    for written in (kind, kind.upper()):
        with pytest.raises(
            InputError, match=re.escape(f"here: adapter = {written!r}: {_NOT_HERE[kind]}; choose another")
        ):
            build(Config, {"adapter": written}, "here")


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"adapter": "dora", "config": {"use_dora": False}}, "adapter: dora itself says what use_dora is; take it out"),
        ({"config": {"target_modules": ["to_w"]}}, r"config.target_modules = \['to_w'\] names no layer of this U-Net"),
        ({"config": {"target_modules": ["to_q", "to_w"]}}, r"target_modules = \['to_w'\] names no layer"),
        ({"config": {"target_modules": ".*nothing"}}, "target_modules = '.*nothing' names no layer"),
        ({"config": {"target_modules": ["norm1"]}}, "names .*norm1, a .*Norm.* adapters change linear layers and conv"),
        ({"adapter": "oft", "config": {"r": 4}}, "PEFT refuses .*r"),
        ({"adapter": "miss", "config": {"r": 64}}, "PEFT refuses this adapter: .*in_features"),
        ({"adapter": "vera", "config": {"target_modules": ["conv1"]}}, "PEFT refuses this adapter: "),
    ],
    ids=str,
)
def test_what_does_not_fit_the_unet_is_refused_before_anything_is_trained(chosen, said, concept):
    with pytest.raises(InputError, match=said):
        make(tiny_base(), concept, **chosen)


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(peft_options, "find_spec", lambda name: None if name == "peft" else util.find_spec(name))
    peft_options.known_options.cache_clear()
    assert Config().adapter == "lora"  # all recipes can be listed
    for asked in (lambda: Config().check(Config.Sampling()), lambda: Config(config={"r": 4})):
        with pytest.raises(ValueError, match=re.escape("pip install 'personalize[peft]'")):
            asked()


# -- files -----------------------------------------------------------------------------------------------------


@of_kinds
def test_what_is_exported_is_loaded_by_peft_and_comes_back(adapter, base, concept, tmp_path):
    method = disturbed(make(base, concept, adapter), by=0.1).requires_grad_(False)
    how = method.export(base, tmp_path)
    assert 'PeftModel.from_pretrained(pipe.unet, "peft")' in how and "'sks dog'" in how
    assert {path.suffix for path in (tmp_path / "peft").iterdir()} == {".json", ".safetensors"}
    expected, back = predictions(method, base), PEFTAdapter.imported(Config(), base, concept, tmp_path)
    torch.testing.assert_close(predictions(back, base), expected, atol=1e-5, rtol=0)
    assert back.config.adapter == ("lora" if adapter in ("pissa", "olora") else adapter)
    again = PEFTAdapter.imported(Config(), base, concept, tmp_path / "peft")
    assert equal_bits(again.state_dict(), back.state_dict())

    pipe = fresh_pipeline(base)
    pipe.unet = PeftModel.from_pretrained(pipe.unet, tmp_path / "peft")
    check_same(pipe, "a photo of sks dog on the beach", method.eval(), base)


def test_what_config_says_is_saved_and_restored_with_what_was_learned(base, concept, tmp_path):
    config = {"r": 2, "lora_alpha": 16, "use_rslora": True, "target_modules": ["to_k", "proj_out"], "use_dora": True}
    method = disturbed(make(base, concept, config=config), by=0.1).requires_grad_(False)
    saving.save(tmp_path, "peft", method, base, seed=0)
    restored = saving.restore(tmp_path, base)
    assert restored.config == method.config and equal_bits(restored.state_dict(), method.state_dict())
    assert torch.equal(predictions(restored, base), predictions(method, base))


def test_a_pattern_is_exported_as_the_layers_that_it_names(base, concept, tmp_path):
    method = disturbed(make(base, concept, config={"target_modules": r".*attn2\.to_[kv]", "r": 2})).requires_grad_(
        False
    )
    method.export(base, tmp_path)
    about = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert sorted(about["target_modules"]) == sorted(method.adapter.modules) and len(method.adapter.modules) == 8
    back = PEFTAdapter.imported(Config(), base, concept, tmp_path)
    assert torch.equal(predictions(back, base), predictions(method, base))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "holds an adapter of type 'PREFIX_TUNING', of which none can be imported"),
        ({"target_modules": "(a+)+b"}, "names its layers by a pattern"),
        ({"r": 10**9}, "config.r = 1000000000: it should be at most"),
        ({"bias": "all"}, "there is no key 'config.bias'"),
        ({"modules_to_save": ["conv_in"]}, "there is no key 'config.modules_to_save'"),
        ({"r": 2}, "does not fit this base model: .*lora_A.*, and should be 2 x"),
    ],
    ids=str,
)
def test_a_file_that_means_something_else_is_refused(change, said, concept, tmp_path):
    base = tiny_base()
    disturbed(make(base, concept)).export(base, tmp_path)
    file = tmp_path / "peft" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InputError, match=said):
        PEFTAdapter.imported(Config(), base, concept, tmp_path)


def test_a_file_in_the_place_of_a_folder_and_a_folder_that_lacks_one_are_named(base, concept, tmp_path):
    PEFTAdapter(Config(), base, concept).export(base, tmp_path)
    folder = tmp_path / "peft"
    with pytest.raises(InputError, match=r"adapter_model.safetensors is one file, .*: name the folder"):
        PEFTAdapter.imported(Config(), base, concept, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").unlink()
    with pytest.raises(InputError, match=r"adapter_config.json does not exist"):
        PEFTAdapter.imported(Config(), base, concept, tmp_path)
