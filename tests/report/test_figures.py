"""Figures: the right pixels in the right place, equal bytes for equal input, and labels that can be read."""

import io
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote
from xml.etree import ElementTree

import numpy as np
import polars as pl
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from personalize_core.analyses import shared_plots
from personalize_core.concepts.image_files import load_image
from personalize_core.metrics.tables import ALL_CONCEPTS
from personalize_core.report import embedded_images
from personalize_core.report.figures import identity_vs_text, image_grids, images, label_placement, sparkline, style
from personalize_core.report.figures import losses as loss_figures
from personalize_core.report.figures.identity_vs_text import save_scatter_plot

pytestmark = pytest.mark.usefixtures("real_loss_curve")
ROOT = Path(__file__).parents[2]


def plain(colour, size=(64, 64)):
    return Image.new("RGB", size, colour)


def share(path, colour, box=None):
    """Portion of an image's pixels that have about this colour."""
    pixels = np.asarray(Image.open(path).convert("RGB").crop(box) if box else Image.open(path).convert("RGB"))
    return (np.abs(pixels.astype(int) - np.array(colour)).max(axis=-1) < 8).mean()


RED, GREEN, BLUE, PURPLE = (200, 30, 30), (30, 160, 60), (30, 60, 200), (140, 40, 160)
PROMPTS = ["a photo of a dog", "a dog in the snow with a mountain in the background"]


# -- grids of images -----------------------------------------------------------------------------------------


def test_a_grid_shows_every_image_large_enough_to_read(tmp_path):
    path = tmp_path / "grid.png"
    rows = {"base model": [[plain(RED)], [plain(GREEN)]], "DreamBooth": [[plain(BLUE)], [plain(PURPLE)]]}
    image_grids.comparison_grid([plain((250, 200, 0))], rows, PROMPTS, path)
    whole = Image.open(path)
    for colour in (RED, GREEN, BLUE, PURPLE, (250, 200, 0)):
        assert share(path, colour) * whole.width * whole.height == 160 * 160


def test_rows_are_variants_and_columns_are_prompts(tmp_path):
    path = tmp_path / "grid.png"
    rows = {"base model": [[plain(RED)], [plain(GREEN)]], "DreamBooth": [[plain(BLUE)], [plain(PURPLE)]]}
    image_grids.comparison_grid([plain((250, 200, 0))], rows, PROMPTS, path)
    middle = {}
    pixels = np.asarray(Image.open(path)).astype(int)
    for name, colour in {"red": RED, "green": GREEN, "blue": BLUE, "purple": PURPLE, "real": (250, 200, 0)}.items():
        y, x = np.nonzero((np.abs(pixels - colour) < 8).all(axis=-1))
        middle[name] = x.mean(), y.mean()
    assert middle["real"][0] < middle["red"][0] < middle["green"][0]
    assert middle["red"][1] == middle["green"][1] < middle["blue"][1] == middle["purple"][1]
    assert middle["red"][0] == middle["blue"][0] and middle["green"][0] == middle["purple"][0]


def test_several_images_share_a_cell_and_none_leaves_it_empty(tmp_path):
    path = tmp_path / "grid.png"
    rows = {"base model": [[plain(RED), plain(GREEN), plain(BLUE)], []]}
    image_grids.comparison_grid([], rows, PROMPTS, path)
    assert share(path, RED) == share(path, GREEN) == share(path, BLUE) > 0


def test_a_row_with_too_few_cells_is_refused(tmp_path):
    with pytest.raises(ValueError, match="row 'base model' has 1 cells, but there are 2 prompts"):
        image_grids.comparison_grid([], {"base model": [[plain(RED)]]}, PROMPTS, tmp_path / "grid.png")
    assert not any(tmp_path.iterdir())


def test_many_references_do_not_make_the_grid_wider_than_two_cells(tmp_path):
    for count in (1, 4, 10, 30):
        tiles = image_grids.Tiles.within(count, height=334, tile=160, gap=14, most_wide=334)
        places = [tiles.place(index) for index in range(count)]
        assert len(set(places)) == count
        assert max(x for x, _ in places) + tiles.tile == tiles.width
        assert tiles.height <= 334
        assert tiles.width <= 334 or count == 30


def test_a_prompt_from_outside_does_not_make_the_grid_larger_than_eight_lines(tmp_path):
    prompts = ["a dog", "a dog " * 3000, "dog" * 300, "$1 for a \\foo$ {} <b>dog</b> \U0001f436"]
    sizes = []
    for number, columns in enumerate((prompts[:1] * 4, prompts)):
        image_grids.comparison_grid([], {"v": [[plain("red")]] * 4}, columns, path := tmp_path / f"{number}.png")
        with Image.open(path) as grid:
            sizes.append(grid.size)
    assert sizes[0][0] == sizes[1][0] and sizes[1][1] - sizes[0][1] == 7 * 19
    for text in prompts:
        lines = image_grids._header(text, 160).split("\n")
        assert len(lines) <= 8 and all(image_grids.font(14).getlength(line) <= 160 for line in lines)
        whole = len(lines) < 8 and "…" not in lines[-1]
        assert "\n".join(lines) == image_grids.wrapped(text, image_grids.font(14), 160) if whole else "…" in lines[-1]


def test_images_may_be_given_as_files_and_are_cut_to_their_middle(tmp_path):
    tall = plain(RED, (40, 120))
    tall.paste(plain(GREEN, (40, 40)), (0, 40))
    tall.save(tmp_path / "tall.png")
    seen = np.asarray(images.square(tmp_path / "tall.png", 64))
    assert (seen[4:-4] == GREEN).all()  # but for what the enlarged edge blends


def test_a_note_stands_below_a_grid_and_takes_none_of_its_room(tmp_path):
    sizes, note = [], "what the colours of all these images mean, and how they are to be read " * 2
    for name, words in (("a", ""), ("b", note)):
        rows = {"base model": [[plain(RED)], [plain(GREEN)]]}
        image_grids.comparison_grid([plain(BLUE)], rows, PROMPTS, tmp_path / f"{name}.png", note=words)
        with Image.open(tmp_path / f"{name}.png") as sheet:
            sizes.append(sheet.convert("RGB"))
    bare, noted = sizes
    assert noted.width == bare.width and noted.height > bare.height + 2 * 17  # it is wrapped
    assert (
        noted.crop((0, 0, bare.width, bare.height - 24)).tobytes()
        == bare.crop((0, 0, bare.width, bare.height - 24)).tobytes()
    )
    below = np.asarray(noted.crop((0, bare.height - 24, noted.width, noted.height)))
    assert below.min() < 200, "the words"
    edge = np.concatenate([below[-5:].ravel(), below[:, -5:].ravel(), below[:, :5].ravel()])
    assert edge.min() == 255, "and none cut off"


def test_no_wrapped_line_is_wider_than_asked_and_no_word_is_lost():
    font = image_grids.font(14)
    text = "a dog painted in the style of Van Gogh's Starry Night, seen from the bottom"
    lines = image_grids.wrapped(text, font, 160).split("\n")
    assert " ".join(lines) == text
    assert len(lines) > 1 and all(font.getlength(line) <= 160 for line in lines)


# -- scores ----------------------------------------------------------------------------------------------------


def summary(levels, base_model="mini", concept=ALL_CONCEPTS):
    """levels: variant -> {metric: mean}."""
    return pl.DataFrame(
        [
            {
                "base_model": None if variant == "real_images" else base_model,
                "concept": concept,
                "method": variant,
                "variant": variant,
                "metric": metric,
                "encoder": "mini-clip" if metric == "clip_t" else "mini-identity",
                "mean": mean,
                "low": mean - 0.02,
                "high": mean + 0.02,
                "images": 12,
                "prompts": 3,
                "concepts": 2,
            }
            for variant, metrics in levels.items()
            for metric, mean in metrics.items()
        ]
    )


LEVELS = {
    "base_model": {"clip_t": 0.28, "dino": 0.3},
    "dreambooth": {"clip_t": 0.27, "dino": 0.6},
    "personalized_residuals": {"clip_t": 0.272, "dino": 0.61},
    "real_images": {"dino": 0.8},
}


@pytest.fixture
def kept_figures(monkeypatch):
    """Every figure that is drawn, before it becomes pixels."""
    kept: list[Figure] = []
    save = style.save_figure

    def keep(figure, *args, **options):
        kept.append(figure)
        save(figure, *args, **options)

    for module in (identity_vs_text, loss_figures):
        monkeypatch.setattr(module, "save_figure", keep)
    return kept


def words(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts if text.get_text()]


LONG = "Identity against text alignment, mean over the concepts that each has, of 3"
NAMED = f"{'a_very_long_name_of_a_concept_' * 3}: identity against text alignment"


@pytest.mark.parametrize("title", ["Identity against text", LONG, NAMED])
def test_a_title_of_a_plane_is_never_cut_off(title):
    figure = identity_vs_text.scatter_plot(summary(LEVELS), title)
    figure.draw_without_rendering()
    (written,) = [text for text in figure.findobj(Text) if text.get_text().startswith(title[:20])]
    assert "".join(written.get_text().split()) == "".join(title.split())
    box = written.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1


def test_each_variant_has_a_point_at_its_scores_and_its_name(tmp_path, kept_figures):
    save_scatter_plot(summary(LEVELS), tmp_path / "a.png", "title", labels={"dreambooth": "DreamBooth"})
    axes = kept_figures[0].axes[0]
    points = {(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if line.get_marker() == "o"}
    assert points == {(m["clip_t"], m["dino"]) for v, m in LEVELS.items() if v != "real_images"}
    assert {"base model", "DreamBooth", "Personalized Residuals"} <= set(words(kept_figures[0]))
    assert "mini-clip" in axes.get_xlabel() and "mini-identity" in axes.get_ylabel()
    assert (tmp_path / "a.png").stat().st_size and ElementTree.parse(tmp_path / "a.svg")


def test_baseline_and_ceiling_are_lines_at_their_identity(tmp_path, kept_figures):
    save_scatter_plot(summary(LEVELS), tmp_path / "a.png", "title")
    levels = {line.get_ydata()[0] for line in kept_figures[0].axes[0].lines if list(line.get_xdata()) == [0, 1]}
    assert levels == {0.3, 0.8}
    low, high = kept_figures[0].axes[0].get_ylim()
    assert low < 0.3 and high > 0.82
    assert any("ceiling" in text for text in words(kept_figures[0])) and any(
        "baseline" in text for text in words(kept_figures[0])
    )


@pytest.mark.parametrize(("count", "spread"), [(10, 0.03), (5, 0.001), (2, 0.0)])
def test_labels_of_close_points_do_not_overlap_and_stay_inside(count, spread, tmp_path, kept_figures):
    generator = np.random.default_rng(0)
    means = generator.normal(0.5, spread, (count, 2))
    levels = {
        f"method_{i}_with_quite_long_options": {"clip_t": float(x), "dino": float(y)} for i, (x, y) in enumerate(means)
    }
    save_scatter_plot(summary(levels), tmp_path / "a.png", "title")
    figure = kept_figures[0]
    figure.draw_without_rendering()
    axes = figure.axes[0]
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text().startswith("method")]
    assert len(boxes) == count
    assert sum(label_placement.overlap(a, b) for i, a in enumerate(boxes) for b in boxes[:i]) == 0
    assert all(
        label_placement.overlap(box, axes.get_window_extent()) == pytest.approx(box.width * box.height) for box in boxes
    )


def test_where_names_would_lie_on_each_other_points_have_numbers_and_a_key_below(tmp_path, kept_figures):
    generator = np.random.default_rng(0)
    means = generator.normal(0.5, 0.03, (31, 2))
    names = [f"method_{i}_with_quite_long_options_and_a_long_name" for i in range(31)]
    levels = {name: {"clip_t": float(x), "dino": float(y)} for name, (x, y) in zip(names, means, strict=True)}
    save_scatter_plot(summary(levels), tmp_path / "a.png", "title")
    figure = kept_figures[0]
    figure.draw_without_rendering()
    axes, (key,) = figure.axes[0], figure.legends
    assert not label_placement.is_crowded(axes, [text for text in axes.texts if text.get_text().isdigit()])
    of_key = [" ".join(text.get_text().split()) for text in key.get_texts()]
    assert of_key == [f"{n} {identity_vs_text.in_words(name)}" for n, name in enumerate(sorted(names), start=1)]
    at = {text.get_text(): tuple(text.xy) for text in axes.texts if text.get_text().isdigit()}
    assert at == {str(n): tuple(levels[name].values()) for n, name in enumerate(sorted(names), start=1)}
    box = key.get_window_extent()
    assert box.y0 >= 0 and box.x0 >= 0 and box.x1 <= figure.bbox.x1
    assert box.y1 < axes.xaxis.label.get_window_extent().y0


def test_a_dot_plot_shows_any_prompt_as_it_is_written_and_cuts_long_ones(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(
        shared_plots, "save_figure", lambda figure, path: kept.append(figure) or style.save_figure(figure, path)
    )
    prompts = ["$1 or $\\foo$2", "<b>{}</b> \U0001f436", "a dog " * 500]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the font has no emoji, and shows a box
        shared_plots.dots([shared_plots.Panel("x", {"v": [[0.5]] * 3})], prompts, tmp_path / "dots.png", "$a_$")
    labels = [label.get_text() for label in kept[0].axes[0].get_yticklabels()]
    assert labels[:2] == prompts[:2] and labels[2].endswith("…") and len(labels[2]) <= shared_plots.MOST_LABEL
    with Image.open(tmp_path / "dots.png") as figure:
        assert max(figure.size) < 2000


def test_a_prompt_in_another_place_of_the_list_is_one_row(tmp_path, monkeypatch):
    """An external column has its prompts in an order of its own."""
    from personalize_core.analyses import per_prompt  # which needs torch: figures are plotted without it

    common = {"metric": "dino", "encoder": "mini-identity", "headline": True, "image_index": 0}
    ours = pl.DataFrame([{"variant": "base_model", "prompt_index": i, "prompt": p, "score": i / 4} | common
                         for i, p in enumerate(["a", "b", "c"])])  # fmt: skip
    theirs = pl.DataFrame([{"variant": "flux", "prompt_index": i, "prompt": p, "score": 1.0 - i / 4} | common
                           for i, p in enumerate(["c", "a", "d"])])  # fmt: skip
    seen = []
    monkeypatch.setattr(per_prompt, "dots", lambda panels, rows, *rest: seen.append((panels, rows)))
    per_prompt.plot([ours, theirs], tmp_path / "x.png", "x")
    ((panel,), rows) = seen[0]
    assert sorted(rows) == ["a", "b", "c", "d"]
    scores = {name: dict(zip(rows, values, strict=True)) for name, values in panel.series.items()}
    assert scores["base_model"] == {"a": [0.0], "b": [0.25], "c": [0.5], "d": []}
    assert scores["flux"] == {"a": [0.75], "b": [], "c": [1.0], "d": [0.5]}


def test_images_in_the_page_are_as_large_as_the_largest_variants(tmp_path):
    plain("red").save(tmp_path / "ours.png")
    plain("red", (300, 512)).save(tmp_path / "theirs.png")
    sampled = pl.DataFrame({"variant": ["ours", "theirs"], "image": ["ours.png", "theirs.png"]})
    told = SimpleNamespace(root=tmp_path)
    assert embedded_images._native(told, sampled) == 512  # pyright: ignore[reportArgumentType]
    assert embedded_images._native(told, sampled[:1]) == 64  # pyright: ignore[reportArgumentType]


def test_the_front_holds_what_no_other_reaches_in_both():
    points = {
        "a": (0.1, 0.9),
        "b": (0.5, 0.5),
        "c": (0.9, 0.1),
        "below": (0.4, 0.5),
        "left": (0.1, 0.4),
        "d": (0.2, 0.9),
    }
    naive = [n for n, p in points.items() if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in points.values())]
    assert identity_vs_text.pareto_front(points) == sorted(naive, key=points.get) == ["d", "b", "c"]  # type: ignore[arg-type]
    assert identity_vs_text.pareto_front({"a": (0.5, 0.5), "b": (0.5, 0.5)}) == ["a", "b"]


def test_the_front_is_plotted_through_its_points(tmp_path, kept_figures):
    save_scatter_plot(summary(LEVELS), tmp_path / "a.png", "title")
    means = {v: (m["clip_t"], m["dino"]) for v, m in LEVELS.items() if v != "real_images"}
    corners = [means[variant] for variant in identity_vs_text.pareto_front(means)]
    lines = [list(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in kept_figures[0].axes[0].lines]
    assert len(corners) > 1 and corners in lines


def test_a_variant_without_one_of_the_metrics_is_not_plotted_and_no_variant_at_all_is_an_error(tmp_path, kept_figures):
    save_scatter_plot(summary(LEVELS | {"half": {"dino": 0.5}}), tmp_path / "a.png", "title")
    assert "half" not in words(kept_figures[0])
    with pytest.raises(ValueError, match="no variant of 'vase' has both 'dino' and 'clip_t'"):
        save_scatter_plot(summary(LEVELS), tmp_path / "b.png", "title", concept="vase")
    two = pl.concat([summary(LEVELS), summary(LEVELS, base_model="sd15")])
    with pytest.raises(ValueError, match="several base models"):
        save_scatter_plot(two, tmp_path / "b.png", "title")


# -- losses ----------------------------------------------------------------------------------------------------


def log(steps=60):
    others = {"gradient_norm": 1.0, "lr": [1e-3, 2e-2], "learned": {"v_norm": 1.0}}
    first = [{"stage": "embedding", "step": i, "diffusion": 0.3 - i / 1000, **others} for i in range(steps)]
    second = [{"stage": "whole_net", "step": i, "diffusion": 0.2, "attention": 0.1} for i in range(steps)]
    return first + second


def test_a_loss_curve_shows_each_loss_and_where_a_stage_begins(tmp_path, kept_figures):
    loss_figures.loss_curve(log(), tmp_path / "loss.png", "title")
    losses = kept_figures[0].axes[0]
    (legend,) = kept_figures[0].legends
    assert legend.get_window_extent().y1 < kept_figures[0].axes[-1].get_window_extent().y0, "it hides no curve"
    assert [text.get_text() for text in legend.get_texts()] == ["diffusion loss", "attention loss"]
    assert 59.5 in [line.get_xdata()[0] for line in losses.lines]
    assert {"embedding", "whole net"} <= set(words(kept_figures[0]))


def test_losses_far_apart_stand_on_a_logarithmic_axis_with_plain_numbers(tmp_path, kept_figures):
    rows = [{"stage": "a", "step": i, "diffusion": 0.2, "attention": 1e-3} for i in range(9)]
    loss_figures.loss_curve(rows, tmp_path / "loss.png")
    axis = kept_figures[0].axes[0].yaxis
    assert [axis.get_major_formatter()(value) for value in (0.001, 0.1)] == ["0.001", "0.1"]
    assert not any("$" in word for word in words(kept_figures[0]))


def test_the_average_stays_within_its_stage(tmp_path, kept_figures):
    rows = [{"stage": stage, "step": i, "diffusion": level} for stage, level in (("a", 1), ("b", 5)) for i in range(40)]
    loss_figures.loss_curve(rows, tmp_path / "loss.png")
    curves = [line for line in kept_figures[0].axes[0].lines if len(line.get_xdata()) == 40]
    assert {y for line in curves for y in np.round(line.get_ydata(), 12)} == {1, 5}


def test_the_loss_on_fixed_inputs_is_shown_as_it_was_taken_from_before_the_first_step_on(tmp_path, kept_figures):
    rows = [{"stage": stage, "step": i, "diffusion": 0.1} for stage in ("a", "b") for i in range(40)]
    for row, value in ((9, 0.3), (19, 0.8), (49, 0.2)):  # as the log has them, behind the step
        rows[row]["fixed_inputs"] = value
    taken = [("a", 0, 0.9), ("a", 10, 0.3), ("a", 20, 0.8), ("b", 0, 0.7), ("b", 10, 0.2)]
    seen = [{"stage": stage, "step": step, "value": value} for stage, step, value in taken]
    loss_figures.loss_curve(rows, tmp_path / "loss.png", fixed_inputs=seen)
    losses = kept_figures[0].axes[0]
    points = [list(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in losses.lines]
    own = [[(0, 0.9), (10, 0.3), (20, 0.8)], [(40, 0.7), (50, 0.2)]]
    assert [line for line in points if line in own] == own
    others = {y for line in points if line not in own for _, y in line}
    assert not others & {0.3, 0.8, 0.2}, "nor a second time, from the log"
    words_of = [text.get_text() for text in kept_figures[0].legends[0].get_texts()]
    assert words_of == ["diffusion loss", "loss on fixed inputs"]


def test_a_moving_average_is_of_the_values_around_and_of_fewer_at_the_ends():
    averages = loss_figures.moving_average(np.array([1.0, 2.0, 6.0, 3.0, 5.0, 4.0]), reach=1)
    np.testing.assert_allclose(averages, [(1 + 2) / 2, (1 + 2 + 6) / 3, (2 + 6 + 3) / 3, (6 + 3 + 5) / 3, 4, 4.5])


def test_without_losses_there_is_no_curve(tmp_path):
    for rows in ([], [{"stage": "a", "step": 0, "gradient_norm": 1.0}]):
        with pytest.raises(ValueError, match="no losses were logged"):
            loss_figures.loss_curve(rows, tmp_path / "loss.png")
    with pytest.raises(ValueError, match="no losses"):
        sparkline.loss_sparkline_svg([float("nan")])


@pytest.mark.parametrize("count", [1, 2, 39, 41, 5000])
def test_a_sparkline_is_small_valid_and_falls_where_the_loss_falls(count):
    svg = sparkline.loss_sparkline_svg(list(np.linspace(1, 0, count)))
    assert len(svg) < 700 and len(quote(svg)) < 900  # Dagster shows markdown of under 1,000 characters inline
    line = next(iter(ElementTree.fromstring(svg)))
    metrics = [int(number) for number in line.attrib["points"].split(",")]
    xs, ys = metrics[::2], metrics[1::2]
    assert xs == sorted(xs) and ys == sorted(ys)  # in SVG, down is up
    assert 0 <= min(metrics) and max(xs) <= 160 and max(ys) <= 32
    assert len(xs) <= 40


# -- images from outside ----------------------------------------------------------------------------------------


def test_a_concept_image_is_shown_as_training_sees_it(tmp_path):
    """Sixteen bits of grey, a transparent palette, and an image that lies on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray(np.linspace(0, 65535, 64 * 32).reshape(32, 64).astype(np.uint16))
    deep.save(tmp_path / "deep.png", exif=exif)
    plain(RED, (64, 32)).quantize(2).save(tmp_path / "palette.png", transparency=0)
    for path in sorted(tmp_path.iterdir()):
        assert images.opened(path).tobytes() == load_image(path).tobytes()
    assert images.opened(tmp_path / "deep.png").size == (32, 64)
    assert 100 < np.asarray(images.opened(tmp_path / "deep.png")).mean() < 150  # it was all white


# -- small versions --------------------------------------------------------------------------------------------


def test_a_thumbnail_fits_and_keeps_the_shape(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (150, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    plain(RED, (300, 150)).save(tmp_path / "plain.png")
    sizes = {}
    for name in ("noise", "plain"):
        thumbnail = images.thumbnail_webp(tmp_path / f"{name}.png")
        assert len(thumbnail) <= 700
        image = Image.open(io.BytesIO(thumbnail))
        assert image.format == "WEBP" and image.width == 2 * image.height
        sizes[name] = image.width
    assert sizes["noise"] < sizes["plain"]
    with pytest.raises(ValueError, match="fits into 10 bytes"):
        images.thumbnail_webp(tmp_path / "plain.png", limit_bytes=10)


# -- equal bytes -----------------------------------------------------------------------------------------------


def make_everything(folder):
    rows = {"base model": [[plain(RED)], [plain(GREEN)]]}
    image_grids.comparison_grid([plain(BLUE)], rows, PROMPTS, folder / "grid.png", "title")
    save_scatter_plot(summary(LEVELS), folder / "scores.png", "title")
    loss_figures.loss_curve(log(), folder / "loss.png", "title")


def test_another_process_at_another_time_plots_the_same_bytes(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    make_everything(here)
    program = (
        "import sys, pathlib; sys.path.insert(0, 'tests/report'); import test_figures;"
        "test_figures.make_everything(pathlib.Path(sys.argv[1])); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, str(there)], check=True, cwd=ROOT)
    names = sorted(path.name for path in here.iterdir())
    assert names == ["grid.png", "loss.png", "scores.png", "scores.svg"]
    for name in names:
        assert (here / name).read_bytes() == (there / name).read_bytes(), name
