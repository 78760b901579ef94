"""Context-token drift: what the concept's embedding does to the words around it in the text encoder.

CoRe (Wu et al. 2025), figures 2 and 8: a good embedding leaves the output embeddings of the other
words as the class noun leaves them; an overfitted one bends them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from personalize_core.analyses import shared_plots
from personalize_core.analyses.class_nouns import COMMON_NOUNS
from personalize_core.analyses.findings import Findings, NotDefined
from personalize_core.analyses.inputs import Inputs
from personalize_core.analyses.learned_embedding import MIDDLE
from personalize_core.base_model.model import BaseModel
from personalize_core.base_model.text import TextContext
from personalize_core.concepts.concept import SLOT, Concept
from personalize_core.methods.interface import Method
from personalize_core.report.display_names import in_words

TITLE = "Context tokens"
TEMPLATE = "{} in the desert"
END = "(end of text)"
HOW = (
    f"The text encoder's output for each word of '{TEMPLATE}' behind the slot, compared by cosine with the same word's "
    "output where the base model reads the class noun in the slot. Beside the concept stand other nouns: the two of a "
    "short list whose own outputs are nearest to the class noun's, and the farthest. A method under which each "
    "cross-attention layer reads its own text has the mean over the layers, at the middle timestep."
)
NEAR, FAR = 2, 1
KINDS = ("class noun", "near noun", "far noun", "concept")
MEANINGS = {
    "filler": "what stands in the slot",
    "kind": "'class noun' (the reference itself), 'near noun', 'far noun' or 'concept'",
    "word": f"the word behind the slot; '{END}' for the end token, which sums the prompt up",
    "cosine": "of its output embedding with the same word's in the reference prompt",
}


def positions(base: BaseModel, prompt: str, concept: Concept) -> list[tuple[str, list[int]]]:
    """Of the prompt's tokens: those of each word behind the slot of TEMPLATE, then that of the end of the text."""
    behind = base.tokenizer.spelled(TEMPLATE.replace(SLOT, ""), concept)
    end = int(base.tokenizer([prompt], concept).end[0].int().argmax())
    return [*base.tokenizer.spelled(prompt, concept)[-len(behind) :], (END, [end])]


def outputs(base: BaseModel, context: TextContext, prompt: str, concept: Concept) -> np.ndarray:
    """(layers, words, D) float64: each word's output, the mean of its tokens'. One layer where all read one text."""
    hidden: Tensor = context.layers[0][:, 0] if context.layers else context.hidden[:1]  # (layers, L, D)
    places = [where for _, where in positions(base, prompt, concept)]
    return torch.stack([hidden[:, where].mean(dim=1) for where in places], dim=1).double().cpu().numpy()


def cosines(one: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """(words,): one (layers, words, D) with reference (1, words, D), the mean over the layers."""
    lengths = np.linalg.norm(one, axis=-1) * np.linalg.norm(reference, axis=-1)
    return np.clip((one * reference).sum(axis=-1) / lengths, -1, 1).mean(axis=0)


def words(base: BaseModel, concept: Concept) -> list[str]:
    """The columns."""
    return [word for word, _ in positions(base, TEMPLATE.replace(SLOT, concept.class_noun), concept)]


@torch.no_grad()
def of_noun(base: BaseModel, noun: str, concept: Concept) -> np.ndarray:
    """(1, words, D): the prompt with a plain noun, read by the base model."""
    prompt = TEMPLATE.replace(SLOT, noun)
    return outputs(base, base.encode([prompt], concept), prompt, concept)


@torch.no_grad()
def of_concept(method: Method, base: BaseModel, t: int) -> np.ndarray:
    """(layers, words, D): the prompt as the method says and reads it, at timestep t.

    Raises:
        NotDefined: the method says the class noun alone, which is the reference.
    """
    if method.concept.placeholder not in method.phrase:
        raise NotDefined("the method says the class noun alone, which is what all others are compared with")
    prompt = method.say(TEMPLATE)
    with method.attach(base):
        context = method.condition(base, [prompt])(torch.full((1,), t, device=base.device))
    return outputs(base, context, prompt, method.concept)


@torch.no_grad()
def others(base: BaseModel, class_noun: str, nouns: Sequence[str] = COMMON_NOUNS) -> list[tuple[str, str]]:
    """(noun, kind): the nearest and the farthest of the list, by the output of "a photo of a NOUN" at its end."""
    nouns = [noun for noun in nouns if noun != class_noun]
    context = base.encode([f"a photo of a {noun}" for noun in [class_noun, *nouns]])
    ends = F.normalize(context.hidden[context.end].double(), dim=-1)
    order = (ends[1:] @ ends[0]).argsort(descending=True, stable=True).tolist()
    kinds = [(index, "near noun") for index in order[:NEAR]] + [(index, "far noun") for index in order[-FAR:]]
    return [(nouns[index], kind) for index, kind in kinds]


def plot(table: pl.DataFrame, path: Path, class_noun: str) -> None:
    """A row for each filler, a column for each word. table: rows of MEANINGS, every word for every filler."""
    wide = table.pivot("word", index=["filler", "kind"], values="cosine", maintain_order=True)
    labels = [f"{filler} ({kind})" for filler, kind in wide.select("filler", "kind").iter_rows()]
    columns = wide.columns[2:]
    label = f"cosine with the word's output behind '{class_noun}'"
    shared_plots.shaded(wide.select(columns).to_numpy(), labels, columns, path, TEMPLATE.replace(SLOT, "…"), label)


def analyse(inputs: Inputs, findings: Findings) -> None:
    base, concept = inputs.base, inputs.concept
    mine, reference = (
        of_concept(inputs.trained, base, MIDDLE),
        of_noun(base, concept.class_noun, concept),
    )
    fillers = [(concept.class_noun, "class noun", reference)]
    for noun, kind in others(base, concept.class_noun):
        fillers.append((noun, kind, of_noun(base, noun, concept)))
    fillers.append((f"{inputs.trained.phrase}, {in_words(inputs.method)}", "concept", mine))
    columns = words(base, concept)
    alike = np.stack([cosines(outputs, reference) for _, _, outputs in fillers])
    rows = [
        {"filler": filler, "kind": kind, "word": word, "cosine": float(alike[row, column])}
        for row, (filler, kind, _) in enumerate(fillers)
        for column, word in enumerate(columns)
    ]
    findings.table("context_tokens.parquet", rows, MEANINGS, "every word behind every filler")
    findings.metrics |= {
        f"mean over the words, {filler}": float(alike[row].mean()) for row, (filler, *_) in enumerate(fillers)
    }
    caption = f"how the words of '{TEMPLATE}' change with what stands in the slot"
    plot(pl.DataFrame(rows), findings.image("context_tokens.png", caption), concept.class_noun)
