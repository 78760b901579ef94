"""Images as `personalize add` reads them: every format and mode that Pillow writes, damage, and what is no image."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from benchmarks.hostile_inputs.runner import Case, Right
from personalize_core.concepts.concept_files import add_concept
from personalize_core.concepts.image_files import load_image
from tests.concepts.quarters import corners, quarters
from tests.concepts.test_image_files import (
    MUTATED,
    P3_TO_SRGB,
    TURNED,
    chunk,
    display_p3,
    gamma,
    grey_png,
    icc,
    in_srgb,
    jpeg_of_size,
    jpeg_with_tag,
    webp_of_size,
)
from tests.mutated import mutants
from tests.workspace.test_arrival import EPS

MUTANTS = {
    "JPEG": 60,
    "progressive JPEG": 30,
    "PNG": 60,
    "WEBP": 50,
    "AVIF": 30,
    "TIFF": 30,
    "packed TIFF": 20,
    "GIF": 20,
}
WHITE = (255, 255, 255)
COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), WHITE]
GREYS = [(76,) * 3, (150,) * 3, (29,) * 3, WHITE]  # ITU-R BT.601 of these colours
BLACK_AND_WHITE = [(0,) * 3, WHITE, (0,) * 3, WHITE]  # the greys, with a threshold at 128
SIZE = (32, 16)


@dataclass(frozen=True)
class Added:
    """What `add` has made of a folder."""

    name: str
    class_noun: str
    images: dict[str, Image.Image]  # as everything later reads them
    same_bytes: bool


def add(folder: Path) -> Added:
    """`personalize add` of the one folder in `input`."""
    (photos,) = (folder / "input").iterdir()
    kohya = photos.name[0].isdigit()
    concept = add_concept(folder / "concepts", photos, None if kohya else "dog")
    copied = [path for path in (folder / "concepts" / concept.name).iterdir() if path.suffix != ".yaml"]
    images = {path.name: load_image(path) for path in copied if path.is_file()}
    same = all(path.read_bytes() == (photos / path.name).read_bytes() for path in copied if path.is_file())
    return Added(concept.name, concept.class_noun, images, same)


def case(
    name: str,
    give: Callable[[Path], Any],
    right: Right,
    holds: Callable[[Added], bool] = lambda added: added.same_bytes,
    named: Sequence[str] = ("input/",),
    photos: str = "rex",
) -> Case:
    """`give` fills the folder with the photographs."""

    def fill(folder: Path) -> None:
        (folder / "input" / photos).mkdir(parents=True)
        give(folder / "input" / photos)

    return Case(f"images/{name}", fill, add, right, holds, named, made=("concepts",))


def one(name: str, content: bytes, right: Right, **more: Any) -> Case:
    """A folder with this one file, and a good one beside it."""

    def give(photos: Path) -> None:
        photos.joinpath(os.fsdecode(name)).write_bytes(content)
        photos.joinpath("good.png").write_bytes(encoded(quarters(), "PNG"))

    return case(f"{more.pop('called', name)}", give, right, **{"named": (name,), **more})


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def close(expected: Sequence[Any], within: float = 8) -> Callable[[Added], bool]:
    """Do the corners of the image that is not the good one have these colours? None is any."""

    def holds(added: Added) -> bool:
        (image,) = (image for name, image in added.images.items() if name != "good.png")
        found = zip(corners(image), expected, strict=True)
        near = [wanted is None or np.abs(np.subtract(pixel, wanted)).max() <= within for pixel, wanted in found]
        return added.same_bytes and image.mode == "RGB" and all(near)

    return holds


# -- formats and modes -----------------------------------------------------------------------------------------


def in_mode(mode: str) -> tuple[Image.Image, list[Any]]:
    """The four quarters in a mode, and the colours that they must be read as."""
    image = quarters(*SIZE)
    grey = image.convert("L")
    if mode == "1":
        return grey.convert("1", dither=Image.Dither.NONE), BLACK_AND_WHITE
    if mode.startswith("I;16") or mode == "I":
        values = np.asarray(grey).astype(np.int32) * 257
        stored = values.astype({"I": "<i4", "I;16": "<u2", "I;16B": ">u2"}[mode])
        return Image.frombytes(mode, SIZE, stored.tobytes()), GREYS
    if mode == "F":
        return grey.convert("F"), GREYS
    if mode in ("L", "LA"):
        found = grey.convert(mode)
        if mode == "LA":
            found.putpixel((0, 0), (0, 0))
        return found, [WHITE if mode == "LA" else GREYS[0], *GREYS[1:]]
    if mode in ("P", "PA"):
        return image.convert("P", palette=Image.Palette.ADAPTIVE, colors=4).convert(mode), COLOURS
    if mode == "RGBA":
        found = image.convert("RGBA")
        found.putpixel((0, 0), (0, 0, 0, 0))
        return found, [WHITE, *COLOURS[1:]]
    if mode == "LAB":
        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        found = ImageCms.profileToProfile(image, srgb, lab, outputMode="LAB")
        assert found
        del found.info["icc_profile"]
        return found, COLOURS
    return image.convert(mode), COLOURS


FORMATS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "png": ("PNG", {}, ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
    "bmp": ("BMP", {}, ("1", "L", "P", "RGB", "RGBA")),
    "gif": ("GIF", {}, ("1", "L", "P", "RGB", "RGBA")),
    "jpg": ("JPEG", {"quality": 100, "subsampling": 0}, ("1", "L", "RGB", "RGBX", "CMYK", "YCbCr")),
    "progressive.jpg": ("JPEG", {"quality": 100, "subsampling": 0, "progressive": True}, ("L", "RGB", "CMYK")),
    "mpo": ("MPO", {"quality": 100, "save_all": True}, ("RGB",)),
    "webp": ("WEBP", {"lossless": True, "exact": True}, ("L", "P", "RGB", "RGBA")),
    "lossy.webp": ("WEBP", {"quality": 100}, ("RGB", "RGBA")),
    "avif": ("AVIF", {"quality": 100, "subsampling": "4:4:4", "speed": 10}, ("L", "RGB", "RGBA")),
    "tif": (
        "TIFF",
        {},
        ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "I", "I;16", "I;16B", "F"),
    ),
    "lzw.tif": ("TIFF", {"compression": "tiff_lzw"}, ("L", "P", "RGB", "RGBA", "CMYK", "I;16")),
    "deflate.tif": ("TIFF", {"compression": "tiff_adobe_deflate"}, ("L", "RGB", "I;16", "F")),
    "packbits.tif": ("TIFF", {"compression": "packbits"}, ("1", "L", "RGB")),
    "fax.tif": ("TIFF", {"compression": "group4"}, ("1",)),
    "jpeg.tif": ("TIFF", {"compression": "jpeg", "quality": 100}, ("L", "RGB")),
}
LOSES_ALPHA = {"bmp"}  # Pillow writes it, and such a file does not say that it is alpha
UNKNOWN_RANGE = {("tif", "I"), ("tif", "F"), ("deflate.tif", "F")}  # the file does not say which value is white


def formats() -> Iterator[Case]:
    for ending, (kind, options, modes) in FORMATS.items():
        for mode in modes:
            image, expected = in_mode(mode)
            if ending in LOSES_ALPHA:
                expected = [None, *expected[1:]]
            name = f"{mode.replace(';', '_')}.{ending}"
            right: Right = "refused" if (ending, mode) in UNKNOWN_RANGE else "accepted"
            coarse = (ending, mode) in (
                ("jpeg.tif", "RGB"),
                ("tif", "LAB"),
            )  # of few bits for the colours, by its format
            within = 40 if coarse else 12
            yield one(name, encoded(image, kind, **options), right, holds=close(expected, within))
    grey, palette = quarters(*SIZE).convert("L"), in_mode("P")[0]
    first = [None, *COLOURS[1:]]
    for name, image, transparent, expected in (
        ("transparent_L.png", grey, 150, [GREYS[0], WHITE, *GREYS[2:]]),
        ("transparent_RGB.png", quarters(*SIZE), (0, 255, 0), [COLOURS[0], WHITE, *COLOURS[2:]]),
        ("transparent_P.png", palette, palette.getpixel((31, 0)), [COLOURS[0], WHITE, *COLOURS[2:]]),
        ("transparent_I_16.png", in_mode("I;16")[0], 150 * 257, [GREYS[0], WHITE, *GREYS[2:]]),
    ):
        yield one(name, encoded(image, "PNG", transparency=transparent), "accepted", holds=close(expected))
    black = Image.new("RGB", SIZE)
    for kind in ("GIF", "WEBP", "PNG", "TIFF", "AVIF"):
        content = encoded(quarters(*SIZE), kind, save_all=True, append_images=[black], quality=100)
        yield one(f"animated.{kind.lower()}", content, "accepted", holds=close(first, 16))


# -- EXIF and colours ------------------------------------------------------------------------------------------


def turned() -> Iterator[Case]:
    for kind, suffix in (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("TIFF", "tif"), ("AVIF", "avif")):
        for orientation, expected in TURNED.items():
            exif = Image.Exif()
            exif[0x0112] = orientation
            content = encoded(quarters(*SIZE), kind, exif=exif, quality=100)
            upright = (32, 16) if orientation < 5 else (16, 32)

            def holds(added: Added, expected=expected, upright=upright) -> bool:
                return close(expected)(added) and upright in {image.size for image in added.images.values()}

            yield one(f"orientation_{orientation}.{suffix}", content, "accepted", holds=holds)
    for name, tag in {
        "text": (2, b"sixteen\0"),
        "signed_rational": (10, struct.pack("<ii", -1, 3)),
        "unknown_type": (99, b"xxxxxxxx"),
    }.items():
        yield one(f"exif_width_is_{name}.jpg", jpeg_with_tag(*tag), "accepted", holds=close(TURNED[6]))
    for orientation in (0, 9, 65535):
        exif = Image.Exif()
        exif[0x0112] = orientation
        content = encoded(quarters(*SIZE), "JPEG", exif=exif, quality=100, subsampling=0)
        yield one(f"orientation_{orientation}.jpg", content, "accepted", holds=close(COLOURS))
    yield one("no_exif_at_all.png", encoded(quarters(*SIZE), "PNG", exif=b"Exif\0\0no EXIF at all"), "refused")


def colours() -> Iterator[Case]:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    linear_grey = icc(b"GRAY", {b"kTRC": gamma(1)})
    colour = (60, 200, 60)
    wide = in_srgb(P3_TO_SRGB @ (np.array(colour) / 255) ** 2.2)
    plain = Image.new("RGB", (16, 16), colour)
    for kind in ("PNG", "JPEG", "WEBP", "TIFF", "AVIF"):
        options = {"quality": 100} | ({"lossless": True} if kind == "WEBP" else {})
        p3 = encoded(plain, kind, icc_profile=display_p3(), **options)
        yield one(f"display_p3.{kind.lower()}", p3, "accepted", holds=close([wide] * 4, 4))
        own = encoded(plain, kind, icc_profile=srgb, **options)
        yield one(f"srgb.{kind.lower()}", own, "accepted", holds=close([colour] * 4, 4))
        damaged = encoded(plain, kind, icc_profile=b"no profile", **options)
        yield one(f"no_profile.{kind.lower()}", damaged, "refused")
        cut = encoded(plain, kind, icc_profile=display_p3()[:200], **options)
        yield one(f"half_a_profile.{kind.lower()}", cut, "refused")
    grey = encoded(Image.new("L", (16, 16), 55), "PNG", icc_profile=linear_grey)
    yield one("linear_grey.png", grey, "accepted", holds=close([(128,) * 3] * 4, 2))
    yield one("grey_profile_of_colours.png", encoded(plain, "PNG", icc_profile=linear_grey), "refused")


# -- damage ----------------------------------------------------------------------------------------------------


def damaged() -> Iterator[Case]:
    random = np.random.default_rng(0).bytes
    noise = Image.frombytes("RGB", (64, 64), random(64 * 64 * 3))
    for kind in ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "TIFF", "GIF"):
        content, suffix = encoded(noise, kind), kind.lower()
        for share in (0.1, 0.5, 0.9):
            cut = content[: int(len(content) * share)]
            yield one(f"cut_at_{share:.0%}.{suffix}", cut, "refused" if kind != "GIF" or share < 0.9 else "either")
        half = len(content) // 2
        right: Right = "refused" if kind == "PNG" else "either"  # no other has checksums
        yield one(f"second_half_zeros.{suffix}", content[:half] + bytes(len(content) - half), right)
        yield one(f"second_half_random.{suffix}", content[:half] + random(len(content) - half), right)
        right = "either" if kind == "AVIF" else "accepted"  # whose boxes go on to the end of the file
        yield one(f"zeros_after_it.{suffix}", content + bytes(1000), right)
        yield one(f"{suffix}_by_another_name.jpg", content, "accepted")
    stored = bytearray(encoded(noise, "PNG", compress_level=0))
    start = stored.index(b"IDAT")
    (length,) = struct.unpack_from(">I", stored, start - 4)
    for what, place in (("pixel", 100), ("checksum", 4 + length)):
        changed = bytearray(stored)
        changed[start + place] ^= 1
        yield one(f"wrong_{what}.png", bytes(changed), "refused")
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 64, 8, 2, 0, 0, 0))
    yield one("no_pixels.png", bomb + chunk(b"IEND", b""), "refused")
    text = chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(100_000_000)))
    yield one("text_of_100_MB.png", encoded(noise, "PNG")[:33] + text + encoded(noise, "PNG")[33:], "either")


def no_images() -> Iterator[Case]:
    contents = {
        "eps": EPS,
        "dds": b"DDS " + b"\x7c" + bytes(200),
        "spider": b"\0\0\0\x01" * 3000,
        "ppm": b"P6 16 16 255\n" + bytes(768),
        "text": b"hello",
        "html": b"<!DOCTYPE html><html><body>404</body></html>",
        "json": b'{"message": "not found"}',
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"/>',
        "empty": b"",
        "zeros": bytes(5000),
        "heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
        "avif_without_pixels": b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + bytes(99),
        "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "gif_without_pixels": b"GIF89a and no more",
        "pdf": b"%PDF-1.4\n1 0 obj<<>>endobj\n",
        "zip": b"PK\3\4" + bytes(100),
        "psd": b"8BPS\0\1" + bytes(100),
        "ico": b"\0\0\1\0\1\0\x10\x10" + bytes(100),
        "pickle": b"\x80\4\x95" + bytes(20),
        "only_a_signature": b"\x89PNG\r\n\x1a\n",
    }
    for what, content in contents.items():
        for suffix in ("jpg", "png"):
            yield one(f"{what}.{suffix}", content, "refused")


def sizes() -> Iterator[Case]:
    for width, height in ((1, 3), (1, 3000), (1, 30_000), (30_000, 1), (7, 7), (8, 1000), (1000, 8), (20_001, 2000)):
        yield one(f"{width}x{height}.png", grey_png(width, height), "refused")
    for width, height in ((60_000, 60_000), (2**31 - 1, 1), (12_000, 12_000), (0, 0)):
        yield one(f"only_claims_{width}x{height}.png", grey_png(width, height, b""), "refused")
    yield one("only_claims_144_megapixels.jpg", jpeg_of_size(12_000, 12_000), "refused")
    yield one("only_claims_4225_megapixels.jpg", jpeg_of_size(65_000, 65_000), "refused")
    yield one("only_claims_99_megapixels.jpg", jpeg_of_size(11_000, 9_000), "either")
    yield one("only_claims_4194344x30.webp", webp_of_size(4_194_344, 30), "refused")
    yield one("only_claims_16000000x16000.webp", webp_of_size(16_000_000, 16_000), "refused")
    for width, height in ((8, 8), (8, 160), (160, 8)):
        yield one(f"{width}x{height}.png", grey_png(width, height), "accepted", holds=close([(0,) * 3] * 4))


# -- folders ---------------------------------------------------------------------------------------------------


def good(photos: Path, count: int = 2) -> None:
    for number in range(count):
        photos.joinpath(f"{number}.png").write_bytes(encoded(quarters(*SIZE), "PNG"))


def beside(name: str, make: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """Two good images, and something else with this name."""
    return lambda photos: (good(photos), make(photos / name))


def named(photos: Path, name: bytes) -> None:
    good(photos)
    os.rename(photos / "0.png", os.fsencode(photos) + b"/" + name)


def odd_folders() -> Iterator[Case]:
    for name, make, said in (
        ("fifo", os.mkfifo, "b.jpg"),
        ("device", lambda path: os.symlink("/dev/zero", path), "b.jpg"),
        ("terminal", lambda path: os.symlink("/dev/tty", path), "b.jpg"),
        ("dangling_link", lambda path: os.symlink("/nowhere/b.jpg", path), "b.jpg"),
        ("link_to_itself", lambda path: os.symlink("b.jpg", path), "b.jpg"),
        ("link_to_its_folder", lambda path: os.symlink(".", path), ""),
        ("unreadable", lambda path: (path.write_bytes(b""), path.chmod(0)), "b.jpg"),
        ("link_to_a_password_file", lambda path: os.symlink("/etc/passwd", path), "b.jpg"),
    ):
        right: Right = "either" if name == "link_to_its_folder" else "refused"
        yield case(name, beside("b.jpg", make), right, named=(said,))
    yield case("folder_called_b.png", beside("b.png", Path.mkdir), "accepted")
    yield case("name_not_utf8", lambda photos: named(photos, b"\xe9.png"), "refused", named=("\\udce9.png",))
    for name in (b"\xff\xfe.jpg", b"a\xc3.png"):
        yield case(f"name_{name!r}", lambda photos, name=name: named(photos, name), "refused", named=("\\udc",))
    for name in (
        "dog[b].png",
        "photo [red] (1).png",
        "犬🐶.png",
        "a\nb.png",
        "\x1b[31m.png",
        "-rf.png",
        " .png",
        "é.png",
    ):
        yield case(f"name_{name!r}", lambda photos, name=name: named(photos, name.encode()), "accepted")
    yield case("name_of_255_bytes", lambda photos: named(photos, b"x" * 251 + b".png"), "accepted")
    for name in (
        "Thumbs.db",
        ".DS_Store",
        "desktop.ini",
        "0.txt",
        "0.npz",
        "0.caption",
        "._0.png",
        "README.md",
        "0.json",
    ):
        yield case(f"beside_{name}", beside(name, lambda path: path.write_bytes(b"x")), "accepted", two_images)
    for name in ("IMG_1.HEIC", "a.cr2", "more.zip", "IMG_0001", "a.svg", "a.psd", "notes.pages", "a.mp4"):
        yield case(f"beside_{name}", beside(name, lambda path: path.write_bytes(b"x")), "refused", named=(name,))
    yield case("empty", lambda photos: None, "refused")
    yield case("only_text", lambda photos: (photos / "a.txt").write_text("x"), "refused")
    yield case("images_in_a_folder_within", lambda photos: ((photos / "a").mkdir(), good(photos / "a")), "refused")
    yield case("hundred_levels", deep, "accepted", two_images)
    yield case("hundred_images", lambda photos: good(photos, 100), "accepted")
    for name in ("10_rex dog", "1_Rex stuffed animal", "999999999999_a b"):
        yield case(f"folder {name!r}", good, "accepted", by_kohya(name), photos=name)
    yield case("folder '10_rex dog7'", good, "refused", named=("class noun",), photos="10_rex dog7")
    for name in ("Dog 7", "a|b", "dog...7", "é", "x" * 64, "CON", "-rf", "a\nb"):
        yield case(f"folder {name!r}", good, "refused", named=("cannot be a concept's name",), photos=name)
    yield from masks()


def two_images(added: Added) -> bool:
    return added.same_bytes and sorted(added.images) == ["0.png", "1.png"]


def by_kohya(name: str) -> Callable[[Added], bool]:
    _, _, rest = name.partition("_")
    said, _, noun = rest.partition(" ")
    return lambda added: (added.name, added.class_noun) == (said.lower(), noun)


def deep(photos: Path) -> None:
    good(photos)
    (photos / "/".join("d" * 100)).mkdir(parents=True)


def masks() -> Iterator[Case]:
    def masked(make: Callable[[Path], Any]) -> Callable[[Path], Any]:
        def give(photos: Path) -> None:
            good(photos)
            (photos / "masks").mkdir()
            for name in ("0.png", "1.png"):
                Image.new("L", SIZE, 255).save(photos / "masks" / name)
            make(photos / "masks" / "1.png")

        return give

    def instead(make: Callable[[Path], Any]) -> Callable[[Path], Any]:
        return lambda path: (path.unlink(), make(path))

    yield case("masks", masked(lambda path: None), "accepted", two_images)
    for name, make in {
        "lacking": Path.unlink,
        "empty": lambda path: path.write_bytes(b""),
        "text": lambda path: path.write_bytes(b"no image"),
        "smaller": lambda path: Image.new("L", (9, 9)).save(path),
        "fifo": instead(os.mkfifo),
        "device": instead(lambda path: os.symlink("/dev/zero", path)),
        "dangling": instead(lambda path: os.symlink("/nowhere", path)),
        "folder": instead(Path.mkdir),
        "huge": lambda path: path.write_bytes(grey_png(60_000, 60_000, b"")),
    }.items():
        yield case(f"mask_{name}", masked(make), "refused", named=("masks",))


def mutated() -> Iterator[Case]:
    def sound(added: Added) -> bool:
        return added.same_bytes and all(image.mode == "RGB" for image in added.images.values())

    for kind, count in MUTANTS.items():
        for number, content in enumerate(mutants(MUTATED[kind], count, seed=1)):
            yield one("x.jpg", content, "either", holds=sound, called=f"mutated {kind} {number}")


def prepare(folder: Path) -> None:
    """Nothing is needed but Pillow."""


def cases(folder: Path) -> Iterator[Case]:
    for make in (formats, turned, colours, damaged, no_images, sizes, odd_folders, mutated):
        yield from make()
