"""Write the tables of methods in README.md and docs/methods.md from the methods' recipes: `make docs`.

A table stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->`; everything else on a page is written by hand.
tests/test_docs.py fails where a table is stale.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from personalize_core.base_model.loading import load_base_model
from personalize_core.concepts.concept import Concept
from personalize_core.files.typed_yaml import keys_of
from personalize_core.methods import RECIPES, method_class
from personalize_core.methods.recipe import Recipe
from personalize_core.methods.shared.options import LAG

ROOT = Path(__file__).parent.parent
README, PAGE = ROOT / "README.md", ROOT / "docs" / "methods.md"
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


def overview(text: str) -> str:
    """The counts are those of each method's section, which tests/test_docs.py checks at true shapes."""
    base, concept = load_base_model("mini", device="cpu"), Concept("v", "<v>", "dog")
    rows = []
    for name, recipe in RECIPES.items():
        kind: Any = method_class(name)
        config = recipe()
        stages = kind(config, base, concept).stages()
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
            "several concepts in one image",
            _names(config for config in confinable if not config.text_embeddings),
            "`personalize compose`",
        ],
    ]
    for config in published.values():
        fields: Any = config.Sampling
        for option in [key for key in keys_of(fields) if key not in keys_of(LAG)]:
            rows.append([f"`{option}`", config.display_name, fields.__pydantic_fields__[option].description])
    return _table(["strategy", "methods", "how"], rows)


TABLES: dict[str, Callable[[str], str]] = {
    "methods": in_readme,
    "overview": overview,
    "strategies": strategies,
}


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
    for page in (README, PAGE):
        page.write_text(written(page))
