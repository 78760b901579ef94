"""How diffusers' scripts give the text encoder a new word."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.suite.models import Stock


def add_word(parts: Stock, word: str, embedding: Tensor) -> int:
    """Add it to tokenizer and text encoder, which then reads `embedding` (D,) for it; returns its number."""
    parts.tokenizer.add_tokens(word)
    number = parts.tokenizer.convert_tokens_to_ids(word)
    # without the mean of all others, which the scripts overwrite at once and which takes a while to compute
    parts.text_encoder.resize_token_embeddings(len(parts.tokenizer), mean_resizing=False)
    with torch.no_grad():
        parts.text_encoder.get_input_embeddings().weight[number] = embedding.detach()
    return number
