"""Judge the exported weights: `python -m personalize_core.mini.gates [GATE ...]`. Writes the model card beside them.

What takes an eye is looked at in the pictures that the gates write, counted, and told to the card: `--seen
pictures=20 personalization=6`. Of a gate that is not asked for, the card keeps the figures as long as the weights they
were measured on are the same.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from personalize_core.files.stamps import sha256, stamp_of
from personalize_core.metrics.encoders import load_identity_encoder
from personalize_core.mini import classifier, clip, concepts, loop, personalization, world
from personalize_core.mini.autoencoder import psnr, scenes
from personalize_core.mini.diffusion import encoded, held_out, judged_pairs, judged_scenes, swap_table
from personalize_core.mini.export import WEIGHTS, averaged, size_of
from personalize_core.mini.names import ALL_COLOURS, CATEGORIES, COLOURS, DESIGNS, MARKS, PLACES
from personalize_core.mini.networks import to_pictures, to_tensor
from personalize_core.mini.sampling import sample
from personalize_core.mini.text import ASPECTS, Heads, at_end, labels, reading_loss, right, tokens

Figures = dict[str, float]
CARD = "model_card.json"


def reconstructed(vae, pictures: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        parts = [vae(to_tensor(pictures[n : n + 32])).sample for n in range(0, len(pictures), 32)]
    return to_pictures(torch.cat(parts))


def photographs() -> np.ndarray:
    """Every photograph of the eight concepts, (N, 64, 64, 3)."""
    drawn = [
        world.draw(concepts.scene(name, place, number))[0]
        for name in concepts.DESIGNS
        for number, place in enumerate(concepts.PLACES[name])
    ]
    return np.stack(drawn)


def autoencoder_gate(vae, judge: classifier.Network, fresh: int = 200, read_on: int = 400) -> tuple[Figures, str]:
    rng = np.random.default_rng(2**20)
    pictures, _, _ = scenes(rng, fresh)
    photos = photographs()
    figures = {
        "dB on fresh scenes": float(psnr(pictures, reconstructed(vae, pictures)).mean()),
        "dB on the concepts": float(psnr(photos, reconstructed(vae, photos)).mean()),
    }
    pictures, _, drawn = scenes(rng, read_on, plain=1, photo=1)
    truth = classifier.truths(drawn)
    for kind, shown in (("originals", pictures), ("reconstructions", reconstructed(vae, pictures))):
        read = classifier.verdicts(judge, shown)
        for aspect in ("category", "colour"):
            figures[f"{aspect} read from {kind}"] = float((read[aspect] == truth[aspect]).float().mean())
    return figures, f"{fresh} fresh scenes, the concepts' {len(photos)} photographs; read from {read_on} others"


def text_gate(text_encoder, words) -> tuple[Figures, str]:
    """A linear reading fitted on 1,500 captions, tested on 500 others."""
    rng = np.random.default_rng(2**20)
    drawn = [world.random_scene(rng) for _ in range(2000)]
    captions = [world.caption(s, rng) for s in drawn]
    rows = []
    with torch.no_grad():
        for start in range(0, 2000, 100):
            ids = tokens(words, captions[start : start + 100], 24)
            rows.append(at_end(text_encoder(ids).last_hidden_state, ids, words.eos_token_id))
    features, truth = torch.cat(rows), labels(drawn, captions)
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


def unet_gate(model: StableDiffusionPipeline, count: int = 300) -> tuple[Figures, str]:
    drawn = judged_scenes(count)
    table = swap_table(model.tokenizer, model.text_encoder, model.unet, drawn, encoded(model.vae, drawn))
    pairs = judged_pairs(count)
    table |= swap_table(model.tokenizer, model.text_encoder, model.unet, pairs, encoded(model.vae, pairs), ("beside",))
    figures = {f"{aspect}: {figure}": value for aspect, row in table.items() for figure, value in row.items()}
    return figures, f"{count} fresh scenes and as many of two things, 4 draws of noise each"


def held_out_words(count: int) -> list[tuple[str, str, str]]:
    """`count` combinations that training left out, in random order; over again where there are not so many."""
    every = itertools.product(CATEGORIES, COLOURS, [p for p in PLACES if p])
    kept = [combination for combination in every if held_out(*combination)]
    order = np.random.default_rng(11).permutation(len(kept))
    return [kept[order[n % len(kept)]] for n in range(count)]


def pictures_gate(
    model: StableDiffusionPipeline, judge: classifier.Network, guidance: float, count: int = 200
) -> tuple[Figures, str, np.ndarray]:
    combinations = held_out_words(count)
    prompts = [f"a photo of a {colour} {category} {PLACES[place]}" for category, colour, place in combinations]
    drawn = []
    for start in range(0, len(prompts), 20):
        drawn.append(
            sample(
                model.vae,
                model.tokenizer,
                model.text_encoder,
                model.unet,
                prompts[start : start + 20],
                guidance=guidance,
                seed=start,
            )
        )
    pictures = np.concatenate(drawn)
    read = classifier.verdicts(judge, pictures)
    asked = {aspect: [combination[n] for combination in combinations] for n, aspect in enumerate(ASPECTS) if n < 3}
    figures = {
        f"{aspect} named": float(
            np.mean([ASPECTS[aspect][int(r)] == a for r, a in zip(read[aspect], asked[aspect], strict=False)])
        )
        for aspect in asked
    }
    renders, _, truth = scenes(np.random.default_rng(2**20 + 1), 400, plain=1, photo=1, studio=0)
    its_own = right(judge_scores(judge, renders), classifier.truths(truth))
    figures |= {f"the classifier's own {a} on renders": s for a, s in its_own.items()}
    different = len(set(combinations))
    measured_on = (
        f"{count} samples of {different} held-out combinations; the classifier's own on {len(renders)} renders"
    )
    return figures, measured_on, pictures


@torch.no_grad()
def judge_scores(judge: classifier.Network, pictures: np.ndarray) -> dict[str, Tensor]:
    return judge(to_tensor(pictures))


def look_alikes(count: int = 50) -> list[world.Design]:
    """Other designs on the concepts' own sprites, in other colours; half of each sprite's keep the mark and layout."""
    rng, found = np.random.default_rng(2**20), []
    every = list(concepts.DESIGNS.values())
    while len(found) < count:
        original = every[len(found) % len(every)]
        other = world.random_design(rng, original.sprite, plain=0)
        if len(found) // len(every) % 2:
            other = replace(other, mark=original.mark, mark_colour=original.mark_colour, layout=original.layout)
        else:
            other = replace(other, mark=str(rng.choice(MARKS)), layout=str(rng.choice(DESIGNS[1:])))
        if set(other.colours) != set(original.colours):
            found.append(other)
    return found


def near_misses(original: world.Design, rng: np.random.Generator) -> list[world.Design]:
    """Four designs that differ from the original in one thing each: the mark, the layout, one colour, the other."""

    def another(options, *taken: str) -> str:
        return str(rng.choice([o for o in options if o not in taken]))

    first, second = original.colours
    taken = (first, second, original.mark_colour)
    return [
        replace(original, mark=another(MARKS, original.mark or "")),
        replace(original, layout=another(DESIGNS[1:], original.layout)),
        replace(original, colours=(another(ALL_COLOURS, *taken), second)),
        replace(original, colours=(first, another(ALL_COLOURS, *taken))),
    ]


def found_again(asked: Tensor, truth: Tensor, gallery: Tensor, owners: Tensor) -> float:
    """The share of rows of `asked` whose nearest row of the gallery belongs to whom it should; all rows of length 1."""
    return float((owners[(asked @ gallery.T).argmax(dim=1)] == truth).double().mean())


def identity_gate(folder: Path, vae) -> tuple[Figures, str]:
    """Fresh renders of the concepts; the nearest of all photographs and look-alikes must show the same concept.

    With the encoder as the scores load it. Beside the gate's figures stands a harder question, asked of nobody: with
    the photographs and renders that differ from the concept in one thing only (`near_misses`).
    """
    encoder = load_identity_encoder(folder)

    def features(pictures: np.ndarray) -> Tensor:
        return encoder.images([Image.fromarray(picture) for picture in pictures])

    rng = np.random.default_rng(2**20 + 2)

    def renders(designs: list[world.Design], each: int) -> np.ndarray:
        drawn = []
        for design in designs:
            for _ in range(each):
                place, number = str(rng.choice(list(PLACES))), int(rng.integers(2**31))
                scene = world.Scene("bear", design, world.random_pose(rng), place, "photo", number)
                drawn.append(world.draw(scene)[0])
        return np.stack(drawn)

    names, nobody, each = list(concepts.DESIGNS), -1, 12
    photos = features(photographs())
    owners = torch.tensor([names.index(name) for name in names for _ in concepts.PLACES[name]])
    others = features(renders(look_alikes(), 2))
    close = features(renders([near for design in concepts.DESIGNS.values() for near in near_misses(design, rng)], 3))
    queries = np.stack(
        [
            world.draw(concepts.scene(name, list(PLACES)[k % len(PLACES)], 100 + k))[0]
            for name in names
            for k in range(each)
        ]
    )
    truth = torch.arange(len(names)).repeat_interleave(each)
    same = truth[:, None] == owners[None]
    figures = {}
    for kind, shown in (("renders", queries), ("reconstructed renders", reconstructed(vae, queries))):
        asked = features(shown)
        for against, wrong in (("", others), (", one thing changed", close)):
            gallery, whose = torch.cat([photos, wrong]), torch.cat([owners, torch.full((len(wrong),), nobody)])
            figures[f"nearest is the same concept, {kind}{against}"] = found_again(asked, truth, gallery, whose)
        figures[f"mean similarity to the same concept, {kind}"] = float((asked @ photos.T)[same].mean())
        figures[f"mean similarity to look-alikes, {kind}"] = float((asked @ others.T).mean())
    measured = f"{len(queries)} renders, {len(photos)} photographs, {len(others)} renders of 50 look-alikes"
    return figures, f"{measured}, {len(close)} of 32 near misses"


def clip_gate(folder: Path) -> tuple[Figures, str]:
    import open_clip

    model = open_clip.create_model(f"local-dir:{folder}").eval()
    words = open_clip.get_tokenizer(f"local-dir:{folder}").tokenizer
    pictures, _, drawn = scenes(np.random.default_rng(2**20), 400, plain=1, photo=1, studio=0)
    found = clip.accuracy(model, words, drawn, pictures)
    return {f"zero-shot {a}": share for a, share in found.items()}, "400 fresh renders"


NEEDED: dict[str, dict[str, float]] = {
    "autoencoder": {"dB on fresh scenes": 28, "dB on the concepts": 28},
    "text": {"category": 0.99, "colour": 0.99, "place": 0.99, "style": 0.99},
    "unet": {"place: wins": 0.90, "category: wins": 0.85, "colour: wins": 0.80},
    "pictures": {"category named": 0.80, "place named": 0.90, "colour named": 0.75},
    "clip": {"zero-shot category": 0.90, "zero-shot place": 0.95},
    "identity": {
        "nearest is the same concept, renders": 0.95,
        "nearest is the same concept, reconstructed renders": 0.95,
    },
    "personalization": {"concepts whose 95 % interval lies above the base model": 8},
}
# gate -> what a person is to see, in how many pictures at least, of how many
SEEN = {
    "pictures": ("prompts whose thing and place are recognised by eye", 20, 24),
    "personalization": ("concepts that show their two colours and their mark on a new place, by eye", 6, 8),
}


ROUNDING = 1e-6  # 95 of 100 as a float32 is less than 0.95


def passed(gate: str, figures: Figures) -> bool:
    """Whether all that the gate needs is reached; what takes an eye is not, before somebody has looked."""
    enough = all(figures[name] >= least - ROUNDING for name, least in NEEDED[gate].items())
    if gate in SEEN:
        what, least, _ = SEEN[gate]
        return enough and figures.get(what, 0) >= least
    if gate == "autoencoder":
        lost = [
            figures[f"{a} read from originals"] - figures[f"{a} read from reconstructions"]
            for a in ("category", "colour")
        ]
        return enough and max(lost) <= 0.03 + ROUNDING
    return enough


GRID = [
    f"a photo of a {colour} {category} {PLACES[place]}".strip()
    for category, colour, place in (
        *zip(CATEGORIES, [*COLOURS] * 2, [p for p in PLACES if p] * 2, strict=False),
        ("dog", "white", "beach"),
        ("cat", "pink", "desert"),
        ("car", "red", "snow"),
        ("robot", "blue", "kitchen"),
        ("mug", "yellow", "night"),
        ("teapot", "green", "meadow"),
        ("clock", "purple", "city"),
        ("shoe", "black", ""),
    )
]


def tiled(pictures: np.ndarray, columns: int, scale: int = 2) -> Image.Image:
    """(N, h, w, 3) in rows; what is missing of the last row stays white."""
    missing = np.full((-len(pictures) % columns, *pictures.shape[1:]), 255, np.uint8)
    pictures = np.concatenate([pictures, missing])
    rows = [np.concatenate(list(pictures[n : n + columns]), 1) for n in range(0, len(pictures), columns)]
    grid = Image.fromarray(np.concatenate(rows))
    return grid.resize((grid.width * scale, grid.height * scale), Image.Resampling.NEAREST)


# -- the model card -------------------------------------------------------------------------------------------

# gate -> the weights that its figures are about
ABOUT = {
    "autoencoder": ("base/vae",),
    "text": ("base/text_encoder", "base/tokenizer"),
    "clip": ("clip",),
    "identity": ("identity", "base/vae"),
    "unet": ("base",),
    "pictures": ("base",),
    "personalization": ("base", "identity"),
}


def weights_of(gate: str, weights: Path) -> str:
    """A short name for the weights that a gate is about; another one as soon as a byte of them changes."""
    files = sorted(file for part in ABOUT[gate] for file in (weights / part).rglob("*") if file.is_file())
    return stamp_of({str(file.relative_to(weights)): sha256(file) for file in files})


def record_of(gate: str, figures: Figures, measured_on: str, weights: Path) -> dict:
    return {
        "passed": passed(gate, figures),
        "figures": {name: round(value, 5) for name, value in figures.items()},
        "measured on": measured_on,
        "date": time.strftime("%Y-%m-%d"),
        "weights": weights_of(gate, weights),
    }


def written_card(weights: Path) -> dict[str, dict]:
    """The card as the last run wrote it; empty before the first."""
    path = weights / CARD
    return json.loads(path.read_text()) if path.exists() else {"stages": {}, "gates": {}}


def still_true(weights: Path) -> dict[str, dict]:
    """What the card says of gates whose weights have not changed since."""
    gates = written_card(weights)["gates"]
    return {g: record for g, record in gates.items() if g in ABOUT and record.get("weights") == weights_of(g, weights)}


def card(work: Path, weights: Path, gates: dict[str, dict]) -> dict:
    stages = written_card(weights)["stages"]  # of checkpoints long gone, too
    for folder in sorted(work.iterdir()):
        if (folder / "checkpoint.safetensors").exists():
            progress = loop.read_progress(folder)
            stages[folder.name] = {
                "steps": progress.step,
                "samples seen": progress.samples,
                "minutes": round(progress.seconds / 60, 1),
                "device": progress.device,
            }
    return {
        "date": time.strftime("%Y-%m-%d"),
        "data": "scenes drawn by personalize_core.mini.world, 64 x 64 pixels; no photograph, no download",
        "machine": platform.machine(),
        "bytes": size_of(weights),
        "stages": stages,
        "gates": {gate: gates[gate] for gate in ABOUT if gate in gates},
        "prompts of the grid": GRID,
    }


def as_markdown(facts: dict) -> str:
    lines = [
        "# The embedded miniature",
        "",
        f"Written by the run on {facts['date']}. {facts['data'].capitalize()}.",
        "",
        f"All weights together: {facts['bytes']:,} bytes, fp16. Trained on {facts['machine']}.",
        "",
        "| stage | steps | samples seen | minutes | device |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, stage in facts["stages"].items():
        numbers = f"{stage['steps']:,} | {stage['samples seen']:,} | {stage['minutes']}"
        lines.append(f"| {name} | {numbers} | {stage['device']} |")
    lines += ["", "| gate | figure | measured | needed |", "| --- | --- | --- | --- |"]
    for name, gate in facts["gates"].items():
        for figure, value in gate["figures"].items():
            needed = {what: f"{least} of {all_}" for what, least, all_ in SEEN.values()}.get(figure, "")
            needed = NEEDED[name].get(figure, needed)
            lines.append(
                f"| {name} ({'passed' if gate['passed'] else 'not passed'}) | {figure} | {value:.4g} | {needed} |"
            )
    lines += ["", "What each gate was measured on:", ""]
    lines += [f"- {name}: {gate['measured on']} ({gate['date']})." for name, gate in facts["gates"].items()]
    missing = [gate for gate in ABOUT if gate not in facts["gates"]]
    if missing:
        lines.append(f"- {', '.join(missing)}: not measured on these weights.")
    lines += ["", "The autoencoder may also lose at most 3 points of category and of colour.", ""]
    for name, (what, *_) in SEEN.items():
        if name in facts["gates"] and what not in facts["gates"][name]["figures"]:
            lines += [f"Nobody has yet counted, for {name}: {what}.", ""]
    if "personalization" in facts["gates"]:
        lines += ["Each row two photographs of a concept, then DreamBooth's pictures of it on new places:", ""]
        lines += ["![eight concepts](personalization.png)", ""]
    if "pictures" in facts["gates"]:
        lines += ["![24 prompts](samples.png)", "", "Row by row:", ""]
        lines += [f"{n}. {prompt}" for n, prompt in enumerate(facts["prompts of the grid"], 1)]
    return "\n".join(lines).rstrip() + "\n"


@dataclass
class Judgement:
    """What the gates look at, loaded when the first of them asks."""

    work: Path
    weights: Path
    guidance: float = 6.0
    samples: int = 200

    @cached_property
    def model(self) -> StableDiffusionPipeline:
        return StableDiffusionPipeline.from_pretrained(
            self.weights / "base", torch_dtype=torch.float32, use_safetensors=True, local_files_only=True
        )

    @cached_property
    def judge(self) -> classifier.Network:
        folder = self.work / "classifier"
        if not (folder / "checkpoint.safetensors").exists():
            raise SystemExit(f"{folder} holds no classifier to judge with: train it first, stage 'classifier'")
        return averaged(classifier.Network(), folder)  # type: ignore[return-value]

    def autoencoder(self) -> tuple[Figures, str]:
        photos = photographs()
        pairs = np.concatenate([photos, reconstructed(self.model.vae, photos)], axis=1)
        tiled(pairs, 10).save(self.work / "reconstructions.png")
        return autoencoder_gate(self.model.vae, self.judge)

    def text(self) -> tuple[Figures, str]:
        return text_gate(self.model.text_encoder, self.model.tokenizer)

    def clip(self) -> tuple[Figures, str]:
        return clip_gate(self.weights / "clip")

    def identity(self) -> tuple[Figures, str]:
        return identity_gate(self.weights / "identity", self.model.vae)

    def unet(self) -> tuple[Figures, str]:
        return unet_gate(self.model)

    def pictures(self) -> tuple[Figures, str]:
        figures, measured_on, pictures = pictures_gate(self.model, self.judge, self.guidance, self.samples)
        tiled(pictures[:96], 16).save(self.work / "held_out.png")
        grid = sample(
            self.model.vae,
            self.model.tokenizer,
            self.model.text_encoder,
            self.model.unet,
            GRID,
            steps=40,
            guidance=self.guidance,
        )
        tiled(grid, 8).save(self.weights / "samples.png", optimize=True)
        return figures, f"{measured_on}; 25 steps, guidance {self.guidance}; the grid 40 steps"

    def personalization(self) -> tuple[Figures, str]:
        if self.weights.resolve() != WEIGHTS.resolve():
            raise SystemExit("gate 'personalization' runs the steps that users run, on the weights that ship alone")
        figures, measured_on, pictures = personalization.run(self.work / "personalization")
        tiled(pictures, 8).save(self.weights / "personalization.png", optimize=True)
        return figures, measured_on


def judged(judgement: Judgement, asked: list[str], seen: dict[str, int] | None = None) -> dict:
    """Measure the gates asked for, add what was seen by eye, and bring the card up to date after each."""
    gates = still_true(judgement.weights)
    facts = card(judgement.work, judgement.weights, gates)
    for name in asked:
        gate: Callable[[], tuple[Figures, str]] = getattr(judgement, name)
        figures, measured_on = gate()
        gates[name] = record_of(name, figures, measured_on, judgement.weights)
        print(f"{'passed    ' if gates[name]['passed'] else 'NOT passed'} {name}: ", end="")
        print(", ".join(f"{k} {v:.4g}" for k, v in figures.items()), f"({measured_on})", flush=True)
        facts = write_card(judgement, gates)
    for name, count in (seen or {}).items():
        if name not in gates:
            raise SystemExit(f"gate {name!r} has not been measured on these weights, so there is nothing to have seen")
        figures = gates[name]["figures"] | {SEEN[name][0]: count}
        gates[name] |= {"figures": figures, "passed": passed(name, figures)}
        facts = write_card(judgement, gates)
    return facts


def write_card(judgement: Judgement, gates: dict[str, dict]) -> dict:
    facts = card(judgement.work, judgement.weights, gates)
    (judgement.weights / CARD).write_text(json.dumps(facts, indent=2) + "\n")
    (judgement.weights / "MODEL_CARD.md").write_text(as_markdown(facts))
    return facts


def counted(text: str) -> tuple[str, int]:
    """GATE=COUNT."""
    gate, _, count = text.partition("=")
    if gate not in SEEN or not count.isdigit() or int(count) > SEEN[gate][2]:
        these = ", ".join(f"{name}=0 to {name}={all_}" for name, (_, _, all_) in SEEN.items())
        raise argparse.ArgumentTypeError(f"{text!r} is none of {these}")
    return gate, int(count)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m personalize_core.mini.gates", description=__doc__)
    parser.add_argument("gates", nargs="*", metavar="GATE", help=f"of {', '.join(ABOUT)}; all unless named")
    parser.add_argument("--seen", nargs="+", type=counted, default=[], metavar="GATE=COUNT", help="counted by eye")
    parser.add_argument("--work", type=Path, default=loop.WORK)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--guidance", type=float, default=6.0)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if unknown := set(options.gates) - set(ABOUT):
        parser.error(f"no gate is called {', '.join(sorted(unknown))}")
    torch.set_num_threads(options.threads)
    judgement = Judgement(options.work, options.weights, options.guidance, options.samples)
    judged(judgement, options.gates or ([] if options.seen else list(ABOUT)), dict(options.seen))


if __name__ == "__main__":
    main()
