"""A judge on this machine: a vision-language model that transformers loads, with its processor and chat template."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from personalize_core.base_model.pretrained import load_network, weights_in
from personalize_core.errors import InputError
from personalize_core.files.hub import hub_folder
from personalize_core.files.outside import is_folder
from personalize_core.metrics.judge.local_weights import FILES, weights_of
from personalize_core.metrics.judge.questions import Question
from personalize_core.metrics.weights import readable

MOST_TOKENS = 512  # of an answer


@dataclass(frozen=True)
class LocalJudge:
    """A model and its processor; it answers one question at a time, each token the most probable one."""

    name: str
    weights: str
    processor: Any
    model: Any
    device: str
    at_once: int = 1
    tries: int = 1  # each answer would be the same

    @property
    def answers_depend_on(self) -> Mapping[str, Any]:
        return {"local": self.name, "weights": self.weights, "tokens": MOST_TOKENS}

    def stop(self) -> None:
        """It never waits."""

    @torch.inference_mode()
    def ask(self, question: Question) -> str:
        images = [
            {"type": "image", "image": Image.open(io.BytesIO(image.png), formats=["PNG"])} for image in question.images
        ]
        messages = [{"role": "user", "content": [*images, {"type": "text", "text": question.text}]}]
        given = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self.device)
        made = self.model.generate(
            **given, do_sample=False, temperature=None, top_p=None, top_k=None, max_new_tokens=MOST_TOKENS
        )
        return self.processor.batch_decode(made[:, given["input_ids"].shape[1] :], skip_special_tokens=True)[0]


def load_local(model: str, revision: str | None, device: str) -> LocalJudge:
    """The model, kept for the next table.

    Args:
        model: a folder, or OWNER/NAME on the Hugging Face Hub.
        revision: the commit, of a model on the hub.

    Raises:
        InputError: it cannot be had, holds no safetensors, has no chat template, or wants code of its own to be run.
    """
    return _loaded(model, revision, device, weights_of(model, revision))


@lru_cache(maxsize=1)
def _loaded(model: str, revision: str | None, device: str, weights: str) -> LocalJudge:
    """weights: others by now are loaded anew, though the folder's name is the same."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = Path(model) if is_folder(Path(model)) else _fetched(model, str(revision))
    how: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    network = load_network(AutoModelForImageTextToText, folder, "auto")
    processor = readable(model, folder, lambda: AutoProcessor.from_pretrained(folder, **how))
    if not getattr(processor, "chat_template", None):
        raise InputError(f"{folder} has no chat template, so it cannot be asked questions; choose an instruction model")
    name = folder.resolve().name if is_folder(Path(model)) else model
    return LocalJudge(name, weights, processor, network.to(device), device)


def _fetched(model: str, revision: str) -> Path:
    """The folder on this machine that holds the files of that commit, fetched from the hub if need be."""
    return hub_folder(
        f"the judge's model {model}",
        model,
        revision,
        FILES,
        "or write the path of a folder that holds it as judge.local.model",
        lambda folder: weights_in(folder, "model"),
    )
