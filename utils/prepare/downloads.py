"""One file from the web, whatever the server does: retries, limits of time and size, http and https only."""
import itertools
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, wait

import requests
from requests.adapters import HTTPAdapter
from urllib3 import Retry

MOST_REDIRECTS = 5
PASSING = (408, 425, 429)  # and all from 500: statuses that a later attempt may change
LONGEST_WAIT = 60.0  # seconds before a further attempt, even if the server asks for more
BLOCK = 2**16  # bytes read at once
HEADERS = {"User-Agent": "perpeft/0.1 (images of a research data set)", "Accept-Encoding": "identity"}


class ImageError(Exception):
    """Why an image cannot be fetched; another attempt would not help."""


class PassingError(ImageError):
    """Why an image cannot be fetched now; `retry_after` is the number of seconds that the server asks for, if it does."""

    def __init__(self, reason: str, retry_after: float | None = None):
        super().__init__(reason)
        self.retry_after = retry_after


class Downloader:
    """Fetches files of up to `max_bytes`; may be used by many threads at once.

    Args:
        retries: further attempts after one that may pass.
        timeout: seconds without an answer after which an attempt fails.
        deadline: seconds that a file may take altogether, with all attempts.
        backoff: seconds before the third attempt (the second follows at once); each further wait is twice as long.
    """

    def __init__(self, retries: int, timeout: float, deadline: float, max_bytes: int, backoff: float = 1):
        self.retries, self.timeout, self.deadline, self.max_bytes, self.backoff = retries, timeout, deadline, max_bytes, backoff
        self._late = f"not fetched within {deadline:g} seconds"
        self._session = requests.Session()
        self._session.headers.update(HEADERS)
        self._session.max_redirects = MOST_REDIRECTS
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=256, max_retries=0))
        self._stopped: Future[None] = Future()

    def get(self, url: str) -> bytes:
        """The content behind an address.

        Raises:
            PassingError: the last attempt failed in a way that may pass, or the deadline came.
            ImageError: no attempt can succeed.
        """
        result: Future[bytes] = Future()
        # A thread of its own, which is left behind at the deadline: no timeout of a socket ends a server that trickles.
        threading.Thread(target=self._fetch, args=(url, result, time.monotonic() + self.deadline), daemon=True).start()
        wait((result, self._stopped), self.deadline, FIRST_COMPLETED)
        if not result.done():
            raise PassingError("stopped" if self._stopped.done() else self._late)
        return result.result()

    def stop(self) -> None:
        """End all calls of `get` now, and let no other begin; to be called once."""
        self._stopped.set_result(None)

    def _fetch(self, url: str, result: Future, end: float) -> None:
        try:
            result.set_result(self._content_after_retries(url, end))
        except BaseException as error:
            result.set_exception(error)

    def _content_after_retries(self, url: str, end: float) -> bytes:
        for failed in itertools.count():
            try:
                return self._attempt(url, end)
            except PassingError as error:
                seconds = self.backoff * (2**failed // 2) if error.retry_after is None else error.retry_after
                if failed == self.retries or self._pause(min(seconds, LONGEST_WAIT)) or time.monotonic() > end:
                    raise

    def _pause(self, seconds: float) -> bool:
        """Wait; whether all was stopped meanwhile."""
        return bool(wait((self._stopped,), seconds).done)

    def _attempt(self, url: str, end: float) -> bytes:
        try:
            with self._session.get(url, timeout=self.timeout, stream=True) as response:
                if response.status_code >= 500 or response.status_code in PASSING:
                    raise PassingError(f"HTTP {response.status_code}", _retry_after(response))
                if response.status_code != 200:
                    raise ImageError(f"HTTP {response.status_code}")
                return self._content(response, end)
        except requests.TooManyRedirects:
            raise ImageError(f"more than {MOST_REDIRECTS} redirects") from None
        except (requests.exceptions.InvalidSchema, ValueError) as error:  # an invalid address is a ValueError too
            raise ImageError("no http or https address") from error
        except requests.Timeout as error:
            raise PassingError(f"no answer within {self.timeout:g} seconds") from error
        except (requests.RequestException, OSError) as error:
            reason = getattr(error.args[0] if error.args else error, "reason", error)
            raise PassingError(f"connection failed: {str(reason)[:200]}") from error

    def _content(self, response: requests.Response, end: float) -> bytes:
        response.raw.enforce_content_length = True  # less than was announced is an error, which urllib3 before 2.0 overlooks
        announced = response.headers.get("Content-Length", "")
        size, content = int(announced) if announced.isdecimal() else 0, bytearray()
        blocks = response.iter_content(BLOCK)
        while max(size, len(content)) <= self.max_bytes:
            if time.monotonic() > end:
                raise PassingError(self._late)
            block = next(blocks, None)
            if block is None:
                return bytes(content)
            content += block
        raise ImageError(f"more than {self.max_bytes:,} bytes")


def _retry_after(response: requests.Response) -> float | None:
    """Seconds that a Retry-After header asks for; None where it asks for nothing that can be read."""
    try:
        return Retry().get_retry_after(response.raw)
    except Exception:  # urllib3 has an error of its own for a header that it cannot read
        return None
