"""What a study shows: balanced, blinded, of the same noise, and refused where it cannot be."""

from __future__ import annotations

import base64
import io
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from personalize_core import steps
from personalize_core.errors import InputError
from personalize_core.files.typed_yaml import build
from personalize_core.study import page
from personalize_core.study.design import Key, Request, design, image_paths
from personalize_core.workspace.external_columns import ExternalColumn
from personalize_core.workspace.store import Store
from tests import tiny_workspace
from tests.study import workspace as small

pytestmark = pytest.mark.usefixtures("short_checks")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return small.make(tmp_path_factory.mktemp("workspace"))


def request(**changes) -> Request:
    return Request(variants=list(small.VARIANTS), **changes)


def embedded(html: str) -> dict:
    found = re.search(r'<script type="application/json" id="study">(.*?)</script>', html, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_a_pair_is_one_cell_of_the_grids_of_two_variants(store):
    key = design(store, request())
    assert [(c.first, c.second) for c in key.comparisons] == [
        (small.VARIANTS[0], other) for other in small.VARIANTS[1:]
    ]
    assert len(key.pairs()) == len(key.comparisons) * len(key.cells)
    for number, (first, second) in enumerate(key.pairs()):
        comparison, cell = key.comparisons[number // len(key.cells)], number % len(key.cells)
        assert (key.images[first].variant, key.images[first].cell) == (comparison.first, cell)
        assert (key.images[second].variant, key.images[second].cell) == (comparison.second, cell)


def test_the_page_shows_every_pixel_that_was_sampled_under_a_number_that_tells_nothing(store):
    key = design(store, request())
    shown = embedded(page.render(store, key))
    for number, image in enumerate(key.images):
        cell = key.cells[image.cell]
        kind, content = shown["images"][number].split(",")
        assert kind == "data:image/webp;base64"
        opened = Image.open(io.BytesIO(base64.b64decode(content)))
        expected = small.pixels_of(image.variant, key.concepts[cell.concept].name, cell.prompt_index, cell.image_index)
        assert np.array_equal(np.asarray(opened.convert("RGB")), expected)
    runs = sum(one.variant == other.variant for one, other in zip(key.images, key.images[1:], strict=False))
    assert runs < len(key.images) / 2, "images lie in the page in a random order, not variant by variant"


def test_the_page_names_no_variant_no_concept_and_no_file(store):
    html = page.render(store, design(store, request()))
    decoded = html + "".join(base64.b64decode(uri.split(",")[1]).decode("latin-1") for uri in embedded(html)["images"])
    for secret in [*small.VARIANTS, "Personalized Residuals", "DreamBooth", *small.CONCEPTS, ".png", str(store.root)]:
        assert not re.search(rf"(?<![A-Za-z0-9+/]){re.escape(secret)}(?![A-Za-z0-9+/])", decoded), secret


def test_the_page_asks_nothing_of_the_network(store):
    html = page.render(store, design(store, request()))
    assert "default-src 'none'" in html
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:)|url\(|@import|fetch\(|XMLHttpRequest|https?://""", html)


def test_a_prompt_is_shown_with_the_class_noun_and_cannot_become_markup(store):
    html = page.render(store, design(store, request(title="Cats & </title><b>@@STUDY@@")))
    texts = {cell["text"] for cell in embedded(html)["cells"]}
    assert {"a dog on the beach", "a red mug on the beach"} <= texts
    assert any("</script>" in text for text in texts) and html.count("</script>") == 2
    assert "Cats &amp; &lt;/title&gt;&lt;b&gt;" in html


def test_concepts_take_turns_so_that_fewer_pairs_are_still_of_every_concept(store):
    key = design(store, request(pairs=10))
    assert Counter(cell.concept for cell in key.cells) == {0: 5, 1: 5}
    assert len({(cell.concept, cell.prompt_index, cell.image_index) for cell in key.cells}) == 10


def test_a_rater_answers_no_more_than_asked_for_and_an_even_number_of_each(store):
    for per_rater, each in [(8, 2), (15, 2), (16, 4), (40, 10)]:
        key = design(store, request(per_rater=per_rater))
        assert key.each == each and key.questions_per_rater == each * 4 <= per_rater
    assert design(store, request(pairs=9, per_rater=1000)).each == 4, "9 pairs give 4 to each of two questions"


def test_as_many_concept_images_as_asked_for_are_shown_and_all_where_there_are_fewer(store):
    assert all(len(concept.concept_images) == 3 for concept in design(store, request()).concepts)
    assert all(len(concept.concept_images) == 5 for concept in design(store, request(concept_images=9)).concepts)


def test_the_same_request_gives_the_same_page_and_any_other_gives_another_study(store):
    key = design(store, request())
    assert page.render(store, key) == page.render(store, design(store, request()))
    changes = [
        {"seed": 1},
        {"pairs": 20},
        {"per_rater": 20},
        {"concept_images": 2},
        {"title": "x"},
        {"questions": ["both"]},
    ]
    others = {design(store, request(**change)).study for change in changes}
    assert len(others | {key.study}) == len(changes) + 1


def test_another_pixel_makes_another_study(tmp_path):
    store = small.make(tmp_path)
    before = design(store, request())
    image = image_paths(store, before)[0]
    Image.new("RGB", (small.SIZE, small.SIZE)).save(image)
    assert design(store, request()).study != before.study


def test_the_key_comes_back_whole_and_one_that_was_changed_is_refused(store, tmp_path):
    written = page.write(store, request(), tmp_path / "study")
    assert Key.read(written.key_file) == written.key
    values = json.loads(written.key_file.read_text())
    values["images"][0]["variant"] = "dreambooth" if values["images"][0]["variant"] != "dreambooth" else "other"
    written.key_file.write_text(json.dumps(values))
    with pytest.raises(InputError, match="changed after it was written"):
        Key.read(written.key_file)
    written.key_file.write_text(written.key_file.read_text()[:-40])
    with pytest.raises(InputError, match="is not the key of a study"):
        Key.read(written.key_file)
    with pytest.raises(InputError, match="there is no"):
        Key.read(tmp_path / "nowhere.json")


def test_a_study_of_what_the_steps_sample(tmp_path):
    """The contract with grid.json: nothing of it is made up here."""
    store = tiny_workspace.make(tmp_path)
    for method in ("base_model", "textual_inversion"):
        steps.train(store, "rex", method)
        steps.sample_grid(store, "rex", method)
    key = design(store, Request(variants=["textual_inversion", "base_model"], questions=["both"]))
    assert [concept.name for concept in key.concepts] == ["rex"] and key.left_out == ["cup"]
    assert {cell.text for cell in key.cells} == {"a photo of a dog", "a photo of a dog on the beach"}
    assert len(key.cells) == 4 and all(path.is_file() for path in image_paths(store, key))


def test_a_concept_that_some_variant_has_not_sampled_is_left_out_and_named(tmp_path):
    store = small.make(tmp_path)
    (store.grid("dreambooth", "cup") / "grid.json").unlink()
    assert design(store, request()).left_out == ["cup"]
    with pytest.raises(InputError, match="there is no grid of 'cup' by 'dreambooth'; run .*cup -m dreambooth"):
        design(store, request(concepts=["cup"]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"templates": ["a {}"]}, "different prompts"),
        ({"images_per_prompt": 2}, "different numbers of images"),
        ({"base_model": "sd-1.4"}, "different base models"),
        ({"sampling": {"sampler": "dpm-solver++"}}, "different sampling"),
        ({"seed": 6}, "different seeds"),
    ],
)
def test_grids_that_do_not_share_their_noise_and_prompts_make_no_pairs(change, said, tmp_path):
    store = small.make(tmp_path)
    small.sample_grid(store, "rex", "dreambooth", **change)
    with pytest.raises(InputError, match=said):
        design(store, request())


def test_images_made_elsewhere_stand_beside_those_of_the_same_prompt(tmp_path):
    """Of three prompts two are ours, in another order; of one there are two images, of the other three."""
    store = small.make(tmp_path / "workspace")
    folder, rows = tmp_path / "out", []
    folder.mkdir()
    for prompt, count in (("a dog on the beach", 3), ("a dog in space", 3), ("a photo of a dog", 2)):
        for image in range(count):
            file = f"{len(rows)}.png"
            Image.new("RGB", (2000, 1500), (10 * len(rows), 90, 30 * image)).save(folder / file)
            rows.append({"file": file, "prompt": prompt, "seed": image})
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    steps.add_external(store, "flux", "rex", ExternalColumn(folder=str(folder)))
    with pytest.raises(InputError, match="there is no grid of 'rex' by 'flux'; run `personalize score"):
        design(store, Request(variants=["flux", "dreambooth"], concepts=["rex"]))
    params = yaml.safe_load((store.root / "params.yaml").read_text()) | {"base_model": "mini"}
    (store.root / "params.yaml").write_text(yaml.safe_dump(params))
    store = Store(store.root)
    steps.list_external(store, "rex", "flux")

    key = design(store, Request(variants=["dreambooth", "flux", "textual_inversion"]))
    assert Key.model_validate_json(key.model_dump_json()) == key
    assert (key.made_elsewhere, key.left_out) == (["flux"], ["cup"])
    assert Counter(cell.text for cell in key.cells) == {"a photo of a dog": 2, "a dog on the beach": 3}
    ours = [text.replace("{}", "dog") for text in small.TEMPLATES]
    assert {(cell.text, cell.prompt_index) for cell in key.cells} == {(ours[0], 0), (ours[1], 1)}
    theirs = design(store, Request(variants=["flux", "dreambooth"]))  # whose first prompt is the beach, the second lost
    assert {(cell.text, cell.prompt_index) for cell in theirs.cells} == {("a dog on the beach", 0), (ours[0], 2)}
    for image, path in zip(key.images, image_paths(store, key), strict=True):
        cell = key.cells[image.cell]
        if image.variant == "flux":
            row = rows[int(path.stem)]
            assert (row["prompt"], row["seed"]) == (cell.text, cell.image_index)
        else:
            prompt = ours.index(cell.text)
            assert path.name == f"{prompt:02d}_{cell.image_index:02d}.png"
    shown = embedded(page.render(store, key))
    largest = max(Image.open(io.BytesIO(base64.b64decode(one.split(",")[1]))).size for one in shown["images"])
    assert largest == (1024, 768)
    (folder / "0.png").unlink()
    with pytest.raises(InputError, match=r"0\.png is missing; `personalize score`"):
        design(store, Request(variants=["dreambooth", "flux"]))


def test_a_image_that_is_missing_is_named(tmp_path):
    store = small.make(tmp_path)
    (store.grid("dreambooth", "rex") / "dreambooth" / "01_02.png").unlink()
    with pytest.raises(InputError, match=r"01_02\.png is missing from its grid"):
        page.write(store, request(), tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_a_damaged_grid_and_a_damaged_image_are_named_and_nothing_is_written(tmp_path):
    store = small.make(tmp_path)
    image = store.grid("dreambooth", "rex") / "dreambooth" / "01_02.png"
    image.write_bytes(image.read_bytes()[:100])
    with pytest.raises(InputError, match=r"01_02\.png cannot be read as an image"):
        page.write(store, request(), tmp_path / "study")
    (store.grid("dreambooth", "rex") / "grid.json").write_text('{"variants":')
    with pytest.raises(InputError, match=r"grid\.json is damaged"):
        page.write(store, request(), tmp_path / "study")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "params.yaml", "photos"]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"variants": ["dreambooth"]}, "at least two"),
        ({"variants": ["dreambooth", "dreambooth"]}, "given twice"),
        ({"variants": ["dreambooth", "hypernetwork"]}, "no variant 'hypernetwork'; its variants are"),
        ({"variants": list(small.VARIANTS), "questions": ["taste"]}, "'text', 'image' or 'both'"),
        ({"variants": list(small.VARIANTS), "pairs": 0}, "pairs = 0"),
        ({"variants": list(small.VARIANTS), "seed": -1}, "seed = -1"),
        ({"variants": list(small.VARIANTS), "per_rater": 7}, "allow at least 8"),
        ({"variants": list(small.VARIANTS), "pairs": 3}, "3 pairs of each comparison are too few"),
        ({"variants": list(small.VARIANTS), "concepts": ["fido"]}, "there is no concept 'fido'"),
    ],
)
def test_a_request_that_makes_no_study_is_refused_in_one_sentence(values, said, store):
    with pytest.raises(InputError, match=said):
        design(store, build(Request, values, "personalize study"))


def test_no_study_is_overwritten(store, tmp_path: Path):
    (tmp_path / "study").mkdir()
    with pytest.raises(InputError, match="exists already"):
        page.write(store, request(), tmp_path / "study")
    assert not list((tmp_path / "study").iterdir())
