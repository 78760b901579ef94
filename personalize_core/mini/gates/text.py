"""What a linear reading finds in the text encoder."""

from __future__ import annotations

import numpy as np
import torch

from personalize_core.mini import world
from personalize_core.mini.gates.thresholds import Figures
from personalize_core.mini.text import Heads, at_end, labels, reading_loss, right, tokens


def text_gate(text_encoder, words) -> tuple[Figures, str]:
    """A linear reading fitted on 1,500 captions, tested on 500 others."""
    rng = np.random.default_rng(2**20)
    described = [world.random_scene(rng) for _ in range(2000)]
    captions = [world.caption(s, rng) for s in described]
    rows = []
    with torch.no_grad():
        for start in range(0, 2000, 100):
            ids = tokens(words, captions[start : start + 100], 24)
            rows.append(at_end(text_encoder(ids).last_hidden_state, ids, words.eos_token_id))
    features, truth = torch.cat(rows), labels(described, captions)
    torch.manual_seed(0)
    heads = Heads(features.shape[1])
    optimizer = torch.optim.AdamW(heads.parameters(), 0.02)
    for _ in range(300):
        loss = reading_loss(heads(features[:1500]), {a: t[:1500] for a, t in truth.items()})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        found = right(heads(features[1500:]), {a: t[1500:] for a, t in truth.items()})
    return found, "500 captions, a linear reading fitted on 1,500 others"
