"""One file from the web, whatever the server does: retries, a hard end in time and size, http and https only."""
import contextlib
import email.utils
import http.client
import random
import socket
import ssl
import string
import threading
import time
import urllib.parse
import urllib.request

LONGEST_WAIT = 60.0  # seconds before a further attempt, even if the server asks for more
REDIRECTS = (301, 302, 303, 307, 308)
MOST_REDIRECTS = 5
PASSING = (408, 425, 429)  # and all from 500: what a later attempt may mend
AGENT = "perpeft/0.1 (images of a research data set)"


class ImageError(Exception):
    """Why an image cannot be had; another attempt would not help."""


class PassingError(ImageError):
    """Why an image cannot be had now.

    Attributes:
        wait: seconds after which the server wants to be asked again, if it says so.
    """

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


class Downloader:
    """Fetches files; may be used by many threads at once.

    Args:
        retries: further attempts after one that failed and may pass.
        timeout: seconds an attempt may take altogether, from connecting to the last byte.
        max_bytes: the largest file taken.
        first_wait: seconds before the second attempt; each further wait is twice as long.
    """

    def __init__(self, retries: int = 3, timeout: float = 30, max_bytes: int = 10 * 2**20, first_wait: float = 1):
        self.retries, self.timeout, self.max_bytes, self.first_wait = retries, timeout, max_bytes, first_wait
        self._context = ssl.create_default_context()  # made once: reading the certificates takes long
        self._stopped = threading.Event()
        self._watches: set[_Watch] = set()

    def get(self, url: str) -> bytes:
        """The content behind an address.

        Raises:
            PassingError: the last attempt failed in a way that may pass.
            ImageError: no attempt can succeed.
        """
        for attempt in range(self.retries + 1):
            try:
                return self._attempt(url)
            except PassingError as error:
                if attempt == self.retries or self._stopped.is_set():
                    raise
                wait = self.first_wait * 2**attempt * random.uniform(0.5, 1) if error.wait is None else error.wait
                self._stopped.wait(min(wait, LONGEST_WAIT))
        raise AssertionError("unreachable")

    def stop(self) -> None:
        """End all attempts now, and let no other begin."""
        self._stopped.set()
        for watch in list(self._watches):
            watch.end()

    def _attempt(self, url: str) -> bytes:
        watch = _Watch(self.timeout)
        self._watches.add(watch)
        try:
            with watch:
                if self._stopped.is_set():
                    raise PassingError("stopped")
                return self._follow(url, watch)
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)  # urllib puts the error of a connection into one of its own
            if watch.over or isinstance(reason, TimeoutError):
                raise PassingError(f"not there within {self.timeout:g} seconds") from error
            if isinstance(error, (ValueError, http.client.InvalidURL)):
                raise ImageError("no http or https address") from error
            raise PassingError(f"connection failed: {reason or type(error).__name__}") from error
        finally:
            self._watches.discard(watch)

    def _follow(self, url: str, watch: "_Watch") -> bytes:
        for _ in range(MOST_REDIRECTS + 1):
            parts = urllib.parse.urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ImageError("no http or https address")
            request = urllib.request.Request(urllib.parse.quote(url, safe=string.punctuation), headers={"User-Agent": AGENT})
            with watch.opener(self._context).open(request, timeout=self.timeout) as response:
                if response.status not in REDIRECTS:
                    return self._content(response, watch)
                url = urllib.parse.urljoin(url, response.headers.get("Location", ""))
        raise ImageError(f"more than {MOST_REDIRECTS} redirects")

    def _content(self, response: http.client.HTTPResponse, watch: "_Watch") -> bytes:
        if response.status >= 500 or response.status in PASSING:
            raise PassingError(f"HTTP {response.status}", _seconds(response.headers.get("Retry-After")))
        if response.status != 200:
            raise ImageError(f"HTTP {response.status}")
        too_large = ImageError(f"more than {self.max_bytes:,} bytes")
        if (response.length or 0) > self.max_bytes:
            raise too_large
        content = response.read(self.max_bytes + 1)
        if len(content) > self.max_bytes:
            raise too_large
        if watch.over:  # which looks like the end of the file
            raise TimeoutError
        if response.length:
            raise PassingError(f"cut off, {response.length:,} bytes are missing")
        return content


class _Watch:
    """Shuts an attempt's connections down when its time is up, whichever part of them it is waiting for."""

    def __init__(self, seconds: float):
        self.over = False
        self._timer = threading.Timer(seconds, self.end)
        self._timer.daemon = True
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []

    def __enter__(self) -> "_Watch":
        self._timer.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._timer.cancel()
        with self._lock:
            for connection in self._sockets:
                connection.close()
            self._sockets.clear()

    def end(self) -> None:
        """Shut down."""
        with self._lock:
            self.over = True
            for connection in self._sockets:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def connect(self, *args: object, **options: object) -> socket.socket:
        """`socket.create_connection`, watched."""
        connection = socket.create_connection(*args, **options)
        with self._lock:
            self._sockets.append(connection.dup())  # a second hold on it, as TLS takes the first away
        if self.over:
            self.end()
        return connection

    def opener(self, context: ssl.SSLContext) -> urllib.request.OpenerDirector:
        """What opens addresses over watched connections, through a proxy where the environment names one; nothing else."""
        opener = urllib.request.OpenerDirector()
        for handler in (urllib.request.ProxyHandler(), _Http(), _Https(context=context)):
            handler.watch = self
            opener.add_handler(handler)
        return opener


class _Watched:
    """Makes an urllib handler connect by its `watch`."""

    def do_open(self, http_class: type, request: urllib.request.Request, **options: object) -> http.client.HTTPResponse:
        """As in urllib, which asks for the class of the connection."""

        def connection(*args: object, **more: object) -> http.client.HTTPConnection:
            made = http_class(*args, **more)
            made._create_connection = self.watch.connect  # there to be replaced, says http.client
            return made

        return super().do_open(connection, request, **options)


class _Http(_Watched, urllib.request.HTTPHandler):
    """http, watched."""


class _Https(_Watched, urllib.request.HTTPSHandler):
    """https, watched."""


def _seconds(retry_after: str | None) -> float | None:
    """What a Retry-After header asks for, a number of seconds or a date; None where it says nothing of use."""
    if retry_after is None:
        return None
    if retry_after.strip().isdecimal():
        return float(retry_after)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
