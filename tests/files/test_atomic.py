"""Files are whole or not there, and a stamp says what they were made from."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from personalize_core.files import atomic, stamps
from personalize_core.files.atomic import (
    MANIFEST,
    changed_files,
    is_up_to_date,
    read_json,
    read_record,
    record_of_result,
    save_tensors,
    whole_folder,
    write_bytes,
    write_json,
)
from personalize_core.files.stamps import sources_hash, stamp_of

ROOT = Path(__file__).parents[2]


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Failure(Exception):
    pass


# -- single files ----------------------------------------------------------------------------------------------


def test_json_is_read_as_it_was_written_in_any_locale(tmp_path):
    write_json(tmp_path / "said.json", {"said": "größer"})
    program = "import sys, pathlib; from personalize_core.files.atomic import read_json as read; "
    program += "print(ascii(read(pathlib.Path(sys.argv[1]))['said']))"
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # text is ASCII there
    run = [sys.executable, "-c", program, str(tmp_path / "said.json")]
    said = subprocess.run(run, env={**os.environ, **plain}, capture_output=True, text=True)
    assert said.stdout.strip() == ascii("größer"), said.stderr


def test_a_file_is_written_with_the_folders_it_needs(tmp_path):
    write_bytes(tmp_path / "deep" / "er" / "file", b"content")
    assert (tmp_path / "deep" / "er" / "file").read_bytes() == b"content"
    assert names(tmp_path / "deep" / "er") == ["file"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_bytes(tmp_path / "file", b"old")

    def fail(*args):
        raise Failure

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(Failure):
        write_bytes(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_json_is_read_back_and_does_not_depend_on_the_order_of_keys(tmp_path):
    write_json(tmp_path / "a.json", {"b": [1, 2.5], "a": "ü"})
    write_json(tmp_path / "b.json", {"a": "ü", "b": [1, 2.5]})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert read_json(tmp_path / "a.json") == {"a": "ü", "b": [1, 2.5]}


def test_the_same_tensors_give_the_same_bytes_whatever_their_order(tmp_path):
    tensors = {name: torch.randn(3, 4) for name in "cab"}
    save_tensors(tmp_path / "a", tensors, {"note": "n"})
    save_tensors(tmp_path / "b", dict(reversed(tensors.items())), {"note": "n"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    read = load_file(tmp_path / "a")
    assert all(torch.equal(read[name], tensors[name]) for name in "cab")


def test_tensors_replace_a_file_whole_and_others_may_read_them(tmp_path):
    path = tmp_path / "a"
    save_tensors(path, {"t": torch.zeros(3)})
    save_tensors(path, {"t": torch.ones(3)})
    write_bytes(tmp_path / "b", b"")
    assert path.stat().st_mode == (tmp_path / "b").stat().st_mode
    assert torch.equal(load_file(path)["t"], torch.ones(3)) and sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_tensors_that_cannot_be_written_leave_the_old_file_and_the_systems_error(tmp_path):
    """In a process of its own, whose files may not be large."""
    path = tmp_path / "a"
    save_tensors(path, {"t": torch.zeros(3)})
    script = f"""
import resource, torch
from pathlib import Path
from personalize_core.files.atomic import save_tensors
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    save_tensors(Path({str(path)!r}), {{"t": torch.ones(10000)}})
except OSError as error:
    print(error.errno, error.filename)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == [str(errno.EFBIG), str(path)]
    assert torch.equal(load_file(path)["t"], torch.zeros(3)) and os.listdir(tmp_path) == ["a"]


def test_a_view_that_asks_for_gradients_is_saved_as_plain_numbers(tmp_path):
    tensor = torch.randn(4, 6, requires_grad=True)
    save_tensors(tmp_path / "a", {"t": tensor.T[1:]})
    assert torch.equal(load_file(tmp_path / "a")["t"], tensor.T[1:].detach())


# -- stamps ----------------------------------------------------------------------------------------------------


def test_a_stamp_is_equal_exactly_if_all_that_it_names_is():
    same = [stamp_of({"seed": 1, "config": {"lr": 0.1}}), stamp_of({"config": {"lr": 0.1}, "seed": 1})]
    others = [
        stamp_of({"seed": 2, "config": {"lr": 0.1}}),
        stamp_of({"seed": 1, "config": {"lr": 0.2}}),
        stamp_of({"seed": "1", "config": {"lr": 0.1}}),
        stamp_of({"seed": 1}),
    ]
    assert same[0] == same[1]
    assert len({same[0], *others}) == 5


def test_the_hash_of_sources_follows_their_text(tmp_path, monkeypatch):
    monkeypatch.setattr(stamps, "__file__", str(tmp_path / "files" / "stamps.py"))
    (tmp_path / "methods").mkdir()
    (tmp_path / "train.py").write_text("1")
    (tmp_path / "methods" / "one.py").write_text("2")
    before = sources_hash(["train", "methods/one"])
    assert sources_hash(["methods/one", "train"]) == before
    (tmp_path / "methods" / "one.py").write_text("3")
    assert sources_hash(["train", "methods/one"]) != before


def test_the_hash_of_a_package_follows_each_of_its_files_wherever_it_lies(tmp_path, monkeypatch):
    monkeypatch.setattr(stamps, "__file__", str(tmp_path / "files" / "stamps.py"))
    (tmp_path / "figures" / "deep").mkdir(parents=True)
    (tmp_path / "figures" / "__init__.py").write_text("")
    hashes = [sources_hash(["figures"])]
    for name, text in (("style.py", "1"), ("style.py", "2"), ("deep/grid.py", "1"), ("deep/grid.py", "2")):
        (tmp_path / "figures" / name).write_text(text)
        hashes.append(sources_hash(["figures"]))
    (tmp_path / "figures" / "style.py").rename(tmp_path / "figures" / "deep" / "style.py")
    assert len({*hashes, sources_hash(["figures"])}) == 6


def test_the_hash_of_a_folder_of_texts_follows_each_of_them_and_their_names(tmp_path, monkeypatch):
    monkeypatch.setattr(stamps, "__file__", str(tmp_path / "files" / "stamps.py"))
    (tmp_path / "lists").mkdir()
    (tmp_path / "train.py").write_text("1")
    (tmp_path / "lists" / "a.txt").write_text("a {}")
    hashes = [sources_hash(["train", "lists"])]
    for name, text in (("a", "one {}"), ("b", "a {}"), ("b", "two {}")):
        (tmp_path / "lists" / f"{name}.txt").write_text(text)
        hashes.append(sources_hash(["train", "lists"]))
    (tmp_path / "lists" / "b.txt").rename(tmp_path / "lists" / "c.txt")
    assert len({*hashes, sources_hash(["train", "lists"])}) == 5


# -- folders ---------------------------------------------------------------------------------------------------


def fill(folder, stamp, content="content"):
    with whole_folder(folder, stamp) as new:
        (new / "sub").mkdir()
        (new / "sub" / "file").write_text(content)


def test_a_folder_appears_with_its_stamp_and_a_list_of_its_files(tmp_path):
    fill(tmp_path / "result", "s1")
    manifest = read_json(tmp_path / "result" / MANIFEST)
    assert manifest["stamp"] == "s1"
    assert manifest["files"] == {
        "sub/file": {"bytes": 7, "sha256": stamps.sha256(tmp_path / "result" / "sub" / "file")}
    }
    assert is_up_to_date(tmp_path / "result", "s1") and not is_up_to_date(tmp_path / "result", "s2")
    assert names(tmp_path) == ["result"]


def test_it_is_not_there_before_it_is_whole(tmp_path):
    with whole_folder(tmp_path / "result", "s1") as new:
        (new / "file").touch()
        assert not (tmp_path / "result").exists()
        assert all(name.startswith(".") for name in names(tmp_path))


def test_a_failure_inside_leaves_nothing(tmp_path):
    with pytest.raises(Failure), whole_folder(tmp_path / "result", "s1") as new:
        (new / "half").touch()
        raise Failure
    assert names(tmp_path) == []


def test_a_failure_inside_leaves_the_old_folder(tmp_path):
    fill(tmp_path / "result", "s1", "old")
    with pytest.raises(Failure), whole_folder(tmp_path / "result", "s2") as new:
        (new / "half").touch()
        raise Failure
    assert is_up_to_date(tmp_path / "result", "s1")
    assert (tmp_path / "result" / "sub" / "file").read_text() == "old"
    assert names(tmp_path) == ["result"]


def test_a_new_folder_replaces_the_old_one_whole(tmp_path):
    with whole_folder(tmp_path / "result", "s1") as new:
        (new / "only in the old one").touch()
    fill(tmp_path / "result", "s2")
    assert names(tmp_path / "result") == [MANIFEST, "sub"]
    assert is_up_to_date(tmp_path / "result", "s2")
    assert names(tmp_path) == ["result"]


def test_the_old_folder_comes_back_when_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    fill(tmp_path / "result", "s1", "old")
    rename = os.rename

    def fail_the_second_time(source, target):
        if target == tmp_path / "result" and "s2" in (source / MANIFEST).read_text():
            raise Failure
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_the_second_time)
    with pytest.raises(Failure):
        fill(tmp_path / "result", "s2")
    assert is_up_to_date(tmp_path / "result", "s1")
    assert names(tmp_path) == ["result"]


def test_a_folder_that_lost_or_changed_a_file_is_not_current(tmp_path):
    for damage in (lambda file: file.unlink(), lambda file: file.write_text("shorter or longer")):
        fill(tmp_path / "result", "s1")
        damage(tmp_path / "result" / "sub" / "file")
        assert not is_up_to_date(tmp_path / "result", "s1")


def rewritten(folder, content: str = "CONTENT") -> None:
    assert len(content) == (folder / "sub" / "file").stat().st_size
    (folder / "sub" / "file").write_text(content)


def swapped(folder) -> None:
    """Renaming keeps a file's time of modification."""
    (folder.parent / "other").write_text("CONTENT")
    os.utime(folder.parent / "other", ns=(1, 1))
    os.replace(folder.parent / "other", folder / "sub" / "file")


@pytest.mark.parametrize("damage", [rewritten, swapped])
def test_a_folder_with_other_bytes_of_the_same_size_is_not_up_to_date(damage, tmp_path):
    folder = tmp_path / "result"
    fill(folder, "s1")
    assert is_up_to_date(folder, "s1")
    damage(folder)
    assert not is_up_to_date(folder, "s1")
    assert changed_files(folder, read_json(folder / MANIFEST)["files"]) == ["sub/file"]
    rewritten(folder, "content")
    assert is_up_to_date(folder, "s1")


def test_a_file_is_hashed_once_after_it_was_touched_and_not_otherwise(tmp_path, monkeypatch):
    folder, hashed, later = tmp_path / "result", [], time.time_ns() + 10**9
    fill(folder, "s1")
    monkeypatch.setattr(atomic, "sha256", lambda path: hashed.append(path.name) or stamps.sha256(path))
    monkeypatch.setattr(atomic.time, "time_ns", lambda: later)  # of the first look
    assert is_up_to_date(folder, "s1")
    hashed.clear()  # of a file as new as its manifest nobody knows which was there first
    assert is_up_to_date(folder, "s1") and not hashed
    os.utime(folder / "sub" / "file", ns=(later + 1, later + 1))
    later += 10**9
    assert is_up_to_date(folder, "s1") and is_up_to_date(folder, "s1") and hashed == ["file"]


def test_a_manifest_from_the_future_vouches_for_nothing(tmp_path):
    folder = tmp_path / "result"
    fill(folder, "s1")
    os.utime(folder / MANIFEST, ns=(2**62, 2**62))
    assert is_up_to_date(folder, "s1")
    rewritten(folder)
    assert not is_up_to_date(folder, "s1")


@pytest.mark.parametrize("manifest", ["", "{", "null", "[]", "{}", '{"stamp": "s1"}', '{"stamp": "s1", "files": [1]}'])
def test_a_damaged_manifest_is_not_current(manifest, tmp_path):
    (tmp_path / MANIFEST).write_text(manifest)
    assert not is_up_to_date(tmp_path, "s1")


@pytest.mark.parametrize("written", [None, "", '{"half', "[1]", "null"])
def test_a_record_that_is_gone_or_damaged_says_nothing(written, tmp_path):
    if written is not None:
        (tmp_path / "record.json").write_text(written)
    assert read_record(tmp_path / "record.json") == {}


def test_a_record_counts_for_the_result_that_it_was_made_with_alone(tmp_path):
    record, folder = tmp_path / "record.json", tmp_path / "result"
    write_json(record, {"seconds": 3})
    assert record_of_result(record, folder) == {}  # neither has a stamp
    with whole_folder(folder, "first"):
        pass
    assert record_of_result(record, folder) == {}
    write_json(record, {"stamp": "first", "seconds": 3})
    assert record_of_result(record, folder)["seconds"] == 3
    with whole_folder(folder, "second"):
        pass
    assert record_of_result(record, folder) == {}


def test_what_is_not_there_is_not_current(tmp_path):
    assert not is_up_to_date(tmp_path / "nothing", "s1")


# What a process that was killed leaves


def killed_while(doing: str, folder) -> None:
    """A process of its own does that, and is killed in the middle of it."""
    script = f"""
import os, signal
from pathlib import Path
from personalize_core.files.atomic import os as files_os, whole_folder, write_bytes
folder = Path({str(folder)!r})
files_os.replace = files_os.rename = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
{doing}
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    "doing",
    ["write_bytes(folder / 'a', b'half')", "with whole_folder(folder / 'a', 's') as new: write_bytes(new / 'b', b'')"],
    ids=["a file", "a folder"],
)
def test_what_a_killed_process_left_goes_with_the_next_writing(doing, tmp_path):
    killed_while(doing, tmp_path)
    assert len(names(tmp_path)) == 1 and names(tmp_path)[0].endswith(".tmp")
    write_bytes(tmp_path / "c", b"whole")
    assert names(tmp_path) == ["c"]


def test_what_another_process_is_still_writing_stays(tmp_path):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        theirs = atomic._beside(tmp_path / "theirs").name.replace(f".{os.getpid()}.", f".{other.pid}.")
        (tmp_path / theirs).mkdir()
        with whole_folder(tmp_path / "ours", "s"), whole_folder(tmp_path / "also_ours", "s"):
            assert len(names(tmp_path)) == 3
        assert names(tmp_path) == [theirs, "also_ours", "ours"]
        other.communicate()
    write_bytes(tmp_path / "c", b"whole")
    assert names(tmp_path) == ["also_ours", "c", "ours"]


def test_what_is_written_on_another_machine_stays(tmp_path, monkeypatch):
    """A process number says nothing there; what a lost machine left is for a person to remove."""
    monkeypatch.setattr(atomic, "machine", lambda: "0" * 8)
    theirs = atomic._beside(tmp_path / "theirs").name.replace(f".{os.getpid()}.", ".999999999.")
    (tmp_path / theirs).touch()
    monkeypatch.undo()
    write_bytes(tmp_path / "c", b"whole")
    assert names(tmp_path) == [theirs, "c"]


def test_what_an_earlier_process_of_our_own_number_left_goes(tmp_path):
    """As in a container, where every process may be number 1."""
    left = tmp_path / atomic._beside(tmp_path / "left").name
    left.touch()
    atomic._WRITING.discard(left.name)
    write_bytes(tmp_path / "c", b"whole")
    assert names(tmp_path) == ["c"]
