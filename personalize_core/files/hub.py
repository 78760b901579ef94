"""Files of a repository on the Hugging Face Hub, at a pinned commit: those of its cache, or fetched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from personalize_core.errors import InputError, said_by

T = TypeVar("T")

PATIENCE = 5  # seconds for the hub to answer at all; its client would try again for half a minute


def hub_files(
    what: str, repository: str, revision: str, files: Sequence[str], otherwise: str, terms: str = "them"
) -> list[Path]:
    """Where these files of a commit lie in the hub's cache; they are fetched if need be.

    Args:
        what: "the IP-Adapter 'sd15'", for messages.
        files: their paths in the repository.
        otherwise: what to do where they cannot be fetched, for messages.
        terms: what accounts have to accept where the hub asks for it: "the DINOv3 License", for messages.

    Raises:
        InputError: they are not in the cache and cannot be fetched; the sentence says why.
    """
    from huggingface_hub import hf_hub_download

    def found(local: bool) -> list[Path]:
        return [Path(hf_hub_download(repository, file, revision=revision, local_files_only=local)) for file in files]

    return _cached_or_fetched(found, what, repository, revision, otherwise, terms)


def hub_folder(
    what: str,
    repository: str,
    revision: str,
    files: Sequence[str],
    otherwise: str,
    check: Callable[[Path], object],
) -> Path:
    """The folder in the hub's cache that holds these files of a commit; they are fetched if need be.

    Args:
        what: "the base model 'sd-1.4'", for messages.
        files: patterns of their paths in the repository.
        otherwise: what to do where they cannot be fetched, for messages.
        check: raises InputError if a folder lacks some of them, as the cache may.

    Raises:
        InputError: they are not in the cache and cannot be fetched; the sentence says why. Or `check` refuses what was
            fetched.
    """
    from huggingface_hub import snapshot_download

    def found(local: bool) -> Path:
        folder = Path(
            snapshot_download(repository, revision=revision, allow_patterns=list(files), local_files_only=local)
        )
        check(folder)
        return folder

    return _cached_or_fetched(found, what, repository, revision, otherwise)


def _cached_or_fetched(
    found: Callable[[bool], T], what: str, repository: str, revision: str, otherwise: str, terms: str = "them"
) -> T:
    """found: of the cache alone, if told so."""
    from huggingface_hub import constants, get_session
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    def refused(why: str, mend: str = "") -> InputError:
        return InputError(f"{what} ({repository} at {revision}) cannot be loaded here: {why}; {mend}{otherwise}")

    lacking = ""
    try:
        return found(True)
    except InputError as error:  # of `check`
        lacking = f": {error}"
    except OSError:
        pass  # not in the hub's cache, or not all of it
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception as error:  # of the hub's client, or of its HTTP library, or no valid address
        raise refused(
            f"its files are not all in the hub's cache ({constants.HF_HUB_CACHE}{lacking}), and the hub "
            f"({constants.ENDPOINT}) cannot be reached from here",
            "go on where there is a network, set HF_HOME to a cache that holds them, ",
        ) from error
    try:
        return found(False)
    except InputError:
        raise
    except GatedRepoError as error:
        raise refused(
            "the hub gives it only to accounts that accepted its terms",
            f"accept {terms} at {constants.ENDPOINT}/{repository} and log in with `hf auth login`, ",
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise refused("the hub has no such repository or commit, or not for everybody") from error
    except Exception as error:  # the hub's client raises a dozen unrelated classes
        raise refused(f"fetching it failed: {said_by(error)}", "try again, ") from error
