"""The downloader against servers of every temper, and the folder that it fills."""
import contextlib
import errno
import http.server
import itertools
import os
import signal
import socket
import threading
import time
from collections import Counter
from functools import partial
from unittest import mock

import pytest
from PIL import Image

from tests.conftest import draw_image, encoded
from utils.common.errors import PerPEFTError
from utils.prepare import downloads, image_folder
from utils.prepare.downloads import Downloader, ImageError, PassingError
from utils.prepare.image_folder import fill_folder, keep_image, read_image

IMAGE = draw_image(1)
JPEG = encoded(IMAGE)


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers by the path: what comes in the dictionary `answers` of the server is called, all else is the JPEG."""

    def do_GET(self):
        with self.server.lock:
            self.server.asked[self.path] += 1
        with contextlib.suppress(ConnectionError, TimeoutError):
            self.server.answers.get(self.path, send)(self)

    def log_message(self, *_):
        pass


def send(handler, status=200, content=JPEG, **headers):
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)


def answer(*args, **options):
    return lambda handler: send(handler, *args, **options)


def after(times, first):
    """Answer in one way so many times, and then with the JPEG."""
    count = itertools.count()
    return lambda handler: (first if next(count) < times else send)(handler)


def raw(content):
    return lambda handler: handler.wfile.write(b"HTTP/1.1 200 OK\r\n" + content)


def drip(handler, begin=b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n", piece=b"x"):
    """Something every 20 ms, for as long as anyone listens."""
    handler.wfile.write(begin)
    while not handler.server.closing.wait(0.02):
        handler.wfile.write(piece)


OTHER_SCHEMES = ("file:///etc/hostname", "ftp://127.0.0.1/a", "data:image/gif;base64,R0lG", "javascript:1", "http://[")
CUT_SHORT, CUT_CHUNK = raw(b"Content-Length: 9\r\n\r\nabc"), raw(b"Transfer-Encoding: chunked\r\n\r\n100\r\nabc")


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.daemon_threads, made.lock, made.closing = True, threading.Lock(), threading.Event()
    made.answers, made.asked = {}, Counter()
    made.url = f"http://127.0.0.1:{made.server_port}"
    threading.Thread(target=made.serve_forever, args=(0.02,), daemon=True).start()
    yield made
    made.closing.set()
    made.shutdown()
    made.server_close()


def downloader(**changes):
    return Downloader(**{"retries": 2, "timeout": 5, "deadline": 120, "max_bytes": 10 * 2**20, "backoff": 0.01, **changes})


def test_files_up_to_the_limit_by_addresses_as_they_are_or_made_sendable(server):
    for name in ("81%2B+a b", "ü"):
        assert downloader(max_bytes=len(JPEG)).get(f"{server.url}/{name}.jpg") == JPEG
    assert set(server.asked) == {"/81%2B+a%20b.jpg", "/%C3%BC.jpg"}
    with pytest.raises(ImageError, match="more than"):
        downloader(max_bytes=len(JPEG) - 1).get(server.url)


@pytest.mark.parametrize("trouble", [answer(500), answer(503), answer(429), CUT_SHORT, CUT_CHUNK])
def test_trouble_that_may_pass_is_waited_for_so_long(server, trouble):
    server.answers.update({"/passes": after(2, trouble), "/stays": trouble})
    assert downloader().get(server.url + "/passes") == JPEG
    with pytest.raises(PassingError):
        downloader().get(server.url + "/stays")
    assert server.asked == {"/passes": 3, "/stays": 3}


@pytest.mark.parametrize("trouble, message", [
    *((answer(status, b""), f"HTTP {status}") for status in (204, 304, 400, 403, 404, 410)),
    *((answer(302, b"", Location=place), "no http or https address") for place in OTHER_SCHEMES),
    (raw(b"Content-Length: 1099511627776\r\n\r\n"), "more than 100,000 bytes"),
    (partial(drip, begin=b"HTTP/1.1 200 OK\r\n\r\n", piece=bytes(2**16)), "more than 100,000 bytes"),
])  # fmt: skip
def test_what_no_other_attempt_helps_is_asked_for_once(server, trouble, message):
    server.answers["/a"] = trouble
    with pytest.raises(ImageError, match=message):
        downloader(max_bytes=100_000).get(server.url + "/a")
    assert server.asked["/a"] == 1


@pytest.mark.parametrize("header, waits", [
    ({}, [0, 1, 2, 4]), ({"Retry_After": "soon"}, [0, 1, 2, 4]), ({"Retry_After": "7"}, [7] * 4), ({"Retry_After": "0"}, [0] * 4),
    ({"Retry_After": "99999"}, [downloads.LONGEST_WAIT] * 4), ({"Retry_After": "Sat, 03 Oct 2020 10:00:00 GMT"}, [0] * 4),
])  # fmt: skip
def test_waits_double_or_are_those_that_the_server_asks_for_within_a_limit(server, header, waits):
    server.answers["/a"] = after(4, answer(429, **header))
    web, found = downloader(retries=4, backoff=1), []
    web._pause = found.append
    assert web.get(server.url + "/a") == JPEG and found == waits


def test_a_wait_lasts_until_all_is_stopped():
    web, started = downloader(), time.monotonic()
    assert not web._pause(0.2) and time.monotonic() - started > 0.19
    web.stop()
    assert web._pause(1000)


@pytest.mark.parametrize("begin, piece", [
    (b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n", b"x"),  # the content
    (b"HTTP/1.1 200 OK\r\n\r\n", b"x"),  # whose end would be the connection's
    (b"HTTP/1.1 200 OK\r\n", b"x: y\r\n"),  # the headers
    (b"H", b"x"),  # the first line
])  # fmt: skip
def test_what_trickles_ends_at_the_deadline(server, begin, piece):
    server.answers["/a"] = partial(drip, begin=begin, piece=piece)
    started = time.monotonic()
    with pytest.raises(PassingError, match="not fetched within 0.3 seconds"):
        downloader(deadline=0.3).get(server.url + "/a")
    assert time.monotonic() - started < 3


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_silent_server_is_asked_again_and_ends_in_time_as_none_does(scheme):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"{scheme}://127.0.0.1:{silent.getsockname()[1]}/a"
        with pytest.raises(PassingError, match="no answer within 0.2 seconds"):
            downloader(timeout=0.2, retries=1).get(url)
        silent.settimeout(5)
        assert [silent.accept() for _ in range(2)]
    with pytest.raises(PassingError, match="connection failed: .*refused"):
        downloader().get(url)


def test_redirects_are_followed_so_far(server):
    server.answers["/a"] = answer(301, b"", Location="/b.jpg")
    server.answers["/circle"] = answer(302, b"", Location="/circle")
    assert downloader().get(server.url + "/a") == JPEG
    with pytest.raises(ImageError, match="more than 5 redirects"):
        downloader().get(server.url + "/circle")
    assert server.asked["/circle"] == 6


@pytest.mark.parametrize("url", [
    *OTHER_SCHEMES, "", "a.jpg", "http://", "http://127.0.0.1:port/a", "http:///a", "http://127.0.0.1:99999999/a",
    "http://127.0.0.1\r\nX: y/", "http://" + "a" * 300 + ".example/",
])  # fmt: skip
def test_addresses_that_are_none(url):
    with pytest.raises(ImageError):
        downloader(retries=0).get(url)


def test_other_kinds_become_jpeg_and_jpegs_stay_as_they_are(tmp_path):
    for kind, mode in (("PNG", "RGBA"), ("GIF", "P"), ("WEBP", "RGB"), ("PNG", "L")):
        keep_image(encoded(IMAGE.convert(mode), kind), tmp_path / "a.jpg")
        with Image.open(tmp_path / "a.jpg") as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", IMAGE.size)
    keep_image(JPEG, tmp_path / "a.jpg")
    assert read_image(str(tmp_path / "a.jpg")) == JPEG
    assert os.listdir(tmp_path) == ["a.jpg"]


def test_what_is_no_image_or_cannot_be_read_leaves_nothing(tmp_path):
    for content in (b"", b"<html>not found</html>", JPEG[:200], encoded(IMAGE, "PNG")[:90], b"%!PS-Adobe-3.0\n"):
        with pytest.raises(ImageError, match="no image"):
            keep_image(content, tmp_path / "a.jpg")
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(ImageError, match="cannot be read"):
            read_image(str(path))
    assert not os.listdir(tmp_path)


def test_a_folder_is_filled_and_what_is_there_and_whole_is_not_fetched_again(server, tmp_path):
    server.answers.update({"/html": answer(content=b"<html>"), "/gone": answer(404, b""), "/down": answer(500)})
    sources = {name: f"{server.url}/{name}" for name in ("html", "gone", "down", "a", "b", "c", "x" * 251)}
    filling = fill_folder(tmp_path / "images", sources, downloader().get, 3)
    failed = {"html": "no image: not an image of a kind that is read", "gone": "HTTP 404", "down": "HTTP 500"}
    assert (filling.kept, filling.fetched, filling.failed) == (0, 4, failed)
    server.asked.clear()
    (tmp_path / "images" / "a.jpg").write_bytes(JPEG[:300])
    (tmp_path / "images" / "b.jpg").unlink()
    (tmp_path / "images" / ".77.tmp").write_bytes(JPEG[:300])  # as a killed process leaves it
    filling = fill_folder(tmp_path / "images", sources, downloader().get, 3)
    assert (filling.kept, filling.fetched, filling.failed) == (2, 2, failed)
    assert server.asked == {"/a": 1, "/b": 1, "/html": 1, "/gone": 1, "/down": 3}
    images = {path.name: path.read_bytes() for path in (tmp_path / "images").iterdir()}
    assert images == {f"{name}.jpg": JPEG for name in ("a", "b", "c", "x" * 251)}


def test_never_more_at_once_than_workers(tmp_path):
    under_way, counts = set(), []

    def get(source):
        under_way.add(source)
        counts.append(len(under_way))
        time.sleep(0.02)
        under_way.remove(source)
        return JPEG

    fill_folder(tmp_path, {str(number): number for number in range(40)}, get, 5)
    assert len(counts) == 40 and 2 <= max(counts) <= 5


@pytest.mark.parametrize("slow", [drip, answer(503, Retry_After="50")])
def test_interrupted_it_ends_at_once_and_goes_on_later(server, tmp_path, slow):
    sources = {str(number): f"{server.url}/{number}" for number in range(30)}
    server.answers.update({f"/{number}": after(1, slow) for number in range(10, 14)})
    main = threading.main_thread().ident
    server.answers["/14"] = after(1, lambda handler: (time.sleep(0.2), signal.pthread_kill(main, signal.SIGINT), drip(handler)))
    web = downloader(timeout=100)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        fill_folder(tmp_path, sources, web.get, 5, web.stop)
    assert time.monotonic() - started < 5
    there = {path.stem for path in tmp_path.iterdir()}
    assert 10 <= len(there) < 30 and all((tmp_path / f"{name}.jpg").read_bytes() == JPEG for name in there)
    before = Counter(server.asked)
    filling = fill_folder(tmp_path, sources, downloader().get, 5)
    assert (filling.fetched, filling.kept) == (30 - len(there), len(there))
    assert {path[1:] for path in server.asked - before} == set(sources) - there


def test_without_a_connection_it_gives_up(server, tmp_path):
    sources = {str(number): f"{server.url}/{number}" for number in range(40)}
    fill_folder(tmp_path, {"0": sources["0"]}, downloader().get, 2)
    server.answers.update({f"/{number}": answer(503) for number in range(40)})
    with pytest.raises(PerPEFTError, match=r"10 images in a row could not be fetched \(the last: HTTP 503\)"):
        fill_folder(tmp_path, sources, downloader(retries=0).get, 2, give_up=10)
    assert len(fill_folder(tmp_path, sources, downloader(retries=0).get, 2).failed) == 39
    server.answers.update({f"/{number}": answer(404, b"") for number in range(0, 40, 4)})  # the server is there, so it goes on
    assert len(fill_folder(tmp_path, sources, downloader(retries=0).get, 2, give_up=10).failed) == 39


def test_a_full_disk_is_no_failed_image(tmp_path, monkeypatch):
    monkeypatch.setattr(image_folder.os, "replace", mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        fill_folder(tmp_path, {"a": "a", "b": "b"}, lambda source: JPEG, 2)
    assert not os.listdir(tmp_path)
