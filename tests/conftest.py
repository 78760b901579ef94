"""A tiny random Stable Diffusion of few blocks, with convolutional projections as in 1.x or linear ones as in 2.x."""

from __future__ import annotations

# isort: off
import gc
import hashlib
import io
import math
import os

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a prompt is too short for several threads

import personalize_core  # noqa: F401  first: without it diffusers does not import beside the CPU build of torch

# isort: on
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import polars as pl
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from personalize_core.artifacts import proof, saving
from personalize_core.base_model.blocks import transformers_in_order
from personalize_core.base_model.model import BaseModel
from personalize_core.base_model.text import TextContext
from personalize_core.concepts.concept import Concept
from personalize_core.concepts.images import ConceptLatents
from personalize_core.files.atomic import write_bytes
from personalize_core.methods.interface import Method, Step
from personalize_core.methods.recipe import Recipe
from personalize_core.report import comparison
from personalize_core.report.figures import losses
from personalize_core.sampling.sampler import initial_noise, make_sampler, sample
from personalize_core.training import fixed_batch
from personalize_core.training import loop as training
from personalize_core.training.loop import denoising_step
from tests.copies import Copies
from tests.other_processor import How, other_processor

if TYPE_CHECKING:
    import dagster as dg

torch.set_num_threads(1)  # far faster on models this small

# Of the tiny U-Net, in the order they run. Its time goes into calling small operations, so it has few blocks.
LAYERS = (
    "down_blocks.0.attentions.0",
    "mid_block.attentions.0",
    "up_blocks.1.attentions.0",
    "up_blocks.1.attentions.1",
)
EVERY_STEP: dict[str, Any] = {"every_seconds": 0, "share": math.inf}  # when `Checkpoints` are saved
WORDS = "a photo of the sks dog teddy bear in desert on beach red mug jungle".split()


class ThisProcess:
    """In the place of proof.FreshProcess: the same, but for the seconds in which a process imports its libraries."""

    def __init__(self, base: BaseModel) -> None:
        self.base = base

    def __enter__(self) -> ThisProcess:
        return self

    def __exit__(self, *failure: object) -> None:
        pass

    def restore(self, folder: Path) -> None:
        self.folder = folder

    def evidence(self) -> proof.Evidence:
        return proof.evidence(saving.restore(self.folder, self.base), self.base)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--other-processor", choices=get_args(How), help="round as another processor may: other_processor.py"
    )


@pytest.fixture(autouse=True, scope="session")
def processor(request: pytest.FixtureRequest) -> Iterator[None]:
    """This one, or what --other-processor asks for."""
    how = request.config.getoption("--other-processor")
    with other_processor(how) if how else nullcontext():
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: with several processes none of them is left for the end, for one alone."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """Leave what was imported out of every later search for garbage, of which each new model causes about twenty."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True, scope="session")
def no_fresh_process():
    """Training starts no process, which saves time; tests/artifacts/test_proof.py starts some."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof, "FreshProcess", ThisProcess)
        yield


def quick_loss_curve(
    log_rows: Iterable[Mapping[str, Any]], path: str | Path, title: str = "", fixed_inputs: losses.Seen = ()
) -> None:
    """In the place of losses.loss_curve: a small image that depends on all that it would show."""
    shown = [
        [(name, row[name]) for name in row if name in ("stage", "step", "gradient_norm") or name not in losses.NO_LOSS]
        for row in log_rows
    ]
    buffer = io.BytesIO()
    Image.frombytes("L", (8, 4), hashlib.sha256(repr((shown, title, list(fixed_inputs))).encode()).digest()).save(
        buffer, "png"
    )
    write_bytes(Path(path), buffer.getvalue())


@pytest.fixture(autouse=True, scope="session")
def no_loss_curve() -> Iterator[Callable[..., None]]:
    """Training plots nothing, which is a quarter of a short training's time; `real_loss_curve` for tests that look."""
    plot = losses.loss_curve
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "loss_curve", quick_loss_curve)
        yield plot


@pytest.fixture
def real_loss_curve(no_loss_curve: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "loss_curve", no_loss_curve)


@pytest.fixture(scope="module")
def short_checks() -> Iterator[None]:
    """For tests of what is run rather than of what comes out: the checks around a training look at fewer numbers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof, "STEPS", 1)
        patch.setattr(fixed_batch, "TIMESTEPS", (250, 750))
        yield


def quick_scatter_plot(summary: pl.DataFrame, path: Path, title: str, concept: str = "all", baseline: str = "") -> None:
    """In the place of save_scatter_plot: small files that depend on all that it would show."""
    shown = hashlib.sha256(repr((summary.rows(), title, concept, baseline)).encode()).digest()
    buffer = io.BytesIO()
    Image.frombytes("L", (8, 4), shown).save(buffer, "png")
    write_bytes(path, buffer.getvalue())
    write_bytes(path.with_suffix(".svg"), shown.hex().encode())


@pytest.fixture(scope="module")
def no_scatter_plot() -> Iterator[None]:
    """Comparing plots nothing, which is most of its time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "save_scatter_plot", quick_scatter_plot)
        yield


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    """Dagster's history in memory, with two concepts. A result asks it, and does not keep it alive."""
    import dagster as dg  # here, for a second: most tests need none of it

    from pipelines.partitions import CONCEPT

    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions(CONCEPT, ["dog7", "rex"])
        yield instance


def tiny_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """Byte-pair encoding with one merge chain a word, so that every word of WORDS is one token."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    merges, tokens = [], []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            left, right = parts[-2], parts[-1]
            if (left, right) not in merges:
                merges.append((left, right))
                tokens.append(left + right)
            parts[-2:] = [left + right]
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), *tokens, "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(vocabulary)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77, pad_token=pad_token)


def tiny_unet(linear: bool, levels: int = 2) -> UNet2DConditionModel:
    """Of `levels` resolutions; as in Stable Diffusion, the lowest has attention only in the middle block."""
    return UNet2DConditionModel(
        sample_size=8,
        down_block_types=(*["CrossAttnDownBlock2D"] * (levels - 1), "DownBlock2D"),
        up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * (levels - 1)),
        block_out_channels=(16, *[32] * (levels - 1)),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
        use_linear_projection=linear,
    )


def layers_of_stable_diffusion() -> list[str]:
    """The layers of a U-Net with diffusers' default blocks, which are Stable Diffusion's."""
    unet = UNet2DConditionModel(block_out_channels=(8,) * 4, norm_num_groups=4, cross_attention_dim=8)
    return list(transformers_in_order(unet))


def tiny_parts(linear: bool = False, prediction_type: Any = "epsilon", levels: int = 2) -> dict[str, Any]:
    """The five components of a tiny Stable Diffusion, with random weights from a fixed seed."""
    kinds: Any = {"encoder": CLIPTextModel, "vae": AutoencoderKL}  # their signatures are narrower than what they take
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer: Any = tiny_tokenizer()
        text_encoder = kinds["encoder"](
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=77,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        torch.nn.init.normal_(text_encoder.get_input_embeddings().weight)  # CLIP's 0.02 would hide the words
        vae = kinds["vae"](
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
        )
        unet = tiny_unet(linear, levels)
    scheduler = DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        steps_offset=1,  # as in every Stable Diffusion; diffusers' pipeline would set it
        prediction_type=prediction_type,
    )
    return {"tokenizer": tokenizer, "text_encoder": text_encoder, "vae": vae, "unet": unet, "scheduler": scheduler}


def tiny_xl_parts(prediction_type: Any = "epsilon") -> dict[str, Any]:
    """The seven components of a tiny Stable Diffusion XL: encoders of different widths, two blocks in a transformer."""
    kinds: Any = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    parts = tiny_parts(linear=True, prediction_type=prediction_type)
    parts |= {"tokenizer": tiny_tokenizer(), "tokenizer_2": tiny_tokenizer(pad_token="!")}  # as the published ones pad
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for part, width in (("text_encoder", 32), ("text_encoder_2", 16)):
            tokenizer = parts["tokenizer" if part == "text_encoder" else "tokenizer_2"]
            parts[part] = kinds[part](
                CLIPTextConfig(
                    vocab_size=len(tokenizer),
                    hidden_size=width,
                    intermediate_size=2 * width,
                    num_hidden_layers=3,
                    num_attention_heads=4,
                    max_position_embeddings=77,
                    hidden_act="quick_gelu" if part == "text_encoder" else "gelu",
                    projection_dim=24,
                    bos_token_id=tokenizer.bos_token_id,
                    eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id,
                )
            )
            torch.nn.init.normal_(parts[part].get_input_embeddings().weight)
        unet: Any = UNet2DConditionModel
        parts["unet"] = unet(
            sample_size=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(16, 32),
            layers_per_block=1,
            transformer_layers_per_block=(1, 2),
            cross_attention_dim=32 + 16,
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            norm_num_groups=8,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 24,
        )
    return parts


def tiny_xl(prediction_type: Any = "epsilon", **options) -> BaseModel:
    """As `tiny_base`, a Stable Diffusion XL."""
    return _copies_of_tiny_xl(prediction_type, **options)()


@cache
def _copies_of_tiny_xl(prediction_type: str, **options) -> Copies[BaseModel]:
    parts = tiny_xl_parts(prediction_type)
    return Copies(BaseModel(name="tiny-xl", revision="local", weights_hash="tiny-xl", **parts, **options))


def tiny_base(linear: bool = False, prediction_type: Any = "epsilon", levels: int = 2, **options) -> BaseModel:
    """A base model of its own for every caller, who may change it; copied, which takes a fifth of building it."""
    return _copies_of_tiny_base(linear, prediction_type, levels, **options)()


@cache
def _copies_of_tiny_base(linear: bool, prediction_type: str, levels: int, **options) -> Copies[BaseModel]:
    parts = tiny_parts(linear, prediction_type, levels)
    return Copies(BaseModel(name="tiny", revision="local", weights_hash="tiny", **parts, **options))


def stock_pipeline(parts: dict[str, Any]) -> Any:
    """Diffusers' own pipeline of five components, or of seven."""
    kinds: Any = StableDiffusionPipeline, StableDiffusionXLPipeline
    if "text_encoder_2" in parts:
        pipe = kinds[1](**parts, add_watermarker=False)
    else:
        pipe = kinds[0](**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(params=[False, True], ids=["convolutional", "linear"])
def base(request) -> BaseModel:
    return tiny_base(request.param)


@pytest.fixture
def concept() -> Concept:
    return Concept("v", "<v>", "dog")


@pytest.fixture
def images() -> ConceptLatents:
    return tiny_images()


def tiny_images() -> ConceptLatents:
    """Three concept images and two class images of random latents."""
    generator = torch.Generator().manual_seed(1)

    def moments() -> torch.Tensor:
        mean = torch.randn(1, 4, 8, 8, generator=generator)
        return torch.stack([mean, torch.full_like(mean, 0.1)], dim=1)

    return ConceptLatents([moments() for _ in range(3)], class_images=[moments() for _ in range(2)])


def predict(base: BaseModel, context: TextContext) -> torch.Tensor:
    """The base model's answer to one fixed noisy latent per prompt, all rows with the same noise."""
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3)).expand(len(context), -1, -1, -1)
    trained = [weight for weight in base.unet.parameters() if weight.is_leaf and weight.requires_grad]
    for weight in trained:  # of an attached method; with and without, torch may take different kernels
        weight.requires_grad_(False)
    try:
        with torch.no_grad():
            return base.denoise(noise, torch.full((len(context),), 500), context)
    finally:
        for weight in trained:
            weight.requires_grad_(True)


def sample_latents(method: Method, base: BaseModel, prompts: Sequence[str], steps: int = 2, guidance: float = 6.0):
    """Latents of one image per prompt, from the noise that every method starts from."""
    noise = initial_noise(base, 0, [(index, 0) for index in range(len(prompts))])
    return sample(method, base, prompts, noise, make_sampler("ddim", base), steps, guidance)


def unpersonalized(base: BaseModel, concept: Concept) -> Method:
    """The interface's own defaults: it learns nothing and changes nothing."""
    return Method(Recipe(), base, concept)


def disturbed(module: Any, starting: str = "", seed: int = 11, by: float = 0.3) -> Any:
    """The same module, with its parameters moved at random: all, or those whose names start so."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if name.startswith(starting):
            with torch.no_grad():
                parameter += by * torch.randn(parameter.shape, generator=generator)
    return module


def snapshot(base: BaseModel) -> dict[str, torch.Tensor]:
    """A copy of every tensor of the base model."""
    parts = {"unet": base.unet, "text_encoders": base.text_encoders, "vae": base.vae}
    return {f"{part}.{name}": t.clone() for part, model in parts.items() for name, t in model.state_dict().items()}


def equal_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Do two sets of tensors agree in names, types and every bit?"""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def a_step(method: Method, base: BaseModel, images: ConceptLatents, stage: int = 0, index: int = 0) -> Step:
    """One step of a stage, as training would take it."""
    return denoising_step(method.train(), base, images, method.stages()[stage], seed=0, index=index)


def states_of_stages(method: Method, base: BaseModel, images: ConceptLatents) -> dict[str, dict[str, torch.Tensor]]:
    """What is learned, as it is after each stage; trained in place."""
    after = {}

    def log(row):
        after[row["stage"]] = {name: tensor.clone() for name, tensor in method.state_dict().items()}

    training.train(method, base, images, 0, log)
    return after
