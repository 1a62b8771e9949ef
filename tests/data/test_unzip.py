"""unzip_data.py: every file arrives byte for byte, hostile or damaged archives change nothing, a killed run continues."""
import errno
import io
import itertools
import os
import random
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

import unzip_data
from tests.conftest import exit_code
from tests.run_files import tree
from tests.zygote import ROOT
from utils.data import archives
from utils.data.table1 import PAPER_TABLE1, dataset_table

ARCHIVE = "mmrec_datasets.zip"
TEMP = f"dataset/.unpacking/{ARCHIVE}"
NOISE = random.Random(0)
LINES = b"1 1\n1 2\n1 3\n2 2\n2 5\n"
STORED, DEFLATED, BZIP2, LZMA = METHODS = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    """The empty folder that a test runs in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def zip_bytes(files, method=STORED):
    """A zip in memory of {name: bytes} or of (name or ZipInfo, bytes) pairs."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", method) as zipped:
        warnings.simplefilter("ignore")  # duplicates are meant
        for name, data in files.items() if isinstance(files, dict) else files:
            zipped.writestr(name, data)
    return buffer.getvalue()


def images(name, count=4):
    return {f"{name}_{i}.jpg": NOISE.randbytes(300 + i) for i in range(count)}


def below(folder, files):
    return {f"{folder}{path}": data for path, data in files.items()}


def write(files):
    for path, data in files.items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(data)


def download(names=("arts",), folder="", inner_folder="{}_images/", method=STORED):
    """Write the archive; return the files that it ends as in the target, and those that --keep leaves there."""
    final, kept = {}, {}
    for name in names:
        shots = images(name)
        kept |= {f"{name}_final.txt": LINES, f"{name}_item2id_final.pickle": NOISE.randbytes(90),
                 f"{name}_texts_final.pickle": NOISE.randbytes(120), f"{name}_preX.pt": NOISE.randbytes(20_000),
                 f"{name}_images.zip": zip_bytes(below(inner_folder.format(name), shots))}
        final |= below(f"{name}_images/", shots)
    write({ARCHIVE: zip_bytes(below(folder, kept), method)})
    kept |= final
    return {path: data for path, data in kept.items() if not path.endswith(".zip")}, kept


def unzip(*options):
    """Run the script in this process; returns its exit code."""
    return exit_code(options, unzip_data.main)


@pytest.fixture
def refused(work, capsys):
    """Runs the script, which must exit 2 with one sentence and leave all as it was; returns the sentence."""

    def run():
        before, folders = tree(work), {path for path in work.rglob("*") if path.is_dir()}
        assert unzip() == 2
        assert (tree(work), {path for path in work.rglob("*") if path.is_dir()}) == (before, folders)
        err = capsys.readouterr().err
        assert "Traceback" not in err
        return err.strip().splitlines()[-1]

    return run


@pytest.mark.parametrize(
    "folder, inner_folder, method, target",
    [
        ("", "{}_images/", STORED, "dataset"), ("dataset/", "", DEFLATED, "elsewhere/data"),
        ("mmrec_datasets/", "home/me/{}_images/", BZIP2, "dataset"), ("./a/", "./{}_x/", LZMA, "dataset"),
    ],
)  # fmt: skip
def test_archive_becomes_the_layout_and_goes(work, capsys, folder, inner_folder, method, target):
    final, _ = download(["arts", "my_shop"], folder, inner_folder, method)
    assert unzip(*(["--target", target] if target != "dataset" else [])) == 0
    assert tree(work) == below(f"{target}/", final)
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line}
    assert rows["my_shop"] == ["my_shop", "2", "-", "4", "-", "5", "-", "4"]


def test_keep_keeps_and_a_second_run_without_it_only_deletes(work):
    final, kept = download()
    archive = (work / ARCHIVE).read_bytes()
    for _ in range(2):
        assert unzip("--keep") == 0
        assert tree(work) == below("dataset/", kept) | {ARCHIVE: archive}
    stamps = {path: path.stat().st_mtime_ns for path in work.glob("dataset/arts_images/*")}
    assert unzip() == 0
    assert tree(work) == below("dataset/", final)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


LITTER = {"all/.DS_Store": b"x", "__MACOSX/all/._README.md": b"x"}
FOLDERS_EACH = {"all/arts/arts_final.txt": b"1 1\n", "all/toys/toys_final.txt": b"1 2\n", "all/README.md": b"hello"}
AS_WINDOWS_WRITES = {"data\\arts_final.txt": LINES, "data\\arts_images\\": b"", "data\\arts_images\\a.jpg": b"image"}
SHOTS = images("arts")
INNER = zip_bytes(SHOTS)


@pytest.mark.parametrize(
    "files, options, left",
    [
        ({ARCHIVE: zip_bytes(AS_WINDOWS_WRITES)}, "", {"arts_final.txt": LINES, "arts_images/a.jpg": b"image"}),
        ({ARCHIVE: zip_bytes(FOLDERS_EACH | LITTER)}, "",
         {"arts_final.txt": b"1 1\n", "toys_final.txt": b"1 2\n", "README.md": b"hello"}),
        ({"dataset/arts_images.zip": INNER}, "", below("arts_images/", SHOTS)),
        ({"arts_images.zip": INNER}, "--archive arts_images.zip", below("arts_images/", SHOTS)),
        ({"dataset/arts_images.zip": INNER}, "--archive dataset/arts_images.zip --keep",
         below("arts_images/", SHOTS) | {"arts_images.zip": INNER}),
    ],
)  # fmt: skip
def test_one_archive_alone(work, capsys, files, options, left):
    write(files)
    assert unzip(*options.split()) == 0
    assert tree(work) == below("dataset/", left)
    assert capsys.readouterr().out.count("verified on disk") == 1


def test_without_an_archive(refused, capsys):
    assert re.search("mmrec_datasets.zip .* README's section Data", refused())
    command = [sys.executable, "-c", "import sys, unzip_data; sys.exit('torch' in sys.modules)"]
    subprocess.run(command, cwd=ROOT, check=True)  # it starts quickly, and before torch is installed
    write({"dataset/arts_final.txt": b"7 1\n"})
    assert unzip() == 0
    assert "arts      " in capsys.readouterr().out


def special(kind):
    """An archive with a link, a device, or (None) a folder with content."""
    member = zipfile.ZipInfo("arts_images" if kind else "arts_images/")
    member.external_attr = ((kind or stat.S_IFDIR) | 0o777) << 16
    return zip_bytes([(member, b"/etc"), ("arts_images/passwd", b"x")])


def lie(archive, field, value):
    """Overwrite a field of the only member, in its own header and in the table of contents."""
    own, table, form = {"flags": (6, 8, "<H"), "method": (8, 10, "<H"), "crc": (14, 16, "<I"), "size": (22, 24, "<I")}[field]
    data, central = bytearray(archive), archive.index(b"PK\x01\x02")
    struct.pack_into(form, data, own, value)
    struct.pack_into(form, data, central + table, value)
    return bytes(data)


def flipped(archive, place, bits=4):
    return archive[:place] + bytes([archive[place] ^ bits]) + archive[place + 1 :]


AWAY = [
    "../evil.txt", "a/../../evil.txt", "/etc/evil.txt", "..\\evil.txt", "\\evil.txt", "a\\..\\..\\evil.txt", "\\\\host\\evil.txt",
    "C:\\evil.txt", "C:/evil.txt", "C:evil.txt", "a/D:/evil.txt", "..", ".", "evil\n.txt", ".unpacking/x", "//host/evil.txt",
]  # fmt: skip
ONE_PLACE = [
    ("a_final.txt", "a_final.txt"), ("b_final.txt", "x/b_final.txt"), ("x/a", "x/./a"), ("x/a", "x\\a"), ("b/a", "b/a/c"),
]  # fmt: skip
SPECIAL = [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFSOCK, None]
PLAIN = zip_bytes({"arts_final.txt": b"1 1\n"})
BY_HAND = r"7-Zip \(7z x mmrec_datasets.zip -odataset\), delete the archive and start again"
TEXT = b"".join(b"%d %d\n" % (i, i * i) for i in range(500))
SIZES = [(NOISE.randbytes(4000), STORED, 3), (NOISE.randbytes(4000), STORED, 5000), (TEXT, DEFLATED, len(TEXT) + 5),
         (bytes(30 << 20), DEFLATED, 1000)]  # fmt: skip
FLIPPED = {method: flipped(zip_bytes({"a_final.txt": b"1 1\n", "a_preX.pt": NOISE.randbytes(5000)}, method), 2600)
           for method in METHODS}  # fmt: skip
WITH_INNER = zip_bytes({"arts_final.txt": b"1 1\n", "arts_images.zip": INNER})
CUTS = [*(int(len(WITH_INNER) * share) for share in (0.0, 0.3, 0.9, 0.995, 0.999)),
        WITH_INNER.index(INNER) + len(INNER)]  # there a zip reader finds the faultless table of contents of the inner one
THREE = zip_bytes({"arts_final.txt": b"1 1\n", "b": b"b", "arts_preX.pt": b"states"})
SWALLOWED = flipped(THREE, THREE.index(b"PK\x01\x02") + 32, 255)  # the first entry's comment takes in the entries after it
TWO = zip_bytes({"arts_images/a.jpg": b"1", "arts_final.txt": b"1 1\n"})
REFUSED = {  # what is wrong: the archive or all files, the sentence
    **{f"leaves the target: {name!r}": (zip_bytes({"arts_final.txt": b"1 1\n", name: b""}), "refused") for name in AWAY},
    **{f"of kind {kind}": (special(kind), "neither a plain file") for kind in SPECIAL},
    **{f"one place: {both}": (zip_bytes([(name, b"1 1\n") for name in (*both, "other")]), "refused") for both in ONE_PLACE},
    "encrypted": (lie(PLAIN, "flags", 1), f"is refused: its member 'arts_final.txt' is encrypted, .*{BY_HAND}"),
    "deflate64": (lie(PLAIN, "method", 9), rf"refused: its member 'arts_final.txt' .* method 9 \(deflate64\), which .*{BY_HAND}"),
    "inner one leaves the target": ({"dataset/arts_images.zip": zip_bytes({"a.jpg": b"1", "../../evil.jpg": b"2"})},
                                    "arts_images.zip is refused"),
    "inner one with one place": ({"dataset/arts_images.zip": zip_bytes({"one/a.jpg": b"1", "two/a.jpg": b"2"})},
                                 "'one/a.jpg' and 'two/a.jpg' both belong at arts_images/a.jpg"),
    **{f"says {size}": (lie(zip_bytes({"arts_final.txt": content}, method), "size", size), "damaged")
       for content, method, size in SIZES},
    **{f"flipped byte, method {method}": (archive, "damaged") for method, archive in FLIPPED.items()},
    "flipped byte beside another": ({ARCHIVE: FLIPPED[STORED], "dataset/toys_final.txt": b"1 1\n"}, "damaged"),
    **{f"cut off at {end}": (WITH_INNER[:end], "damaged or not a zip") for end in CUTS},
    "with entries in a comment": (SWALLOWED, "damaged or not a zip"),
    "with more behind it": (WITH_INNER + bytes(10) + b"\2" + bytes(11), "damaged or not a zip"),
    "a page": (b"<html>Quota exceeded</html>", "damaged or not a zip"),
    "no files": (zip_bytes({"dataset/": b""}), "holds no files"),
    "a file for the target": ({ARCHIVE: TWO, "dataset": b"mine"}, "dataset is not a folder"),
    "a file for the images": ({ARCHIVE: TWO, "dataset/arts_images": b"mine"}, "arts_images is not a folder"),
    "another file": ({ARCHIVE: TWO, "dataset/arts_final.txt": b"mine"}, "arts_final.txt exists already and differs"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refused_or_damaged_archive_changes_nothing(refused, what):
    files, sentence = REFUSED[what]
    write(files if isinstance(files, dict) else {ARCHIVE: files})
    assert re.search(sentence, refused())


def test_no_more_is_written_than_a_member_declares(work):
    bomb = lie(zip_bytes({"arts_final.txt": bytes(30 << 20)}, DEFLATED), "size", 1000)
    write({ARCHIVE: lie(bomb, "crc", zlib.crc32(bytes(1000)))})
    archives.unpack_all(Path(ARCHIVE), Path("dataset"))
    assert tree(work) == {"dataset/arts_final.txt": bytes(1000)}


@pytest.mark.parametrize("leftover", [False, True])
def test_too_little_disk(work, refused, monkeypatch, leftover):
    """What an earlier run has written need not fit once more."""
    files = {"arts_preX.pt": NOISE.randbytes(80_000), "toys_preX.pt": NOISE.randbytes(8192)}
    write({ARCHIVE: zip_bytes(files)} | ({f"{TEMP}/arts_preX.pt": files["arts_preX.pt"]} if leftover else {}))
    free = 8191 if leftover else 90_111
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    assert "make room" in refused()
    free += 1  # whole blocks of 4096
    assert unzip() == 0
    assert tree(work / "dataset") == files


def test_damage_in_an_inner_archive_keeps_it_and_the_rest(work, capsys):
    _, kept = download()
    inner = kept["arts_images.zip"]
    files = {path: data for path, data in kept.items() if "_images" not in path}
    files["arts_images.zip"] = flipped(inner, inner.index(b".jpg") + 100)
    write({ARCHIVE: zip_bytes(files)})
    assert unzip("--debug") == 2
    err = capsys.readouterr().err
    assert "arts_images.zip is damaged" in err and "Traceback" in err
    assert tree(work) == below("dataset/", files)


def test_failing_disk_and_full_memory(refused, monkeypatch):
    download()
    with mock.patch.object(zipfile.ZipFile, "open", side_effect=MemoryError), pytest.raises(MemoryError):
        archives.unpack_all(Path(ARCHIVE), Path("dataset"))
    with mock.patch.object(os, "fsync", side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))):
        assert "cannot be unpacked: No space left on device" in refused()
    real = Path.open

    def forgetful(path, mode="r", *rest):
        return real(Path(os.devnull) if mode == "wb" and path.name == "arts_preX.pt" else path, mode, *rest)

    monkeypatch.setattr(Path, "open", forgetful)
    assert "arts_preX.pt is not as declared" in refused()


def test_everything_is_fsynced_before_it_is_renamed_and_before_the_archive_goes(work, monkeypatch):
    download()
    synced, placed, real_fsync, real_replace, real_unlink = set(), [], os.fsync, os.replace, Path.unlink

    def fsync(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        real_fsync(descriptor)

    def replace(source, place):
        assert {path.stat().st_ino for path in [Path(source), *Path(source).rglob("*")]} <= synced
        synced.discard(Path("dataset").stat().st_ino)
        placed.append(Path(place).name)
        real_replace(source, place)

    def unlink(path):
        if path.suffix == ".zip":
            assert Path("dataset").stat().st_ino in synced
        real_unlink(path)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(Path, "unlink", unlink)
    assert unzip() == 0
    assert sorted(placed[:-2]) == ["arts_images.zip", "arts_item2id_final.pickle", "arts_preX.pt", "arts_texts_final.pickle"]
    assert placed[-2:] == ["arts_final.txt", "arts_images"]


def stopped_before(last, number):
    """Run the script in a copy of this process that kills itself before that step; returns its exit code.

    A step is an audit event that touches the disk, or the reading of one chunk out of an archive.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    steps = itertools.count(1)

    def step():
        if next(steps) == last:
            os.kill(os.getpid(), number)

    def hook(event, arguments):
        place = str(arguments[0]) if arguments else ""
        changes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir")
        if changes or (event == "open" and place.startswith(("dataset", "mmrec_datasets.zip"))):
            step()

    try:
        archives.CHUNK = 10_000  # the member of 20,000 bytes is then cut off in its middle too
        read = zipfile.ZipExtFile.read
        zipfile.ZipExtFile.read = lambda *arguments: step() or read(*arguments)
        sys.addaudithook(hook)
        os._exit(unzip())
    finally:
        os._exit(1)


@pytest.mark.parametrize("number, every, exit_code", [(signal.SIGKILL, 2, -signal.SIGKILL), (signal.SIGINT, 6, 130)])
def test_stopped_before_any_step_and_continued(work, monkeypatch, capfd, number, every, exit_code):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # spares the disk
    final, kept = download(folder="dataset/", method=DEFLATED)
    archive = (work / ARCHIVE).read_bytes()
    shots, states = {path for path in final if "_images/" in path}, set()
    for last in itertools.count(1, every):
        folder = work / str(last)
        folder.mkdir()
        shutil.copy(work / ARCHIVE, folder)
        monkeypatch.chdir(folder)
        code, err = stopped_before(last, number), capfd.readouterr().err
        if code == 0:
            break
        assert code == exit_code and "Traceback" not in err
        assert ("the same command continues where this one stopped" in err) == (number == signal.SIGINT)
        # true files only, image folders complete, no archive gone too early
        found = {path: data for path, data in tree(folder / "dataset").items() if not path.startswith(".unpacking/")}
        assert found.items() <= kept.items()
        assert not shots & found.keys() or shots <= found.keys()
        if "arts_final.txt" in found:  # it comes last, so the rest of the data set is there
            assert final.keys() - shots <= found.keys()
            assert "arts_images.zip" in found or shots <= found.keys()
        assert "arts_final.txt" in found or (folder / ARCHIVE).exists()
        assert tree(folder).get(ARCHIVE, archive) == archive
        states.add(frozenset(found))
        assert unzip() == 0
        assert tree(folder) == below("dataset/", final)
        assert set(os.listdir("dataset")) == {path.split("/")[0] for path in final}  # .unpacking is gone
    assert last > 40 and len(states) > 6 / every  # the stops did come at different points


def test_what_an_earlier_run_left_whole_is_used_and_the_rest_is_not(work):
    shots = below("arts_images/", images("arts", 6))
    whole, cut, wrong, *_ = shots
    left = {whole: shots[whole], cut: shots[cut][:100], wrong: flipped(shots[wrong], 0)}
    write({ARCHIVE: zip_bytes(shots)} | below(f"{TEMP}/", left))
    os.utime(f"{TEMP}/{whole}", ns=(1, 1))
    assert unzip() == 0
    assert tree(work) == below("dataset/", shots)
    assert (work / "dataset" / whole).stat().st_mtime_ns == 1 < (work / "dataset" / cut).stat().st_mtime_ns


def test_leftovers_of_another_archive_or_in_place_by_now_are_not_placed(work):
    write({ARCHIVE: zip_bytes({"arts_images/a.jpg": b"aaa", "arts_images/b.jpg": b"bbb"})})
    write({f"{TEMP}/arts_images/a.jpg": b"a", f"{TEMP}/arts_images/stranger.jpg": b"s"})
    write({"dataset/arts_images/a.jpg": b"aaa", "dataset/arts_images/mine.jpg": b"mine"})
    assert unzip() == 0
    assert tree(work / "dataset/arts_images") == {"a.jpg": b"aaa", "b.jpg": b"bbb", "mine.jpg": b"mine"}


def test_table_sets_counts_beside_the_papers(work):
    files = {"arts_final.txt": b"1 4\n1 5\n3 4\n", "arts_images/x.jpg": b"", "arts_images/notes.txt": b""}
    write(files | {"broken_final.txt": b"1 2\n3 x\n"})
    (work / "toys_games_images").mkdir()
    lines = dataset_table(work).splitlines()
    assert [line.split() for line in lines[1:4]] == [
        ["arts", "2", "24,511", "2", "18,884", "3", "231,207", "1"],
        ["broken", "unreadable", "-", "unreadable", "-", "unreadable", "-", "missing"],
        ["toys_games", "missing", "19,026", "missing", "14,718", "missing", "162,349", "0"],
    ]
    assert len(set(map(len, lines[:4]))) == 1
    assert lines[4:6] == ["arts: 2 users, but 24,511 in the paper", "arts: 2 items, but 18,884 in the paper"]
    assert [counts[2] for counts in PAPER_TABLE1.values()] == [192736, 162349, 433879, 231207]
    (work / "shop_final.txt").write_text("".join(f"{i // 7 + 1} {i % 9973 + 1}\n" for i in range(300_000)))
    assert dataset_table(work).splitlines()[3].split() == ["shop", "42,858", "-", "9,973", "-", "300,000", "-", "missing"]
