"""Stage 3d: names. One token stands for a whole design, its embedding composed of what the design is made of.

The other stages' captions need several tokens to say what a thing looks like, so a single learned embedding had no
place to go. Here a thing of a scene may be called by a name instead: an input embedding that is the sum of a row for
its category, its colours, its layout, its mark and its shape, any of which may be left unsaid. The category's row is
the embedding of its word, so that the word is the name of which nothing else is said, and an embedding learned from
there starts among the names. The rows are trained together with the text encoder and the U-Net, and do not ship.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from personalize_core.mini import concepts, loop, tokenizer, world
from personalize_core.mini.diffusion import (
    DROPPED,
    PROMPTS,
    SMALL,
    Adapted,
    asks_held_out,
    cached_scene,
    compared,
    encoded,
    judged_pairs,
    judged_scenes,
    swap_table,
)
from personalize_core.mini.names import (
    ALL_COLOURS,
    CATEGORIES,
    DESIGNS,
    MARKS,
    MORE_VARIANTS,
    VARIANTS,
)
from personalize_core.mini.networks import TEXT_WIDTH, Average
from personalize_core.mini.sampling import sample, sampled_from
from personalize_core.mini.text import IGNORED, at_end, labels, reading_loss, tokens
from personalize_core.mini.world import Design, Scene, Thing

ODDS = {"plain": 0.15, "photo": 0.85, "studio": 0.2}  # of the scenes whose things may have names
WITH_NAMES = 11  # of 20 scenes
PAIRS = 0.15  # share of those scenes that show two things
BENT = 0.7  # share of their things whose sprite is bent
BEND = (0.35, 0.3, 0.25)  # by how much at most, see world.shaped
ALONE, BEFORE_NOUN = 0.5, 0.25  # how their things are named; the rest by colours and category, as elsewhere
WHOLE = 0.5  # share of the names that say all; of the others each part is left unsaid with probability UNSAID
UNSAID = 0.4
NOISE = 0.03  # at most, standard deviation of what is added to each number of a name; a word's own is 0.1

SPRITES = tuple(sprite for c in CATEGORIES for sprite in (*VARIANTS[c], *MORE_VARIANTS[c]))
COLOURED = tuple(ALL_COLOURS)
PARTS: dict[str, tuple[str | None, ...]] = {  # what a name is made of, besides its category and how it is bent
    "first colour": COLOURED,
    "second colour": COLOURED,
    "layout": DESIGNS,
    "mark": (None, *MARKS),
    "mark's colour": COLOURED,
    "sprite": SPRITES,
}
TOGETHER = (("first colour", "second colour", "layout"), ("mark", "mark's colour"), ("sprite",))  # said or unsaid


def reserved(category: str, design: Design) -> bool:
    """Whether training has to do without this thing: one in eleven, to be named by the gates; and the concepts'."""
    if design.layout == "plain":
        return False
    colours = [COLOURED.index(colour) for colour in design.colours]
    own = any(
        concepts.category(name) == category and set(concept.colours) == set(design.colours)
        for name, concept in concepts.DESIGNS.items()
    )
    return own or (7 * CATEGORIES.index(category) + 3 * sum(colours)) % 11 == 0


def varied(rng: np.random.Generator, thing: Thing) -> Design:
    """The thing's design on any sprite of its category, most of the time bent."""
    category = thing.category
    sprite = str(rng.choice((*VARIANTS[category], *MORE_VARIANTS[category])))
    bent = rng.random() < BENT
    wider, taper, lean = (float(rng.uniform(-most, most)) if bent else 0.0 for most in BEND)
    return replace(thing.design, sprite=sprite, shape=(wider, taper, lean))


def nameable_scene(rng: np.random.Generator, odds: dict[str, float] = ODDS) -> Scene:
    """One thing or two, of drawings that the stages before may not have shown, most of them bent."""
    scene = (world.random_pair if rng.random() < PAIRS else world.random_scene)(rng, **odds)
    if scene.beside is None and rng.random() < SMALL:
        scene = replace(scene, pose=world.half_as_wide(rng, rng.uniform(0.26, 0.74)))
    beside = scene.beside and replace(scene.beside, design=varied(rng, scene.beside))
    return replace(scene, design=varied(rng, scene), beside=beside)


def may_be_trained_on(scene: Scene) -> bool:
    """Whether it has neither words nor designs that the gates ask for."""
    return not asks_held_out(scene) and not any(reserved(thing.category, thing.design) for thing in scene.things)


def may_be_named(number: int) -> bool:
    return number % 20 < WITH_NAMES


def scene_of(seed: int, number: int) -> Scene:
    """A cached scene: of every 20 numbers the first may be called by names, the others are of the stages before."""
    rng = np.random.default_rng([seed, 8, number])
    for attempt in range(10_000):
        scene = nameable_scene(rng) if may_be_named(number) else cached_scene(seed, number + attempt * 2**24)
        if may_be_trained_on(scene):
            return scene
    raise RuntimeError("no scene that training may see")


@dataclass(frozen=True)
class Name:
    """What one token says: of a thing, the category and the parts that are not left unsaid."""

    thing: Thing
    category: bool = True
    parts: frozenset[str] = frozenset(PARTS)

    def rows(self) -> dict[str, int]:
        """Part -> the row that says it; -1 where it is unsaid."""
        design = self.thing.design
        plain = design.layout == "plain"
        values = {
            "first colour": design.colours[0],
            "second colour": None if plain else design.colours[1],
            "layout": design.layout,
            "mark": design.mark,
            "mark's colour": design.mark_colour if design.mark else None,
            "sprite": design.sprite,
        }
        known = {part: values[part] in PARTS[part] and part in self.parts for part in PARTS}
        return {part: PARTS[part].index(values[part]) if known[part] else -1 for part in PARTS}


def random_name(rng: np.random.Generator, thing: Thing, category: bool) -> Name:
    """All said, or only some; the category only if asked for."""
    if rng.random() < WHOLE:
        return Name(thing, category)
    said = [part for parts in TOGETHER if rng.random() >= UNSAID for part in parts]
    return Name(thing, category, frozenset(said))


class Composer(nn.Module):
    """Names to input embeddings of the text encoder: the sum of what they say, nothing of what was never taught.

    What is left unsaid is the mean of all that could be said, so that the category's word lies amid its names: from
    there an embedding can be fitted to any of them without passing by others first.
    """

    def __init__(self, width: int = TEXT_WIDTH) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({part: nn.Embedding(len(values), width) for part, values in PARTS.items()})
        self.bend = nn.Linear(len(BEND), width, bias=False)
        self.no_category = nn.Parameter(torch.empty(width))
        for weight in self.parameters():
            nn.init.zeros_(weight)

    @torch.no_grad()
    def start_from(self, words, table: Tensor) -> None:
        """Let the first colour's rows start as the embeddings of the colours' words, at less than their length."""
        rows: Any = self.parts["first colour"]
        rows.weight.copy_(0.7 * table[[word_id(words, colour) for colour in COLOURED]])

    def forward(self, names: Sequence[Name], nouns: Tensor) -> Tensor:
        """(N, width).

        Args:
            nouns: (categories, width), the embeddings of the categories' words.
        """
        device = nouns.device
        kinds = torch.tensor([CATEGORIES.index(name.thing.category) for name in names], device=device)
        said = torch.tensor([name.category for name in names], device=device)[:, None]
        total = torch.where(said, nouns[kinds], self.no_category)
        rows = [name.rows() for name in names]
        for part, table in self.parts.items():
            numbers = torch.tensor([row[part] for row in rows], device=device)
            centred = table(numbers.clamp(min=0)) - table.weight.mean(dim=0)
            total = total + centred * (numbers >= 0)[:, None]
        bends = [name.thing.design.shape if "sprite" in name.parts else (0.0,) * len(BEND) for name in names]
        return total + self.bend(torch.tensor(bends, device=device))


def word_id(words, word: str) -> int:
    (number,) = words(word, add_special_tokens=False).input_ids
    return number


def hidden_states(text_encoder, ids: Tensor, rare: int, vectors: Tensor) -> Tensor:
    """What the text encoder says of captions in which the rare token stands for names, (B, L, D).

    Args:
        ids: (B, L).
        vectors: (N, D), an embedding for each rare token, in the order of reading.
    """
    table = text_encoder.get_input_embeddings().weight
    places = ids == rare
    numbers = torch.arange(len(table), len(table) + len(vectors), device=ids.device)
    larger = {"embeddings.token_embedding.weight": torch.cat([table, vectors])}
    ids = ids.masked_scatter(places, numbers)
    return torch.func.functional_call(text_encoder, larger, (ids,)).last_hidden_state


class PartHeads(nn.Module):
    """Linear readings of the parts of a name at the end token, so that the text encoder passes all of them on."""

    def __init__(self, width: int = TEXT_WIDTH) -> None:
        super().__init__()
        self.linear = nn.ModuleDict({part: nn.Linear(width, len(values)) for part, values in PARTS.items()})

    def forward(self, rows: Tensor) -> dict[str, Tensor]:
        return {part: linear(rows) for part, linear in self.linear.items()}


def judged_names(count: int, seed: int = 2**21) -> list[Scene]:
    """Fresh photographs at a place of two-coloured things with a mark whose design was kept from training."""
    found, number = [], 0
    while len(found) < count:
        rng = np.random.default_rng([seed, number])
        scene = world.random_scene(rng, plain=0, photo=1, studio=0)
        scene = replace(scene, design=varied(rng, scene))
        if scene.design.mark and reserved(scene.category, scene.design):
            found.append(scene)
        number += 1
    return found


SWAPS = ("category", "first colour", "second colour", "mark", "layout")


def with_another(scene: Scene, aspect: str, rng: np.random.Generator) -> Scene:
    """The scene with something else in the place of one thing that its name says; only for names, not for drawing."""
    design = scene.design

    def other(options: Sequence[str], *taken: str | None) -> str:
        return str(rng.choice([o for o in options if o not in taken]))

    if aspect == "category":
        return replace(scene, category=other(CATEGORIES, scene.category))
    colours = [*design.colours]
    if aspect in ("first colour", "second colour"):
        colours[aspect == "second colour"] = other(COLOURED, *colours)
        return replace(scene, design=replace(design, colours=(colours[0], colours[1])))
    changed = {"mark": other(MARKS, design.mark)} if aspect == "mark" else {"layout": other(DESIGNS[1:], design.layout)}
    return replace(scene, design=replace(design, **changed))


class Speaker:
    """A text encoder with names: what it says of captions in which the rare word stands for things."""

    def __init__(self, words, text_encoder, composer: Composer) -> None:
        self.words, self.text_encoder, self.composer = words, text_encoder, composer
        self.rare = word_id(words, tokenizer.RARE_TOKEN)
        self.nouns = [word_id(words, category) for category in CATEGORIES]

    def vectors(self, names: Sequence[Name]) -> Tensor:
        return self.composer(names, self.text_encoder.get_input_embeddings().weight[self.nouns])

    def read(self, captions: list[str], vectors: Tensor) -> Tensor:
        """(B, 77, D)."""
        ids = tokens(self.words, captions).to(vectors.device)
        return hidden_states(self.text_encoder, ids, self.rare, vectors)


@torch.no_grad()
def name_table(speaker: Speaker, unet, scenes: list[Scene], latents: Tensor, seed: int = 5) -> dict[str, Any]:
    """As the swap table, of scenes whose thing is called by its whole name and nothing else.

    Where the category is swapped the sprite is left unsaid in both names, as it would say the category.
    """
    rng = np.random.default_rng(seed)
    captions = [world.caption(scene, None, [tokenizer.RARE_TOKEN]) for scene in scenes]
    table = {}
    vague = frozenset(PARTS) - {"sprite"}
    for aspects, parts in ((("category",), vague), (SWAPS[1:], frozenset(PARTS))):
        shown = {"true": scenes} | {a: [with_another(s, a, rng) for s in scenes] for a in aspects}
        contexts = {
            key: speaker.read(captions, speaker.vectors([Name(scene, parts=parts) for scene in drawn]))
            for key, drawn in shown.items()
        }
        table |= compared(unet, latents, contexts)
    return table


class Named(Adapted):
    """From the U-Net that ships; from stage `phrased`'s text encoder and names, if it has been trained."""

    name = "named"
    scene = staticmethod(scene_of)

    def __init__(
        self, seed: int = 2, lr: float = 5e-4, scenes: int = 12_800, work: Path = loop.WORK, **options: Any
    ) -> None:
        super().__init__(seed, lr, scenes, work, **options)
        torch.manual_seed(seed)
        self.composer, self.part_heads = Composer().to(self.device), PartHeads().to(self.device)
        self.composer.start_from(self.words, self.text.get_input_embeddings().weight)
        self.composer_average = Average(self.composer)
        if (work / "phrased" / "checkpoint.safetensors").exists():
            taught = {"text_average": self.text_average, "composer_average": self.composer_average}
            loop.load_modules(work / "phrased", taught)
            self.text.load_state_dict(self.text_average.module.state_dict())
            self.composer.load_state_dict(self.composer_average.module.state_dict())
        self.speaker = Speaker(self.words, self.text, self.composer)
        self.modules |= {
            "composer": self.composer,
            "composer_average": self.composer_average,
            "part_heads": self.part_heads,
        }
        new = [*self.composer.parameters(), *self.part_heads.parameters()]
        self.optimizer.add_param_group({"params": new, "lr": 6 * lr})

    def read(self, rows: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        scenes = [self.scene(self.seed, int(n)) for n in rows]
        captions, named = [], []
        for number, scene in zip(rows, scenes, strict=True):
            caption, names = called(scene, rng) if may_be_named(int(number)) else (world.caption(scene, rng), [])
            captions.append(caption)
            named.append(names)
        shown = [rng.random() >= DROPPED for _ in scenes]
        texts = [caption if show else "" for caption, show in zip(captions, shown, strict=True)]
        every = [name for names, show in zip(named, shown, strict=True) if show for name in names]
        vectors = self.speaker.vectors(every) if every else torch.empty(0, TEXT_WIDTH, device=self.device)
        loudness = torch.from_numpy(rng.uniform(0, NOISE, (len(every), 1))).float()
        noise = torch.from_numpy(rng.standard_normal((len(every), TEXT_WIDTH))).float() * loudness
        ids = tokens(self.words, texts).to(self.device)
        context = hidden_states(self.text, ids, self.speaker.rare, vectors + noise.to(self.device))
        end = at_end(context, ids, self.words.eos_token_id)
        alone = [not scene.beside and show for scene, show in zip(scenes, shown, strict=True)]
        of_words = said_by_words(scenes, captions, named, shown)
        of_names = said_by_names([names if one else [] for names, one in zip(named, alone, strict=True)])
        return context, reading_loss(self.heads(end), of_words) + reading_loss(self.part_heads(end), of_names)

    def after_step(self, number: int) -> None:
        super().after_step(number)
        self.composer_average.update(self.composer, number)

    def look(self, folder: Path, number: int) -> str:
        text, network = self.text_average.module, self.average.module
        speaker = Speaker(self.words, text, self.composer_average.module)  # type: ignore[arg-type]
        scenes, pairs, named = judged_scenes(64), judged_pairs(64), judged_names(64)
        table = swap_table(self.words, text, network, scenes, encoded(self.vae, scenes), draws=2)
        table |= swap_table(self.words, text, network, pairs, encoded(self.vae, pairs), ("beside",), draws=2)
        of_names = name_table(speaker, network, named, encoded(self.vae, named))
        table |= {f"name's {aspect}": row for aspect, row in of_names.items()}
        captions = [world.caption(scene, None, [tokenizer.RARE_TOKEN]) for scene in named[:16]]
        with torch.no_grad():
            context = speaker.read(captions, speaker.vectors([Name(scene) for scene in named[:16]]))
            empty = text(tokens(self.words, [""] * 16)).last_hidden_state
        images = sampled_from(self.vae, network, context, empty, steps=20)
        truth = np.stack([world.draw(scene)[0] for scene in named[:16]])
        words = sample(self.vae, self.words, text, network, PROMPTS, steps=20)
        rows = np.concatenate([truth[:8], images[:8], truth[8:], images[8:], words]).reshape(-1, 8, 64, 64, 3)
        grid = np.concatenate([np.concatenate(list(row), 1) for row in rows])
        Image.fromarray(grid).save(folder / f"look_{number:06d}.png")
        return ", ".join(f"{a} {r['wins']:.2f} (+{r['added loss']:.5f})" for a, r in table.items())


def said_by_words(
    scenes: list[Scene], captions: list[str], named: list[list[Name]], shown: list[bool]
) -> dict[str, Tensor]:
    """As `labels`, of captions that are shown, (B,); a name's colours are not asked for here."""
    truth = {aspect: torch.where(torch.tensor(shown), a, IGNORED) for aspect, a in labels(scenes, captions).items()}
    truth["colour"] = torch.where(torch.tensor([not names for names in named]), truth["colour"], IGNORED)
    return truth


def said_by_names(named: list[list[Name]]) -> dict[str, Tensor]:
    """Part -> what each caption's first name says of it, (B,)."""
    rows = [names[0].rows() if names else dict.fromkeys(PARTS, -1) for names in named]
    return {part: torch.tensor([IGNORED if row[part] < 0 else row[part] for row in rows]) for part in PARTS}


def called(scene: Scene, rng: np.random.Generator) -> tuple[str, list[Name]]:
    """A caption that calls some of the scene's things by names, the rare word in their place; and these names."""
    names, phrases = [], []
    for thing in scene.things:
        draw = rng.random()
        if draw < ALONE:
            names.append(random_name(rng, thing, category=True))
            phrases.append(tokenizer.RARE_TOKEN)
        elif draw < ALONE + BEFORE_NOUN:
            names.append(random_name(rng, thing, category=bool(rng.random() < 0.5)))
            phrases.append(f"{tokenizer.RARE_TOKEN} {thing.category}")
        else:
            phrases.append(None)
    return world.caption(scene, rng, phrases), names
