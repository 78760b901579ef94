"""The frozen text-to-image model that every method teaches."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from personalize_core.base_model.attention import AttentionMaps, Call, CrossAttention, SelfAttention, check_plain
from personalize_core.base_model.blocks import Block, blocks_in_order, transformers_in_order
from personalize_core.base_model.prompt_reader import PromptReader
from personalize_core.base_model.text import PromptTokenizer, TextContext
from personalize_core.base_model.text_encoders import TextEncoders
from personalize_core.concepts.concept import Concept
from personalize_core.errors import InputError, shown

if TYPE_CHECKING:
    from personalize_core.base_model.compiling import CompiledBlocks

PIXELS_AT_ONCE = 2 * 768**2  # that the autoencoder reads or makes together: four times as many would need 13.5 GiB


class BaseModel:
    """A frozen Stable Diffusion 1, 2 or XL: encode text, denoise, decode. It knows nothing of any method.

    What it is, is read from its parts: with a second text encoder it is a Stable Diffusion XL, whose U-Net is told of
    the text's pooled projection and of image sizes too.

    The text encoders and the autoencoder stay in float32. With `dtype` bfloat16 the frozen U-Net is held in it
    and runs under autocast, so tensors that a method trains keep their float32 master copies. `unrounded` holds its
    weights as the checkpoint has them, by name, in the CPU's memory: what is tuned starts from these. In float32 it is
    empty, for the U-Net holds them itself.
    """

    def __init__(
        self,
        *,
        name: str,
        revision: str,
        weights_hash: str,
        tokenizer: CLIPTokenizer,
        text_encoder: CLIPTextModel,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        scheduler: DDPMScheduler,
        tokenizer_2: CLIPTokenizer | None = None,
        text_encoder_2: CLIPTextModelWithProjection | None = None,
        empty_prompt_is_zero: bool = True,
        image_size: int | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        rare_word: str = "sks",
    ) -> None:
        """
        Args:
            tokenizer_2, text_encoder_2: of a Stable Diffusion XL, and of no other.
            empty_prompt_is_zero: whether a Stable Diffusion XL reads zeros for an empty prompt, as the published one
                was trained (`force_zeros_for_empty_prompt` of its pipeline).
            image_size: side length in pixels, if not the native one.

        Raises:
            InputError: images of this size cannot be made by this model.
        """
        self.name, self.revision, self.weights_hash = name, revision, weights_hash
        self.device, self.dtype = torch.device(device), dtype
        self.tokenizer = PromptTokenizer(tokenizer, rare_word, tokenizer_2)
        encoders = {"text_encoder": text_encoder, "text_encoder_2": text_encoder_2}
        given = {part: encoder for part, encoder in encoders.items() if encoder is not None}
        self.text_encoders = _frozen(TextEncoders(given)).to(self.device)
        zeros = len(given) > 1 and empty_prompt_is_zero
        self.prompt_reader = PromptReader(self.tokenizer, self.text_encoders, self.device, zeros)
        self.vae = _frozen(vae).to(self.device)
        self.unrounded: Mapping[str, Tensor] = {}
        if dtype != torch.float32:  # before it moves: a graphics card never holds both
            self.unrounded = {name: weight.detach() for name, weight in unet.named_parameters()}
            nn.Module.to(unet, dtype)  # diffusers' own warns at each model that nothing of it stays in float32
        self.unet = _frozen(unet).to(self.device)
        self.scheduler: Any = scheduler
        self.transformers = transformers_in_order(unet)
        self.blocks = blocks_in_order(self.transformers)
        self._use_own_processors()
        self._other_image_size = image_size
        self._check_image_size()
        whole = [self.image_size, self.image_size, 0, 0, self.image_size, self.image_size]
        self._whole_image = torch.tensor([whole], dtype=torch.float32, device=self.device)  # (1, 6): TextContext.sizes
        self._call: Call | None = None
        self.compiles = False  # whether `compiled` does anything
        self._compiled: CompiledBlocks | None = None  # what was compiled last

    # What the model is

    @property
    def text_width(self) -> int:
        """D: 768 for Stable Diffusion 1, 1024 for 2, 768 + 1280 for XL.

        So wide is what the layers read, and the embedding of a word: of two text encoders it is a pair, side by side.
        """
        return sum(self.text_encoders.widths)

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the cross-attention layers, in the order they run: 16 in Stable Diffusion 1 and 2.

        `blocks` has the transformer block of each.
        """
        return tuple(self.blocks)

    def blocks_of(self, transformers: Iterable[str] | None = None) -> list[Block]:
        """The transformer blocks of some transformers, by their paths, or of all; in the order given."""
        chosen = self.transformers if transformers is None else transformers
        return [block for path in chosen for block in self.blocks.values() if block.transformer == path]

    @property
    def prediction_type(self) -> str:
        """'epsilon' or 'v_prediction'. Always read from the scheduler: the weights do not say."""
        return self.scheduler.config.prediction_type

    @property
    def is_told_sizes(self) -> bool:
        """Whether the U-Net is told of image sizes: a Stable Diffusion XL's."""
        return len(self.text_encoders) > 1

    @property
    def vae_scale(self) -> int:
        """Pixels per latent pixel along a side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def image_size(self) -> int:
        """Side length in pixels: the native one, if no other was asked for."""
        return self._other_image_size or self._own_image_size()

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, h, w) of one image's latents."""
        side = self.image_size // self.vae_scale
        return self.unet.config.in_channels, side, side

    def rare_embedding(self) -> Tensor:
        """(D,): the input embedding that an untrained placeholder reads."""
        return self.text_encoders.embeddings(self.tokenizer.rare_id)

    def word_embedding(self, phrase: str, token: int = -1) -> Tensor:
        """(D,): the input embedding of a phrase's last token, or another; heads come last ("stuffed animal")."""
        ids = self.tokenizer.class_noun_ids(phrase)
        return self.text_encoders.embeddings(ids[token])

    def entry_embedding(self, entry: str) -> Tensor | None:
        """(D,): the input embedding of an entry of the vocabulary, which need not be a word; None without the entry."""
        token = self.tokenizer.entry_id(entry)
        return None if token is None else self.text_encoders.embeddings(token)

    # What it computes

    def encode(
        self, prompts: Sequence[str], concept: Concept | None = None, embedding: Tensor | None = None
    ) -> TextContext:
        """The prompts as the cross-attention layers read them; `PromptReader.encode` says how."""
        return self.prompt_reader.encode(prompts, concept, embedding)

    @property
    def transformer_of_layer(self) -> tuple[int, ...]:
        """For each cross-attention layer which of the transformers it is in, counted in the order they run."""
        numbers = {path: number for number, path in enumerate(self.transformers)}
        return tuple(numbers[block.transformer] for block in self.blocks.values())

    def denoise(
        self,
        x_t: Tensor,
        t: Tensor,
        context: TextContext,
        maps: AttentionMaps | None = None,
        rows: slice | None = None,
    ) -> Tensor:
        """The U-Net's prediction, (B, 4, h, w) float32: noise or velocity, by `prediction_type`.

        Args:
            x_t: (B, 4, h, w) noisy latents.
            t: (B,) timesteps, 0 to 999.
            context: what the cross-attention layers read; B rows.
            maps: filled with this call's cross-attention maps; without them only hooks see any, of their own layer.
            rows: which of a training batch these are; all if None.
        """
        call = Call(t, context, maps if maps is not None else AttentionMaps(latest_only=True), rows)
        self._call, before = call, self._call
        try:
            with self._precision():
                prediction = self.unet(
                    x_t, t, context.hidden, cross_attention_kwargs={"call": call}, **self.beside_text(context)
                ).sample
        finally:
            self._call = before
        return prediction.float()

    def beside_text(self, context: TextContext) -> dict[str, Any]:
        """What a Stable Diffusion XL's U-Net is told beside the text that its layers read."""
        if context.pooled is None:
            return {}
        sizes = self.whole_images(len(context)) if context.sizes is None else context.sizes
        return {"added_cond_kwargs": {"text_embeds": context.pooled, "time_ids": sizes}}

    def whole_images(self, rows: int) -> Tensor:
        """(rows, 6): `TextContext.sizes` of images of the base model's image size, of which nothing was cut off."""
        return self._whole_image.expand(rows, -1)

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """Within it U-Net and text encoder keep little for the gradient, and are computed again where it is needed.

        Each part of the U-Net by itself. What was recorded in the first pass, such as queries and keys, belongs to the
        one graph that both passes share, so losses on it teach the same.
        """
        self.unet.enable_gradient_checkpointing(self._checkpointed)
        self.prompt_reader.recomputes = True
        try:
            yield
        finally:
            self.prompt_reader.recomputes = False
            self.unet.disable_gradient_checkpointing()

    @contextmanager
    def compiled(self, backend: str = "inductor") -> Iterator[None]:
        """Within it, where `compiles` is set, the U-Net's transformer blocks are compiled: the same up to rounding.

        What is compiled is kept for the next time, unless a block had more variants than are kept.

        Args:
            backend: of torch.compile.
        """
        if not self.compiles:
            yield
            return
        from personalize_core.base_model.compiling import CompiledBlocks  # takes a second to import, for few

        if self._compiled is None or self._compiled.gave_up or self._compiled.backend != backend:
            blocks = {layer: block.module for layer, block in self.blocks.items()}
            self._compiled = CompiledBlocks(blocks, backend)
        with self._compiled.in_place():
            yield

    def _checkpointed(self, module: Any, *args: Any) -> Any:
        """As diffusers' own checkpointing, but hooks find the same `call` when the module is computed again.

        Its maps are then new ones, which go with the module: those of the first pass stay as they were read.
        """
        call, first = self.call, True

        def compute(*args: Any) -> Any:
            nonlocal first
            now = call if first else replace(call, maps=AttentionMaps(latest_only=True))
            if not first:
                args = tuple({**arg, "call": now} if isinstance(arg, dict) and "call" in arg else arg for arg in args)
            first = False
            before, self._call = self._call, now
            try:
                return module(*args)
            finally:
                self._call = before

        return checkpoint(compute, *args, use_reentrant=False)

    @property
    def call(self) -> Call:
        """The pass that is now running, for hooks inside the U-Net."""
        if self._call is None:
            raise RuntimeError("no pass through the U-Net is running: base.call is for hooks inside it")
        return self._call

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the U-Net should predict: the noise, or the velocity (Salimans & Ho 2022), by `prediction_type`."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "v_prediction":
            return self.scheduler.get_velocity(latents, noise, t)
        raise ValueError(f"prediction type {self.prediction_type!r} is neither 'epsilon' nor 'v_prediction'")

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> mean and deviation of their latents, (B, 2, 4, h, w), scaled."""
        together = _together(pixels[0, 0].numel())
        parts = [self.vae.encode(part.to(self.device)).latent_dist for part in pixels.split(together)]
        moments = [torch.stack([posterior.mean, posterior.std], dim=1).cpu() for posterior in parts]
        return torch.cat(moments) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, 4, h, w), scaled as the U-Net sees them -> images (B, H, W, 3) uint8 on the CPU."""
        together = _together(latents[0, 0].numel() * self.vae_scale**2)
        return torch.cat([self._decoded(part) for part in latents.to(self.device).split(together)])

    def move(self, device: str | torch.device) -> None:
        """Move the weights; what is computed is computed on `self.device`, so they must be back there by then."""
        self.prompt_reader.forget()
        for part in (self.text_encoders, self.vae, self.unet):
            nn.Module.to(part, device)

    def give_back_memory(self) -> None:
        """Let other processes have what this process holds of a graphics card and does not need: kept texts too."""
        self.prompt_reader.forget()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # Inside

    def _own_image_size(self) -> int:
        side = self.unet.config.sample_size
        if isinstance(side, list | tuple) and len({*side}) == 1:  # diffusers writes height and width so
            side = side[0]
        if not isinstance(side, int):
            raise InputError(
                f"the U-Net of {self.name} does not say the side of its images: sample_size is {shown(side)} in its "
                "config.json; write the side in pixels as image_size in params.yaml"
            )
        return side * self.vae_scale

    def _check_image_size(self) -> None:
        step = self.vae_scale * 2 ** (len(self.unet.config.block_out_channels) - 1)  # the U-Net's lowest resolution
        if self.image_size < step or self.image_size % step:
            raise InputError(
                f"image_size = {self.image_size} does not divide: {self.name} makes images whose sides are multiples "
                f"of {step} pixels; write one of these, or null for its own size"
            )

    def _decoded(self, latents: Tensor) -> Tensor:
        pixels = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()

    def _use_own_processors(self) -> None:
        cross = {
            f"{block.path}.attn2": CrossAttention(layer, index)
            for index, (layer, block) in enumerate(self.blocks.items())
        }
        for kind in (
            CrossAttention,
            SelfAttention,
        ):  # diffusers asks for the signature in every call: 0.1 ms to find out
            call: Any = kind.__call__
            call.__signature__ = inspect.signature(call)
        modules: dict[str, Any] = dict(self.unet.named_modules())
        for path in cross:
            check_plain(path, modules[path])
        self.unet.set_attn_processor(
            {key: cross.get(key.removesuffix(".processor")) or SelfAttention() for key in self.unet.attn_processors}  # type: ignore[arg-type]
        )

    def _precision(self) -> AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)


def _together(pixels: int) -> int:
    """How many images of so many pixels the autoencoder reads or makes together."""
    return max(1, PIXELS_AT_ONCE // pixels)


def _frozen(module: Any) -> Any:
    return module.requires_grad_(False).eval()
