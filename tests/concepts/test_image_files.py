"""Image files from outside are loaded as upright RGB in sRGB, or refused with a sentence that names the file."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from personalize_core.concepts import image_files as files
from personalize_core.concepts.image_files import image_files, listing, load_image
from personalize_core.errors import InputError
from tests.concepts.quarters import BLUE, GREEN, RED, WHITE, corners, quarters
from tests.mutated import outcomes, put


def saved(image: Image.Image, path: Path, **options) -> Path:
    image.save(path, **options)
    return path


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as refused:
        load_image(path)
    assert str(refused.value).startswith(str(path)) and "\n" not in str(refused.value)
    return str(refused.value)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def grey_png(width: int, height: int, pixels: bytes | None = None) -> bytes:
    """A PNG that is black, and small whatever its size: each row is a 0 for the filter, and zeros."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes((width + 1) * height) if pixels is None else pixels)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


# -- what an image becomes ------------------------------------------------------------------------------------------


TURNED = {  # EXIF 2.3, tag 0x0112: where the stored rows and columns begin
    1: [RED, GREEN, BLUE, WHITE],
    2: [GREEN, RED, WHITE, BLUE],
    3: [WHITE, BLUE, GREEN, RED],
    4: [BLUE, WHITE, RED, GREEN],
    5: [RED, BLUE, GREEN, WHITE],
    6: [BLUE, RED, WHITE, GREEN],
    7: [WHITE, GREEN, BLUE, RED],
    8: [GREEN, WHITE, RED, BLUE],
}


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".avif", ".tif"])
@pytest.mark.parametrize("orientation", TURNED)
def test_an_image_is_upright_as_its_exif_says(orientation, suffix, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = load_image(saved(quarters(), tmp_path / f"photo{suffix}", exif=exif, quality=100))
    assert np.abs(np.array(corners(image)) - TURNED[orientation]).max() < 8  # some formats are lossy
    assert image.size == ((32, 16) if orientation < 5 else (16, 32))


def jpeg_with_tag(kind: int, value: bytes) -> bytes:
    """A JPEG whose EXIF says that it lies on its side, and gives its width (tag 256) as a value of another type."""
    entries = [(0x0100, kind, 1 if kind == 10 else len(value), struct.pack("<I", 38)), (0x0112, 3, 1, b"\6\0\0\0")]
    table = b"".join(struct.pack("<HHI", tag, type_, count) + at for tag, type_, count, at in entries)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + table + bytes(4) + value
    content = io.BytesIO()
    quarters().save(content, "JPEG", quality=100, subsampling=0)
    return content.getvalue()[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + content.getvalue()[2:]


@pytest.mark.parametrize("tag", [(2, b"sixteen\0"), (10, struct.pack("<ii", -1, 3))], ids=["text", "signed rational"])
def test_exif_that_pillow_cannot_write_again_does_not_matter(tag, tmp_path):
    path = written(tmp_path / "telephone.jpg", jpeg_with_tag(*tag))
    assert np.abs(np.array(corners(load_image(path))) - TURNED[6]).max() < 8


def test_a_grey_image_becomes_rgb(tmp_path):
    image = load_image(saved(Image.new("L", (8, 8), 77), tmp_path / "grey.png"))
    assert image.mode == "RGB" and image.getpixel((0, 0)) == (77, 77, 77)


LEVELS = np.array([[0, 257, 257 * 128, 65535]] * 8, dtype=np.uint16).repeat(2, axis=1)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_of_grey_become_eight(suffix, tmp_path):
    image = load_image(saved(Image.fromarray(LEVELS), tmp_path / f"deep{suffix}"))
    assert [image.getpixel((x, 0)) for x in (0, 2, 4, 6)] == [(v, v, v) for v in (0, 1, 128, 255)]


def test_the_transparent_one_of_sixteen_bits_of_grey_becomes_white(tmp_path):
    image = load_image(saved(Image.fromarray(LEVELS), tmp_path / "deep.png", transparency=257 * 128))
    assert [image.getpixel((x, 0)) for x in (0, 2, 4, 6)] == [(v, v, v) for v in (0, 1, 255, 255)]


def test_transparent_parts_become_white(tmp_path):
    image = quarters().convert("RGBA")
    image.putpixel((0, 0), (0, 0, 0, 0))
    assert corners(load_image(saved(image, tmp_path / "cut.png"))) == [WHITE, GREEN, BLUE, WHITE]


def test_a_palette_is_looked_up_and_its_transparent_entry_white(tmp_path):
    image = quarters().convert("P", palette=Image.Palette.ADAPTIVE, colors=4)
    path = saved(image, tmp_path / "palette.png")
    assert corners(load_image(path)) == [RED, GREEN, BLUE, WHITE]
    path = saved(image, tmp_path / "transparent.png", transparency=image.getpixel((31, 0)))
    assert corners(load_image(path)) == [RED, WHITE, BLUE, WHITE]


def test_cmyk_becomes_rgb(tmp_path):
    image = load_image(saved(quarters().convert("CMYK"), tmp_path / "print.tif"))
    assert image.mode == "RGB" and corners(image) == [RED, GREEN, BLUE, WHITE]


@pytest.mark.parametrize("name", ["a.gif", "a.jfif", "a.avif", "a.bmp", "a.webp", "a.mpo"])
def test_other_formats_are_read_and_of_several_images_the_first(name, tmp_path):
    kind = {"a.jfif": "JPEG"}.get(name)
    more = {"save_all": True, "append_images": [Image.new("RGB", (32, 16))]} if name in ("a.gif", "a.mpo") else {}
    path = saved(quarters(), tmp_path / name, format=kind, quality=100, **more)
    assert np.abs(np.array(corners(load_image(path))) - [RED, GREEN, BLUE, WHITE]).max() < 8


# -- colour profiles ------------------------------------------------------------------------------------------------

# Display P3 -> sRGB for linear light, of CSS Color 4, section 17; a white of one is a white of the other.
P3_TO_SRGB = np.array(
    [[1.2249401, -0.2249404, 0], [-0.0420569, 1.0420571, 0], [-0.0196376, -0.0786361, 1.0982735]],
)
# The primaries of Display P3 in XYZ, adapted to D50 (as in Apple's profile).
P3_PRIMARIES = [(0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407)]


def icc(kind: bytes, tags: dict[bytes, bytes]) -> bytes:
    """A profile by ICC.1:2001-04, section 6: a header, a table of tags, and what each of them holds."""
    white = struct.pack(">iii", *(round(value * 65536) for value in (0.9642, 1, 0.8249)))  # D50
    named = {b"desc": b"desc" + bytes(4) + struct.pack(">I", 2) + b"x\0" + bytes(78), b"cprt": b"text\0\0\0\0x\0"}
    tags = named | {b"wtpt": b"XYZ " + bytes(4) + white} | tags
    table, content = struct.pack(">I", len(tags)), b""
    for name, value in tags.items():
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(content), len(value))
        content += value + bytes(-len(value) % 4)
    head = b"test" + bytes((2, 0x10, 0, 0)) + b"mntr" + kind + b"XYZ " + bytes(12) + b"acsp" + bytes(28) + white
    return struct.pack(">I", 132 + 12 * len(tags) + len(content)) + head + bytes(48) + table + content


def gamma(exponent: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(exponent * 256))


def display_p3() -> bytes:
    """With a gamma of 2.2 in place of its curve, so that the expected values are easily worked out."""
    tags = {}
    for name, primary in zip("rgb", P3_PRIMARIES, strict=True):
        tags[f"{name}XYZ".encode()] = b"XYZ " + bytes(4) + struct.pack(">iii", *(round(v * 65536) for v in primary))
        tags[f"{name}TRC".encode()] = gamma(2.2)
    return icc(b"RGB ", tags)


def in_srgb(linear: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1, of values in [0, 1]; what lies outside is cut."""
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif", ".avif"])
def test_the_colours_of_a_wide_gamut_become_those_of_srgb(suffix, tmp_path):
    worst = 0.0
    for colour in [(60, 200, 60), (200, 90, 40), (128, 128, 128), (255, 255, 255), (10, 60, 120)]:
        expected = in_srgb(P3_TO_SRGB @ (np.array(colour) / 255) ** 2.2)
        lossless = {".webp": {"lossless": True}, ".jpg": {"subsampling": 0}}.get(suffix, {})
        options = {"quality": 100, "icc_profile": display_p3()} | lossless
        path = saved(Image.new("RGB", (16, 16), colour), tmp_path / f"wide{suffix}", **options)
        worst = max(worst, float(np.abs(np.array(load_image(path).getpixel((8, 8))) - expected).max()))
    assert worst < (3 if suffix in (".jpg", ".avif") else 1.5)  # a level for rounding, one or two for the coding


def test_a_profile_of_grey_is_followed_and_transparent_grey_is_white(tmp_path):
    profile, image = icc(b"GRAY", {b"kTRC": gamma(1)}), Image.new("LA", (8, 8), (55, 255))
    image.putpixel((7, 7), (55, 0))
    found = load_image(saved(image, tmp_path / "linear.png", icc_profile=profile))
    assert found.getpixel((0, 0)) == (128, 128, 128)  # 55 / 255 = 0.216 of linear light
    assert found.getpixel((7, 7)) == WHITE


def test_an_srgb_profile_changes_nothing(tmp_path):
    from PIL import ImageCms

    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert load_image(saved(noise, tmp_path / "s.png", icc_profile=own)).tobytes() == noise.tobytes()


@pytest.mark.parametrize(
    ("profile", "said"),
    [
        (b"no profile", "has a colour profile that cannot be read; save it in sRGB, or without a profile"),
        (icc(b"GRAY", {b"kTRC": gamma(1)}), "has RGB pixels and a colour profile for GRAY; save it in sRGB"),
    ],
    ids=["damaged", "of other pixels"],
)
def test_a_profile_that_cannot_be_followed_is_not_ignored(profile, said, tmp_path):
    assert refusal(saved(quarters(), tmp_path / "x.png", icc_profile=profile)).endswith(said)


# -- what is refused ------------------------------------------------------------------------------------------------


def test_an_unreadable_image_is_named_with_what_is_wrong(tmp_path):
    whole = saved(quarters(80, 60), tmp_path / "whole.jpg").read_bytes()
    assert "is empty" in refusal(written(tmp_path / "empty.jpg", b""))
    for content in (b"not an image", whole[: len(whole) // 2], b"GIF89a and no more"):
        said = refusal(written(tmp_path / "a.png", content))
        assert "cannot be read as an image" in said and said.endswith("; replace it or take it out of the folder")
    with pytest.raises(InputError, match="/none.png does not exist"):
        load_image(tmp_path / "none.png")


def test_a_file_is_opened_as_one_of_the_formats_that_are_meant_whatever_its_name(tmp_path, monkeypatch):
    from PIL import EpsImagePlugin

    def started(*arguments, **options):
        raise AssertionError("a program was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", started)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", "gs")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\n{} loop\n"
    ppm = b"P6 16 16 255\n" + bytes(768)
    for content in (eps, ppm):
        assert "it is none of JPEG, PNG" in refusal(written(tmp_path / "photo.jpg", content))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "is HEIC, which is not read here; convert to JPEG (`heif-convert"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "`git lfs pull` fetches it"),
    ],
)
def test_what_is_known_not_to_be_an_image_is_said(content, said, tmp_path):
    assert said in refusal(written(tmp_path / "IMG_1.jpg", content))


@pytest.mark.parametrize("kind", [np.float32, np.int32, np.int16])
def test_pixels_whose_black_and_white_are_unknown_are_refused(kind, tmp_path):
    ramp = np.linspace(0, 1 if kind is np.float32 else 30000, 256).astype(kind).reshape(16, 16)
    pixels = Image.fromarray(ramp) if kind is not np.int16 else Image.fromarray(ramp.astype(np.int32))
    assert "the file does not say which values are black and white" in refusal(saved(pixels, tmp_path / "x.tif"))


@pytest.mark.parametrize("damage", ["a pixel", "the checksum"])
def test_a_png_whose_checksum_is_wrong_is_refused(damage, tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    content = bytearray(saved(noise, tmp_path / "x.png", compress_level=0).read_bytes())
    start = content.index(b"IDAT")
    (length,) = struct.unpack_from(">I", content, start - 4)
    content[start + (100 if damage == "a pixel" else 4 + length)] ^= 1
    assert "it is damaged (a checksum is wrong)" in refusal(written(tmp_path / "x.png", bytes(content)))


def test_a_png_whose_second_half_is_lost_is_refused(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    content = saved(noise, tmp_path / "x.png").read_bytes()
    half = len(content) // 2
    for lost in (b"", bytes(len(content) - half)):
        assert "cannot be read as an image" in refusal(written(tmp_path / "x.png", content[:half] + lost))


def jpeg_of_size(width: int, height: int) -> bytes:
    content = io.BytesIO()
    quarters().save(content, "JPEG")
    changed = bytearray(content.getvalue())
    at = changed.index(b"\xff\xc0") + 5  # ITU T.81, B.2.2: the frame's height and width
    changed[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(changed)


def webp_of_size(width: int, height: int) -> bytes:
    content = io.BytesIO()
    quarters().save(content, "WEBP", save_all=True, append_images=[Image.new("RGB", (32, 16))])
    changed = bytearray(content.getvalue())
    assert changed[12:16] == b"VP8X"  # RFC 9649, 2.7: the canvas
    changed[24:30] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return bytes(changed)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (grey_png(1, 3), "has 1 x 3 pixels; each side needs at least 8"),
        (grey_png(1, 3000), "has 1 x 3,000 pixels; each side needs at least 8"),
        (grey_png(1, 30000), "has 1 x 30,000 pixels; make its longer side at most 20,000"),
        (grey_png(8, 400), "has 8 x 400 pixels; crop it, so that its longer side is at most 20 times its shorter one"),
        (jpeg_of_size(12000, 12000), "has 12,000 x 12,000 pixels; make it smaller than 100 megapixels"),
        (jpeg_of_size(65000, 65000), "has too many pixels; make it smaller than 100 megapixels"),
        (webp_of_size(3_000_000, 30), "has 3,000,000 x 30 pixels; make its longer side at most 20,000"),
        (webp_of_size(16_000_000, 16_000), "has too many pixels; make it smaller than 100 megapixels"),
    ],
)
def test_an_image_is_refused_by_its_size_before_it_is_decoded(content, said, tmp_path, monkeypatch):
    from PIL import ImageFile

    def decoded(*arguments):
        raise AssertionError("it was decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decoded)
    monkeypatch.setattr("PIL.WebPImagePlugin.WebPImageFile.load", decoded)
    assert said in refusal(written(tmp_path / "x.png", content))


def test_a_file_that_is_larger_than_any_image_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MOST_BYTES", 100)
    assert "at most 100 are read of such a file" in refusal(saved(quarters(), tmp_path / "x.bmp"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_what_is_no_regular_file_is_never_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo.jpg")
    os.symlink("/dev/zero", tmp_path / "zeros.jpg")
    os.symlink("loop.jpg", tmp_path / "loop.jpg")
    assert "is a FIFO" in refusal(tmp_path / "fifo.jpg")
    assert "is a device" in refusal(tmp_path / "zeros.jpg")
    with pytest.raises(InputError, match="loop.jpg"):
        load_image(tmp_path / "loop.jpg")


def as_bytes(save: Callable[[io.BytesIO], None]) -> bytes:
    content = io.BytesIO()
    save(content)
    return content.getvalue()


def exif() -> Image.Exif:
    found = Image.Exif()
    found.update({0x0112: 6, 0x010F: "Maker", 0x0132: "2026:01:01 00:00:00"})
    return found


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8))
MUTATED = {
    "JPEG": as_bytes(lambda file: NOISE.save(file, "JPEG", exif=exif(), icc_profile=display_p3())),
    "progressive JPEG": as_bytes(lambda file: NOISE.save(file, "JPEG", progressive=True)),
    "PNG": as_bytes(lambda file: NOISE.quantize(8).save(file, "PNG", exif=exif(), transparency=1)),
    "WEBP": as_bytes(lambda file: NOISE.save(file, "WEBP", exif=exif(), icc_profile=display_p3())),
    "AVIF": as_bytes(lambda file: NOISE.save(file, "AVIF", exif=exif(), speed=10)),
    "BMP": as_bytes(lambda file: NOISE.save(file, "BMP")),
    "TIFF": as_bytes(lambda file: NOISE.save(file, "TIFF", exif=exif())),
    "packed TIFF": as_bytes(lambda file: NOISE.save(file, "TIFF", compression="tiff_lzw")),
    "GIF": as_bytes(lambda file: NOISE.save(file, "GIF", save_all=True, append_images=[quarters(16, 12)])),
}


@pytest.mark.parametrize("kind", MUTATED)
def test_a_mutated_image_is_read_or_refused(kind, tmp_path):
    path = tmp_path / "mutated.jpg"

    def read(content: bytes) -> None:
        put(path, content)
        try:
            image = load_image(path)
            assert image.mode == "RGB" and max(image.size) <= files.MOST_SIDE
        except InputError as error:
            assert str(path) in str(error)
            raise

    accepted, refused = outcomes(MUTATED[kind], read, count=300)
    assert refused > 50 and accepted + refused == 300


# -- the images of a folder -----------------------------------------------------------------------------------------


def test_a_folders_images_are_found_by_name_in_order(tmp_path):
    for name in ("b.PNG", "a.jpeg", ".hidden.png", "notes.txt", "c.webp"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in image_files(tmp_path)] == ["a.jpeg", "b.PNG", "c.webp"]


def test_what_systems_and_trainers_write_beside_images_is_told_from_what_may_be_an_image(tmp_path):
    side = ["Thumbs.db", "desktop.ini", "._a.jpg", ".DS_Store", "a.npz", "a.txt", "a.caption", "a.json", "a.XMP"]
    unknown = ["IMG_1.HEIC", "a.cr2", "IMG_0001", "more.zip"]
    for name in ["a.jpg", *side, *unknown]:
        (tmp_path / name).touch()
    found = listing(tmp_path)
    assert [path.name for path in found.images] == ["a.jpg"] and found.folders == []
    assert [path.name for path in found.side_files] == sorted(side)
    assert [path.name for path in found.unknown] == sorted(unknown)


def test_a_name_of_an_image_that_leads_to_none_is_refused(tmp_path):
    os.symlink(tmp_path / "nowhere.jpg", tmp_path / "a.jpg")
    with pytest.raises(InputError, match="a.jpg is a link that leads nowhere; put the image itself there, or take it"):
        image_files(tmp_path)
    (tmp_path / "a.jpg").unlink()
    saved(quarters(), tmp_path / "elsewhere", format="PNG")
    os.symlink(tmp_path / "elsewhere", tmp_path / "a.jpg")  # as the caches of datasets have them
    assert load_image(*image_files(tmp_path)).size == (32, 16)


@pytest.mark.skipif(os.name == "nt", reason="names of files are Unicode there")
def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    try:
        open(os.fsencode(tmp_path) + b"/\xe9t\xe9.jpg", "wb").close()
    except OSError:
        pytest.skip("this file system holds no such names")
    with pytest.raises(InputError) as refused:
        image_files(tmp_path)
    assert str(refused.value) == f"{tmp_path}/\\udce9t\\udce9.jpg has a name that is not UTF-8; rename it"
