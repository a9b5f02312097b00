"""Files of models on the Hub, and what to do where it has none."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_session
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from transformers.utils.hub import cached_file

from nopad.published import published_models
from nopad.suggestions import did_you_mean

logger = logging.getLogger(__name__)


def file_on_hub(name: str, filename: str, **hub: Any) -> Path | None:
    """A file of a model on the Hub or in its cache, `None` where the model has none of that name.

    Raises:
        OSError: in one line what the Hub refuses.
    """
    try:
        path = cached_file(name, filename, _raise_exceptions_for_missing_entries=False, **hub)
    except OSError as error:  # of several lines
        raise OSError(f"checkpoint {name!r}: {_hub_error(name, error, hub.get('revision'))}") from error
    return None if path is None else Path(path)


def _hub_error(name: str, error: OSError, revision: str | None) -> str:
    """Message for what the Hub has refused."""
    cause = error.__cause__ or error
    if isinstance(cause, GatedRepoError):  # also a RepositoryNotFoundError
        return (
            f"gated on the Hub, and this account may not read it: accept its terms at {constants.ENDPOINT}/{name} and "
            f"log in with `hf auth login`, or set HF_TOKEN{_untrained_advice(name)}"
        )
    if isinstance(cause, RepositoryNotFoundError):
        return (
            f"neither a file nor a folder, and the Hub has no model of that name, or it is private, which takes "
            f"`hf auth login` or HF_TOKEN{advice(name)}"
        )
    if isinstance(cause, RevisionNotFoundError):
        return f"revision: the Hub has no branch, tag or commit {revision!r} of it"
    return " ".join(str(error).split())


def why_offline(name: str, *, local_files_only: bool = False, **hub: Any) -> str | None:
    """The reason why only the Hub's cache is read; `None` where the Hub can be reached.

    Otherwise huggingface_hub would retry every file for half a minute.
    """
    if local_files_only or constants.HF_HUB_OFFLINE:
        return "as local_files_only or HF_HUB_OFFLINE requires"
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # of a client that is another one in each version of huggingface_hub
        reason = f"which cannot be reached: {str(error) or repr(error)}"
        logger.warning("looking for %s in the Hub's cache alone, without the Hub, %s", name, reason)
        return reason
    return None


def advice(name: str) -> str:
    """Advice for a name that the Hub does not have, for the end of a message."""
    return _untrained_advice(name) or did_you_mean(name, published_names()) or "; `nopad models` lists published names"


def _untrained_advice(name: str) -> str:
    is_published = name in published_names()
    return f". 'untrained:{name}' gives its architecture with random weights" if is_published else ""


def published_names() -> list[str]:
    """The names that nopad has an architecture of."""
    return [model["name"] for model in published_models()]
