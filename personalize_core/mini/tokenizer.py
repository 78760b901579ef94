"""CLIP's tokenizer with a pruned vocabulary: `build` keeps only the merges that the words below need."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from personalize_core.mini import names

FOLDER = Path(__file__).parent / "weights" / "base" / "tokenizer"
START, END = "<|startoftext|>", "<|endoftext|>"
RARE_TOKEN = "sks"  # DreamBooth's identifier; known, and in no caption

# Words that no caption uses but prompts, templates and class nouns may: their embeddings are untrained, their
# segmentation is CLIP's.
MORE_WORDS = """
sks and with on in of top to at under over by near my your one two three style background floating wearing
cobblestone street pink fabric wooden floor wood city mountain house purple rug forest hat santa rainbow scarf
black monocle chef outfit firefighter police glasses yellow shirt wizard red shiny wet cube shaped wheat field tree
autumn leaves eiffel tower water ocean milk green grass sunflowers around mirror sidewalk crowded street dirt road
white orange teal brown navy grey gray color colour colorful gold silver light dark bright big little old new
times square moon monet oil marc chagall manga drawing watercolor statue app icon sand sculpture graffiti photograph
table pencil paper simple plain studio wall window garden park river lake sky sun star heart cross ring bolt disc
stripes striped dots spotted pattern person man woman child people dog puppy cat kitten animal toy stuffed bag cup
bowl glass bottle vase candle can box bird horse cow rabbit elephant penguin turtle owl lion tiger monkey sheep
boot sneaker shoes jacket dress sunglasses watch phone camera guitar drum bell book chair lamp bed sofa desk
truck bus train bicycle bike plane ship robot monster dinosaur cartoon figurine action doll fancy berry apple banana
cake pizza flower rose cactus leaf mushroom rock stone brick metal plastic object thing it is that looks like this
art style pixel digital illustration poster logo winter summer spring night day morning evening rain storm cloud
""".split()


def words() -> list[str]:
    """Every word that must be segmented as by CLIP itself."""
    sentences = [t.format(" ") for templates in names.STYLE_TEMPLATES.values() for t in templates]
    sentences += [*names.PLACES.values(), *names.PLACES, *names.CATEGORIES, *names.ALL_COLOURS, *names.STYLES]
    return sorted({w for s in [*sentences, *MORE_WORDS] for w in re.findall(r"[a-z]+", s)})


@cache
def byte_characters() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte, in CLIP's order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}


@cache
def clip_merges() -> dict[tuple[str, str], int]:
    """CLIP's merges with their ranks, from the vocabulary inside open_clip (MIT, as OpenAI's CLIP)."""
    import open_clip.tokenizer

    with gzip.open(open_clip.tokenizer.default_bpe(), "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : 49152 - 256 - 2 + 1]
    pairs = [line.split() for line in lines]
    return {(first, second): rank for rank, (first, second) in enumerate(pairs)}


def segment(word: str, merges: dict[tuple[str, str], int]) -> tuple[list[str], set[tuple[str, str]]]:
    """Byte-pair encoding of one word: its pieces, and the merges that made them."""
    pieces = [byte_characters()[b] for b in word.encode()]
    pieces[-1] += "</w>"
    used = set()
    while pairs := [p for p in zip(pieces, pieces[1:], strict=False) if p in merges]:
        best = min(pairs, key=merges.__getitem__)
        used.add(best)
        joined, index = [], 0
        while index < len(pieces):
            step = 2 if tuple(pieces[index : index + 2]) == best else 1
            joined.append("".join(pieces[index : index + step]))
            index += step
        pieces = joined
    return pieces, used


def build(folder: Path = FOLDER, known: Iterable[str] | None = None) -> None:
    """Write the tokenizer, as files that transformers' CLIPTokenizer opens, slow or fast."""
    merges = clip_merges()
    used = set().union(*(segment(word, merges)[1] for word in known or words()))
    kept = sorted(used, key=merges.__getitem__)
    characters = list(byte_characters().values())
    pieces = [*characters, *(c + "</w>" for c in characters), *("".join(pair) for pair in kept), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in kept)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2))
    config = special | {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def load(folder: Path = FOLDER):
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder)


if __name__ == "__main__":
    build()
