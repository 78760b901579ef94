"""examples/dreambooth/train_dreambooth_lora.py, with PEFT's LoRA as there, and with PEFT's OFT in its place."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, OFTConfig
from torch import Tensor

from benchmarks.suite.models import Precision, Stock
from benchmarks.suite.scripts.dreambooth import RareWordScript
from personalize_core.base_model.model import BaseModel
from personalize_core.methods.lora_dreambooth.method import LoRADreamBooth
from personalize_core.methods.oft.method import OFT
from personalize_core.methods.shared.layer_modules import stored

PROJECTIONS = ["to_k", "to_q", "to_v", "to_out.0"]


class AdapterScript(RareWordScript):
    """The frozen U-Net is held in the precision of the run; what is trained is float32, as ours."""

    def __init__(
        self, parts: Stock, method: Any, base: BaseModel, device: str, precision: Precision, adapter: Any
    ) -> None:
        super().__init__(parts, method, base, device, precision)
        self.cast(self.unet.requires_grad_(False))
        self.unet.add_adapter(adapter)
        cast_training_params(self.unet, dtype=torch.float32)
        self.unet.train()

    def start_adapter(self) -> None:
        trained = [weight for weight in self.unet.parameters() if weight.requires_grad]
        self.unet = self.start(self.unet, trained, trained)

    def layer(self, path: str) -> Any:
        """PEFT's layer at a path of the U-Net."""
        return self.accelerator.unwrap_model(self.unet).get_submodule(path)


class LoRAScript(AdapterScript):
    def __init__(
        self, parts: Stock, method: LoRADreamBooth, base: BaseModel, device: str, precision: Precision
    ) -> None:
        rank = method.config.rank
        how = LoraConfig(
            r=rank, lora_alpha=rank, lora_dropout=0.0, init_lora_weights="gaussian", target_modules=PROJECTIONS
        )
        super().__init__(parts, method, base, device, precision, how)
        self.paths = [path for path, _ in method.changes.by_path()]
        with torch.no_grad():
            for path, change in method.changes.by_path():
                self.layer(path).lora_A["default"].weight.copy_(change.A)
                self.layer(path).lora_B["default"].weight.copy_(change.B)
        self.start_adapter()

    def gradients(self) -> dict[str, Tensor]:
        found = {}
        for path in self.paths:
            layer = self.layer(path)
            found[f"changes.{stored(path)}.A"] = layer.lora_A["default"].weight.grad
            found[f"changes.{stored(path)}.B"] = layer.lora_B["default"].weight.grad
        return found


class OFTScript(AdapterScript):
    """With the exact inverse in Cayley's parametrization, as ours, and not PEFT's series."""

    def __init__(self, parts: Stock, method: OFT, base: BaseModel, device: str, precision: Precision) -> None:
        config = method.config
        how = OFTConfig(
            r=config.r,
            oft_block_size=0,
            block_share=config.block_share,
            use_cayley_neumann=False,
            target_modules=PROJECTIONS,
        )
        super().__init__(parts, method, base, device, precision, how)
        self.paths = [path for path, _ in method.rotations.by_path()]
        self.start_adapter()

    def gradients(self) -> dict[str, Tensor]:
        """Of ours, A with S = (A - A^T) / 2; PEFT trains what stands above the diagonal of S."""
        found = {}
        for path in self.paths:
            above: Any = self.layer(path).oft_R["default"].weight.grad
            n = round((1 + (1 + 8 * above.shape[1]) ** 0.5) / 2)  # above.shape[1] = n (n - 1) / 2
            full = above.new_zeros(len(above), n, n)
            full[(slice(None), *torch.triu_indices(n, n, offset=1))] = above
            found[f"rotations.{stored(path)}.A"] = (full - full.mT) / 2
        return found
