"""Base models by name, hub id or folder: loaded in float32 whatever the files hold, or refused in one sentence."""

from __future__ import annotations

import json
import shutil

import httpx
import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import load_file, save_file

from personalize_core.base_model import loading
from personalize_core.base_model.loading import NAMES, PUBLISHED, choose_device, identify, load_base_model
from personalize_core.base_model.parts import FILES
from personalize_core.errors import InputError
from tests.conftest import predict, sample_latents, stock_pipeline, tiny_base, tiny_parts, unpersonalized


@pytest.fixture(autouse=True)
def forget_loaded_models():
    yield
    load_base_model.cache_clear()


@pytest.fixture
def folder(tmp_path):
    stock_pipeline(tiny_parts()).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def refusal(act) -> str:
    with pytest.raises(InputError) as refused:
        act()
    assert "\n" not in str(refused.value)
    return str(refused.value)


# -- loading ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("linear", [False, True], ids=["convolutional", "linear"])
def test_a_folder_that_a_stock_pipeline_saved_samples_the_same(linear, tmp_path, concept):
    stock_pipeline(tiny_parts(linear)).save_pretrained(tmp_path / "tiny")
    loaded, built = load_base_model(str(tmp_path / "tiny"), "cpu"), tiny_base(linear)
    prompts = ["a photo of the <v> dog", "a red mug"]
    expected = sample_latents(unpersonalized(built, concept), built, prompts)
    assert torch.equal(sample_latents(unpersonalized(loaded, concept), loaded, prompts), expected)


def test_half_precision_files_are_read_as_float32(tmp_path, concept):
    stock_pipeline(tiny_parts()).to(torch.float16).save_pretrained(tmp_path / "half")
    base, built = load_base_model(str(tmp_path / "half"), "cpu"), tiny_base()
    for part in ("unet", "text_encoders", "vae"):
        loaded, expected = getattr(base, part).state_dict(), getattr(built, part).state_dict()
        assert {tensor.dtype for tensor in loaded.values() if tensor.is_floating_point()} == {torch.float32}
        assert all(torch.equal(tensor, expected[name].half().float()) for name, tensor in loaded.items())


def with_key_prefix(folder, prefix: str) -> None:
    """Rewrite the text encoder's file so that every key has exactly this prefix."""
    path = folder / "text_encoder" / "model.safetensors"
    tensors = {prefix + key.removeprefix("text_model."): value for key, value in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("prefix", ["text_model.", ""], ids=["with text_model., as SD 1 has", "without"])
def test_the_text_encoder_loads_under_old_and_new_names(prefix, folder, concept):
    with_key_prefix(folder, prefix)
    base, built = load_base_model(str(folder), "cpu"), tiny_base()
    prompt = ["a photo of <v> dog"]
    assert torch.equal(base.encode(prompt, concept).hidden, built.encode(prompt, concept).hidden)


def test_position_ids_that_old_files_hold_are_no_hindrance(folder, concept):
    with_key_prefix(folder, "text_model.")
    path = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(path) | {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    save_file(tensors, path, metadata={"format": "pt"})
    base, built = load_base_model(str(folder), "cpu"), tiny_base()
    assert torch.equal(base.encode(["a dog"]).hidden, built.encode(["a dog"]).hidden)


def test_the_autoencoder_loads_under_the_names_of_old_files(folder):
    """Stable Diffusion 1 names its attention query, key, value and proj_attn."""
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def renamed(key: str) -> str:
        for new, name in old.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{name}.")
        return key

    tensors = {renamed(key): value for key, value in load_file(path).items()}
    assert any("proj_attn" in key for key in tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    base, built = load_base_model(str(folder), "cpu"), tiny_base()
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(base.decode(latents), built.decode(latents))


def test_a_model_is_loaded_once_a_process(folder):
    assert load_base_model(str(folder), "cpu") is load_base_model(str(folder), "cpu")


def test_the_precision_is_the_unets_alone(folder):
    base = load_base_model(str(folder), "cpu", "bf16")
    assert {parameter.dtype for parameter in base.unet.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in base.text_encoders["text_encoder"].parameters()} == {torch.float32}


def test_loading_leaves_torchs_random_state_alone(folder):
    before = torch.random.get_rng_state()
    load_base_model(str(folder), "cpu")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_it_knows_where_it_came_from(folder):
    base = load_base_model(str(folder), "cpu")
    assert (base.name, base.revision) == (str(folder), "local")
    assert base.weights_hash == identify(str(folder)).weights_hash


# -- identity --------------------------------------------------------------------------------------------------


def test_the_identity_follows_the_files_and_not_the_folders_name(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    before = identify(str(folder))
    assert identify(str(copy)).weights_hash == before.weights_hash
    path = copy / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_in.bias"] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    changed = identify(str(copy))
    assert changed.weights_hash != before.weights_hash
    assert changed.hash_of("unet") != before.hash_of("unet")
    assert changed.hash_of("vae") == before.hash_of("vae")


def test_the_scheduler_belongs_to_the_identity(folder):
    before = identify(str(folder)).weights_hash
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "v_prediction"}))
    assert identify(str(folder)).weights_hash != before


def test_the_names_stand_for_the_published_models_at_a_fixed_revision():
    """The hub ids of Stable Diffusion 1.4, 1.5, 2.1-base, 2.1 and XL."""
    assert {name: published.hub_id for name, published in PUBLISHED.items()} == {
        "sd-1.4": "CompVis/stable-diffusion-v1-4",
        "sd-1.5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "sd-2.1-base": "stabilityai/stable-diffusion-2-1-base",
        "sd-2.1": "stabilityai/stable-diffusion-2-1",
        "sdxl-base-1.0": "stabilityai/stable-diffusion-xl-base-1.0",
        "sdxl-base-1.0-fp16-vae": "stabilityai/stable-diffusion-xl-base-1.0",
    }
    for name, published in PUBLISHED.items():
        identity = identify(name)
        assert (identity.source, identity.revision) == (published.hub_id, published.revision)
        assert len(published.revision) == 40
    assert NAMES[0] == "mini"


def test_a_hub_id_comes_with_its_revision():
    identity = identify("org/model@" + "a" * 40)
    assert (identity.source, identity.revision) == ("org/model", "a" * 40)
    assert identity.weights_hash != identify("org/model@" + "b" * 40).weights_hash


# -- what is refused -------------------------------------------------------------------------------------------


def test_an_unknown_name_with_the_known_ones():
    said = refusal(lambda: identify("sd-9"))
    assert said.startswith(
        "there is no base model 'sd-9'; known are mini, sd-1.4, sd-1.5, sd-2.1-base, sd-2.1, "
        "sdxl-base-1.0 and sdxl-base-1.0-fp16-vae, "
    )
    assert "a folder in diffusers' layout" in said


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("x" * 300, "File name too long"),
        ("a\0b", "cannot be the name of a file"),
        ("~nobody-of-this-name/x", "is in the folder of a user who is not known here; write the whole path"),
    ],
    ids=["too long", "of no file", "of no user"],
)
def test_what_no_folder_can_be_called_is_refused(name, said):
    assert said in refusal(lambda: identify(name))


def test_a_hub_id_without_its_revision_says_how_to_pin_it():
    said = refusal(lambda: identify("org/model"))
    assert "'org/model' is neither a folder here nor" in said and "as org/model@<40-digit commit>" in said


def test_a_folder_that_is_no_stable_diffusion_says_what_is_missing(folder):
    shutil.rmtree(folder / "vae")
    shutil.rmtree(folder / "tokenizer")
    said = refusal(lambda: identify(str(folder)))
    what = f"{folder} is no Stable Diffusion in diffusers' layout"
    assert said == f"{what}: it has no vae/config.json and tokenizer/tokenizer.json"


def test_the_embedded_model_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "MINI", tmp_path)
    assert refusal(lambda: identify("mini")) == (
        f"the embedded base model is missing from {tmp_path}; install the package again"
    )


@pytest.mark.parametrize(
    ("part", "file"),
    [
        ("unet", "diffusion_pytorch_model.safetensors"),
        ("vae", "diffusion_pytorch_model.safetensors"),
        ("text_encoder", "model.safetensors"),
        ("unet", "config.json"),
        ("text_encoder", "config.json"),
        ("scheduler", "scheduler_config.json"),
        ("tokenizer", "tokenizer.json"),
    ],
)
@pytest.mark.parametrize("damage", ["gone", "cut short"])
def test_a_folder_with_a_file_gone_or_damaged(damage, part, file, folder):
    path = folder / part / file
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    said = refusal(lambda: load_base_model(str(folder), "cpu"))
    if damage == "gone" and not file.endswith(".safetensors"):
        assert said == f"{folder} is no Stable Diffusion in diffusers' layout: it has no {part}/{file}"
    else:
        assert said.startswith((f"{path} ", f"{path.parent} holds no weights; put {file} there"))


# -- the hub ---------------------------------------------------------------------------------------------------

COMMIT = "a" * 40


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """A cache of the hub that holds org/model at COMMIT, and no hub."""
    cache = tmp_path / "hub"
    snapshot = cache / "models--org--model" / "snapshots" / COMMIT
    shutil.copytree(folder, snapshot)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub, "get_session", NoHub)
    return snapshot


class NoHub:
    def head(self, address, timeout):
        raise ConnectionError("no route to host")


class SomeHub:
    def head(self, address, timeout):
        pass


def test_a_base_model_in_the_hubs_cache_needs_no_network(hub, folder):
    loaded, own = load_base_model(f"org/model@{COMMIT}", "cpu").encode(["a dog"]), load_base_model(str(folder), "cpu")
    assert torch.equal(loaded.hidden, own.encode(["a dog"]).hidden)


@pytest.mark.parametrize("lost", [".", "unet", "vae/config.json", "text_encoder/model.safetensors", "tokenizer"])
def test_a_hub_that_cannot_be_reached_is_said_at_once(hub, lost, monkeypatch):
    """Whatever part of the base model the cache lacks; nothing is asked for again and again."""
    path = hub / lost
    path.unlink() if path.is_file() else shutil.rmtree(path)
    asked = []
    fetch = huggingface_hub.snapshot_download

    def download(*args, local_files_only, **options):
        asked.append(local_files_only)
        return fetch(*args, local_files_only=local_files_only, **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    said = refusal(lambda: load_base_model(f"org/model@{COMMIT}", "cpu"))
    assert asked == [True]
    assert said.startswith(f"the base model 'org/model@{COMMIT}' (org/model at {COMMIT}) cannot be loaded here: ")
    assert "the hub (https://huggingface.co) cannot be reached from here; go on where there is a network, " in said
    assert "give a folder with its files in diffusers' layout, or work with the embedded model, 'mini'" in said


@pytest.mark.parametrize("name", ["sd-1.4", "sd-2.1", "sdxl-base-1.0", "sdxl-base-1.0-fp16-vae"])
def test_a_published_one_that_is_not_in_the_cache(hub, name):
    said = refusal(lambda: load_base_model(name, "cpu"))
    assert repr(name) in said and "cannot be reached from here" in said


def test_without_a_hub_what_is_wrong_with_its_cache_is_said(hub):
    weights = hub / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    said = refusal(lambda: load_base_model(f"org/model@{COMMIT}", "cpu"))
    assert f"{weights} is no safetensors file, or a damaged one" in said and "cannot be reached from here" in said


def test_what_the_cache_lacks_is_fetched(hub, monkeypatch):
    config = (hub / "vae" / "config.json").read_text()
    (hub / "vae" / "config.json").unlink()

    def download(repository, *, revision, allow_patterns, local_files_only):
        if not local_files_only:
            assert (repository, revision) == ("org/model", COMMIT) and "vae/config.json" in allow_patterns
            (hub / "vae" / "config.json").write_text(config)
        return str(hub)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "get_session", SomeHub)
    assert load_base_model(f"org/model@{COMMIT}", "cpu").image_size == 16


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (GatedRepoError, "accept them at https://huggingface.co/org/model and log in with `hf auth login`"),
        (RepositoryNotFoundError, "the hub has no such repository or commit, or not for everybody"),
        (RevisionNotFoundError, "the hub has no such repository or commit, or not for everybody"),
        (None, "fetching it failed: the disk is full; try again"),
    ],
)
def test_why_the_hub_does_not_give_it(hub, monkeypatch, error, said):
    shutil.rmtree(hub)
    response = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co"))

    def download(*args, local_files_only, **options):
        if local_files_only:
            raise FileNotFoundError("not in the cache")
        raise error("no", response=response) if error else OSError("the disk is full")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "get_session", SomeHub)
    assert said in refusal(lambda: load_base_model(f"org/model@{COMMIT}", "cpu"))


def test_a_repository_on_the_hub_that_is_no_stable_diffusion(hub, monkeypatch):
    shutil.rmtree(hub / "vae")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **options: str(hub))
    monkeypatch.setattr(huggingface_hub, "get_session", SomeHub)
    said = refusal(lambda: load_base_model(f"org/model@{COMMIT}", "cpu"))
    assert said == f"{hub} is no Stable Diffusion in diffusers' layout: it has no vae/config.json"


def test_weights_in_half_precision_beside_the_others_are_not_fetched():
    """Nor pickles, nor a whole checkpoint, nor what an image is checked with."""
    wanted = ["unet/diffusion_pytorch_model.safetensors", "text_encoder_2/model-00001-of-00002.safetensors"]
    unwanted = [
        "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.bin", "v1-5.safetensors",
        "safety_checker/model.safetensors", "text_encoder/model.fp16.safetensors", "vae_1_0/config.json",
    ]  # fmt: skip
    assert [*huggingface_hub.utils.filter_repo_objects([*wanted, *unwanted], allow_patterns=list(FILES))] == wanted


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == "cpu"
    assert "torch sees no GPU here; use 'auto' or 'cpu'" in refusal(lambda: choose_device("cuda"))


def test_the_loaded_model_predicts(folder, concept):
    base = load_base_model(str(folder), "cpu")
    assert predict(base, base.encode(["a <v> dog"], concept)).isfinite().all()


# -- a card that others use ------------------------------------------------------------------------------------


def test_who_waits_for_a_card_holds_no_base_model_on_it(folder, monkeypatch):
    base, moved = load_base_model(str(folder), "cpu"), []
    monkeypatch.setattr(base, "move", lambda device: moved.append(str(device)))
    with loading.aside():
        assert moved == []  # it is on no card
    base.device = torch.device("cuda")
    monkeypatch.setattr(base, "give_back_memory", lambda: moved.append("given back"))
    with loading.aside():
        assert moved == ["cpu", "given back"]
    assert moved == ["cpu", "given back", "cuda"]
