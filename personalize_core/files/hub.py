"""Files of a repository on the Hugging Face Hub, at a pinned commit: those of its cache, or fetched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from personalize_core.errors import InputError, listed, said_by

PATIENCE = 5  # seconds for the hub to answer at all; its client would try again for half a minute


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
    from huggingface_hub import constants, get_session, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    def folder(local: bool) -> Path:
        found = Path(
            snapshot_download(repository, revision=revision, allow_patterns=list(files), local_files_only=local)
        )
        check(found)
        return found

    def refused(why: str, mend: str = "") -> InputError:
        return InputError(f"{what} ({repository} at {revision}) cannot be loaded here: {why}; {mend}{otherwise}")

    try:
        return folder(local=True)
    except (OSError, InputError):
        pass  # not in the hub's cache, or not all of it
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception as error:  # of the hub's client, or of its HTTP library, or no valid address
        raise refused(
            f"its files are not all in the hub's cache ({constants.HF_HUB_CACHE}), and the hub ({constants.ENDPOINT}) "
            "cannot be reached from here",
            "go on where there is a network, set HF_HOME to a cache that holds them, ",
        ) from error
    try:
        return folder(local=False)
    except InputError:
        raise
    except GatedRepoError as error:
        raise refused(
            "the hub gives it only to accounts that accepted its terms",
            f"accept them at {constants.ENDPOINT}/{repository} and log in with `hf auth login`, ",
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise refused("the hub has no such repository or commit, or not for everybody") from error
    except Exception as error:  # the hub's client raises a dozen unrelated classes
        raise refused(f"fetching it failed: {said_by(error)}", "try again, ") from error


def check_holds(files: Sequence[str]) -> Callable[[Path], None]:
    """For `hub_folder`: raises InputError if a folder lacks one of these files."""

    def check(folder: Path) -> None:
        if lacking := [file for file in files if not (folder / file).is_file()]:
            raise InputError(f"{folder} has no {listed(lacking)}")

    return check
