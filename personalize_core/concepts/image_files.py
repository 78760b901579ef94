"""Image files from outside: which ones a folder holds, and one of them loaded as upright RGB in sRGB.

A file is opened only as one of `FORMATS`, whatever its name says: Pillow knows more, and hands one of them (EPS) to
another program. The size is checked before any pixel is decoded. Whatever Pillow raises becomes an `InputError` that
names the file.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

from PIL import AvifImagePlugin, Image, ImageCms, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin

from personalize_core.errors import InputError, listed
from personalize_core.files.outside import read_bytes

_plugins = (AvifImagePlugin, TiffImagePlugin, WebPImagePlugin)  # registered by their import; the others always are
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "TIFF", "GIF")
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jfif", ".mpo", ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif"}
)
MOST_BYTES = 256 * 2**20  # of a file
MOST_PIXELS = 100_000_000
LEAST_SIDE, MOST_SIDE = 8, 20_000  # turned by 45 degrees, as a method does, the longest image takes 1.3 GB
MOST_RATIO = 20  # of the longer side to the shorter one: when that becomes 512 pixels, the image takes 21 MB

_ORIENTATION = 0x0112  # EXIF's tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_IN_PROFILE = {  # the profile's colour space -> the modes whose pixels it can describe, and the mode to convert from
    "RGB": ({"1", "L", "P", "RGB", "YCbCr"}, "RGB"),
    "GRAY": ({"1", "L"}, "L"),
    "CMYK": ({"CMYK"}, "CMYK"),
}
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_HEIC_ADVICE = "convert to JPEG (`heif-convert IN.heic OUT.jpg`, or export as JPEG from a photo program)"
_SIDE_FILES = {"thumbs.db", "ehthumbs.db", "icon\r"}  # of Windows and macOS; theirs that begin with "." are hidden
_SIDE_SUFFIXES = {
    *(".txt", ".caption", ".md", ".csv", ".json", ".jsonl", ".yaml", ".yml", ".toml"),  # captions and notes
    *(".npz", ".pt", ".safetensors"),  # trainers' caches
    *(".ini", ".xmp", ".aae", ".pp3"),  # desktop.ini, and what photograph managers keep beside an image
}
MEND = "replace it or take it out of the folder"


class _Unusable(Exception):
    """What is wrong with an image, to follow its path in a sentence."""


def load_image(path: Path) -> Image.Image:
    """The image as RGB in sRGB, upright by its EXIF orientation, on white where it is transparent.

    Of an animation or a file of several pages, it is the first.

    Raises:
        InputError: the file is missing, no regular file, empty, damaged, of another format, too large, too small or
            too narrow, or has pixels or a colour profile whose meaning is not known.
    """
    content = read_bytes(path, MOST_BYTES)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, which name no file
            return _decoded(content)
    except _Unusable as error:
        raise InputError(f"{path} {error}") from None


def _decoded(content: bytes) -> Image.Image:
    if not content:
        raise _Unusable(f"is empty; {MEND}")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
            _check_size(*opened.size)
            if opened.format == "PNG":
                _check_png(content)
            opened.load()
            return _as_rgb(_upright(opened))
    except (_Unusable, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise _Unusable(f"has too many pixels; make it smaller than {MOST_PIXELS // 10**6} megapixels") from None
    except UnidentifiedImageError:
        raise _Unusable(_unknown(content)) from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, TypeError and others
        raise _Unusable(f"cannot be read as an image ({type(error).__name__}); {MEND}") from None


@dataclass(frozen=True)
class Listing:
    """What a folder holds; every list is sorted by name."""

    images: list[Path]
    side_files: list[Path]  # what systems and trainers write beside images: thumbnails, captions, caches
    unknown: list[Path]  # files that their owner may have meant as images, though none can be read by such a name
    folders: list[Path]


def listing(folder: Path) -> Listing:
    """What a folder holds, by the files' names; no file is opened.

    Raises:
        InputError: the folder cannot be read, or something that is named like an image is none that can be used: a link
            that leads nowhere, a FIFO, a device, or a file whose name is not UTF-8.
    """
    try:
        entries = sorted(folder.iterdir())
        found = Listing([], [], [], [])
        for path in entries:
            hidden = path.name.startswith(".")
            if path.is_dir():
                found.folders.append(path)
            elif path.suffix.lower() in IMAGE_SUFFIXES and not hidden:
                _check_kind(path)
                found.images.append(path)
            elif hidden or path.name.lower() in _SIDE_FILES or path.suffix.lower() in _SIDE_SUFFIXES:
                found.side_files.append(path)
            else:
                found.unknown.append(path)
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}") from None
    return found


def image_files(folder: Path) -> list[Path]:
    """The images of a folder by their names' endings, sorted; hidden files and subfolders are not looked at.

    Raises:
        InputError: as `listing`.
    """
    return listing(folder).images


def check_all_known(found: Listing, folder: Path) -> None:
    """Raise InputError if a folder also holds files that may be images, but cannot be read; it says what to do."""
    if not found.unknown:
        return
    advice: dict[str, list[str]] = {}
    for path in found.unknown:
        advice.setdefault(_advice_for(path), []).append(path.name)
    what = "; ".join(f"{listed(names, 4)}: {mend}" for mend, names in advice.items())
    raise InputError(f"{folder} also holds files that cannot be read as images. {what}")


def _advice_for(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix in {".heic", ".heif", ".hif"}:
        return _HEIC_ADVICE
    if suffix in {".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf", ".orf", ".rw2"}:
        return "export as JPEG or PNG from a raw converter"
    if suffix in {".jxl", ".jp2", ".j2k", ".psd", ".xcf", ".svg", ".tga", ".exr", ".hdr", ".ppm", ".eps", ".pdf"}:
        return "convert to JPEG or PNG"
    return "move out of the folder, or, if it is an image, give the name its format's ending, such as .jpg"


def _check_kind(path: Path) -> None:
    try:
        path.name.encode()
    except UnicodeEncodeError:
        raise InputError(f"{path} has a name that is not UTF-8; rename it") from None
    if path.is_file():
        return
    if path.is_symlink() and not path.exists():
        what = "is a link that leads nowhere"
    else:
        what = "is no regular file"
    raise InputError(f"{path} {what}; put the image itself there, or take it out of the folder")


def _check_size(width: int, height: int) -> None:
    sides = f"has {width:,} x {height:,} pixels"
    if width * height > MOST_PIXELS:
        raise _Unusable(f"{sides}; make it smaller than {MOST_PIXELS // 10**6} megapixels")
    if max(width, height) > MOST_SIDE:
        raise _Unusable(f"{sides}; make its longer side at most {MOST_SIDE:,}")
    if min(width, height) < LEAST_SIDE:
        raise _Unusable(f"{sides}; each side needs at least {LEAST_SIDE}")
    if max(width, height) > MOST_RATIO * min(width, height):
        raise _Unusable(f"{sides}; crop it, so that its longer side is at most {MOST_RATIO} times its shorter one")


def _check_png(content: bytes) -> None:
    """Raise if the checksum of a chunk is wrong: Pillow does not look at those of the pixels."""
    place = 8
    while place + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, place)
        end = place + 8 + length
        if end + 4 > len(content):
            return  # cut off, which decoding finds
        if zlib.crc32(memoryview(content)[place + 4 : end]) != struct.unpack_from(">I", content, end)[0]:
            raise _Unusable(f"cannot be read as an image: it is damaged (a checksum is wrong); {MEND}")
        if content[place + 4 : place + 8] == b"IEND":
            return
        place = end + 4


def _upright(image: Image.Image) -> Image.Image:
    """By the orientation alone: ImageOps.exif_transpose also writes the whole EXIF anew, and fails if it cannot."""
    try:
        turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # it depends on the damage
        raise _Unusable("has EXIF data that cannot be read, so its orientation is unknown; save it again") from None
    return image.transpose(turn) if turn is not None else image


def _as_rgb(image: Image.Image) -> Image.Image:
    """Transparent parts become white, as viewers show them, sixteen bits eight, and colours those of sRGB."""
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I;16"):
        image = _in_eight_bits(image)
    elif image.mode in ("I", "F"):
        raise _Unusable(
            "has 32-bit or signed pixels, and the file does not say which values are black and white; save it with 8 "
            "or 16 bits per channel"
        )
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        grey = image.mode in ("L", "LA", "La")
        image = Image.alpha_composite(white, image.convert("RGBA")).convert("L" if grey else "RGB")
    return _in_srgb(image, profile) if profile else image.convert("RGB")


def _in_eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, of which Pillow's own conversion would cut all values at 255."""
    import numpy as np

    values = np.asarray(image).astype(np.uint16)
    grey = (values // 257).astype(np.uint8)
    if (transparent := image.info.get("transparency")) is not None:
        grey[values == transparent] = 255
    return Image.fromarray(grey)


def _in_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """From the colours of a profile, which may have other primaries than sRGB (Display P3, Adobe RGB)."""
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = str(getattr(own.profile, "xcolor_space", "")).strip()
        modes, mode = _IN_PROFILE.get(space, ((), "RGB"))
        if image.mode not in modes:
            raise _Unusable(f"has {image.mode} pixels and a colour profile for {space}; save it in sRGB")
        srgb = ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image.convert(mode), own, srgb, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        raise _Unusable("has a colour profile that cannot be read; save it in sRGB, or without a profile") from None
    assert converted is not None  # it is only where the image itself is converted
    return converted


def _unknown(content: bytes) -> str:
    if content[4:8] == b"ftyp" and content[8:12] in _HEIF_BRANDS:
        return f"is HEIC, which is not read here; {_HEIC_ADVICE}"
    if content.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS, not the image itself; `git lfs pull` fetches it"
    return f"cannot be read as an image: it is none of JPEG, PNG, WebP, AVIF, BMP, TIFF and GIF, or damaged; {MEND}"
