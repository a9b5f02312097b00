"""What obstore raises, as errors of the system's files whose messages say what to do."""

from __future__ import annotations

import errno
import re

from nopad.storage.addresses import WEB, scheme_of

_S3 = "check the bucket's name, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and AWS_ENDPOINT_URL"
_GS = "check the bucket's name and GOOGLE_APPLICATION_CREDENTIALS"
_AZ = "check the container's name, AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY"
SETTINGS = {"s3": _S3, "gs": _GS, **dict.fromkeys(("az", "abfs", "abfss"), _AZ), **dict.fromkeys(WEB, "check the host")}
"""What to check of a store, by the scheme of its address."""

_STATUS = re.compile(r"status code: (\d{3})[ A-Za-z-]*")
_TRANSIENT = (408, 425, 429)
_MAX_REASON = 300
# Where the clients look for credentials last: the metadata of a cloud's own machines.
_METADATA = re.compile(r" https?://[^/ ]+/(latest/(api/token|meta-data)|computeMetadata|metadata/identity)\b")
# By the codes in the bodies of responses: the key stands in the error's text as well, but without such brackets.
_NO_BUCKET = re.compile("<Code>(NoSuchBucket|ContainerNotFound)</Code>")
_OTHER_REGION = re.compile("redirect without LOCATION|<Code>(AuthorizationHeaderMalformed|PermanentRedirect)</Code>")


def as_os_error(error: BaseException, base: str, *, writing: bool = False) -> OSError:
    """The error of a file for one of obstore's.

    Args:
        base: the store, see `Address`.
        writing: whether an object was being written or removed.
    """
    text = str(error)
    if type(error).__name__ == "PreconditionError":
        return OSError(errno.ESTALE, "replaced while it was read")
    match, status = _STATUS.search(text), status_of(error)
    reason = match[0].removeprefix("status code: ") if match else first_line(error)
    is_web = scheme_of(base) in WEB
    if not is_web and (advice := _advice(text, status, reason, base, writing)):
        return ConnectionError(errno.ECONNABORTED, f"{base}: {advice}")
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
    scheme = scheme_of(base)
    if status != 404 and _METADATA.search(text.split("\n", 1)[0]):
        public = ", or set AWS_SKIP_SIGNATURE=true for a public bucket" if scheme == "s3" and not writing else ""
        return f"no credentials in the environment; {SETTINGS[scheme]}{public}"
    if _NO_BUCKET.search(text):
        return "no such bucket; create it, or correct its name"
    if _OTHER_REGION.search(text):
        return "it is in another region; set AWS_REGION to that of the bucket"
    if status in (401, 403) and writing:
        return f"{reason}: writing is refused; use credentials that may write there, or another --out"
    if status in (401, 403):
        return f"{reason}; {SETTINGS[scheme]}"
    return ""


def status_of(error: BaseException) -> int:
    """The status of a server's response, 0 for an error without one. The rest of an error's text has the key."""
    return int(match[1]) if (match := _STATUS.search(str(error))) else 0


def first_line(error: BaseException) -> str:
    """What an error says, without the request and its retries."""
    return str(error).split("\n", 1)[0].rsplit(" - ", 1)[-1][:_MAX_REASON]
