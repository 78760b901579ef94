"""The loop that diffusers' training scripts have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.suite.models import DTYPES, Precision, Stock
from benchmarks.suite.rows import Rows


class TrainingScript:
    """One training by a script: its models, its optimizer, and its loop over batch items.

    A subclass sets up what is trained, calls `start`, and overrides what its script does otherwise.
    """

    max_gradient_norm: float | None = 1.0  # None: the script clips nothing

    def __init__(self, parts: Stock, device: str, precision: Precision, lr: float) -> None:
        mixed = {"fp32": "no", "bf16": "bf16"}[precision]
        self.accelerator = Accelerator(mixed_precision=mixed, cpu=device == "cpu")
        self.device, self.dtype, self.lr = self.accelerator.device, DTYPES[precision], lr
        self.tokenizer, self.noise_scheduler = parts.tokenizer, parts.scheduler
        self.unet: Any = parts.unet.to(self.device)
        self.text_encoder: Any = parts.text_encoder.to(self.device)
        self.model: Any = None

    def cast(self, network: Any) -> None:
        """Hold a frozen network in the precision of the run."""
        if self.dtype != torch.float32:
            network.to(self.dtype)

    def start(self, model: nn.Module, trained: Iterable[nn.Parameter], clipped: Iterable[nn.Parameter]) -> Any:
        """Make the optimizer and hand all to accelerate; returns the model as it came back."""
        self.clipped = list(clipped)
        optimizer = torch.optim.AdamW(list(trained), lr=self.lr, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
        rates = get_scheduler("constant", optimizer=optimizer)
        prepared: Any = self.accelerator.prepare(model, optimizer, rates)
        self.model, self.optimizer, self.rates = prepared
        return self.model

    def gradients(self) -> dict[str, Tensor]:
        """What `loss` has given to what is trained, by the names of our method's parameters."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it trains")

    def words(self, prompts: Sequence[str]) -> list[str]:
        """Prompts as a user of the script writes them."""
        return list(prompts)

    def context(self, prompts: Sequence[str]) -> Tensor:
        """(B, L, D): what the U-Net reads."""
        ids = self.tokenizer(
            self.words(prompts),
            padding="max_length",
            truncation=True,
            max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids
        return self.text_encoder(ids.to(self.device))[0]

    def loss(self, rows: Rows) -> Tensor:
        latents = rows.latents.to(self.device, self.dtype)
        noise, t = rows.noise.to(self.device, self.dtype), rows.t.to(self.device)
        noisy = self.noise_scheduler.add_noise(latents, noise, t)
        prediction = self.unet(noisy, t, self.context(rows.prompts)).sample
        return self.loss_of(prediction.float(), noise.float(), rows)

    def loss_of(self, prediction: Tensor, target: Tensor, rows: Rows) -> Tensor:
        return F.mse_loss(prediction, target, reduction="mean")

    def after_backward(self) -> None:
        """Before gradients are clipped."""

    def after_step(self) -> None:
        """After the optimizer's step."""

    def train(self, rows: Iterable[Rows], heard: Callable[[Any], None] = lambda rows: None) -> None:
        """A step for each.

        Args:
            heard: is called after each step.
        """
        bar = tqdm(disable=True)
        for some in rows:
            with self.accelerator.accumulate(self.model):
                loss = self.loss(some)
                self.accelerator.backward(loss)
                self.after_backward()
                if self.max_gradient_norm is not None:
                    self.accelerator.clip_grad_norm_(self.clipped, self.max_gradient_norm)
                self.optimizer.step()
                self.rates.step()
                self.optimizer.zero_grad()
                self.after_step()
            bar.update(1)
            bar.set_postfix(loss=loss.detach().item(), lr=self.rates.get_last_lr()[0])
            heard(some)
