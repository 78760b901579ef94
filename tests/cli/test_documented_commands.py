"""README and docs: the commands and options on them exist, and their links lead to a file and a heading."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from personalize_core.cli.main import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [
    path
    for folder in ("personalize_core", "pipelines", "benchmarks", "deploy", "tests", "data/protocols")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".py", ".yaml", ".html", ".j2"} or path.name == "Dockerfile"
] + [ROOT / name for name in ("Makefile", "dvc.yaml", "params.yaml", "dagster.yaml", "pyproject.toml")]
of_pages = pytest.mark.parametrize("page", PAGES, ids=[path.name for path in PAGES])


def code(page: Path) -> list[str]:
    """Every line of a block of code, and every span of code in the text."""
    text = page.read_text()
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.M | re.S)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    return [line for block in blocks for line in block.splitlines()] + spans


def commands(page: Path) -> list[list[str]]:
    """The arguments of each `personalize ...` of a page."""
    found = []
    for line in code(page):
        if call := re.match(r"(?:\.venv/bin/)?personalize (.*)", line.strip()):
            words = shlex.split(call[1], comments=True)
            found.append(words[: words.index("&&")] if "&&" in words else words)
    return found


def anchors(page: Path) -> set[str]:
    """What a link can name after '#', by GitHub's rule for headings."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), flags=re.M)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@of_pages
def test_every_command_on_a_page_exists_with_its_options(page):
    root = typer.main.get_command(app)
    for words in commands(page):
        command = root
        for word in words:
            if word.startswith("-"):
                known = {name for option in command.params for name in option.opts}
                assert word in known | {"--help"}, f"{page.name}: {words}"
            elif word in getattr(command, "commands", {}):
                command = command.commands[word]  # type: ignore[attr-defined]
        assert command is not root or {"COMMAND", "--help"} & set(words), f"{page.name}: {words}"


def test_the_pages_tell_of_every_command():
    told = {word for page in PAGES for words in commands(page) for word in words}
    known = set(typer.main.get_command(app).commands) - {"step"}  # type: ignore[attr-defined]
    assert known - told - {"train", "evaluate", "compare", "demo"} == set()


@of_pages
def test_every_link_on_a_page_leads_to_a_file_and_a_heading(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not link.startswith("https://"):
            name, _, anchor = link.partition("#")
            target = (page.parent / name) if name else page
            assert target.exists(), f"{page.name} links to {link}"
            assert not anchor or anchor in anchors(target), f"{page.name} links to {link}"


def test_every_page_that_the_sources_name_exists():
    for path in SOURCES:
        for name in re.findall(r"\bdocs/\w+\.md", path.read_text(errors="replace")):
            assert (ROOT / name).is_file(), f"{path.relative_to(ROOT)} names {name}"


def test_the_readme_links_to_every_page_and_is_read_in_ten_minutes():
    readme = (ROOT / "README.md").read_text()
    assert set(re.findall(r"\]\(docs/(\w+\.md)\)", readme)) == {page.name for page in PAGES[1:]}
    assert len(readme.splitlines()) <= 150


def test_the_readme_names_every_folder_of_the_core_and_no_other():
    readme = (ROOT / "README.md").read_text().partition("personalize_core/    ")[2].partition("pipelines/  ")[0]
    told = set(re.findall(r"^  (\w+)/", readme, flags=re.M))
    assert told == {path.parent.name for path in (ROOT / "personalize_core").glob("*/__init__.py")}
