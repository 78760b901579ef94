"""Encoders and scores: true architectures with random weights, and arithmetic against plain NumPy."""

import hashlib
import json
import logging
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from personalize_core.errors import InputError
from personalize_core.metrics import encoders, similarity
from personalize_core.metrics.preprocessing import CLIP_PREPROCESSING
from personalize_core.metrics.weights import TEXT_IMAGE

torch.set_num_threads(1)

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def images():
    """Images of unlike shapes, smooth enough that resizing does not erase what tells them apart."""
    generator = np.random.default_rng(0)
    sizes = [(90, 60), (64, 64), (50, 121), (300, 257)]
    small = [Image.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)) for _ in sizes]
    return [image.resize(size, Image.Resampling.BICUBIC) for image, size in zip(small, sizes, strict=True)]


def prepared(image, size, crop, mean, std):
    """Shorter side to `size`, centre crop, normalise, written without our code: (1, 3, crop, crop)."""
    width, height = image.size
    wide = (int(size * width / height), size) if width > height else (size, int(size * height / width))
    resized = np.asarray(image.resize(wide, Image.Resampling.BICUBIC), dtype=np.float64)
    top, left = round((resized.shape[0] - crop) / 2), round((resized.shape[1] - crop) / 2)
    values = resized[top : top + crop, left : left + crop] / 255
    return torch.tensor(((values - mean) / std).transpose(2, 0, 1)[None], dtype=torch.float32)


def of_length_one(rows):
    return rows / rows.norm(dim=1, keepdim=True)


# -- the published encoders: true size, random weights, a folder on this machine -------------------------------


@pytest.fixture(scope="module")
def vit_b32(tmp_path_factory):
    """(folder, model): OpenAI's CLIP ViT-B/32; half precision on disk, to spare the disk."""
    import open_clip
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("vit-b32")
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32-quickgelu").eval().half().float()
    halves = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(halves, folder / "open_clip_model.safetensors")
    yield folder, model
    (folder / "open_clip_model.safetensors").unlink()


@pytest.fixture(scope="module")
def clip_b32(vit_b32):
    return encoders.load_text_image_encoder(f"clip-b32:{vit_b32[0]}")


@pytest.fixture(scope="module")
def vit_s16(tmp_path_factory):
    """(folder, model): DINO's ViT-S/16 with the files that facebook/dino-vits16 has; it carries an unused pooler."""
    from transformers import ViTConfig, ViTModel

    folder = tmp_path_factory.mktemp("vit-s16")
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, patch_size=16, image_size=224)
    model = ViTModel(config, add_pooling_layer=True).eval()
    torch.nn.init.normal_(model.layernorm.weight, mean=1.0)  # at its initial value the norm could hide
    torch.nn.init.normal_(model.layernorm.bias)
    model.save_pretrained(folder)
    stock = {
        "size": {"height": 224, "width": 224},
        "resample": 3,
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(stock))
    return folder, model


def test_clip_b32_is_plain_open_clip_on_a_image_prepared_by_hand(clip_b32, vit_b32, images):
    _, model = vit_b32
    with torch.no_grad():
        plain = torch.cat([model.encode_image(prepared(p, 224, 224, CLIP_MEAN, CLIP_STD)) for p in images])
    ours = clip_b32.images(images)
    assert clip_b32.name == "clip-b32"
    assert ours.shape == (len(images), 512)
    torch.testing.assert_close(ours, of_length_one(plain), atol=1e-5, rtol=0)


def test_clip_b32_reads_texts_as_open_clip_does_and_cuts_long_ones_off(clip_b32, vit_b32):
    import open_clip

    texts = ["a photo of a dog", "a dog on the beach", "dog " * 100, "dog " * 300]
    with torch.no_grad():
        plain = vit_b32[1].encode_text(open_clip.get_tokenizer("ViT-B-32-quickgelu")(texts))
    ours = clip_b32.texts(texts)
    torch.testing.assert_close(ours, of_length_one(plain), atol=1e-5, rtol=0)
    torch.testing.assert_close(ours[2], ours[3])  # both are 77 tokens of the same word


def test_clip_l14_prepares_an_image_as_its_processor_in_transformers_does():
    from transformers import image_transforms

    prepare, rng = TEXT_IMAGE["clip-l14"].prepare, np.random.default_rng(0)
    assert prepare is not None and "its corner rounded down" in str(prepare)
    at_another_pixel = 0
    for width, height in [
        (300, 224),
        (227, 224),
        (224, 301),
        (448, 655),
        (240, 240),
        *rng.integers(60, 400, (12, 2)).tolist(),
    ]:
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        size: Any = image_transforms.get_resize_output_image_size(pixels, 224, default_to_square=False)
        resized = image_transforms.resize(pixels, size, resample=Image.Resampling.BICUBIC)
        theirs = image_transforms.center_crop(resized, (224, 224)) / 255
        theirs = (theirs - CLIP_MEAN) / CLIP_STD
        ours = prepare([Image.fromarray(pixels)])[0].permute(1, 2, 0)
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
        others = CLIP_PREPROCESSING([Image.fromarray(pixels)])[0].permute(1, 2, 0)
        at_another_pixel += not torch.equal(ours, others)
    assert at_another_pixel > 2  # where open_clip's crop begins elsewhere


def test_dino_s16_is_the_class_token_after_the_final_norm(vit_s16, images):
    folder, model = vit_s16
    entering = []
    handle = model.layernorm.register_forward_pre_hook(lambda module, args: entering.append(args[0]))
    with torch.no_grad():
        model(torch.cat([prepared(p, 256, 224, IMAGENET_MEAN, IMAGENET_STD) for p in images]))
        token = entering[0][:, 0].double()
        variance, mean = torch.var_mean(token, dim=1, correction=0, keepdim=True)
        normed = (token - mean) / (variance + model.config.layer_norm_eps).sqrt()
        plain = normed * model.layernorm.weight + model.layernorm.bias
    handle.remove()
    ours = encoders.load_identity_encoder(f"dino-s16:{folder}").images(images)
    assert ours.shape == (len(images), 384)
    torch.testing.assert_close(ours.double(), of_length_one(plain), atol=1e-5, rtol=0)


def test_the_same_weights_as_a_plain_folder_are_fed_as_their_own_processor_says(vit_s16):
    folder, _ = vit_s16
    published, own = encoders.load_identity_encoder(f"dino-s16:{folder}"), encoders.load_identity_encoder(folder)
    assert published.weights_hash == own.weights_hash
    assert "shorter side to 256" in published.preprocessing
    assert "both sides to 224" in own.preprocessing


def test_the_weights_hash_is_that_of_the_file(vit_s16):
    folder, _ = vit_s16
    expected = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert encoders.load_identity_encoder(folder).weights_hash == expected


def test_a_network_that_was_saved_with_dropout_does_not_drop_anything_when_it_scores(images, tmp_path):
    from transformers import ViTConfig, ViTModel

    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    ViTModel(ViTConfig(**sizes, image_size=32, hidden_dropout_prob=0.5)).save_pretrained(tmp_path)
    about = {"size": {"shortest_edge": 32}, "image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(about))
    encoder = encoders.load_identity_encoder(tmp_path)
    assert torch.equal(encoder.images(images), encoder.images(images))


# -- small encoders in folders, such as the mini ones ----------------------------------------------------------


@pytest.fixture(scope="module")
def small_clip(tmp_path_factory):
    """A folder as open_clip's `local-dir:` wants it, with its own tokenizer and its own statistics."""
    import open_clip
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("small-clip")
    words = ["<pad>", "a", "dog", "cat", "on", "beach", "<unk>", "<start>", "<end>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="<start> $A <end>", special_tokens=[("<start>", 7), ("<end>", 8)]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>").save_pretrained(folder)
    config = {
        "model_cfg": {
            "embed_dim": 32,
            "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32},
            "text_cfg": {
                "context_length": 77,
                "vocab_size": len(words),
                "width": 32,
                "heads": 2,
                "layers": 2,
                "hf_tokenizer_name": "here",
            },
        },
        "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "interpolation": "bilinear"},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(1)
    model = open_clip.create_model(f"local-dir:{folder}", pretrained_text=False)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    return folder


def test_loading_a_folder_logs_nothing(small_clip, caplog):
    """open_clip would warn of random weights, which are then replaced."""
    encoders.load_text_image_encoder(small_clip)
    assert caplog.records == []
    logging.getLogger().warning("of somebody else")
    assert [record.message for record in caplog.records] == ["of somebody else"]


def test_a_folder_is_fed_as_its_own_configuration_says(small_clip, images):
    import open_clip

    encoder = encoders.load_text_image_encoder(small_clip)
    model: Any
    transform: Any
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{small_clip}")
    with torch.no_grad():
        plain = model.eval().encode_image(torch.stack([transform(p) for p in images]))
    assert encoder.name == small_clip.name
    torch.testing.assert_close(encoder.images(images), of_length_one(plain), atol=1e-5, rtol=0)
    assert "bilinear" in encoder.preprocessing and "0.25" in encoder.preprocessing


def test_texts_go_through_the_folders_own_tokenizer(small_clip):
    encoder = encoders.load_text_image_encoder(small_clip)
    dog, dog_again, cat = encoder.texts(["a dog", "a  dog", "a cat"])
    torch.testing.assert_close(dog, dog_again)
    assert not torch.allclose(dog, cat)


def test_a_image_has_the_same_features_whatever_is_encoded_with_it(small_clip, images, monkeypatch):
    encoder = encoders.load_text_image_encoder(small_clip)
    together = encoder.images(images)
    monkeypatch.setattr(encoders, "BATCH_SIZE", 3)
    torch.testing.assert_close(encoder.images(images), together, atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.cat([encoder.images([p]) for p in images]), together, atol=1e-6, rtol=0)


def test_features_are_float32_of_length_one_without_gradient(small_clip, images):
    encoder = encoders.load_text_image_encoder(small_clip)
    for rows in (encoder.images(images), encoder.texts(["a dog", "a cat"])):
        assert rows.dtype == torch.float32 and not rows.requires_grad
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)))


def test_grey_and_transparent_images_are_read_as_colour(small_clip, images):
    encoder = encoders.load_text_image_encoder(small_clip)
    image = images[1]
    torch.testing.assert_close(encoder.images([image.convert("RGBA")]), encoder.images([image]))
    grey = image.convert("L")
    torch.testing.assert_close(encoder.images([grey]), encoder.images([grey.convert("RGB")]))


def test_there_is_nothing_to_encode_in_an_empty_list(small_clip):
    encoder = encoders.load_text_image_encoder(small_clip)
    with pytest.raises(ValueError, match="no images"):
        encoder.images([])
    with pytest.raises(ValueError, match="no texts"):
        encoder.texts([])


# -- what a user can get wrong ---------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [encoders.load_text_image_encoder, encoders.load_identity_encoder])
def test_an_unknown_encoder_is_refused_with_the_known_ones(load):
    with pytest.raises(InputError, match="no encoder 'clip-b33': known are mini-"):
        load("clip-b33")


def test_without_a_network_one_sentence_says_what_to_do(monkeypatch, tmp_path):
    import huggingface_hub

    def unreachable(*args, **options):
        raise OSError("[Errno -2] Name or service not known")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    monkeypatch.setattr(huggingface_hub, "get_session", unreachable)
    with pytest.raises(InputError, match="copy its open_clip_model.safetensors into a folder .* 'clip-b32:FOLDER'"):
        encoders.load_text_image_encoder("clip-b32")
    with pytest.raises(InputError, match="or use the mini encoders"):
        encoders.load_identity_encoder("dino-s16")


def test_published_weights_are_asked_for_at_one_commit(monkeypatch, vit_s16):
    import huggingface_hub

    asked = []

    def download(repository, file, revision, local_files_only):
        asked.append((repository, revision))
        return str(vit_s16[0] / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    encoder = encoders.load_identity_encoder("dino-s16")
    assert encoder.name == "dino-s16"
    assert {repository for repository, _ in asked} == {"facebook/dino-vits16"}
    assert all(len(revision) == 40 for _, revision in asked)


def test_an_empty_folder_and_one_with_two_weights_files_are_refused(small_clip, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="does not hold open_clip_config.json"):
        encoders.load_text_image_encoder(tmp_path / "empty")
    with pytest.raises(InputError, match="holds no weights: put open_clip_model.safetensors there"):
        encoders.load_text_image_encoder(f"clip-b32:{tmp_path / 'empty'}")
    twins = tmp_path / "twins"
    twins.mkdir()
    for name, source in (("a.safetensors", "model.safetensors"), ("b.safetensors", "model.safetensors")):
        (twins / name).write_bytes((small_clip / source).read_bytes())
    (twins / "open_clip_config.json").write_bytes((small_clip / "open_clip_config.json").read_bytes())
    with pytest.raises(InputError, match="several weights files"):
        encoders.load_text_image_encoder(twins)


def test_other_weights_than_the_name_says_are_refused(small_clip, tmp_path):
    from transformers import ViTConfig, ViTModel

    with pytest.raises(InputError, match="could not be read as the encoder 'clip-b32'"):
        encoders.load_text_image_encoder(f"clip-b32:{small_clip}")
    small = ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32)
    ViTModel(small).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="is not dino-s16: its features have width 32"):
        encoders.load_identity_encoder(f"dino-s16:{tmp_path}")


def test_weights_that_are_only_half_there_are_refused_rather_than_filled_with_noise(vit_s16, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(vit_s16[0] / "model.safetensors")
    del weights["layernorm.bias"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((vit_s16[0] / name).read_bytes())
    with pytest.raises(InputError, match="lacks weights of a ViTModel, among them 'layernorm.bias'"):
        encoders.load_identity_encoder(tmp_path)


def test_weights_that_are_no_numbers_are_refused_rather_than_scored_with(vit_s16, small_clip, tmp_path):
    from safetensors.torch import load_file, save_file

    of_kinds = ((vit_s16[0], encoders.load_identity_encoder), (small_clip, encoders.load_text_image_encoder))
    for number, (source, load) in enumerate(of_kinds):
        folder = shutil.copytree(source, tmp_path / str(number))
        file = next(folder.glob("*.safetensors"))
        weights = load_file(file)
        name = next(name for name in weights if name.endswith(".bias"))
        weights[name][-1] = float("nan")
        save_file(weights, file, metadata={"format": "pt"})
        with pytest.raises(InputError, match=f"{file} holds numbers that are not finite, in .*{name.split('.')[-2]}"):
            load(folder)


def test_of_weights_that_do_not_fit_it_is_said_which(small_clip, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(small_clip, tmp_path / "clip")
    file = next(folder.glob("*.safetensors"))
    weights = load_file(file)
    del weights["ln_final.bias"]
    save_file(weights, file)
    with pytest.raises(InputError, match=f"{file} could not be read as the encoder .*ln_final.bias"):
        encoders.load_text_image_encoder(folder)


# -- scores ----------------------------------------------------------------------------------------------------


def rows(n, width, seed):
    return torch.tensor(np.random.default_rng(seed).normal(size=(n, width)), dtype=torch.float32)


def cosine(a, b):
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return sum(x * y for x, y in zip(a, b, strict=True)) / (np.sqrt((a**2).sum()) * np.sqrt((b**2).sum()))


def test_image_alignment_is_the_mean_over_all_pairs():
    g, r = rows(4, 7, seed=1), rows(3, 7, seed=2)
    pairs = [[cosine(a, b) for b in r] for a in g]
    np.testing.assert_allclose(similarity.image_alignment_per_image(g, r), np.mean(pairs, axis=1), atol=1e-12)
    np.testing.assert_allclose(similarity.image_alignment(g, r), np.mean(pairs), atol=1e-12)


def test_real_alignment_is_the_mean_over_pairs_of_different_images():
    r = rows(5, 7, seed=3)
    others = [np.mean([cosine(a, b) for j, b in enumerate(r) if j != i]) for i, a in enumerate(r)]
    np.testing.assert_allclose(similarity.real_alignment_per_image(r), others, atol=1e-12)
    np.testing.assert_allclose(similarity.real_alignment(r), np.mean(others), atol=1e-12)


def test_a_set_against_itself_counts_the_diagonal_when_generated_and_not_when_real():
    r = rows(6, 9, seed=4)
    generated, real = similarity.image_alignment(r, r), similarity.real_alignment(r)
    np.testing.assert_allclose(6 * 6 * generated - 6 * 5 * real, 6, atol=1e-12)  # the six ones of the diagonal


def test_equal_images_are_aligned_perfectly_in_both():
    same = rows(1, 9, seed=5).expand(4, 9)
    assert similarity.image_alignment(same, same) == pytest.approx(1, abs=1e-12)
    assert similarity.real_alignment(same) == pytest.approx(1, abs=1e-12)


def test_text_alignment_is_the_cosine_with_the_images_own_text():
    images, texts = rows(4, 7, seed=6), rows(4, 7, seed=7)
    expected = [cosine(a, b) for a, b in zip(images, texts, strict=True)]
    np.testing.assert_allclose(similarity.text_alignment_per_image(images, texts), expected, atol=1e-12)
    np.testing.assert_allclose(similarity.text_alignment(images, texts), np.mean(expected), atol=1e-12)


def test_one_text_serves_all_images():
    images, text = rows(4, 7, seed=6), rows(1, 7, seed=7)
    once, repeated = (similarity.text_alignment_per_image(images, t) for t in (text, text.expand(4, 7)))
    assert torch.equal(once, repeated)


def test_clip_score_is_two_and_a_half_times_a_positive_cosine_and_zero_otherwise():
    cosines = similarity.text_alignment_per_image(rows(40, 5, seed=8), rows(40, 5, seed=9))
    positive = cosines > 0
    assert positive.any() and not positive.all()
    np.testing.assert_array_equal(similarity.clip_score(cosines)[positive], 2.5 * cosines[positive])
    assert not similarity.clip_score(cosines)[~positive].any()


def test_scores_ignore_the_length_of_features_and_the_order_of_references():
    g, r = rows(4, 7, seed=10), rows(5, 7, seed=11)
    expected = similarity.image_alignment_per_image(g, r)
    torch.testing.assert_close(similarity.image_alignment_per_image(3 * g, r.flip(0) * 0.01), expected)


def test_scores_of_nothing_are_refused():
    some, none = rows(2, 7, seed=1), torch.empty(0, 7)
    for score in (
        lambda: similarity.image_alignment(none, some),
        lambda: similarity.image_alignment(some, none),
        lambda: similarity.text_alignment(none, some),
        lambda: similarity.real_alignment(none),
    ):
        with pytest.raises(ValueError, match="there are no"):
            score()
    with pytest.raises(ValueError, match="at least 2"):
        similarity.real_alignment(some[:1])


def test_features_of_different_encoders_are_refused():
    with pytest.raises(ValueError, match="width 7, reference features 8: they come from different encoders"):
        similarity.image_alignment(rows(2, 7, seed=1), rows(2, 8, seed=1))
    with pytest.raises(ValueError, match="different encoders"):
        similarity.text_alignment(rows(2, 7, seed=1), rows(2, 8, seed=1))


def test_texts_that_do_not_match_the_images_in_number_are_refused():
    with pytest.raises(ValueError, match="4 images and 3 texts"):
        similarity.text_alignment(rows(4, 7, seed=1), rows(3, 7, seed=1))


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_features_without_a_direction_are_refused_rather_than_scored_nan(value):
    bad = rows(3, 7, seed=1)
    bad[1] = value
    with pytest.raises(ValueError, match="row 1 of the generated features"):
        similarity.image_alignment(bad, rows(2, 7, seed=2))
