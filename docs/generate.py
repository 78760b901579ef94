"""Write the tables of the pages from what they describe: `make docs`.

Those of methods in README.md and docs/methods.md come from the methods' recipes, that of layouts in
docs/score_other_images.md from the layouts, that in docs/encoders.md from the encoders that are known, and those in
docs/reading_peft_results.md from docs/peft_image_gen.csv.

A table stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->`; everything else on a page is written by hand.
tests/test_docs.py fails where a table is stale.
"""

from __future__ import annotations

import csv
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from personalize_core.base_model.loading import load_base_model
from personalize_core.concepts.concept import Concept
from personalize_core.external.layouts import LAYOUTS
from personalize_core.files.typed_yaml import keys_of
from personalize_core.methods import RECIPES, method_class
from personalize_core.methods.interface import Method
from personalize_core.methods.recipe import Recipe
from personalize_core.methods.shared.options import LAG
from personalize_core.metrics.encoder_names import PUBLISHED, PUBLISHED_OF
from personalize_core.sampling.interpolation import learns_a_word_alone

ROOT = Path(__file__).parent.parent
README, PAGE = ROOT / "README.md", ROOT / "docs" / "methods.md"
OTHER_IMAGES, PEFT = ROOT / "docs" / "score_other_images.md", ROOT / "docs" / "reading_peft_results.md"
ENCODERS = ROOT / "docs" / "encoders.md"
PAGES = (README, PAGE, OTHER_IMAGES, PEFT, ENCODERS)
PEFT_RESULTS = ROOT / "docs" / "peft_image_gen.csv"
PEFT_FILES = "https://github.com/huggingface/peft/blob/{commit}/method_comparison/image-gen/results/{experiment}.json"
LATE = ("valid_400", "valid_500", "valid_600", "valid_700")
_TABLE = re.compile(r"(<!-- (\w+):begin -->\n).*?(<!-- \2:end -->)", re.S)


def written(page: Path) -> str:
    """The page's text with every generated table as the recipes have it now."""
    text = page.read_text()
    return _TABLE.sub(lambda found: f"{found[1]}{TABLES[found[2]](text)}\n{found[3]}", text)


def in_readme(text: str) -> str:
    rows = [
        [_link(recipe, "docs/methods.md"), recipe.learns, f"[{name}](personalize_core/methods/{name})", _paper(recipe)]
        for name, recipe in RECIPES.items()
    ]
    return _table(["method", "what it learns", "source", "paper"], rows)


def made(method: str) -> Method:
    """By its published recipe, for the miniature."""
    kind: Any = method_class(method)
    return kind(kind.Config(), load_base_model("mini", device="cpu"), Concept("v", "<v>", "dog"))


def overview(text: str) -> str:
    """The counts are those of each method's section, which tests/test_docs.py checks at true shapes."""
    rows = []
    for name, recipe in RECIPES.items():
        config, stages = recipe(), made(name).stages()
        section = text.partition(f"`{name}`, [{name}](")[2]
        (count,) = re.findall(r"^Parameters: (\S+) at SD 1\.4", section, flags=re.M)[:1]
        rates = dict.fromkeys(group["lr"] for stage in stages for group in stage.param_groups)
        year = recipe.venue or (f"arXiv 20{recipe.arxiv[:2]}" if recipe.arxiv else "")
        rows.append(
            [
                _link(recipe),
                ", ".join(part for part in (year, _paper(recipe)) if part),
                recipe.learns,
                count,
                ", ".join(f"{stage.steps:,} x {stage.batch_size}" for stage in stages),
                ", ".join(_number(rate) for rate in rates),
                str(config.class_images_needed),
                f"[{name}](../personalize_core/methods/{name})",
            ]
        )
    heads = ["method", "paper", "what is trained", "parameters", "steps x batch", "learning rate", "class images"]
    return _table([*heads, "folder"], rows)


def strategies(text: str) -> str:
    """Which ways of sampling apply to which methods, by their published recipes."""
    published = {name: recipe() for name, recipe in RECIPES.items()}
    confinable = [config for config in published.values() if issubclass(config.Sampling, LAG)]
    rows = [
        ["LAG", _names(confinable), "the sampling options `lag` and `lag_unconditional`"],
        [
            "test-time optimization (TTO)",
            _names(config for config in published.values() if config.text_embeddings == 1),
            "`test_time_optimization`, which stands beside a method's own sampling options",
        ],
        [
            "personalization guidance, consistency guidance",
            _names(config for config in published.values() if config.samples_by_weights),
            "`personalization_guidance` or `consistency_guidance`, which stand there too, without LAG",
        ],
        [
            "several concepts in one image",
            _names(config for config in confinable if not config.text_embeddings),
            "`personalize compose`",
        ],
        [
            "words between two concepts",
            _names(recipe() for name, recipe in RECIPES.items() if learns_a_word_alone(name)),
            "`personalize interpolate`",
        ],
    ]
    for config in published.values():
        fields: Any = config.Sampling
        for option in [key for key in keys_of(fields) if key not in keys_of(LAG)]:
            rows.append([f"`{option}`", config.display_name, fields.__pydantic_fields__[option].description])
    return _table(["strategy", "methods", "how"], rows)


def layouts(text: str) -> str:
    rows = [
        [f"`{layout.NAME}`", layout.MEANING, "; ".join(f"`{name}`: {words}" for name, words in layout.OPTIONS.items())]
        for layout in LAYOUTS.values()
    ]
    return _table(["layout", "what the folder holds", "options"], rows)


def peft_results(text: str) -> str:
    """Every experiment, the highest test score first."""
    rows = [
        [
            f"[{row['experiment']}]({PEFT_FILES.format(**row)})",
            f"{int(row['parameters']):,}",
            row["test"],
            row["drift"] or "NaN",
            ", ".join(row[step] for step in LATE) if row[LATE[-1]] else "trained 300 steps",
            f"{float(row['train_seconds']) / 60:.0f}",
            f"{int(row['peak_bytes']) / 2**30:.1f}",
        ]
        for row in _published()
    ]
    heads = ["experiment", "parameters", "test", "drift", "validation at steps 400, 500, 600, 700"]
    return _table([*heads, "train_time, minutes", "most memory, GiB"], rows)


def peft_facts(text: str) -> str:
    """What the table of experiments shows."""
    top = _published()[:20]
    late = [[float(row[step]) for step in LATE] for row in top]
    ranges = sorted(max(scores) - min(scores) for scores in late)
    changes = [abs(after - before) for scores in late for before, after in zip(scores, scores[1:], strict=False)]
    tests = [float(row["test"]) for row in top]
    before, after = ([scores[place] for scores in late] for place in (2, 3))
    facts = {
        "test score, from the highest to the 10th": f"{tests[0]:.3f} to {tests[9]:.3f}",
        "test score, from the highest to the 20th": f"{tests[0]:.3f} to {tests[19]:.3f}",
        "range of one run's last four validation scores": f"{ranges[0]:.3f} to {ranges[-1]:.3f}, median "
        f"{statistics.median(ranges):.3f}",
        "change of the validation score in 100 steps": f"median {statistics.median(changes):.3f}",
        "rank correlation of the validation scores at steps 600 and 700": _rank_correlation(before, after),
        "rank correlation of the validation score at step 700 and the test score": _rank_correlation(after, tests),
    }
    return _table(["of the 20 experiments with the highest test scores", "value"], map(list, facts.items()))


def encoders(text: str) -> str:
    """Every published encoder and segmenter, by what it is for."""
    purposes = {"text_image": "CLIP-T, CLIP-I", "identity": "DINO", "segmenter": "masks", "masc": "MaSC"}
    rows = [
        [
            f"`{name}`",
            purposes[kind],
            f"[{found.repository}](https://huggingface.co/{found.repository})",
            f"`{found.revision[:12]}`",
            f"{found.licence}{', gated' if found.gated else ''}",
        ]
        for kind, names in PUBLISHED_OF.items()
        for name in names
        for found in [PUBLISHED[name]]
    ]
    return _table(["name", "for", "weights", "revision", "licence"], rows)


TABLES: dict[str, Callable[[str], str]] = {
    "methods": in_readme,
    "overview": overview,
    "strategies": strategies,
    "encoders": encoders,
    "layouts": layouts,
    "peft_results": peft_results,
    "peft_facts": peft_facts,
}


def _published() -> list[dict[str, str]]:
    """PEFT's experiments, the highest test score first; of one that was run twice, the later run."""
    with PEFT_RESULTS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    latest = {row["experiment"]: row for row in reversed(rows)}  # the file has the later run first
    return sorted(latest.values(), key=lambda row: -float(row["test"]))


def _rank_correlation(one: Sequence[float], other: Sequence[float]) -> str:
    found: Any = spearmanr(one, other)
    return f"{found.statistic:.2f}"


def _names(recipes: Iterable[Recipe]) -> str:
    return ", ".join(recipe.display_name for recipe in recipes)


def _link(recipe: type[Recipe], page: str = "") -> str:
    """To the method's section, whose heading is its display name."""
    heading = re.sub(r"[^\w -]", "", recipe.display_name).lower().replace(" ", "-")
    return f"[{recipe.display_name}]({page}#{heading})"


def _paper(recipe: type[Recipe]) -> str:
    return f"[{recipe.arxiv}](https://arxiv.org/abs/{recipe.arxiv})" if recipe.arxiv else ""


def _number(rate: float) -> str:
    return re.sub(r"\.?0*e-0*", "e-", f"{rate:e}")


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(written(page))
