"""The recipe of an adapter of PEFT's library, trained as DreamBooth is."""

from __future__ import annotations

import re
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from personalize_core.concepts.preprocessing import Preprocessing
from personalize_core.errors import InputError, listed, shown
from personalize_core.methods.peft.peft_options import MISSING, check_options, is_installed
from personalize_core.methods.recipe import Ablation, options
from personalize_core.methods.shared.options import LAG, PriorPreservationRecipe

OF_LORA = ("rslora", "dora", "pissa", "olora")  # kinds of PEFT's LoRA
WITHIN = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")  # a transformer
INITS = ("gaussian", "orthogonal", "pissa", "olora")
FAST_PISSA = re.compile(r"pissa_niter_\d{1,3}")

_OF_PROMPTS = "it learns tokens in front of a language model's prompt, and a U-Net has no tokens"
_NOT_HERE = {
    **dict.fromkeys(("prompt_tuning", "multitask_prompt_tuning", "p_tuning", "prefix_tuning", "cpt"), _OF_PROMPTS),
    "cartridge": "it learns the keys and values of a language model's cache, and a U-Net has none",
    "adaption_prompt": "it is made for the attention of one family of language models",
    "trainable_tokens": "it learns rows of a vocabulary; textual_inversion does that",
    "ln_tuning": "it trains whole layers of the base model; dreambooth does that",
    "osf": "it trains whole layers of the base model, all but some directions; dreambooth trains them all",
    "adalora": "the training loop has to tell it after every step which ranks to give up",
    "xlora": "it mixes adapters that were trained before",
    "poly": "it mixes adapters of several tasks",
    "shadow": "it needs the decoder of a language model",
}


def _offered(adapter: Any) -> Any:
    """Raise for a kind of PEFT's that cannot be offered, with the reason."""
    if why := _NOT_HERE.get(str(adapter).lower()):
        raise ValueError(f"{why}; choose another adapter")
    return adapter


@options
class Config(PriorPreservationRecipe):
    """An adapter of PEFT's library on layers of the U-Net; the placeholder reads a rare word's embedding.

    What is trained on, how long and at which rate is diffusers' DreamBooth LoRA recipe, for Stable Diffusion 1.5. An
    adapter starts from PEFT's own defaults, none of which was tuned for images.
    """

    display_name = "PEFT"
    learns = "an adapter of PEFT's on each attention projection"
    Sampling = LAG

    adapter: Annotated[
        Literal[
            "lora", "rslora", "dora", "pissa", "olora", "loha", "lokr", "oft", "boft", "hra", "vera", "randlora",
            "delora", "gralora", "miss", "ia3",
        ],
        BeforeValidator(_offered),
    ] = "lora"  # fmt: skip
    config: dict[str, Any] = field(default_factory=dict)  # of PEFT's configuration, what is not as PEFT has it
    prior_preservation: bool = False
    prior_weight: Annotated[float, Field(ge=0)] = 1.0
    class_images: Annotated[int, Field(gt=0)] = 200
    steps: Annotated[int, Field(gt=0)] = 500
    batch_size: Annotated[int, Field(gt=0)] = 1  # as many class images come on top, with prior preservation
    lr: Annotated[float, Field(gt=0)] = 1e-4

    ablations = {
        "rslora": Ablation({"adapter": "rslora", "config": {}}, "PEFT: rsLoRA"),
        "dora": Ablation({"adapter": "dora", "config": {}}, "PEFT: DoRA"),
        "pissa": Ablation({"adapter": "pissa", "config": {}}, "PEFT: PiSSA"),
        "olora": Ablation({"adapter": "olora", "config": {}}, "PEFT: OLoRA"),
        "loha": Ablation({"adapter": "loha", "config": {}}, "PEFT: LoHa"),
        "lokr": Ablation({"adapter": "lokr", "config": {}}, "PEFT: LoKr"),
        "oft": Ablation({"adapter": "oft", "config": {}}, "PEFT: OFT"),
        "boft": Ablation({"adapter": "boft", "config": {}}, "PEFT: BOFT"),
        "hra": Ablation({"adapter": "hra", "config": {}}, "PEFT: HRA"),
        "vera": Ablation({"adapter": "vera", "config": {}}, "PEFT: VeRA"),
        "randlora": Ablation({"adapter": "randlora", "config": {}}, "PEFT: RandLora"),
        "delora": Ablation({"adapter": "delora", "config": {}}, "PEFT: DeLoRA"),
        "gralora": Ablation({"adapter": "gralora", "config": {}}, "PEFT: GraLoRA"),
        "miss": Ablation({"adapter": "miss", "config": {}}, "PEFT: MiSS"),
        "ia3": Ablation({"adapter": "ia3", "config": {}}, "PEFT: (IA)3"),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        init = self.config.get("init_lora_weights")
        if isinstance(init, str) and init not in INITS and not FAST_PISSA.fullmatch(init):
            raise InputError(
                f"config.init_lora_weights = {shown(init)} needs more than the weights to start from; choose true, "
                f"false, pissa_niter_NUMBER, {listed(INITS)}"
            )
        checked = {key: value for key, value in self.config.items() if value is not init or init is None}
        if checked:
            check_options("lora" if self.adapter in OF_LORA else self.adapter, checked, "config")

    def check(self, sampling: LAG) -> None:
        if not is_installed():
            raise InputError(MISSING)
        targets = self.config.get("target_modules", WITHIN)
        if sampling.lag and (isinstance(targets, str) or not set(targets) <= set(WITHIN)):
            raise InputError(
                "lag keeps what was learned to the region that looks at the concept, so every change must lie within a "
                f"transformer; sample without lag, or let config.target_modules be a list of {listed(WITHIN)}"
            )

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing("crop", "bilinear", flip=False)

    @property
    def samples_as_it_trains(self) -> bool:
        return not any(value for key, value in self.config.items() if key.endswith("dropout"))

    @property
    def starts_as_base_model(self) -> bool:
        return all(self.config.get(key, True) for key in ("init_lora_weights", "init_weights", "init_ia3_weights"))
