"""examples/dreambooth/train_dreambooth.py: all weights of the U-Net, with or without prior preservation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from benchmarks.suite.models import Precision, Stock
from benchmarks.suite.rows import Rows
from benchmarks.suite.scripts.training_script import TrainingScript
from personalize_core.base_model.model import BaseModel
from personalize_core.methods.interface import Method
from personalize_core.methods.shared.layer_modules import stored


class RareWordScript(TrainingScript):
    """What the scripts share that teach a rare word, and train something in the U-Net."""

    def __init__(self, parts: Stock, method: Method, base: BaseModel, device: str, precision: Precision) -> None:
        super().__init__(parts, device, precision, method.config.lr)
        self.placeholder, self.rare_word = method.concept.placeholder, base.tokenizer.rare_word
        self.prior_weight = method.config.prior_weight if method.config.prior_preservation else None
        self.cast(self.text_encoder.requires_grad_(False))

    def words(self, prompts: Sequence[str]) -> list[str]:
        return [prompt.replace(self.placeholder, self.rare_word) for prompt in prompts]

    def loss_of(self, prediction: Tensor, target: Tensor, rows: Rows) -> Tensor:
        """With prior preservation the second half of the batch items shows the class noun."""
        if self.prior_weight is None:
            return super().loss_of(prediction, target, rows)
        own, prior = (F.mse_loss(*pair) for pair in zip(prediction.chunk(2), target.chunk(2), strict=True))
        return own + self.prior_weight * prior


class DreamBoothScript(RareWordScript):
    """The U-Net stays in float32 and computes under autocast."""

    def __init__(self, parts: Stock, method: Any, base: BaseModel, device: str, precision: Precision) -> None:
        super().__init__(parts, method, base, device, precision)
        self.unet.requires_grad_(True).train()
        self.names = {f"unet.weights.{stored(name)}": name for name, _ in self.unet.named_parameters()}
        self.unet = self.start(self.unet, self.unet.parameters(), self.unet.parameters())

    def gradients(self) -> dict[str, Tensor]:
        weights: dict[str, Any] = dict(self.accelerator.unwrap_model(self.unet).named_parameters())
        return {ours: weights[name].grad for ours, name in self.names.items()}
