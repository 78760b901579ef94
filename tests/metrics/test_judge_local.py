"""A local judge: a tiny Qwen2-VL of transformers' own code, untrained, and taught one answer."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from personalize_core.concepts.concept import Concept
from personalize_core.errors import InputError
from personalize_core.metrics import tables
from personalize_core.metrics.judge import judging, local, local_weights
from personalize_core.metrics.judge.kept_answers import KeptAnswers
from personalize_core.metrics.judge.questions import Question, Showing, ShownImage
from tests.metrics.test_judge import Found, paint

ANSWER = '{"score": 3, "reason": "the same ears"}'
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_model(folder: Path, taught: bool) -> Path:
    """With the files that a model on the hub has. taught: it answers ANSWER to everything, and ends."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLProcessor,
    )
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    words.add_tokens([ANSWER])
    words.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|im_end|>", pad_token="<|im_end|>")
    number = tokenizer.get_vocab()
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 4096,
            "eos_token_id": number["<|im_end|>"], "bos_token_id": None, "pad_token_id": number["<|im_end|>"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        },
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 1},
        image_token_id=number["<|image_pad|>"], video_token_id=number["<|video_pad|>"],
        vision_start_token_id=number["<|vision_start|>"], vision_end_token_id=number["<|vision_end|>"],
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = Qwen2VLForConditionalGeneration(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    if taught:
        given = tokenizer("<|im_start|>assistant\n" + ANSWER + "<|im_end|>", return_tensors="pt")["input_ids"]
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(40):
            loss = torch.nn.functional.cross_entropy(model(input_ids=given).logits[0, -3:-1], given[0, -2:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.save_pretrained(folder)
    Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=56 * 56),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("judge") / "untrained", taught=False)


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("judge") / "taught", taught=True)


def judged(folder: Path, root: Path, monkeypatch: pytest.MonkeyPatch | None = None) -> Found:
    if monkeypatch:
        monkeypatch.setattr(local, "MOST_TOKENS", 8)  # it would not end by itself
    concept_image = paint(root / "concept.png", 0)
    path = paint(root / "image.png", 1)
    about = {"concept": "rex", "method": "oft", "variant": "oft", "base_model": "tiny", "image": path.name}
    about |= {"image_sha256": "0" * 64, "prompt": "a photo of a {}", "prompt_index": 0, "image_index": 0}
    asking = judging.Asking(
        local.load_local(str(folder), None, "cpu"), Showing(detail=None), KeptAnswers(root / "answers")
    )
    found = Found()
    judging.judge_images(found, root, [about], Concept("rex", "<rex>", "dog"), [concept_image], asking)
    return found


def test_a_model_that_answers_as_it_is_asked_gives_scores(taught, tmp_path):
    found = judged(taught, tmp_path)
    assert [(row["metric"], row["score"]) for row in found.rows] == [("judge_pf", 0.75), ("judge_cp", 0.75)]
    table = tables.from_rows(found.rows)
    assert set(table["encoder"]) == {"taught"}
    assert set(table["encoder_sha256"]) == {local_weights.weights_of(str(taught), None)}
    kept = [json.loads(path.read_text()) for path in (tmp_path / "answers").rglob("*.json")]
    assert [one["reason"] for one in kept] == ["the same ears"] * 2


def test_a_model_that_answers_anything_gives_no_score_and_a_reason(untrained, tmp_path, monkeypatch):
    found = judged(untrained, tmp_path, monkeypatch)
    assert not found.rows and [one["metric"] for one in found.absent] == ["judge_pf", "judge_cp"]
    assert all("the judge's answer could not be read: " in one["reason"] for one in found.absent)


def test_the_answer_is_the_models_own_most_probable_one(untrained, tmp_path, monkeypatch):
    """Token by token, by plain forward passes over all that was said before."""
    from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

    monkeypatch.setattr(local, "MOST_TOKENS", 5)
    images = [ShownImage.of(paint(tmp_path / f"{seed}.png", seed, (60, 40)), 64) for seed in range(2)]
    said = local.load_local(str(untrained), None, "cpu").ask(Question("Which?", images))
    model: Any = Qwen2VLForConditionalGeneration.from_pretrained(untrained).eval()
    processor = AutoProcessor.from_pretrained(untrained)
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    text = f"<|im_start|>user\n{picture}{picture}Which?<|im_end|>\n<|im_start|>assistant\n"
    opened = [Image.open(io.BytesIO(image.png)) for image in images]
    given = processor(text=[text], images=opened, return_tensors="pt")
    tokens = given["input_ids"]
    for _ in range(5):
        more = tokens.shape[1] - given["input_ids"].shape[1]
        kinds = torch.cat([given["mm_token_type_ids"], torch.zeros(1, more, dtype=torch.long)], dim=1)
        with torch.no_grad():
            logits = model(
                input_ids=tokens,
                pixel_values=given["pixel_values"],
                image_grid_thw=given["image_grid_thw"],
                mm_token_type_ids=kinds,
            ).logits
        tokens = torch.cat([tokens, logits[:, -1:].argmax(dim=-1)], dim=1)
    own = tokens[0, given["input_ids"].shape[1] :]
    assert said == processor.tokenizer.decode(own, skip_special_tokens=True)


def test_the_order_of_images_is_seen(untrained, tmp_path, monkeypatch):
    monkeypatch.setattr(local, "MOST_TOKENS", 12)
    judge = local.load_local(str(untrained), None, "cpu")
    images = [ShownImage.of(paint(tmp_path / f"{seed}.png", seed, (60, 40)), 64) for seed in range(4)]
    pairs = [(images[one], images[other]) for one, other in ((0, 1), (1, 0), (2, 3), (3, 2))]
    assert len({judge.ask(Question("Which?", pair)) for pair in pairs}) > 1


# -- what is refused ------------------------------------------------------------------------------------------------


def refusal(act) -> str:
    with pytest.raises(InputError) as refused:
        act()
    return str(refused.value)


def test_weights_that_are_not_safetensors_are_refused(tmp_path):
    said = refusal(lambda: local.load_local(str(tmp_path), None, "cpu"))
    assert "holds no safetensors file" in said
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    assert "is a pickle" in refusal(lambda: local.load_local(str(tmp_path), None, "cpu"))


def test_a_name_on_the_hub_needs_a_commit(tmp_path):
    assert "its commit as judge.local.revision" in refusal(lambda: local_weights.weights_of("owner/name", None))
    assert local_weights.weights_of("owner/name", "a" * 40) == "owner/name@" + "a" * 40


def test_a_part_of_the_weights_that_the_hubs_cache_lacks_is_fetched(untrained, tmp_path, monkeypatch):
    """Also where another program began to fetch them, and so no list of the commit's files lies beside them."""
    snapshot = tmp_path / "models--owner--name" / "snapshots" / ("a" * 40)
    shutil.copytree(untrained, snapshot)
    network = local.load_local(str(untrained), None, "cpu").model
    (snapshot / "model.safetensors").unlink()
    network.save_pretrained(snapshot, max_shard_size="20KB")
    lost, *others = sorted(snapshot.glob("model-*.safetensors"), reverse=True)
    assert others
    lost.rename(tmp_path / lost.name)
    fetch, asked = huggingface_hub.snapshot_download, []

    def download(*args, local_files_only, **options):
        asked.append(local_files_only)
        if not local_files_only:
            (tmp_path / lost.name).rename(lost)
        return fetch(*args, local_files_only=True, **options)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "get_session", SomeHub)
    judge = local.load_local("owner/name", "a" * 40, "cpu")
    assert asked == [True, False]
    for name, weight in judge.model.state_dict().items():
        assert torch.equal(weight, network.state_dict()[name])


class SomeHub:
    def head(self, address, timeout):
        pass


def test_a_model_of_another_kind_or_with_code_of_its_own_is_refused(untrained, tmp_path):
    config = json.loads((untrained / "config.json").read_text())
    for changes in (
        {"model_type": "vit", "architectures": ["ViTModel"]},
        {"model_type": "unheard_of", "auto_map": {"AutoConfig": "code.Config"}},
    ):
        folder = tmp_path / changes["model_type"]
        folder.mkdir()
        for path in untrained.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        (folder / "code.py").write_text(f"open({str(tmp_path / 'was run')!r}, 'w')")
        (folder / "config.json").write_text(json.dumps(config | changes))
        said = refusal(lambda folder=folder: local.load_local(str(folder), None, "cpu"))
        assert said.startswith(f"{folder / 'config.json'} describes no AutoModelForImageTextToText that can be built: ")
    assert not (tmp_path / "was run").exists()


def test_a_model_that_lacks_a_weight_is_refused(untrained, tmp_path):
    for path in untrained.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in weights if name.endswith("mlp.down_proj.weight"))
    save_file({name: each for name, each in weights.items() if name != lost}, tmp_path / "model.safetensors")
    said = refusal(lambda: local.load_local(str(tmp_path), None, "cpu"))
    assert said.startswith(f"{tmp_path / 'model.safetensors'} lacks the weight ") and "mlp.down_proj.weight" in said


def test_a_model_without_a_chat_template_is_refused(untrained, tmp_path):
    for path in untrained.iterdir():
        if path.name != "chat_template.jinja":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    assert "no chat template" in refusal(lambda: local.load_local(str(tmp_path), None, "cpu"))


def test_other_weights_under_the_same_name_are_another_judge(untrained, taught):
    one, other = (local_weights.weights_of(str(folder), None) for folder in (untrained, taught))
    assert one != other and len(one) == len(other) == 16


@pytest.mark.parametrize("file", ["preprocessor_config.json", "chat_template.jinja", "config.json"])
def test_another_template_or_processor_is_another_judge(untrained, tmp_path, file):
    folder = Path(shutil.copytree(untrained, tmp_path / "judge"))
    before = local_weights.weights_of(str(folder), None)
    path = folder / file
    path.write_text((path.read_text() if path.exists() else "") + "\n")
    assert local_weights.weights_of(str(folder), None) != before
