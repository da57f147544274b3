"""A store's place on S3: whole objects, conditional puts, tries that are repeated, faults in words.

Endpoint, region and credentials are botocore's business, which reads AWS's usual variables and profiles. No message
shows more of them than the endpoint's host.
"""

import logging
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from secrets import SystemRandom
from typing import Any, TypeVar
from urllib.parse import urlsplit

from botocore import exceptions as boto
from s3fs.core import S3_RETRYABLE_ERRORS, S3FileSystem

from quee_core.entries import basename
from quee_core.errors import StoreError, StoreUnreachableError
from quee_core.places import Place
from quee_core.redaction import without_secrets

T = TypeVar("T")
logger = logging.getLogger(__name__)

PART = 16 * 2**20  # bytes of one part; objects of two parts and more are put part by part

_PAGE = 1000  # objects of one answer to a listing: the most that S3 gives
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 5.0  # seconds between two tries
_LATER = frozenset({
    "SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "RequestTimeoutException", "Throttling",
    "ThrottlingException", "RequestThrottled", "RequestLimitExceeded", "TooManyRequests", "BandwidthLimitExceeded",
    "OperationAborted", "ConditionalRequestConflict", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch",
    "NoSuchUpload",
})  # fmt: skip
_LATER_STATUS = frozenset({408, 429, 500, 502, 503, 504})
_CONNECTION = (*S3_RETRYABLE_ERRORS, boto.ConnectionError, ConnectionError, TimeoutError)
_LOGIN = re.compile(r"[^/\s]+@")  # of an endpoint without a scheme
_CREDENTIALS = (
    boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError, boto.TokenRetrievalError,
    boto.NoAuthTokenError, boto.SSOError, boto.MetadataRetrievalError, boto.UnknownCredentialError,
)  # fmt: skip
_EXISTS = frozenset({"PreconditionFailed", "412"})
_NO_CONDITIONS = frozenset({"NotImplemented", "501", "InvalidArgument", "InvalidRequest", "MethodNotAllowed", "405"})

_DENIED = "access is denied; the credentials must be allowed to list the bucket, and to get, put and delete its objects"
_EXPIRED = "the session's credentials have run out; get new ones and run again, what is finished is kept"
_REGION = "the bucket is in another region; set AWS_DEFAULT_REGION, or the profile's region, to the bucket's"
_ADVICE = {
    "NoSuchBucket": "there is no such bucket at {server}; make it, or name another",
    "InvalidBucketName": "the server takes no bucket of this name; name another",
    "InvalidAccessKeyId": "the credentials are wrong: {server} does not know the access key; check "
    "AWS_ACCESS_KEY_ID, or the profile",
    "SignatureDoesNotMatch": "the credentials are wrong: the secret key is not the access key's; check "
    "AWS_SECRET_ACCESS_KEY, or the profile",
    "AccessDenied": _DENIED,
    "AllAccessDisabled": _DENIED,
    "403": _DENIED,
    "ExpiredToken": _EXPIRED,
    "InvalidToken": _EXPIRED,
    "TokenRefreshRequired": _EXPIRED,
    "RequestTimeTooSkewed": "this machine's clock and the server's differ too much; set the clock (timedatectl shows "
    "it) and run again",
    "PermanentRedirect": _REGION,
    "AuthorizationHeaderMalformed": _REGION,
    "IllegalLocationConstraintException": _REGION,
    "301": _REGION,
}


@dataclass(frozen=True)
class _Fault:
    """Why a step failed and what to do, and whether another try can help."""

    why: str
    passes: bool = False


class S3Place(Place):
    """Objects below a prefix of a bucket. Steps raise what s3fs and botocore raise; `attempt` puts it into words."""

    def __init__(self, fs: Any, root: str, patience: float) -> None:
        super().__init__(fs, root)
        self._patience = patience
        self._conditional = True  # until the server says that it can't

    @classmethod
    def at(cls, url: str, patience: float, what: str = "store") -> "S3Place":
        """The place at s3://bucket/prefix, called `what`.

        Raises StoreError for no bucket, and for settings that botocore refuses.
        """
        root = url.partition("://")[2].rstrip("/")
        if not root or root.startswith("/"):
            raise StoreError(f"{what} {url}: no bucket is named; want s3://bucket/prefix")
        # one try and one request for each step, which `attempt` repeats; another writer's files must show at once
        fs = S3FileSystem(
            use_listings_cache=False, max_concurrency=1, config_kwargs={"retries": {"total_max_attempts": 1}}
        )
        fs.retries = 1
        place = cls(fs, root, patience)
        try:
            fs.connect()
        except (boto.BotoCoreError, ValueError) as error:
            raise StoreError(
                f"{what} {url}: the settings for S3 are wrong ({_first_line(error)}); check AWS_ENDPOINT_URL, "
                "AWS_DEFAULT_REGION and AWS_PROFILE"
            ) from error
        return place

    @property
    def server(self) -> str:
        """The endpoint's scheme, host and port."""
        parts = urlsplit(self._fs.s3.meta.endpoint_url)
        return f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")

    def shown(self, location: str) -> str:
        """The object's URL."""
        return f"s3://{self._full(location)}"

    def attempt(self, location: str, doing: str, work: Callable[[], T]) -> T:
        """What `work` returns, tried again with growing pauses while what stops it may pass.

        Raises StoreUnreachableError if it does not, StoreError at once for what can't.
        """
        began, pause, told_so = time.monotonic(), _FIRST_PAUSE, False
        while True:
            try:
                return work()
            except Exception as error:
                fault = self._fault(error)
                if fault is None:
                    raise
                told = f"{self.shown(location)}: cannot be {doing}: {fault.why}"
                if not fault.passes:
                    raise StoreError(told) from error
                tried = time.monotonic() - began
                left = self._patience - tried
                if left <= 0:
                    raise StoreUnreachableError(
                        f"{told}, for {tried:.0f} s now; see that the server runs and AWS_ENDPOINT_URL is its "
                        "address, and run again: what is finished is kept"
                    ) from error
                if pause > 1 and not told_so:
                    logger.warning("%s; trying again for %.0f s", told, left)
                    told_so = True
            # some writers wait longer than others, so that they do not come back all at once
            time.sleep(min(left, pause * SystemRandom().uniform(0.5, 1)))
            pause = min(2 * pause, _LONGEST_PAUSE)

    def put(self, location: str, data: bytes) -> None:
        """Put the finished object, a large one in parts, which show once all of them are there.

        Parts that a killed writer leaves stay unseen; the bucket's rule for unfinished uploads removes them.
        """
        self._fs.pipe_file(self._full(location), data, chunksize=PART, max_concurrency=4)

    def create(self, location: str, data: bytes) -> bool:
        """Put an object unless there is one; whether it was put. A server without conditional puts overwrites it."""
        if not self._conditional:
            return super().create(location, data)
        try:
            self._fs.pipe_file(self._full(location), data, chunksize=PART, max_concurrency=4, mode="create")
        except FileExistsError:
            return False
        except OSError as error:
            code = _answer(error)[0]
            if code in _EXISTS:
                return False
            if code not in _NO_CONDITIONS:
                raise
            self._conditional = False
            return self.create(location, data)
        return True

    def sizes(self, folder: str) -> dict[str, int]:
        """Name and size in bytes of each object right below `folder`."""
        pages = self._pages(folder, "/")
        return {basename(found["Key"]): found["Size"] for page in pages for found in page.get("Contents", [])}

    def folders(self) -> list[str]:
        """Names of the prefixes right below the root."""
        return sorted(
            basename(found["Prefix"].rstrip("/"))
            for page in self._pages("", "/")
            for found in page.get("CommonPrefixes", [])
        )

    def tree(self, top: str) -> Iterator[tuple[str, set[str]]]:
        """Each prefix of objects from `top` down, and their names, by one request for a thousand objects."""
        skipped = len(self._full("").partition("/")[2])
        folders: dict[str, set[str]] = defaultdict(set)
        for page in self._pages(top, ""):
            for found in page.get("Contents", []):
                folder, _, name = found["Key"][skipped:].lstrip("/").rpartition("/")
                folders[folder].add(name)
        yield from folders.items()

    def _pages(self, folder: str, delimiter: str) -> Iterator[dict[str, Any]]:
        bucket, prefix, _ = self._fs.split_path(self._full(folder))
        asked = {"Bucket": bucket, "Prefix": f"{prefix}/" if prefix else "", "Delimiter": delimiter, "MaxKeys": _PAGE}
        while True:
            page = self._fs.call_s3("list_objects_v2", **asked)
            yield page
            if not page.get("IsTruncated"):
                return
            asked["ContinuationToken"] = page["NextContinuationToken"]

    def _unless_absent(self, look: Callable[[], T]) -> T | None:
        try:
            return look()
        except FileNotFoundError as error:
            if _answer(error)[0] == "NoSuchBucket":
                raise
            return None

    def _fault(self, error: Exception) -> _Fault | None:
        """What `error` means; None for a bug."""
        code, status = _answer(error)
        if code in _ADVICE:
            return _Fault(_ADVICE[code].format(server=self.server))
        if _is_for_later(code, status):
            return _Fault(f"{self.server} refuses it for the moment ({code}, status {status})", passes=True)
        if isinstance(error, _CREDENTIALS):
            return _Fault(
                f"no credentials are found ({type(error).__name__}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                "or AWS_PROFILE"
            )
        if isinstance(error, boto.SSLError):
            return _Fault(
                f"no safe connection to {self.server} ({_first_line(error)}); check AWS_ENDPOINT_URL",
                passes="EOF" in str(error),  # ended in the middle, as a server does that is stopped
            )
        if isinstance(error, _CONNECTION):
            return _Fault(f"{self.server} does not answer ({type(error).__name__})", passes=True)
        if isinstance(error, boto.ParamValidationError):
            return _Fault("S3 has no bucket or object of such a name; name another place")
        if isinstance(error, boto.BotoCoreError | boto.ClientError | OSError):
            return _Fault(f"{_first_line(error)}; check the place and run again, what is finished is kept")
        return None


def may_pass(error: BaseException) -> bool:
    """Whether `error`, of botocore or s3fs, is an S3 server that does not answer, or refuses for the moment."""
    return isinstance(error, _CONNECTION) or _is_for_later(*_answer(error))


def _is_for_later(code: str, status: int) -> bool:
    return code in _LATER or status in _LATER_STATUS


def _answer(error: BaseException) -> tuple[str, int]:
    """Code and HTTP status of the server's answer behind `error`; "" and 0 if there was none."""
    for each in (error, error.__cause__):
        response = getattr(each, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", "")), int(
                response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            )
    return "", 0


def _first_line(error: BaseException) -> str:
    told = (str(error) or type(error).__name__).splitlines()[0]
    return _LOGIN.sub("", without_secrets(told))
