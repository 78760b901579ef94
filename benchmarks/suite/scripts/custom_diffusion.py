"""examples/custom_diffusion/train_custom_diffusion.py: keys and values of the cross-attention, and one new word."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor2_0
from torch import Tensor, nn

from benchmarks.suite.models import Precision, Stock
from benchmarks.suite.rows import Rows
from benchmarks.suite.scripts.new_word import add_word
from benchmarks.suite.scripts.training_script import TrainingScript
from personalize_core.base_model.model import BaseModel
from personalize_core.methods.custom_diffusion.method import CustomDiffusion
from personalize_core.methods.shared.layer_modules import stored


class CustomDiffusionScript(TrainingScript):
    def __init__(
        self, parts: Stock, method: CustomDiffusion, base: BaseModel, device: str, precision: Precision
    ) -> None:
        super().__init__(parts, device, precision, method.config.lr)
        self.word = add_word(parts, method.concept.placeholder, method.embedding.vector)
        self.prior_weight = method.config.prior_weight
        self.cast(self.text_encoder.requires_grad_(False))
        table: Any = self.text_encoder.get_input_embeddings()
        table.requires_grad_(True)
        self.cast(self.unet.requires_grad_(False))
        self.processors = self._processors()
        self.unet.set_attn_processor(dict(self.processors))  # which empties what it is given
        trained = nn.ModuleList(self.processors.values())
        self.text_encoder.train()
        self.unet.train()
        parameters = [*table.parameters(), *trained.parameters()]
        clipped = [*self.text_encoder.parameters(), *trained.parameters()]
        self.text_encoder = self.start(self.text_encoder, parameters, clipped)

    def _processors(self) -> dict[str, Any]:
        """For every attention layer; those of the cross-attention hold what is trained, in float32."""
        found = {}
        for name in self.unet.attn_processors:
            layer = self.unet.get_submodule(name.removesuffix(".processor"))
            crosses = name.endswith("attn2.processor")
            processor = CustomDiffusionAttnProcessor2_0(
                train_kv=crosses,
                train_q_out=False,
                hidden_size=layer.to_q.in_features,
                cross_attention_dim=self.unet.config.cross_attention_dim if crosses else None,
            ).to(self.device)
            if crosses:
                weights = {f"{key}_custom_diffusion.weight": getattr(layer, key).weight for key in ("to_k", "to_v")}
                processor.load_state_dict(weights)
            found[name] = processor
        return found

    def loss_of(self, prediction: Tensor, target: Tensor, rows: Rows) -> Tensor:
        """The concept's loss is divided by the sum of its mask of one channel; behind its rows are the class noun's."""
        (own, prior), (own_target, prior_target) = prediction.chunk(2), target.chunk(2)
        mask = (rows.weight[: len(own)] > 0).to(own)
        error = F.mse_loss(own, own_target, reduction="none")
        concept = ((error * mask).sum([1, 2, 3]) / mask.sum([1, 2, 3])).mean()
        return concept + self.prior_weight * F.mse_loss(prior, prior_target)

    def _table(self) -> Tensor:
        return self.accelerator.unwrap_model(self.text_encoder).get_input_embeddings().weight

    def after_backward(self) -> None:
        others = torch.arange(len(self.tokenizer)) != self.word
        gradient: Any = self._table().grad
        gradient.data[others, :] = gradient.data[others, :].fill_(0)

    def gradients(self) -> dict[str, Tensor]:
        table: Any = self._table().grad
        found = {"embedding.vector": table[self.word]}
        for name, processor in self.processors.items():
            if name.endswith("attn2.processor"):
                for key in ("to_k", "to_v"):
                    weight = getattr(processor, f"{key}_custom_diffusion").weight
                    found[f"weights.weights.{stored(name.removesuffix('.processor'))}/{key}/weight"] = weight.grad
        return found
