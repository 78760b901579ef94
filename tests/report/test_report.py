"""The report's folder: what stands in it, the same bytes for the same inputs, and what stops it."""

from __future__ import annotations

import base64
import csv
import io
import re
import shutil
from pathlib import Path

import polars as pl
import pytest
from PIL import Image

from personalize_core import steps
from personalize_core.errors import InputError
from personalize_core.metrics import tables as scores
from personalize_core.metrics.parquet import meanings_in
from personalize_core.report import comparison_in_words, embedded_images, inline_figures, page, tables, verdicts
from personalize_core.report import evidence as read_evidence
from personalize_core.workspace.store import REFERENCES, SCORES, Store
from tests.report import workspace


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Store:
    """Compared and told of, with analyses of one method on one concept."""
    store = workspace.make(tmp_path_factory.mktemp("report") / "workspace")
    workspace.analysed(store, "textual_inversion", "rex")
    steps.compare(store)
    steps.report(store)
    return store


@pytest.fixture
def store(made: Store, tmp_path: Path) -> Store:
    """A copy that a test may spoil."""
    shutil.copytree(made.root, tmp_path / "copy")
    return Store(tmp_path / "copy")


@pytest.fixture(scope="module")
def html(made: Store) -> str:
    return (made.report() / page.PAGE).read_text()


@pytest.fixture(scope="module")
def evidence(made: Store) -> read_evidence.Evidence:
    return read_evidence.read(made)


def bytes_under(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_inputs_give_the_same_bytes_wherever_they_lie(made, store):
    shutil.rmtree(store.report())
    assert not steps.report(store).skipped
    assert bytes_under(store.report()) == bytes_under(made.report())
    assert steps.report(store).skipped


def test_what_a_page_shows_makes_it_anew(store):
    assert steps.report(store).skipped
    workspace.analysed(store, "dreambooth", "cup")
    assert not steps.report(store).skipped
    assert (store.report() / page.PAGE).read_text().count("How far the embedding moved") == 2


def test_nothing_in_the_page_leads_outside(html):
    leads = re.findall(r"""(?:src|href|action|poster|srcset)=["']?([^"'\s>]*)""", html)
    assert leads
    assert not [lead for lead in leads if not re.match(r"data:|#|(tables|figures)/[\w.-]+$", lead)]
    assert "url(" not in re.sub(r"url\(#[\w-]+\)", "", html) and "@import" not in html


def test_every_link_to_a_file_finds_it(made, html):
    links = set(re.findall(r'href="((?:tables|figures)/[^"]+)"', html))
    there = {name for name in bytes_under(made.report()) if "/" in name}
    assert links <= there
    assert {name for name in there - links if not name.endswith("published.tex")} == set()


def test_prompts_of_the_users_own_cannot_break_the_page(html):
    assert "<b >dog</b >" not in html and "&lt;b &gt;dog&lt;/b &gt; in the snow &amp; ice" in html


def test_the_verdict_stands_on_top_and_the_warning_about_the_miniature_with_it(html):
    top = html.index('id="plane"')
    assert html.index("Which keeps the concept best?") < html.index("Which follows the prompt best?") < top
    assert html.index('<p class="answer">DreamBooth</p>') < top
    assert html.index("no evidence about Stable Diffusion") < top


def test_a_reviewer_finds_the_contract_and_what_is_missing(html):
    measured = html[html.index('id="measured"') :]
    for words in ("mini-identity", "d" * 12, "shorter side to 64, bicubic", "sampler ddim", "guidance 3.0", "seed 5",
                  "rex (3)", "Tukey", "bootstrap", "48 images, 16 of each variant"):  # fmt: skip
        assert words in measured, words
    missing = html[html.index('id="missing"') :]
    assert "There are no scores of cup and rex by OFT." in missing
    assert "Costs not recorded" in missing and "noise of training" in missing
    assert "heat maps" not in missing, "somebody made some"


def test_what_nobody_made_is_no_section(made, html):
    method = {name: html[html.index(f'id="method-{name}"') :] for name in ("dreambooth", "textual_inversion")}
    dreambooth = method["dreambooth"][: method["dreambooth"].index('id="method-textual_inversion"')]
    assert "Heat maps" not in dreambooth and "How far" not in dreambooth and "losses_dreambooth.svg" in dreambooth
    inversion = method["textual_inversion"]
    for words in (
        "Heat maps",
        "a photo of &lt;rex&gt;",
        "How far the embedding moved",
        "The cosine while it learned",
        "no embedding is learned.",
    ):
        assert words in inversion


def test_a_recipe_names_the_published_value_where_another_was_used(evidence):
    rows = {row["option"]: row for row in tables.recipes(evidence).frame.filter(method="dreambooth").to_dicts()}
    assert (rows["steps"]["value"], rows["steps"]["published"]) == ("40", "800")


@pytest.mark.parametrize(
    ("interval", "said"), [((0.01, 0.07), ""), ((-0.01, 0.07), "contains 0"), ((-0.2, -0.1), "rose")]
)
def test_a_loss_is_said_to_have_fallen_no_more_surely_than_its_interval_says(interval, said):
    words = page._fell({"before": 0.2, "after": 0.15, "fell_by": sum(interval) / 2, "interval_95": list(interval)})
    assert [one for one in ("contains 0", "rose") if one in words] == ([said] if said else [])


# Tables


def test_every_table_is_the_same_in_parquet_and_csv_and_names_its_columns(made):
    folder = made.report() / page.TABLES
    names = {path.stem for path in folder.iterdir()}
    assert names >= {"overview", "verdicts", "by_concept", "by_prompt", "contract", "published", "recipes"}
    for name in names:
        parquet = pl.read_parquet(folder / f"{name}.parquet")
        from_csv = pl.read_csv(folder / f"{name}.csv", schema=parquet.schema)
        assert parquet.equals(from_csv), name
        assert set(meanings_in(folder / f"{name}.parquet")) == set(parquet.columns), name
        assert all(not parquet[c].is_nan().any() for c in parquet.columns if parquet[c].dtype.is_float()), name


def test_a_spreadsheet_takes_no_text_for_a_formula(tmp_path):
    texts = ["=cmd|'/c calc'!A0 {}", "+{}", "-{}", "@SUM({})", "\t={}", "-1.5", "a {} = b", "a {}"]
    frame = pl.DataFrame({"prompt": texts, "mean": [-1.0] * len(texts)})
    tables.Table("t", "T", frame, {"prompt": "p", "mean": "m"}, [["prompt"], *([text] for text in texts)]).write(
        tmp_path
    )
    assert pl.read_parquet(tmp_path / "t.parquet").equals(frame)
    with (tmp_path / "t.csv").open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert [row["prompt"] for row in rows] == [*(f"'{text}" for text in texts[:5]), *texts[5:]]
    assert {row["mean"] for row in rows} == {"-1.0"}


def test_latex_has_every_row_and_escapes_what_latex_reads(made, evidence):
    latex = (made.report() / page.TABLES / "recipes.tex").read_text()
    assert r"batch\_size" in latex and "batch_size" not in latex
    assert latex.count(r"\\") == len(tables.recipes(evidence).shown)


def test_the_overview_holds_the_summarys_numbers(made, evidence):
    overview = tables.overview(evidence).frame
    for row in evidence.summary.filter(concept="all concepts").iter_rows(named=True):
        if row["metric"] in evidence.metrics:
            mine = overview.filter(variant=row["variant"]).row(0, named=True)
            assert [mine[f"{row['metric']}_{n}"] for n in ("mean", "low", "high")] == [
                row[n] for n in ("mean", "low", "high")
            ]


def test_the_means_of_prompts_are_those_of_the_scores(evidence):
    found = tables.by_prompt(evidence).frame.filter(
        prompt=workspace.PROMPTS[2], variant="dreambooth", metric="dino"
    ).row(0, named=True)  # fmt: skip
    rows = [
        row["score"]
        for row in evidence.scores.iter_rows(named=True)
        if (row["prompt"], row["variant"], row["metric"]) == (workspace.PROMPTS[2], "dreambooth", "dino")
    ]
    assert found["mean"] == pytest.approx(sum(rows) / len(rows)) and found["images"] == len(rows) == 4


@pytest.mark.parametrize(
    ("cost", "value", "said"),
    [
        ("parameters", 8765028.0, "8,765,028"),
        ("artifact_bytes", 35149064.0, "35.1 MB"),
        ("artifact_bytes", 16.0, "16 bytes"),
        ("training_seconds", 61.4, "61 s"),
        ("seconds_per_image", 0.514, "0.51 s"),
        ("training_memory_bytes", None, "not recorded"),
    ],
)
def test_costs_have_units_and_what_was_not_recorded_is_no_zero(cost, value, said):
    assert tables.for_people(cost, value) == said


def test_costs_are_a_table_of_their_own_that_scores_leave_room_for(evidence):
    made, scores = tables.cost(evidence), tables.overview(evidence)
    assert made.shown[0] == ["Variant", "Trained parameters", "Artifact"]  # nothing else was recorded here
    assert made.shown[1][:2] == ["base model", "12,345"] and made.frame["parameters"].to_list() == [12345.0] * 3
    assert "Artifact" not in scores.shown[0] and scores.frame["parameters"].drop_nulls().to_list() == [12345.0] * 3


# Figures


def test_a_figure_in_the_page_has_the_pages_colours_ids_of_its_own_and_words_for_those_who_do_not_see_it(html):
    svgs = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    ids = [name for svg in svgs for name in re.findall(r'\bid="([^"]+)"', svg)]
    assert len(svgs) >= 4 and len(ids) == len(set(ids))
    for svg in svgs:
        assert re.search(r'role="img" aria-label="[^"]{20,}"', svg)
        assert not [colour for colour in inline_figures.THEMED if colour in svg]
        assert {name[1:] for name in re.findall(r'href="(#[^"]+)"', svg)} <= set(re.findall(r'\bid="([^"]+)"', svg))


def test_a_long_log_is_thinned_and_keeps_its_ends():
    log = [{"stage": "a" if step < 900 else "b", "step": step, "diffusion": 1.0} for step in range(2000)]
    kept = [(list(xs), set(values)) for xs, values in inline_figures._lines(log, "diffusion")]
    assert [(xs[0], xs[-1], values) for xs, values in kept] == [(0, 899, {1.0}), (900, 1999, {1.0})]
    assert sum(len(xs) for xs, _ in kept) == inline_figures.MOST_POINTS
    assert inline_figures._stages(log) == [(0, "a"), (900, "b")]


def test_losses_are_averaged_within_a_stage_and_those_on_fixed_inputs_not_at_all(monkeypatch):
    drawn: list = []
    monkeypatch.setattr(inline_figures, "rendered", lambda figure, *_: drawn.append(figure))
    levels = {"a": 1.0, "b": 5.0}
    log = [{"stage": name, "step": i, "diffusion": level} for name, level in levels.items() for i in range(40)]
    log[39]["fixed_inputs"] = (
        3.0  # as the log has what was taken behind a step, but not what was taken before the first
    )
    taken = [("a", 0, [4.0, 5.0]), ("a", 40, [1.0, 2.0]), ("b", 0, [6.0, 0.5]), ("b", 20, [2.0, 0.0])]
    values = [(stage, step, value) for stage, step, rows in taken for value in rows]
    probes = pl.DataFrame(values, schema=["stage", "step", "value"], orient="row").with_columns(metric=pl.lit("loss"))
    inline_figures._losses("oft", [read_evidence.Learned("rex", {}, log, None, probes=probes)])
    diffusion, fixed = ([line for line in axes.lines if len(line.get_xdata()) > 1] for axes in drawn[0].axes)
    assert [set(line.get_ydata()) for line in diffusion if len(line.get_xdata()) > 2] == [{1.0}, {5.0}]
    shown = [list(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in fixed]
    assert shown[:2] == [[(0, 9.0), (40, 3.0)], [(40, 6.5), (60, 2.0)]]


# Images


def test_columns_share_prompt_and_noise_and_every_pixel_of_a_small_image_is_kept(made, evidence):
    shown, left_out = embedded_images.grids(evidence)
    assert left_out == "" and [grid.concept.name for grid in shown] == ["cup", "rex"]
    grid = shown[1]
    assert list(grid.rows) == ["base_model", "dreambooth", "textual_inversion"]
    for variant, cells in grid.rows.items():
        for column, cell in zip(grid.columns, cells, strict=True):
            assert cell
            path = made.grid(variant, "rex") / variant / f"{column.prompt_index:02d}_{column.image_index:02d}.png"
            assert decoded(cell.uri).tobytes() == Image.open(path).convert("RGB").tobytes()
            assert column.prompt in cell.caption and f"noise {column.image_index + 1}" in cell.caption


def decoded(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB")


@pytest.mark.parametrize(
    ("pixels", "said", "concepts", "columns"),
    [(30_000, "", 2, 8), (14_000, "first 1 of 2 images", 2, 4), (7_000, "first 1 of 2 concepts", 1, 4)],
)
def test_of_too_many_images_fewer_are_shown_and_the_page_says_so(evidence, pixels, said, concepts, columns):
    shown, left_out = embedded_images.grids(evidence, pixels)
    assert said in left_out and (len(shown), len(shown[0].columns)) == (concepts, columns)
    assert ("The scores are of all." in left_out) == bool(said)


# What stops it


def test_nothing_compared_is_said(store):
    shutil.rmtree(store.comparison())
    with pytest.raises(InputError, match="nothing has been compared"):
        steps.report(store)


@pytest.mark.parametrize("spoil", ["gone", "other"])
def test_a_image_that_is_gone_or_another_stops_the_report_and_leaves_the_old_one(store, spoil):
    path = store.grid("dreambooth", "rex") / "dreambooth" / "01_00.png"
    if spoil == "gone":
        path.unlink()
    else:
        Image.new("RGB", (24, 24)).save(path)
    manifest = store.report() / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"stamp"', '"was"'))  # out of date
    before = bytes_under(store.report())
    with pytest.raises(InputError, match="(are gone: .*01_00.png|01_00.png has changed since it was scored); run"):
        steps.report(store)
    assert bytes_under(store.report()) == before


def test_a_single_variant_is_told_of_without_a_comparison(tmp_path):
    store = workspace.make(tmp_path / "alone", {"dreambooth": (0.5, 0.3)})
    steps.compare(store)
    html = steps.report(store).path.read_text()
    assert "There is only one variant." in html and "there is no baseline" in html


# Where variants were not all scored on the same concepts


@pytest.fixture(scope="module")
def gap(tmp_path_factory) -> Store:
    """DreamBooth, surely the best, was scored on one of the two concepts alone."""
    store = workspace.make(tmp_path_factory.mktemp("gap") / "workspace")
    shutil.rmtree(store.scores("dreambooth", "cup"))
    steps.compare(store)
    steps.report(store)
    return store


def test_every_row_says_over_how_many_concepts_it_is(gap, evidence):
    told = read_evidence.read(gap)
    made = tables.every(told)
    for name in ("overview", "over_the_baseline", "every_measure", "by_prompt"):
        heading, *rows = made[name].shown
        of = {(row[heading.index("Variant")], row[heading.index("Concepts")]) for row in rows}
        lacking = {words for words, count in of if count == "1"}
        assert lacking == {"DreamBooth"} and ("Textual Inversion", "2") in of, name
    assert dict(made["overview"].frame.select("variant", "concepts").iter_rows())["dreambooth"] == 1
    assert not any("Concepts" in table.shown[0] for name, table in tables.every(evidence).items()), "none has gaps"


def test_any_two_are_compared_on_the_concepts_that_both_have_and_the_words_say_so(gap):
    heading, *rows = tables.every(read_evidence.read(gap))["verdicts"].shown
    for row in rows:
        assert row[heading.index("Concepts that both have")] == ("1" if "DreamBooth" in row else "2")
    html = (gap.report() / page.PAGE).read_text()
    verdict = html[html.index('id="verdict"') : html.index('id="plane"')]
    assert "on the 1 concepts that both have" not in verdict and "on the one concept that both have." in verdict
    assert "scored on all 2 concepts (DreamBooth on 1)" in verdict and "of 1 to 2 concepts" in verdict


def test_the_difference_of_two_is_that_on_what_both_have(gap):
    told = read_evidence.read(gap)
    scores = told.scores.filter(metric="dino", concept="rex")
    one, other = (scores.filter(variant=name)["score"].to_numpy().mean() for name in ("dreambooth", "base_model"))
    found = verdicts.between(told, "dino", "dreambooth", "base_model")
    assert found and found["difference"] == pytest.approx(one - other, abs=1e-12)


def test_the_plane_says_which_points_are_over_fewer_concepts_and_shows_no_front(gap, html):
    whole = (gap.report() / page.PAGE).read_text()
    assert "DreamBooth (1 of 2 concepts)" in whole and "do not compare" in whole
    assert "Identity against text, mean over the concepts that each has, of 2" in titles(read_evidence.read(gap))
    assert "of 2 concepts)" not in html and "Pareto front" in html


def titles(told: read_evidence.Evidence) -> list[str]:
    """Of the planes that are drawn."""
    made: list[str] = []
    draw = inline_figures.scatter_plot

    def noted(summary, title, *rest, **more):
        made.append(title)
        return draw(summary, title, *rest, **more)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(inline_figures, "scatter_plot", noted)
        inline_figures.every(told)
    return made


def test_the_terminal_says_it_too(gap, made):
    lines = comparison_in_words.table(gap.comparison(), gap.costs())
    assert {line[0] for line in lines} >= {"DreamBooth (1 of 2 concepts)", "Textual Inversion", "base model"}
    assert "all 2 concepts" in comparison_in_words.gaps(gap.comparison())
    assert not comparison_in_words.gaps(made.comparison())


@pytest.fixture(scope="module")
def without_a_masked_score(tmp_path_factory) -> Store:
    """Every score that the page shows is there; of the masked one, DreamBooth has none on one of the two concepts, and
    Textual Inversion none of one image."""
    store = workspace.make(tmp_path_factory.mktemp("masked") / "workspace")
    for method, concept in [(m, c) for m in workspace.LEVELS for c in workspace.CONCEPTS]:
        folder = store.scores(method, concept)
        rows = scores.read(folder / SCORES).to_dicts()
        masked = [
            row | {"metric": "dino_masked", "mask": "grey", "foreground": 0.5}
            for row in rows
            if row["metric"] == "dino"
        ]
        first = {"dreambooth": len(masked) if concept == "cup" else 0, "textual_inversion": 1}.get(method, 0)
        shutil.rmtree(folder)
        workspace.scores(store, method, concept, [*rows, *masked[first:]])
    steps.compare(store)
    steps.report(store)
    return store


def test_a_score_that_is_missing_beside_those_shown_makes_no_gap_in_them(without_a_masked_score, made):
    store = without_a_masked_score
    told, whole = read_evidence.read(store), read_evidence.read(made)
    assert told.coverage.whole and verdicts.notes(told) == verdicts.notes(whole)
    assert page.counted(told) == page.counted(whole) and titles(told) == titles(whole)
    no_counterpart = [sentence for sentence in page.missing(told) if "counterpart" in sentence]
    assert not no_counterpart and "Pareto front" in (store.report() / page.PAGE).read_text()
    assert comparison_in_words.gaps(store.comparison()) == ""
    said = comparison_in_words.table(store.comparison(), store.costs())
    assert said == comparison_in_words.table(made.comparison(), made.costs())


def test_the_table_of_every_measure_counts_the_concepts_of_each(without_a_masked_score):
    heading, *rows = tables.every(read_evidence.read(without_a_masked_score))["every_measure"].shown
    of = {(row[0], row[heading.index("Variant")]): row[heading.index("Concepts")] for row in rows}
    assert of["dino_masked", "DreamBooth"] == "1" and of["dino", "DreamBooth"] == "2"


# Images held out


@pytest.fixture(scope="module")
def held(tmp_path_factory) -> Store:
    """rex has seven images, of which two are held out, and dreambooth copies; cup has three."""
    store = workspace.make(tmp_path_factory.mktemp("held") / "workspace")
    images = store.concept_folder("rex")
    for index in range(3, 7):
        workspace.noise_image([9, index], (32, 24)).save(images / f"{index}.png")
    for method, concept in [(m, c) for m in (*workspace.LEVELS, REFERENCES) for c in workspace.CONCEPTS]:
        folder = store.scores(method, concept)
        rows = [{**row, "pairs": 2} for row in scores.read(folder / SCORES).to_dicts()]
        copied = {"dreambooth": 0.2}.get(method, 0.01)
        held_out = [
            row | {"references": scores.HELD_OUT, "pairing": scores.ALL_PAIRS} if row["references"] else row
            for row in rows
            if concept == "rex" or not row["references"]
        ]
        trained_on = [
            row
            | {"references": scores.TRAINED_ON, "metric": f"{row['metric']}_trained_on", "score": row["score"] + copied}
            | ({"pairing": scores.ALL_PAIRS} if concept == "rex" else {})
            for row in rows
            if row["references"]
        ]
        shutil.rmtree(folder)
        workspace.scores(store, method, concept, [*held_out, *trained_on])
    steps.compare(store)
    steps.report(store)
    return store


def test_the_report_says_what_copying_adds_and_for_which_concepts_nothing_is_held_out(held):
    frame = pl.read_parquet(held.report() / "tables" / "copying.parquet")
    row = frame.filter(concept="all concepts", variant="dreambooth", metric="dino").row(0, named=True)
    assert row["difference"] == pytest.approx(0.2) and row["beyond"] == pytest.approx(0.19)
    assert row["concepts"] == 1
    html = (held.report() / page.PAGE).read_text()
    assert "What copying adds" in html and "rex (5 trained on, 2 held out), cup" not in html
    assert "cup (all 3 trained on), rex (5 trained on, 2 held out)" in html
    assert "Of cup, no image is held out: it has 3 concept images, too few, and all are trained on." in html


def test_where_nothing_can_be_held_out_the_images_trained_on_are_shown_and_named(held, tmp_path):
    shutil.copytree(held.root, tmp_path / "copy")
    store = Store(tmp_path / "copy")
    for method in (*workspace.LEVELS, REFERENCES):
        shutil.rmtree(store.scores(method, "rex"))
    steps.compare(store)
    steps.report(store)
    html = (store.report() / page.PAGE).read_text()
    assert "Place, DINO, images trained on" in html and "What copying adds" not in html
    heading, *rows = comparison_in_words.table(store.comparison(), store.costs())
    assert heading[3] == "DINO, trained on" and all(row[3] != "-" for row in rows)
