"""docs/methods.md says what the code does: names, files, defaults, recipes and counts."""

from __future__ import annotations

import dataclasses
import json
import re
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

import pytest
import yaml
from pydantic import TypeAdapter

from personalize_core.base_model.loading import load_base_model
from personalize_core.base_model.model import BaseModel
from personalize_core.concepts.concept import Concept
from personalize_core.methods import ABLATION_NAMES, MARK, METHOD_NAMES, PRESETS, method_class, recipe_class
from personalize_core.methods.interface import Method, count
from personalize_core.methods.recipe import Recipe
from tests.base_model.test_true_shapes import expected, full, learned, name  # noqa: F401  two of them are fixtures
from tests.conftest import tiny_base

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "methods.md"
generate: Any = SimpleNamespace(**runpy.run_path(str(ROOT / "docs" / "generate.py")))
TEXT = PAGE.read_text()
of_methods = pytest.mark.parametrize("method", METHOD_NAMES)


def sections() -> dict[str, str]:
    """Method -> its section: those that name a method, in backticks, in the line behind the heading."""
    parts = re.split(r"^## .*\n\n", TEXT, flags=re.M)[1:]
    return {found[1]: part for part in parts if (found := re.match(r"`(\w+)`, \[\1\]\(", part))}


def rows(text: str) -> list[list[str]]:
    """The cells of every row of the tables in a text, without headings."""
    lines = re.findall(r"(?<=^\|).*(?=\|$)", text, flags=re.M)
    cells = [[cell.strip() for cell in line.split("|")] for line in lines]
    return [
        row
        for place, row in enumerate(cells)
        if row[0] != "---" and cells[place + 1 : place + 2] != [["---"] * len(row)]
    ]


def overview() -> dict[str, list[str]]:
    """Method -> its row in the first table."""
    return {found[1]: row for row in rows(TEXT) if (found := re.match(r"\[(\w+)\]", row[-1]))}


def metrics(text: str) -> list[int]:
    return [int(said.replace(",", "")) for said in re.findall(r"\d[\d,]*", text)]


def counts(section: str) -> list[int]:
    """What it says that the method learns at SD 1.4, at SD 2.1 and on the miniature."""
    (said,) = re.findall(
        r"^Parameters: (\S+) at SD 1\.4, (\S+) at SD 2\.1, (\S+) on the miniature\.$", section, flags=re.M
    )
    return [number for part in said for number in metrics(part)]


def recipe(section: str) -> dict[str, str]:
    """Switch -> its default as the section's table has it; a row may hold several."""
    found: list[tuple[str, str]] = []
    for switches, defaults, _ in rows(section):
        found += zip(re.findall(r"`(\w+)`", switches), defaults.split(", "), strict=True)
    assert len(dict(found)) == len(found), "a switch stands there twice"
    return dict(found)


def as_value(said: str) -> Any:
    """A default as people write it: numbers, true, false and null, else a word."""
    try:
        return json.loads(said)
    except ValueError:
        return said


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return tiny_base()


def test_every_method_has_a_section_and_a_row_and_no_other_has():
    assert set(sections()) == set(overview()) == set(METHOD_NAMES)


def test_every_method_stands_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    assert set(re.findall(r"\(personalize_core/methods/(\w+)\)", readme)) == set(METHOD_NAMES)
    assert "(docs/methods.md)" in readme


@pytest.mark.parametrize("page", generate.PAGES, ids=lambda page: page.name)
def test_generated_tables_are_what_the_recipes_say(page):
    assert page.read_text() == generate.written(page), f"{page.name} is stale: run `make docs`"
    tables = {"README.md": 1, "methods.md": 2, "score_other_images.md": 1, "reading_peft_results.md": 2}
    tables["encoders.md"] = 1
    assert len(re.findall(r"<!-- \w+:begin -->", page.read_text())) == tables[page.name]


@of_methods
def test_a_section_lists_all_ablations_of_its_method_and_those_alone(method):
    listed = set(re.findall(rf"`(\w+{MARK}[\w.]+)`", sections()[method]))
    assert listed == {f"{method}{MARK}{ablation}" for ablation in recipe_class(method).ablations}


def test_every_ablation_on_the_page_exists():
    own = {each for each in ABLATION_NAMES if each.partition(MARK)[2] not in PRESETS}
    assert set(re.findall(rf"\b[a-z_]+{MARK}[\w.]*\w", TEXT)) == own


def test_every_file_that_the_page_links_to_exists():
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    files = [link for link in links if not link.startswith("https://")]
    assert len(files) > 30 and [link for link in files if not (PAGE.parent / link).exists()] == []


def test_every_link_within_the_page_has_its_heading():
    headings = {
        re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-")
        for heading in re.findall(r"^## (.*)", TEXT, flags=re.M)
    }
    assert set(re.findall(r"\]\(#([^)]*)\)", TEXT)) <= headings


@of_methods
def test_a_section_of_a_method_of_the_miniature_shows_its_own_image(method):
    """And no other shows any: one that the miniature has no weights for would show noise."""
    on_the_miniature = method in yaml.safe_load((ROOT / "params.yaml").read_text())["methods"] or method == "peft"
    shown = re.findall(r"^!\[.+\]\((.*)\)$", sections()[method], flags=re.M)
    assert shown == ([f"images/{method}.png"] if on_the_miniature else [])


@of_methods
def test_a_recipe_table_has_every_switch_of_the_config_with_its_default(method):
    config: Any = recipe_class(method)()
    shared = {field.name for field in dataclasses.fields(Recipe)}  # docs/watching_training.md
    real = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.name not in shared}
    real = {switch: ", ".join(value) if isinstance(value, tuple) else value for switch, value in real.items()}
    assert {switch: as_value(said) for switch, said in recipe(sections()[method]).items()} == real


@of_methods
def test_what_a_section_tells_to_write_is_a_switch_with_a_value_that_it_takes(method):
    """`rotate: false` and the like, of Config or Sampling."""
    kind: Any = method_class(method)
    hints = get_type_hints(kind.Config, include_extras=True) | get_type_hints(kind.Config.Sampling, include_extras=True)
    for switch, value in re.findall(r"`(\w+): ([^`]+)`", sections()[method]):
        assert switch in hints
        TypeAdapter(hints[switch]).validate_python(as_value(value))


@of_methods
def test_sampling_options_are_named_in_the_section_or_in_the_table_of_strategies(method):
    kind: Any = method_class(method)
    options = {field.name for field in dataclasses.fields(kind.Config.Sampling)}
    shared = TEXT.partition("| strategy |")[2].partition("\n\n")[0]
    assert options <= set(re.findall(r"`(\w+)(?:: \w+)?`", shared + sections()[method]))


@of_methods
def test_the_overview_has_the_steps_rates_and_class_images_of_the_recipe(method, base):
    kind: Any = method_class(method)
    *_, parameters, length, rates, class_images, _ = overview()[method]
    stages = kind(kind.Config(), base, Concept("v", "<v>", "dog")).stages()
    assert length == ", ".join(f"{stage.steps:,} x {stage.batch_size}" for stage in stages)
    of_groups = dict.fromkeys(group["lr"] for stage in stages for group in stage.param_groups)
    assert [float(rate) for rate in rates.split(", ") if rate] == list(of_groups)
    assert int(class_images) == kind.Config().class_images_needed
    assert metrics(parameters) == counts(sections()[method])[:1]


@of_methods
def test_the_counts_at_published_shapes_are_right(method, full, name):  # noqa: F811
    assert learned(full, method) == expected(name, *counts(sections()[method])[:2])


def test_the_counts_on_the_miniature_are_right():
    base, concept = load_base_model("mini", device="cpu"), Concept("v", "<v>", "dog")
    kinds: dict[str, Any] = {method: method_class(method) for method in METHOD_NAMES}
    real = {method: count(kind(kind.Config(), base, concept)) for method, kind in kinds.items()}
    assert {method: counts(section)[2] for method, section in sections().items()} == real


@of_methods
def test_where_export_is_refused_the_section_says_so(method):
    """Those that leave `export` as the interface has it, which refuses."""
    refuses = method_class(method).export is Method.export
    says = "**Export:** refused" in sections()[method] or method == "base_model"
    assert refuses == says


@of_methods
def test_the_citation_of_the_page_is_the_recipes(method):
    cited = re.findall(r"\[(\d{4}\.\d{5})\]\(https://arxiv\.org/abs/\1\)", overview()[method][1])
    assert cited == [number for number in [recipe_class(method).arxiv] if number]
