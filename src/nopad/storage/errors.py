"""What obstore raises, as errors of the system's files whose messages say what to do."""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping
from urllib.parse import urlsplit

from nopad.storage.addresses import WEB, scheme_of

_S3 = "check the bucket's name, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and AWS_ENDPOINT_URL"
_GS = "check the bucket's name and GOOGLE_APPLICATION_CREDENTIALS"
_AZ = "check the container's name, AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY"
_AZURE = ("az", "abfs", "abfss")
SETTINGS = {"s3": _S3, "gs": _GS, **dict.fromkeys(_AZURE, _AZ), **dict.fromkeys(WEB, "check the host")}
"""What to check of a store, by the scheme of its address."""

_HTTP_ADVICE = "give http:// or https://, a host and, if it needs one, a port"
_ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    **dict.fromkeys(_AZURE, ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT")),
}

_STATUS = re.compile(r"status code: (\d{3})[ A-Za-z-]*")
_TRANSIENT = (408, 425, 429)
_MAX_REASON = 300
# Where the clients look for credentials last: the metadata of a cloud's own machines.
_METADATA = re.compile(r" https?://[^/ ]+/(latest/(api/token|meta-data)|computeMetadata|metadata/identity)\b")
# By the codes in the bodies of responses: the key stands in the error's text as well, but without such brackets.
_NO_BUCKET = re.compile("<Code>(NoSuchBucket|ContainerNotFound)</Code>")
_OTHER_REGION = re.compile("redirect without LOCATION|<Code>(AuthorizationHeaderMalformed|PermanentRedirect)</Code>")
_EXPIRED = re.compile("<Code>(ExpiredToken|TokenRefreshRequired|InvalidToken)</Code>")
# Of the clients' errors without an answer. A name that a resolver could not look up now may be there in a moment.
_CONNECT = re.compile(r"kind: (Connect|Builder)\b")
MAYBE_LATER = re.compile("(?i)temporary failure|try again|timed out|deadline")
_SERVER = re.compile(r"https?://[^/ ]+")
_CAUSE = re.compile(r'(?:message|error): "([^"]+)"')


class UnreachableStoreError(ConnectionError):
    """A store cannot be reached now; the same command may work later."""


class UnusableStoreError(UnreachableStoreError):
    """A store that refuses access, or is none by its name and settings; trying again is of no use until these change.

    Its message has what to change.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(errno.ECONNABORTED, reason)

    def __str__(self) -> str:
        return self.strerror or ""

    def __reduce__(self) -> tuple[type[UnusableStoreError], tuple[str]]:
        return UnusableStoreError, (str(self),)


def unusable_store(error: BaseException | None) -> UnusableStoreError | None:
    """The error of a store that cannot be used which an error is, or comes from."""
    while error is not None and not isinstance(error, UnusableStoreError):
        error = error.__cause__
    return error


def check_endpoint(base: str, environment: Mapping[str, str]) -> None:
    """Check the endpoint that the environment gives for a store; the store's client ends the thread over some.

    Raises:
        UnusableStoreError: no address of a server.
    """
    for name in _ENDPOINTS.get(scheme_of(base), ()):
        value = environment.get(name, "http://host")
        try:
            parts = urlsplit(value)
            is_valid = parts.scheme in WEB and parts.hostname and (parts.port is None or parts.port > 0)
        except ValueError:
            is_valid = False
        if not is_valid or value != value.strip():
            raise UnusableStoreError(f"{base}: {name}: expected the address of a server, got {value!r}; {_HTTP_ADVICE}")


def as_os_error(error: BaseException, base: str, *, writing: bool = False, has_answered: bool = True) -> OSError:
    """The error of a file for one of obstore's.

    Args:
        base: the store, see `Address`.
        writing: whether an object was being written or removed.
        has_answered: whether the store has answered before. One where nothing ever did is rather named wrongly than
            down.
    """
    text = str(error)
    if type(error).__name__ == "PreconditionError":
        return OSError(errno.ESTALE, "replaced while it was read")
    match, status = _STATUS.search(text), status_of(error)
    reason = match[0].removeprefix("status code: ") if match else first_line(error)
    is_web = scheme_of(base) in WEB
    if not is_web and status != 404 and _METADATA.search(text.split("\n", 1)[0]):
        public = (
            ", or set AWS_SKIP_SIGNATURE=true for a public bucket" if scheme_of(base) == "s3" and not writing else ""
        )
        reason = f"{base}: no credentials in the environment; {SETTINGS[scheme_of(base)]}{public}"
        # Where they were there before, they are being renewed.
        return ConnectionError(errno.ECONNABORTED, reason) if has_answered else UnusableStoreError(reason)
    if not is_web and (advice := _advice(text, status, reason, base, writing)):
        return UnusableStoreError(f"{base}: {advice}")
    if not (status or has_answered) and _CONNECT.search(text) and not MAYBE_LATER.search(text):
        causes, server = _CAUSE.findall(text), _SERVER.search(text)
        where = f"{server[0]}: " if server and not is_web else ""
        return UnusableStoreError(f"{base}: {where}{causes[-1] if causes else reason}; {SETTINGS[scheme_of(base)]}")
    if isinstance(error, FileNotFoundError) or status == 404:
        return FileNotFoundError(errno.ENOENT, "No such object")
    if status in (401, 403):
        return PermissionError(errno.EACCES, reason)
    if is_web and 300 <= status < 500 and status not in _TRANSIENT:
        return OSError(errno.EINVAL, reason)
    if "Could not parse path" in text:
        return OSError(errno.EINVAL, reason)
    if type(error).__name__ == "NotSupportedError" or "Content-Length" in text:
        return OSError(errno.EOPNOTSUPP, f"{base}: {reason}")
    return ConnectionError(errno.ECONNABORTED, f"{base}: {reason}")


def _advice(text: str, status: int, reason: str, base: str, writing: bool) -> str:
    """What is wrong with how a cloud's store is reached, and what to do; empty where that is not known."""
    if _NO_BUCKET.search(text):
        return f"no such {'container' if scheme_of(base) in _AZURE else 'bucket'}; create it, or correct its name"
    if _EXPIRED.search(text):
        return "the credentials have expired, or are none; set new ones"
    if _OTHER_REGION.search(text):
        return "it is in another region; set AWS_REGION to that of the bucket"
    if status in (401, 403) and writing:
        return f"{reason}: writing is refused; use credentials that may write there, or another --out"
    if status in (401, 403):
        return f"{reason}; {SETTINGS[scheme_of(base)]}"
    return ""


def status_of(error: BaseException) -> int:
    """The status of a server's response, 0 for an error without one. The rest of an error's text has the key."""
    return int(match[1]) if (match := _STATUS.search(str(error))) else 0


def first_line(error: BaseException) -> str:
    """What an error says, without the request and its retries."""
    return str(error).split("\n", 1)[0].rsplit(" - ", 1)[-1][:_MAX_REASON]
