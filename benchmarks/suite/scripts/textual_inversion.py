"""examples/textual_inversion/textual_inversion.py: all embeddings are trained, and all but one put back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.suite.models import Precision, Stock
from benchmarks.suite.scripts.new_word import add_word
from benchmarks.suite.scripts.training_script import TrainingScript
from personalize_core.base_model.model import BaseModel
from personalize_core.methods.textual_inversion.method import TextualInversion


class TextualInversionScript(TrainingScript):
    max_gradient_norm = None

    def __init__(
        self, parts: Stock, method: TextualInversion, base: BaseModel, device: str, precision: Precision
    ) -> None:
        super().__init__(parts, device, precision, method.config.lr)
        self.word = add_word(parts, method.concept.placeholder, method.embedding.vector)
        self.cast(self.unet.requires_grad_(False))
        self.text_encoder.requires_grad_(False)
        table: Any = self.text_encoder.get_input_embeddings()
        table.requires_grad_(True)
        self.text_encoder.train()
        self.text_encoder = self.start(self.text_encoder, table.parameters(), [])
        self.originals = self._table().detach().clone()

    def _table(self) -> Tensor:
        return self.accelerator.unwrap_model(self.text_encoder).get_input_embeddings().weight

    def context(self, prompts: Any) -> Tensor:
        return super().context(prompts).to(self.dtype)

    def after_step(self) -> None:
        others = torch.ones(len(self.tokenizer), dtype=torch.bool)
        others[self.word] = False
        with torch.no_grad():
            self._table()[others] = self.originals[others]

    def gradients(self) -> dict[str, Tensor]:
        gradient: Any = self._table().grad
        return {"embedding.vector": gradient[self.word]}
