"""Whatever lies where a text file is expected, opening it ends at once, with its text or with one sentence."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from personalize_core.errors import InputError, shown, together
from personalize_core.files import outside
from tests.mutated import outcomes, put

LAUGHS = "\n".join(
    ["a: &a [x, x]", *(f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]" for i in range(25))]
)


def refusal(read, *args) -> str:
    with pytest.raises(InputError) as refused:
        read(*args)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 700
    return str(refused.value)


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_only_regular_files_of_bounded_size_are_opened_and_nothing_waits(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("gone")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "itself").symlink_to("itself")
    large = written(tmp_path / "large", b"x" * 101)
    assert "is a FIFO" in refusal(outside.read_text, tmp_path / "fifo")
    assert "is a folder" in refusal(outside.read_text, tmp_path)
    assert "is a device" in refusal(outside.read_text, tmp_path / "zero")
    assert "a link to gone, which does not exist" in refusal(outside.read_text, tmp_path / "link")
    assert "itself" in refusal(outside.read_text, tmp_path / "itself")
    assert "does not exist" in refusal(outside.read_text, tmp_path / "nowhere" / "x")
    assert "101 bytes, and at most 100" in refusal(outside.read_text, large, 100)
    assert outside.read_bytes(large, 101) == b"x" * 101
    assert "too long" in refusal(outside.read_text, tmp_path / ("x" * 300))
    assert "cannot be the name" in refusal(outside.read_text, tmp_path / "a\0b")
    assert "too long" in refusal(outside.is_there, tmp_path / ("x" * 300))
    assert outside.is_there(tmp_path / "link") and not outside.is_there(tmp_path / "nowhere")
    assert not outside.is_there(large / "below")
    assert "too long" in refusal(outside.is_folder, tmp_path / ("x" * 300))
    assert outside.is_folder(tmp_path) and not outside.is_folder(large) and not outside.is_folder(tmp_path / "itself")
    assert outside.user_path("~/x") == Path.home() / "x" and outside.user_path("x") == Path("x")
    assert "a user who is not known here" in refusal(outside.user_path, "~nobody-of-this-name/x")
    written(tmp_path / "target", "x")
    (tmp_path / "good").symlink_to("target")
    assert outside.read_text(tmp_path / "good") == "x"


def test_a_file_that_only_claims_to_be_small_is_not_read_to_its_end():
    endless = Path("/proc/self/maps")  # says that it has no bytes
    if not endless.exists():
        pytest.skip("not Linux")
    assert "at most 10" in refusal(outside.read_bytes, endless, 10)


@pytest.mark.parametrize(
    "content, said",
    [
        ("caf\u00e9".encode("latin-1"), "line 1 has the byte 0xe9; save it as UTF-8"),
        ("one\ntwo\ncaf\u00e9".encode("latin-1"), "line 3"),
        ("a photo".encode("utf-16"), "is text in UTF-16; save it as UTF-8"),
        ("a photo".encode("utf-16-be"), "characters of value 0"),
        (b"\x80\x04\x95", "is not text in UTF-8"),
    ],
)
def test_text_in_another_encoding_is_refused_with_the_mend(content, said, tmp_path):
    assert said in refusal(outside.read_text, written(tmp_path / "list.txt", content))


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    assert outside.read_text(written(tmp_path / "list.txt", b"\xef\xbb\xbfcaf\xc3\xa9")) == "caf\u00e9"


@pytest.mark.parametrize(
    "content, said",
    [
        ("[" * 100_000, "64 levels"),
        ("{a: " * 100_000, "64 levels"),
        ("- " * 10_000, "64 levels"),
        (LAUGHS, "line 1: anchors and aliases"),
        ("a: &x 1", "anchors and aliases"),
        ("a: 1\nb: 2\na: 3", "line 3: the key 'a' stands there twice"),
        ("a: {b: 1, b: 2}", "the key 'b' stands there twice"),
        ("<<: {a: 1}\na: 2", "merge keys"),
        ("[a]: 1", "['a'] cannot be a key"),
        ("a: 2026-99-99", "is not YAML"),
        ("a: !!bool maybe", "is not YAML"),
        ("a: !!python/object/apply:os.system [true]", "is not YAML"),
        ("a: " + "9" * 5000, "is not YAML"),
        ("a:\n\t- b", "is not YAML"),
        ("a: 1\n---\nb: 2", "is not YAML"),
    ],
)
def test_yaml_that_would_take_the_program_down_or_lose_a_value_is_refused_at_once(content, said, tmp_path):
    begun = time.process_time()
    assert said in refusal(outside.read_yaml, written(tmp_path / "settings.yaml", content))
    assert time.process_time() - begun < 1


def test_good_yaml_is_read_as_pyyaml_reads_it(tmp_path):
    import yaml

    text = Path("params.yaml").read_text(encoding="utf-8")
    assert outside.parse_yaml(text, Path("params.yaml")) == yaml.safe_load(text)
    kinds = "a: [1, 2.5, true, null, x, '1', 0x10, 2026-01-02, 1e3]\n? b\n: {c: ~, d: !!str 5}\n"
    assert outside.parse_yaml(kinds, Path("x")) == yaml.safe_load(kinds)
    assert outside.parse_yaml(kinds, Path("x"), plain=True) == yaml.load(kinds, yaml.BaseLoader)
    assert outside.parse_yaml("", Path("x")) is None
    assert outside.parse_yaml("[" * 64 + "]" * 64, Path("x"))


@pytest.mark.parametrize(
    "content, said",
    [
        ("[" * 100_000, "64 levels"),
        ('{"a":' * 65 + "1" + "}" * 65, "64 levels"),
        ('{"a": 1, "a": 2}', "the key 'a' stands there twice"),
        ('{"a": "\\ud800"}', "is not JSON"),
        ("9" * 5000, "is not JSON"),
        ('{"a": 1', "is not JSON"),
        ("", "is not JSON"),
    ],
)
def test_json_that_cannot_be_used_is_refused(content, said, tmp_path):
    assert said in refusal(outside.read_json, written(tmp_path / "about.json", content))


def test_json_is_read_to_the_allowed_depth_and_an_object_is_asked_for(tmp_path):
    deep = '{"a":' * 64 + "1" + "}" * 64
    assert outside.read_json(written(tmp_path / "about.json", deep)) == json.loads(deep)
    assert outside.parse_json('"\\u00e9"', tmp_path) == "\u00e9"
    assert "should hold a JSON object" in refusal(outside.read_json_object, written(tmp_path / "list.json", "[1]"))


def test_no_message_prints_a_whole_value_or_what_a_terminal_cannot_print():
    assert len(shown("x" * 10**6)) < 120 and len(shown([["x" * 1000] * 1000] * 1000)) < 1200
    assert shown("dog") == "'dog'" and shown({"a": 1}) == "{'a': 1}"
    assert str(InputError("caf\udce9 \x1b[2J")) == "caf\\udce9 \\x1b[2J"


def test_several_problems_stand_in_one_error_each_once():
    assert str(together([InputError("a"), InputError("b"), InputError("a")])) == "2 things are wrong:\n- a\n- b"
    one = InputError("a")
    assert together([one]) is one


@pytest.mark.parametrize("kind", ["yaml", "json"])
def test_mutated_files_are_read_or_refused(kind, tmp_path):
    values = {
        "base_model": "mini",
        "seed": 0,
        "sampling": {"steps": 20, "guidance": 4.0},
        "names": ["a", "b", {"c": None}],
    }
    content = (
        b"base_model: mini\nseed: 0 # zero\nsampling: {steps: 20, guidance: 4.0}\nnames:\n  - a\n  - 'b'\n  - c: ~\n"
    )
    path = tmp_path / "x"

    def read(changed: bytes) -> object:
        put(path, changed)
        return outside.read_yaml(path) if kind == "yaml" else outside.read_json(path)

    accepted, refused = outcomes(content if kind == "yaml" else json.dumps(values).encode(), read)
    assert accepted > 100 and refused > 500 and accepted + refused == 2000
