"""Folders with a manifest or a list of prompts: what is read from them, and what is refused in one sentence."""

from __future__ import annotations

import json
import os
import time

import pytest

from personalize_core.external.layouts import LAYOUTS, read_listing
from personalize_core.external.listing import MOST_SEED
from tests.external.folders_of_images import put_image, put_text, refusal, rows


def test_a_csv_lists_files_prompts_and_seeds(tmp_path):
    for name in ("a.png", "sub/b.jpg", "beside.png"):
        put_image(tmp_path / name)
    put_text(
        tmp_path / "prompts.csv", f'seed,file,prompt\n7,a.png,"a dog,\n on a  beach"\n{MOST_SEED},sub\\b.jpg,a dog\n'
    )
    listing = read_listing(tmp_path)
    assert rows(listing) == [("a.png", "a dog, on a beach", 7), ("sub/b.jpg", "a dog", MOST_SEED)]
    assert listing.layout == "manifest" and listing.left_out == (("beside.png", "is not named in prompts.csv"),)


def test_seeds_may_be_left_out(tmp_path):
    put_image(tmp_path / "a.png")
    put_image(tmp_path / "b.png")
    put_text(tmp_path / "prompts.csv", "\ufefffile,prompt\r\na.png,a dog\r\nb.png,a dog\r\n")
    assert rows(read_listing(tmp_path)) == [("a.png", "a dog", None), ("b.png", "a dog", None)]
    put_text(tmp_path / "prompts.csv", "file,prompt,seed\na.png,a dog,\nb.png,a dog,3\n")
    assert rows(read_listing(tmp_path)) == [("a.png", "a dog", None), ("b.png", "a dog", 3)]


def test_jsonl_is_the_same_with_an_object_a_line(tmp_path):
    put_image(tmp_path / "a.png")
    put_image(tmp_path / "b.png")
    lines = [
        {"file": "a.png", "prompt": "ein Hund \u2028 am Strand", "seed": 4},
        {"file": "b.png", "prompt": "x", "seed": None},
    ]
    put_text(tmp_path / "prompts.jsonl", "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n")
    assert rows(read_listing(tmp_path)) == [("a.png", "ein Hund am Strand", 4), ("b.png", "x", None)]


def test_names_hold_the_number_of_the_prompt_and_the_seed(tmp_path):
    for name in ("0_42.png", "1_7.png", "00_43.webp"):
        put_image(tmp_path / name)
    prompts = put_text(tmp_path / "prompts.txt", "# from a paper\na dog\n\na dog in snow\n")
    assert rows(read_listing(tmp_path)) == [
        ("00_43.webp", "a dog", 43),
        ("0_42.png", "a dog", 42),
        ("1_7.png", "a dog in snow", 7),
    ]
    elsewhere = prompts.rename(tmp_path / "list.txt")
    assert "has no prompts.txt" in refusal(tmp_path)
    for named in ("list.txt", str(elsewhere)):
        assert len(read_listing(tmp_path, options={"prompts": named}).images) == 3
    put_image(tmp_path / "grid.png")
    assert "none of the known layouts" in refusal(tmp_path)
    assert read_listing(tmp_path, "numbered", {"prompts": "list.txt"}).left_out == (
        ("grid.png", "is not named PROMPTINDEX_SEED"),
    )
    put_image(tmp_path / "2_1.png")
    assert "'2_1.png' is of prompt 2" in refusal(tmp_path, "numbered", prompts="list.txt")
    assert "no_such does not exist" in refusal(tmp_path, "numbered", prompts="no_such")


def test_ten_thousand_lines_are_read_in_seconds(tmp_path):
    put_image(tmp_path / "0.png")
    for number in range(1, 10_001):
        os.link(tmp_path / "0.png", tmp_path / f"{number}.png")
    lines = [f"{number}.png,a dog number {number % 100},{number}" for number in range(10_001)]
    put_text(tmp_path / "prompts.csv", "\n".join(["file,prompt,seed", *lines]))
    started = time.process_time()
    assert len(read_listing(tmp_path).images) == 10_001
    assert time.process_time() - started < 20  # measured: 0.5; a comparison of all with all takes minutes


@pytest.mark.parametrize(
    ("manifest", "says"),
    [
        ("file,prompt\na.png,x\ngone.png,x\n", "lacks 1 of the 2 images that its layout 'manifest' names: 'gone.png'"),
        ("file,prompt\n" + "".join(f"g{i}.png,x\n" for i in range(9)), "lacks 9 of the 9 images"),
        ("file,prompt\n" + "".join(f"g{i}.png,x\n" for i in range(9)), "'g0.png', 'g1.png', 'g2.png' and 6 more"),
        ("file,prompt,seed\na.png,x,1\nb.png,x ,1\n", "the prompt 'x' with the seed 1, 'a.png' and 'b.png'"),
        ("file,prompt,seed\na.png,x,1\na.png,y,1\n", "lists 'a.png' more than once"),
        ("file,prompt,seed\na.png,x,1\n./a.png,y,1\n", "lists 'a.png' more than once"),
        ("file,prompt,steps\na.png,x,1\n", "line 1: unknown columns 'steps'; there may be file, prompt and seed"),
        ("file;prompt;seed\na.png;x;1\n", "unknown columns 'file;prompt;seed'"),
        ("file,seed\na.png,1\n", "line 1 lacks prompt"),
        ("file,prompt,file\na.png,x,a.png\n", "a column twice"),
        ("", "line 1 lacks file and prompt"),
        ("file,prompt\n", "holds no image that can be scored"),
        ("file,prompt\n../a.png,x\n", "line 2: '../a.png' leads out of the folder"),
        ("file,prompt\n/etc/a.png,x\n", "line 2: '/etc/a.png' leads out of the folder"),
        ("file,prompt\nC:\\a.png,x\n", "leads out of the folder"),
        ("file,prompt\n..\\a.png,x\n", "leads out of the folder"),
        ("file,prompt\nsub/../../a.png,x\n", "leads out of the folder"),
        ("file,prompt\nloop.png,x\n", "lacks 1 of the 1 images"),
        ("file,prompt\nsub.png,x\n", "lacks 1 of the 1 images"),
        ("file,prompt\nnotes.txt,x\n", "'notes.txt' is not named like an image"),
        ("file,prompt\n,x\n", "is not the name of a file"),
        (f"file,prompt\n{'x' * 300}.png,x\n", "lacks 1 of the 1 images"),
        ("file,prompt\na.png, \n", "line 2: the prompt is empty"),
        (f"file,prompt\na.png,{'x' * 20_001}\n", "the prompt has 20,001 characters, and at most 20,000"),
        (f"file,prompt\na.png,{'x' * 200_000}\n", "line 2 is not CSV: field larger than field limit"),
        ('file,prompt\na.png,"x\n', "is not CSV"),
        ("file,prompt\na.png,x,1\n", "line 2 has 3 values, and there are 2 columns"),
        ("file,prompt,seed\na.png,x,-1\n", "the seed is '-1', and should be a whole number"),
        ("file,prompt,seed\na.png,x,1.0\n", "the seed is '1.0'"),
        (f"file,prompt,seed\na.png,x,{'9' * 5000}\n", "the seed is '999"),
        ("file,prompt,seed\na.png,x,18446744073709551616\n", "should be from 0 to 2**64 - 1"),
    ],
)
def test_what_is_wrong_with_a_csv_is_said_in_one_sentence(tmp_path, manifest, says):
    for name in ("a.png", "b.png"):
        put_image(tmp_path / name)
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "sub.png").mkdir()
    put_text(tmp_path / "prompts.csv", manifest)
    assert says in refusal(tmp_path)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 1 is not JSON"),
        ("[]", "should be a JSON object"),
        ('{"file": "a.png"}', "line 1 lacks prompt"),
        ('{"file": "a.png", "prompt": "x", "model": "m"}', "unknown columns 'model'"),
        ('{"file": "a.png", "prompt": 3}', "should be texts"),
        ('{"file": "a.png", "prompt": "x", "seed": true}', "the seed is True"),
        ('{"file": "a.png", "prompt": "x", "seed": 1.5}', "the seed is 1.5"),
        ('{"file": "a.png", "prompt": "x", "seed": -1}', "should be from 0 to 2**64 - 1"),
        ('{"file": "a.png", "file": "b.png", "prompt": "x"}', "stands there twice"),
        ('{"file": "a\\u0000.png", "prompt": "x"}', "is not the name of a file"),
        ("[" * 100_000, "line 1"),
    ],
)
def test_what_is_wrong_with_a_line_of_jsonl_is_said_in_one_sentence(tmp_path, line, says):
    put_image(tmp_path / "a.png")
    put_text(tmp_path / "prompts.jsonl", line)
    assert says in refusal(tmp_path)


def test_manifests_that_are_no_text_are_refused(tmp_path):
    put_image(tmp_path / "a.png")
    path = tmp_path / "prompts.csv"
    path.write_text("file,prompt\na.png,x\n", encoding="utf-16")
    assert "is text in UTF-16" in refusal(tmp_path)
    path.write_bytes("file,prompt\na.png,fröhlich\n".encode("latin-1"))
    assert "not text in UTF-8: line 2 has the byte 0xf6" in refusal(tmp_path)
    path.unlink()
    path.mkdir()
    assert "is a folder" in refusal(tmp_path)
    path.rmdir()
    os.mkfifo(path)
    assert "is a FIFO" in refusal(tmp_path)
    path.unlink()
    path.symlink_to("prompts.csv")
    assert "cannot be opened" in refusal(tmp_path)
    put_text(tmp_path / "prompts.jsonl", "")
    assert "has both prompts.csv and prompts.jsonl" in refusal(tmp_path)
    path.unlink()
    with open(tmp_path / "prompts.jsonl", "wb") as file:
        file.truncate(10**12)
    assert "1,000,000,000,000 bytes" in refusal(tmp_path)


def test_folders_layouts_and_options_that_are_not_there_are_refused(tmp_path):
    assert "holds no images" in refusal(tmp_path)
    assert "does not exist" in refusal(tmp_path / "gone")
    put_image(tmp_path / "a.png")
    assert "is not a folder" in refusal(tmp_path / "a.png")
    (tmp_path / "loop").symlink_to("loop")
    assert "is not a folder" in refusal(tmp_path / "loop")
    assert "none of the known layouts" in refusal(tmp_path)
    assert "there is no layout 'mine'" in refusal(tmp_path, "mine")
    assert "has no prompts.csv and no prompts.jsonl" in refusal(tmp_path, "manifest")
    assert "the layout 'manifest' has no option 'step'; it has none" in refusal(tmp_path, "manifest", step="3")
    os.mkdir(tmp_path / os.fsdecode(b"\xff.d"))
    (tmp_path / os.fsdecode(b"\xff.png")).write_bytes(b"")
    assert "whose name is not UTF-8" in refusal(tmp_path)


def test_an_image_that_is_there_and_damaged_is_listed(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    put_text(tmp_path / "prompts.csv", "file,prompt\na.png,x\n")
    assert rows(read_listing(tmp_path)) == [("a.png", "x", None)]


def test_a_manifest_stands_before_any_other_layout(tmp_path):
    put_image(tmp_path / "0_1.png")
    put_text(tmp_path / "prompts.txt", "from the list\n")
    put_text(tmp_path / "prompts.csv", "file,prompt\n0_1.png,from the manifest\n")
    assert rows(read_listing(tmp_path)) == [("0_1.png", "from the manifest", None)]
    assert rows(read_listing(tmp_path, "numbered")) == [("0_1.png", "from the list", 1)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_says_what_it_is_in_one_line(name):
    layout = LAYOUTS[name]
    for text in (layout.MEANING, *layout.OPTIONS.values()):
        assert text and "\n" not in text and "|" not in text
