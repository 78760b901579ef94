"""Images are decoded in another process first: what happens there, happens to that process alone."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import textwrap

import psutil
import pytest
from PIL import Image

from personalize_core.concepts import image_check
from personalize_core.concepts.image_check import check_images
from personalize_core.errors import InputError
from tests.concepts.test_image_files import grey_png


@pytest.fixture
def photo(tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    os.utime(tmp_path / "a.png", (1, 1))
    return tmp_path / "a.png"


@pytest.fixture
def process_with(monkeypatch):
    """Another process with other limits, for this test alone."""

    def limit(**limits):
        for name, value in limits.items():
            monkeypatch.setattr(image_check, name, value)
        image_check.end()

    yield limit
    image_check.end()


def refusal(path) -> str:
    with pytest.raises(InputError) as refused:
        check_images([path])
    assert str(refused.value).startswith(str(path)) and "\n" not in str(refused.value)
    return str(refused.value)


def test_it_gives_the_size_of_each_image_as_it_stands_upright(photo, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (16, 12)).save(tmp_path / "b.png", exif=exif)
    assert check_images([tmp_path / "b.png", photo]) == [(12, 16), (40, 30)]


def test_a_path_is_one_of_the_present_folder(photo, tmp_path, monkeypatch):
    check_images([photo])  # the process is there, and was started elsewhere
    monkeypatch.chdir(tmp_path)
    assert check_images([photo.relative_to(tmp_path)]) == [(40, 30)]
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"^b.png cannot be read as an image"):
        check_images([(tmp_path / "b.png").relative_to(tmp_path)])


def test_what_is_wrong_is_said_as_the_loader_says_it(tmp_path):
    (tmp_path / "empty.jpg").touch()
    assert refusal(tmp_path / "empty.jpg").endswith("is empty; replace it or take it out of the folder")
    assert refusal(tmp_path / "none.jpg").endswith("does not exist")
    with pytest.raises(InputError, match="x' cannot be opened: File name too long"):
        check_images([tmp_path / ("x" * 300)])


def test_an_image_is_decoded_again_only_when_it_has_changed(photo, monkeypatch):
    asked = []
    plain = image_check._asked
    monkeypatch.setattr(image_check, "_asked", lambda *question: asked.append(1) or plain(*question))
    check_images([photo])
    asked.clear()
    past = image_check.time.time_ns() + 10**9
    monkeypatch.setattr(image_check.time, "time_ns", lambda: past)  # a file that was just written may change again
    check_images([photo])
    check_images([photo])
    assert len(asked) <= 1
    content = bytearray(photo.read_bytes())
    content[-20] ^= 1
    photo.write_bytes(content)  # as long as before
    assert "a checksum is wrong" in refusal(photo)
    assert "a checksum is wrong" in refusal(photo)


def test_an_image_that_takes_too_much_memory_is_refused_and_the_next_one_read(tmp_path, photo, process_with):
    process_with(MEMORY=250 * 2**20)
    (tmp_path / "large.png").write_bytes(grey_png(7000, 7000))  # 49 megapixels in 48 KB
    assert "decoding it takes more than 0.2 GB of memory" in refusal(tmp_path / "large.png")
    assert check_images([photo]) == [(40, 30)]


def test_an_image_that_takes_too_long_is_refused_and_the_next_one_read(tmp_path, photo, process_with):
    process_with(CPU_SECONDS=0.5)
    content = io.BytesIO()
    Image.new("L", (4000, 4000)).save(content, "JPEG", progressive=True)
    whole = content.getvalue()[:-2]
    last = whole[whole.rindex(b"\xff\xda") :]  # a scan of every pixel, in 1 KB; a decoder follows each of them
    (tmp_path / "slow.jpg").write_bytes(whole + 400 * last + b"\xff\xd9")
    assert "decoding it takes more than 0.5 seconds" in refusal(tmp_path / "slow.jpg")
    assert check_images([photo]) == [(40, 30)]


def test_a_process_that_was_ended_is_started_again(photo, tmp_path):
    check_images([photo])
    first = image_check._process
    assert first is not None
    first.kill()
    first.wait()
    Image.new("RGB", (9, 8)).save(tmp_path / "b.png")
    assert check_images([tmp_path / "b.png"]) == [(9, 8)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_has_a_process_of_its_own(photo, tmp_path):
    Image.new("RGB", (9, 8)).save(tmp_path / "b.png")
    check_images([tmp_path / "b.png"])
    process = image_check._process
    assert process is not None
    child = os.fork()
    if child == 0:
        try:
            image_check._known.clear()
            found, own = check_images([tmp_path / "b.png"]), image_check._process
            image_check.end()
            os._exit(0 if found == [(9, 8)] and own and own.pid != process.pid else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert process.poll() is None and check_images([tmp_path / "b.png"]) == [(9, 8)]
    assert image_check._process is process


def test_it_ends_with_the_program_however_that_ends(photo):
    program = f"""
        import os, signal, sys
        from pathlib import Path
        from personalize_core.concepts import image_check
        image_check.check_images([Path({str(photo)!r})])
        print(image_check._process.pid, flush=True)
        if sys.argv[1] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
    """
    for how, code in (("ended", 0), ("killed", -signal.SIGKILL)):
        ended = subprocess.run([sys.executable, "-c", textwrap.dedent(program), how], capture_output=True, text=True)
        assert ended.returncode == code and ended.stderr == ""
        try:
            psutil.Process(int(ended.stdout)).wait(timeout=30)
        except psutil.NoSuchProcess:
            pass
