"""The one place where text from outside is opened: settings, lists, descriptions, answers; and pickles are refused.

Only regular files of bounded size are opened, never a FIFO, which would wait for ever, or a device. Text must be UTF-8.
YAML and JSON must be of bounded depth, without a key that stands twice in one mapping, and YAML without references.
Whatever a library raises becomes an `InputError` that names the file and says what to do.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Hashable
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar

import yaml

from personalize_core.errors import InputError, said_by, shown

T = TypeVar("T")

MOST_TEXT = 4 * 2**20  # bytes of a file of settings, prompts or nouns; the longest known list of nouns has 2 MB
MOST_ANSWERS = 16 * 2**20  # bytes of a file of answers; 10,000 answers take 2 MB
MOST_RESULT = 256 * 2**20  # bytes of a JSON file that the program itself writes
PICKLES = frozenset({".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle"})
DEEPEST = 64  # levels of lists and mappings; no file of ours has more than 12

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_Composer: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C: an eighth of the time


def is_there(path: Path) -> bool:
    """Is there anything by this name, even a link that leads nowhere?

    Raises:
        InputError: no file can have such a name.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise _unopened(path, error) from None
    return True


def is_folder(path: Path) -> bool:
    """Is it a folder, or a link to one?

    Raises:
        InputError: no file can have such a name.
    """
    return is_there(path) and path.is_dir()


def user_path(text: str) -> Path:
    """A path as a user writes it: `~` is their own folder.

    Raises:
        InputError: `~NAME` is the folder of a user that is not known here.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise InputError(
            f"{shown(text)} is in the folder of a user who is not known here; write the whole path"
        ) from None


def refuse_pickle(path: Path, in_parts: bool = False) -> None:
    """Raise InputError if a file's name ends as the names of pickles do.

    Args:
        in_parts: such a pickle holds part -> name -> tensor, and the safetensors file "part.name".
    """
    if path.suffix.lower() in PICKLES:
        name = {"pytorch_model": "model"}.get(path.stem, path.stem)  # transformers' two names
        tensors = f"torch.load({path.name!r}, weights_only=True)"
        if in_parts:
            tensors = f"{{f'{{part}}.{{name}}': t for part, own in {tensors}.items() for name, t in own.items()}}"
        raise InputError(
            f"{path} is a pickle, which can run any program when it is read, so it is not read here; if you trust it, "
            f"convert it: safetensors.torch.save_file({tensors}, '{name}.safetensors')"
        )


def refuse_pickles_in(folder: Path, in_parts: bool = False) -> None:
    """Raise InputError if a folder holds a pickle; to be called where it lacks the safetensors file that is wanted.

    Args:
        in_parts: as of `refuse_pickle`.
    """
    for path in sorted(folder.iterdir()):
        refuse_pickle(path, in_parts)


def read_bytes(path: Path, most: int = MOST_TEXT) -> bytes:
    """The bytes of a regular file.

    Args:
        most: how many there may be.

    Raises:
        InputError: there is no such file, it is no regular one, it cannot be read, or it is larger.
    """
    try:
        with open_regular(path) as file:
            found = os.fstat(file.fileno())
            content = b"" if found.st_size > most else file.read(found.st_size + 1)  # not `most`: it would be allocated
            if len(content) > found.st_size:  # it has grown
                content += file.read(most + 1 - len(content))
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise _unopened(path, error) from error
    if found.st_size > most or len(content) > most:
        raise InputError(
            f"{path} has {max(found.st_size, len(content)):,} bytes, and at most {most:,} are read of such a file; "
            "is it the right one?"
        )
    return content


def open_regular(path: Path) -> BufferedReader:
    """A regular file, opened for reading.

    Raises:
        InputError: it is a folder, a FIFO or a device.
        OSError: as `open`.
    """
    _check_regular(path, path.stat().st_mode)
    # without waiting: since the look at it, it may have become a FIFO
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    try:
        _check_regular(path, os.fstat(descriptor).st_mode)
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_text(path: Path, most: int = MOST_TEXT) -> str:
    """The text of a file in UTF-8, without the byte-order mark that some editors put first.

    Raises:
        InputError: as `read_bytes`, or it is text in another encoding, or no text.
    """
    content = read_bytes(path, most)
    mend = "save it as UTF-8 in your editor"
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{path} is text in UTF-16; {mend}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path} is not text in UTF-8: line {line} has the byte 0x{content[error.start]:02x}; {mend}"
        ) from None
    if "\0" in text:
        raise InputError(
            f"{path} is not text in UTF-8: it has characters of value 0, as UTF-16 and pickles have; {mend}"
        )
    return text


def parse_yaml(text: str, path: Path, plain: bool = False) -> Any:
    """The value that a text of YAML holds.

    Args:
        path: where the text is from, for messages.
        plain: take every value for text, so that "no" and "1.0" stay what they are.

    Raises:
        InputError: it is not YAML, is nested too deeply, has an anchor, an alias or a merge key, or a key stands twice
            in one mapping. All but the last is seen before any value is built.
    """
    return _guarded(lambda: _built(text, path, plain), path, "YAML")


def read_yaml(path: Path) -> Any:
    """`parse_yaml` of a file's text."""
    return parse_yaml(read_text(path), path)


def parse_json(text: str, path: Path) -> Any:
    """The value that a text of JSON from outside holds.

    Raises:
        InputError: it is not JSON, is nested too deeply, or a key stands twice in one object.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError(f"{path}: the key {shown(twice)} stands there twice in one object; take one of them out")
        return found

    return _guarded(lambda: _checked(json.loads(text, object_pairs_hook=once), text, path), path, "JSON")


def read_json(path: Path, most: int = MOST_TEXT) -> Any:
    """`parse_json` of a file's text."""
    return parse_json(read_text(path, most), path)


def read_json_object(path: Path, most: int = MOST_TEXT) -> dict[str, Any]:
    """`read_json` of a file that holds an object.

    Raises:
        InputError: as `read_json`, or it holds something else.
    """
    found = read_json(path, most)
    if not isinstance(found, dict):
        raise InputError(f"{path} should hold a JSON object, and holds {shown(found)}")
    return found


def _check_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "something else")
        raise InputError(f"{path} is {kind}, and should be a file; put a file in its place, or take it out")


def _unopened(path: Path, error: OSError | ValueError) -> InputError:
    if isinstance(error, FileNotFoundError):
        leads = f"is a link to {os.readlink(path)}, which does not exist" if path.is_symlink() else "does not exist"
        return InputError(f"{path} {leads}")
    if isinstance(error, OSError):
        return InputError(f"{shown(os.fspath(path))} cannot be opened: {error.strerror or error}")
    return InputError(f"{shown(os.fspath(path))} cannot be the name of a file: {error}")  # it has a character 0


def _guarded(parse: Callable[[], T], path: Path, language: str) -> T:
    """What `parse` returns; whatever it raises, as one sentence."""
    try:
        return parse()
    except (InputError, MemoryError):
        raise
    except RecursionError:
        raise _too_deep(path) from None
    except Exception as error:  # the parsers raise their own classes, ValueError, KeyError, TypeError and others
        raise InputError(f"{path} is not {language}: {said_by(error)}") from None


def _too_deep(path: Path) -> InputError:
    return InputError(f"{path} has more than {DEEPEST} levels of lists and mappings in each other; write it flatter")


def _checked_text(text: str, path: Path) -> None:
    """Look at a text's events, of which the parser gives one at a time, before any value is built."""
    depth = 0
    for event in yaml.parse(text, _Composer):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise InputError(
                f"{path}, line {event.start_mark.line + 1}: anchors and aliases (& and *) are not read; write the "
                "value itself"
            )
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise _too_deep(path)


def _built(text: str, path: Path, plain: bool) -> Any:
    _checked_text(text, path)
    loader = _Composer(text)
    try:
        node = loader.get_single_node()
        return None if node is None else _value(node, path, plain, loader)
    finally:
        loader.dispose()


def _value(node: Any, path: Path, plain: bool, loader: Any) -> Any:
    """A node's value; depth has been checked."""
    if isinstance(node, yaml.SequenceNode) and (plain or node.tag == "tag:yaml.org,2002:seq"):
        return [_value(each, path, plain, loader) for each in node.value]
    if isinstance(node, yaml.MappingNode) and (plain or node.tag == "tag:yaml.org,2002:map"):
        found: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            where = f"{path}, line {key_node.start_mark.line + 1}"
            if key_node.tag == "tag:yaml.org,2002:merge" and not plain:
                raise InputError(f"{where}: merge keys (<<) are not read; write the keys themselves")
            key = _value(key_node, path, plain, loader)
            if not isinstance(key, Hashable):
                raise InputError(f"{where}: {shown(key)} cannot be a key")
            if key in found:
                raise InputError(f"{where}: the key {shown(key)} stands there twice; take one of them out")
            found[key] = _value(value_node, path, plain, loader)
        return found
    return str(node.value) if plain else loader.construct_object(node, deep=True)


def _checked(found: Any, text: str, path: Path) -> Any:
    """The same, if it is not too deep, and every text in it is made of whole characters."""
    if text.count("[") + text.count("{") > DEEPEST:
        level = [found]
        for _ in range(DEEPEST):
            containers = [one.values() if isinstance(one, dict) else one for one in level if _holds_values(one)]
            level = [inner for container in containers for inner in container]
        if any(map(_holds_values, level)):
            raise _too_deep(path)
    if "\\u" in text:
        json.dumps(found, ensure_ascii=False).encode()  # half a character has an escape in JSON, and no bytes in UTF-8
    return found


def _holds_values(value: Any) -> bool:
    return isinstance(value, dict | list)
