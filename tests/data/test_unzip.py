"""unzip_data.py: every file arrives byte for byte, hostile or damaged archives change nothing, a killed run continues."""
import errno
import io
import os
import random
import resource
import shutil
import signal
import stat
import struct
import subprocess
import sys
import time
import warnings
import zipfile
import zlib
from collections import namedtuple
from pathlib import Path

import pytest

import unzip_data
from utils.common.errors import PerPEFTError
from utils.data import archives as unzip

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "unzip_data.py")
NOISE = random.Random(0)


def zip_bytes(files, folder="", method=zipfile.ZIP_STORED):
    """Make a zip in memory of {name: bytes}."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as zipped:
        for name, data in files.items():
            zipped.writestr(folder + name, data)
    return buffer.getvalue()


def images(name, count=4):
    return {f"{name}_{i}.jpg": NOISE.randbytes(300 + i) for i in range(count)}


def dataset(name, lines=b"1 1\n1 2\n1 3\n2 2\n2 5\n"):
    """Return the files of one data set beside its images."""
    return {f"{name}_final.txt": lines, f"{name}_item2id_final.pickle": NOISE.randbytes(90),
            f"{name}_texts_final.pickle": NOISE.randbytes(120), f"{name}_preX.pt": NOISE.randbytes(20_000)}


def tree(folder):
    """Return {relative path: bytes} of every file below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_fsync(monkeypatch):
    """Spare the disk: only a power cut tells the difference, and test_everything_is_fsynced looks after that."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def download(work, names, folder="", inner_folder="{}_images/", method=zipfile.ZIP_STORED):
    """Write mmrec_datasets.zip into work; return (the files it ends as, the files that --keep leaves in dataset)."""
    packed, final = {}, {}
    for name in names:
        shots = images(name)
        packed |= dataset(name)
        final |= dataset_files(packed, name) | {f"{name}_images/{shot}": data for shot, data in shots.items()}
        packed[f"{name}_images.zip"] = zip_bytes(shots, inner_folder.format(name))
    (work / "mmrec_datasets.zip").write_bytes(zip_bytes(packed, folder, method))
    return final, final | {name: data for name, data in packed.items() if name.endswith(".zip")}


def dataset_files(packed, name):
    return {key: data for key, data in packed.items() if key.startswith(name + "_") and not key.endswith(".zip")}


def refused(work, capsys, archive=None, *options):
    """Run the script; it must exit 2 with one sentence and leave every file as it was; return the sentence."""
    if archive is not None:
        (work / "mmrec_datasets.zip").write_bytes(archive)
    before, folders = tree(work), {path for path in work.rglob("*") if path.is_dir()}
    assert unzip_data.main([*options]) == 2
    assert tree(work) == before
    assert {path for path in work.rglob("*") if path.is_dir()} == folders
    sentence = capsys.readouterr().err.strip().splitlines()[-1]
    assert "Traceback" not in sentence
    return sentence


# ---- what the paper's README says

@pytest.mark.parametrize("folder, inner_folder", [("", "{}_images/"), ("dataset/", ""), ("mmrec_datasets/", "home/me/{}_images/"),
                                                  ("./a/b/", "./{}_images/")])
def test_archive_becomes_the_layout_and_goes(work, folder, inner_folder):
    final, _ = download(work, ["arts", "toys_games"], folder, inner_folder)
    assert unzip_data.main([]) == 0
    assert tree(work) == {f"dataset/{path}": data for path, data in final.items()}


@pytest.mark.parametrize("names", [["arts"], ["sports_outdoors", "toys_games", "beauty_care", "arts"], ["my_shop"]])
def test_some_or_other_data_sets(work, names, capsys):
    final, _ = download(work, names, method=zipfile.ZIP_DEFLATED)
    assert unzip_data.main(["--target", "elsewhere/data"]) == 0
    assert tree(work / "elsewhere/data") == final
    table = capsys.readouterr().out
    for name in names:
        row = next(line.split() for line in table.splitlines() if line.startswith(name + " "))
        assert row[1::2] == ["2", "4", "5", "4"]


def test_keep_keeps_and_a_second_run_without_it_only_deletes(work):
    final, kept = download(work, ["arts"])
    archive = (work / "mmrec_datasets.zip").read_bytes()
    for _ in range(2):
        assert unzip_data.main(["--keep"]) == 0
        assert tree(work) == {f"dataset/{path}": data for path, data in kept.items()} | {"mmrec_datasets.zip": archive}
    stamps = {path: path.stat().st_mtime_ns for path in work.glob("dataset/arts_images/*")}
    assert unzip_data.main([]) == 0
    assert tree(work) == {f"dataset/{path}": data for path, data in final.items()}
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_data_sets_of_folders_each_and_litter(work):
    files = {"all/arts/arts_final.txt": b"1 1\n", "all/toys/toys_final.txt": b"1 2\n", "all/README.md": b"hello",
             "all/arts/arts_images/A.jpg": b"image", "all/.DS_Store": b"x", "__MACOSX/all/._README.md": b"x"}
    (work / "mmrec_datasets.zip").write_bytes(zip_bytes(files))
    assert unzip_data.main([]) == 0
    assert set(tree(work / "dataset")) == {"arts_final.txt", "toys_final.txt", "README.md", "arts_images/A.jpg"}


def test_only_inner_archive_left(work):
    shots = images("arts")
    (work / "dataset").mkdir()
    (work / "dataset/arts_images.zip").write_bytes(zip_bytes(shots))
    assert unzip_data.main([]) == 0
    assert tree(work / "dataset") == {f"arts_images/{shot}": data for shot, data in shots.items()}


@pytest.mark.parametrize("folder", [".", "dataset"])
def test_images_archive_given_by_name(work, capsys, folder):
    shots = images("arts")
    archive = work / folder / "arts_images.zip"
    archive.parent.mkdir(exist_ok=True)
    archive.write_bytes(zip_bytes(shots))
    assert unzip_data.main(["--archive", str(archive), "--keep"]) == 0
    assert tree(work / "dataset/arts_images") == shots and archive.read_bytes() == zip_bytes(shots)
    assert capsys.readouterr().out.count("verified on disk") == 1


def test_no_archive_but_data(work, capsys):
    (work / "dataset").mkdir()
    (work / "dataset/arts_final.txt").write_text("7 1\n")
    assert unzip_data.main([]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("arts"))
    assert row.split()[1::2] == ["1", "1", "1", "missing"]


def test_nothing_at_all(work, capsys):
    sentence = refused(work, capsys)
    assert "mmrec_datasets.zip" in sentence and "README's section Data" in sentence


# ---- refused before anything is written

@pytest.mark.parametrize("name", ["../evil.txt", "a/../../evil.txt", "/etc/evil.txt", "..\\evil.txt", "a\\b.txt", "C:/evil.txt",
                                  "C:evil.txt", "a/D:/evil.txt", "..", ".", "evil\n.txt", ".unpacking/x", "//host/evil.txt"])
def test_names_that_leave_the_target(work, capsys, name):
    assert "refused" in refused(work, capsys, zip_bytes({"arts_final.txt": b"1 1\n", name: b"evil"}))


def test_names_that_leave_the_target_in_inner_archive(work, capsys):
    (work / "dataset").mkdir()
    (work / "dataset/arts_images.zip").write_bytes(zip_bytes({"a.jpg": b"1", "../../evil.jpg": b"2"}))
    assert "arts_images.zip is refused" in refused(work, capsys)


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFSOCK])
def test_links_and_devices(work, capsys, kind):
    member = zipfile.ZipInfo("arts_images")
    member.external_attr = (kind | 0o777) << 16
    assert "neither a plain file" in refused(work, capsys, zip_bytes_of([(member, b"/etc"), ("arts_images/passwd", b"x")]))


def zip_bytes_of(pairs, method=zipfile.ZIP_STORED):
    """Make a zip of (name or ZipInfo, bytes) pairs, duplicates and all."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", method) as zipped:
        warnings.simplefilter("ignore")
        for name, data in pairs:
            zipped.writestr(name, data)
    return buffer.getvalue()


def test_folder_with_content(work, capsys):
    assert "neither a plain file" in refused(work, capsys, zip_bytes({"arts_final.txt": b"1 1\n", "arts_images/": b"lost"}))


@pytest.mark.parametrize("first, second", [("arts_final.txt", "arts_final.txt"), ("arts_final.txt", "dataset/arts_final.txt"),
                                           ("x/a", "x/./a"), ("b/a", "b/a/c")])
def test_two_members_for_one_place(work, capsys, first, second):
    assert "refused" in refused(work, capsys, zip_bytes_of([(first, b"1 1\n"), (second, b"2 2\n"), ("other", b"")]))


def test_two_images_of_one_name(work, capsys):
    (work / "dataset").mkdir()
    (work / "dataset/arts_images.zip").write_bytes(zip_bytes({"one/a.jpg": b"1", "two/a.jpg": b"2"}))
    assert "both belong at arts_images/a.jpg" in refused(work, capsys)


def test_bomb_of_zeros(work, capsys):
    assert "zip bombs" in refused(work, capsys, zip_bytes({"arts_final.txt": bytes(20 << 20)}, method=zipfile.ZIP_DEFLATED))


def test_bomb_of_many_small_members(work, capsys):
    many = {f"arts_images/{i}.jpg": bytes(1 << 20) for i in range(20)}
    assert "zip bombs" in refused(work, capsys, zip_bytes(many, method=zipfile.ZIP_DEFLATED))


def test_members_that_share_their_bytes(work, capsys):
    honest = zip_bytes({"arts_images/a.jpg": NOISE.randbytes(2000), "arts_images/b.jpg": b"b"})
    first = honest.index(b"PK\x01\x02")
    second = honest.index(b"PK\x01\x02", first + 4)
    overlap = bytearray(honest)
    overlap[second + 42:second + 46] = struct.pack("<I", 10)  # where b's own header would start: inside a
    assert "overlaps" in refused(work, capsys, bytes(overlap))


def lie(archive, field, value):
    """Overwrite one 4-byte field of the only member, in its own header and in the table of contents."""
    own, table = {"crc": (14, 16), "size": (22, 24)}[field]
    data, central = bytearray(archive), archive.index(b"PK\x01\x02")
    data[own:own + 4] = data[central + table:central + table + 4] = struct.pack("<I", value)
    return bytes(data)


@pytest.mark.parametrize("declared", [3, 5000])
def test_stored_member_that_lies_about_its_size(work, capsys, declared):
    assert "damaged" in refused(work, capsys, lie(zip_bytes({"arts_preX.pt": NOISE.randbytes(4000)}), "size", declared))


@pytest.mark.parametrize("true_crc", [True, False])
def test_bomb_that_lies_about_its_size_is_stopped_at_that_size(work, capsys, true_crc):
    bomb = lie(zip_bytes({"arts_final.txt": bytes(30 << 20)}, method=zipfile.ZIP_DEFLATED), "size", 1000)
    if true_crc:  # the CRC of what is declared, so that only counting bytes can tell
        bomb = lie(bomb, "crc", zlib.crc32(bytes(1000)))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    (work / "mmrec_datasets.zip").write_bytes(bomb)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # writing on would fail with another sentence
    try:
        with pytest.raises(PerPEFTError, match="more than the 1,000 bytes"):
            unzip.unpack("mmrec_datasets.zip", "dataset")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert tree(work) == {"mmrec_datasets.zip": bomb} and not (work / "dataset").exists()


def test_member_shorter_than_declared(work, capsys):
    text = b"".join(b"%d %d\n" % (i, i * i) for i in range(500))
    archive = zip_bytes({"arts_final.txt": text}, method=zipfile.ZIP_DEFLATED)
    assert "damaged" in refused(work, capsys, lie(archive, "size", len(text) + 5))


def test_encrypted_member(work, capsys):
    archive = bytearray(zip_bytes({"arts_final.txt": b"1 1\n"}))
    archive[6] |= 1
    archive[archive.index(b"PK\x01\x02") + 8] |= 1
    assert "is refused: its member 'arts_final.txt' is encrypted" in refused(work, capsys, bytes(archive))


def test_unknown_packing_method(work, capsys):
    archive = bytearray(zip_bytes({"arts_final.txt": b"1 1\n"}))
    archive[8] = archive[archive.index(b"PK\x01\x02") + 10] = 9  # Deflate64
    assert "method 9" in refused(work, capsys, bytes(archive))


def test_too_little_disk(work, capsys, monkeypatch):
    sizes = [10_000, 70_000]
    archive = zip_bytes({"arts_preX.pt": NOISE.randbytes(sizes[0]), "toys_preX.pt": NOISE.randbytes(sizes[1])})
    usage, real = namedtuple("usage", "total used free"), shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, sum(sizes) - 1))
    assert "free" in refused(work, capsys, archive)
    monkeypatch.setattr(shutil, "disk_usage", real)
    assert unzip_data.main([]) == 0


def test_target_or_image_folder_is_a_file(work, capsys):
    archive = zip_bytes({"arts_images/a.jpg": b"1"})
    (work / "dataset").write_text("mine")
    assert "is a file" in refused(work, capsys, archive)
    (work / "dataset").unlink()
    (work / "dataset").mkdir()
    (work / "dataset/arts_images").write_text("mine")
    assert "in the way" in refused(work, capsys)


def test_a_file_of_the_users_is_not_overwritten(work, capsys):
    (work / "dataset").mkdir()
    (work / "dataset/arts_final.txt").write_text("9 9\n")
    sentence = refused(work, capsys, zip_bytes({"arts_final.txt": b"1 1\n", "toys_final.txt": b"1 1\n"}))
    assert "arts_final.txt is there already and differs" in sentence


# ---- damaged archives

@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("target_exists", [True, False])
def test_flipped_byte(work, capsys, method, target_exists):
    data = NOISE.randbytes(5000)
    archive = bytearray(zip_bytes({"arts_final.txt": b"1 1\n", "arts_preX.pt": data}, method=method))
    archive[archive.index(b"arts_preX.pt") + 2500] ^= 4
    if target_exists:
        (work / "dataset").mkdir()
        (work / "dataset/toys_final.txt").write_text("1 1\n")
    assert "damaged" in refused(work, capsys, bytes(archive))


def test_flipped_byte_in_inner_archive_keeps_it_and_the_rest(work, capsys):
    _, kept = download(work, ["arts"])
    broken = bytearray(kept["arts_images.zip"])
    broken[broken.index(b".jpg") + 100] ^= 1
    files = {path: data for path, data in kept.items() if "_images" not in path} | {"arts_images.zip": bytes(broken)}
    (work / "mmrec_datasets.zip").write_bytes(zip_bytes(files))
    assert unzip_data.main([]) == 2
    assert "arts_images.zip is damaged" in capsys.readouterr().err
    assert tree(work) == {f"dataset/{path}": data for path, data in files.items()}


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.995, 0.999])
def test_truncated(work, capsys, share):
    download(work, ["arts"])
    archive = (work / "mmrec_datasets.zip").read_bytes()
    assert "damaged or is no zip" in refused(work, capsys, archive[:int(len(archive) * share)])


def test_cut_off_right_after_an_inner_archive_that_looks_like_the_end(work, capsys):
    inner = zip_bytes(images("arts"))
    archive = zip_bytes({"arts_final.txt": b"1 1\n", "arts_images.zip": inner})
    cut = archive.index(inner) + len(inner)
    assert "damaged" in refused(work, capsys, archive[:cut])  # a zip reader finds a faultless table of contents here
    assert "damaged" in refused(work, capsys, archive + b"more")


@pytest.mark.parametrize("length", [40, 255])
def test_damage_that_hides_members(work, capsys, length):
    archive = bytearray(zip_bytes({"arts_final.txt": b"1 1\n", "b": b"b", "arts_preX.pt": b"states"}))
    archive[archive.index(b"PK\x01\x02") + 32] = length  # the first entry's comment now swallows the entries after it
    assert "damaged" in refused(work, capsys, bytes(archive))


def test_web_page_instead_of_zip_and_empty_zip(work, capsys):
    assert "no zip" in refused(work, capsys, b"<html>Quota exceeded</html>")
    assert "holds no files" in refused(work, capsys, zip_bytes({"dataset/": b""}))


def test_debug_shows_the_traceback(work, capsys):
    (work / "mmrec_datasets.zip").write_bytes(b"no zip")
    assert unzip_data.main(["--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_random_damage_never_brings_anything_but_the_true_files_or_a_sentence(work, no_fsync):
    files = {"arts_final.txt": b"1 1\n" * 30, "dataset/arts_texts_final.pickle": NOISE.randbytes(100), "arts_images/a.jpg": b"p"}
    honest = zip_bytes(files, method=zipfile.ZIP_DEFLATED)
    truth = set(files.values())
    refusals = 0
    for _ in range(120):
        damaged = bytearray(honest)
        for _ in range(NOISE.choice([1, 1, 3])):
            damaged[NOISE.randrange(len(damaged))] = NOISE.randrange(256)
        (work / "mmrec_datasets.zip").write_bytes(damaged)
        try:
            unzip.unpack("mmrec_datasets.zip", "dataset")
            # damaged content cannot pass, nor be left out; a damaged name can
            assert set(tree(work / "dataset").values()) == truth
            shutil.rmtree(work / "dataset")
        except PerPEFTError as error:
            refusals += 1
            assert "\n" not in str(error)
            assert tree(work) == {"mmrec_datasets.zip": bytes(damaged)} and not (work / "dataset").exists()
    assert refusals > 40


def test_failing_disk_is_one_sentence_and_the_target_is_as_before(work, capsys, monkeypatch):
    download(work, ["arts"])

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left on device" in refused(work, capsys)


def test_everything_is_fsynced_before_it_is_renamed_and_before_the_archive_goes(work, monkeypatch):
    download(work, ["arts"])
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
    assert unzip_data.main([]) == 0
    assert sorted(placed[:-2]) == ["arts_images.zip", "arts_item2id_final.pickle", "arts_preX.pt", "arts_texts_final.pickle"]
    assert placed[-2:] == ["arts_final.txt", "arts_images"]


def test_what_does_not_arrive_on_disk_is_noticed(work, capsys, monkeypatch):
    archive = zip_bytes(dataset("arts"))
    (work / "mmrec_datasets.zip").write_bytes(archive)
    real = Path.open

    def forgetful(path, mode="r", *rest):
        return real(Path(os.devnull) if mode == "wb" and path.name == "arts_preX.pt" else path, mode, *rest)

    monkeypatch.setattr(Path, "open", forgetful)
    assert unzip_data.main([]) == 2
    assert "did not arrive" in capsys.readouterr().err
    assert os.listdir() == ["mmrec_datasets.zip"] and tree(work) == {"mmrec_datasets.zip": archive}


# ---- interrupted runs

# Forks a child for every n; child n works in the folder str(n) and kills itself before its n-th step: an audit event
# that touches the disk, or the reading of one chunk out of an archive. Stops at the first n that runs to its end.
DRIVER = """
import contextlib, itertools, os, shutil, signal, sys
sys.path.insert(0, sys.argv[1])
import unzip_data, zipfile
from utils.data import archives as unzip
unzip.CHUNK = 10_000  # the member of 20,000 bytes is then cut off in its middle too
os.fsync = lambda descriptor: None
number = int(sys.argv[2])
every = int(sys.argv[3])

def child(last):
    steps = 0
    def step():
        nonlocal steps
        steps += 1
        if steps == last:
            os.kill(os.getpid(), number)
    def hook(event, arguments):
        place = str(arguments[0]) if arguments else ""
        if event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir") or (
                event == "open" and place.startswith(("dataset", "mmrec_datasets.zip"))):
            step()
    read = zipfile.ZipExtFile.read
    def counted_read(*arguments):
        step()
        return read(*arguments)
    zipfile.ZipExtFile.read = counted_read
    sys.addaudithook(hook)
    return unzip_data.main([])

for n in itertools.count(1, every):
    shutil.copytree("start", str(n))
    child_id = os.fork()
    if child_id == 0:
        os.chdir(str(n))
        os._exit(child(n))
    status = os.waitstatus_to_exitcode(os.waitpid(child_id, 0)[1])
    print(n, status)
    if status == 0:
        break
"""


def stop_everywhere(work, number, every=1):
    """Run the driver over the folder start; return [(folder, exit code)] of the runs that were stopped."""
    run = subprocess.run([sys.executable, "-c", DRIVER, str(ROOT), str(number), str(every)], cwd=work, text=True,
                         capture_output=True, check=True)
    pairs = [line.split() for line in run.stdout.splitlines() if line[0].isdigit()]
    assert pairs[-1][1] == "0"
    return [(work / folder, int(status)) for folder, status in pairs[:-1]], run.stderr


def assert_whole_or_not_at_all(folder, final, kept, archive):
    """Check the state that a stopped run leaves: true files only, image folders complete, no archive gone too early."""
    found = {path: data for path, data in tree(folder / "dataset").items() if not path.startswith(".unpacking/")}
    assert found.items() <= kept.items()
    shots = {path for path in final if "_images/" in path}
    assert not shots & found.keys() or shots <= found.keys()
    if "arts_final.txt" in found:  # it comes last, so the rest of the data set is there
        assert final.keys() - shots <= found.keys()
        assert "arts_images.zip" in found or shots <= found.keys()
    if (folder / "mmrec_datasets.zip").exists():
        assert (folder / "mmrec_datasets.zip").read_bytes() == archive
    else:
        assert "arts_final.txt" in found
    return found


def test_killed_before_any_step_and_continued(work, monkeypatch, no_fsync):
    (work / "start").mkdir()
    final, kept = download(work / "start", ["arts"], "dataset/", method=zipfile.ZIP_DEFLATED)
    archive = (work / "start/mmrec_datasets.zip").read_bytes()
    stopped, _ = stop_everywhere(work, signal.SIGKILL)
    assert len(stopped) > 60 and {status for _, status in stopped} == {-signal.SIGKILL}
    states = set()
    for folder, _ in stopped:
        states.add(frozenset(assert_whole_or_not_at_all(folder, final, kept, archive)))
        monkeypatch.chdir(folder)
        assert unzip_data.main([]) == 0
        assert tree(folder) == {f"dataset/{path}": data for path, data in final.items()}
        assert set(os.listdir(folder / "dataset")) == {path.split("/")[0] for path in final}  # .unpacking is gone
    assert len(states) > 6  # the kills did come at different points


def test_interrupted_by_the_user(work, monkeypatch, no_fsync):
    (work / "start").mkdir()
    final, kept = download(work / "start", ["arts"])
    archive = (work / "start/mmrec_datasets.zip").read_bytes()
    stopped, errors = stop_everywhere(work, signal.SIGINT, every=6)
    assert len(stopped) > 8 and {status for _, status in stopped} == {130}
    assert errors.count("Interrupted: start the same command again and it continues") == len(stopped)
    assert "Traceback" not in errors
    assert sum((folder / "dataset/.unpacking/mmrec_datasets.zip/arts_preX.pt").exists() for folder, _ in stopped) > 2
    for folder, _ in stopped:
        assert_whole_or_not_at_all(folder, final, kept, archive)
        monkeypatch.chdir(folder)
        assert unzip_data.main([]) == 0
        assert tree(folder) == {f"dataset/{path}": data for path, data in final.items()}


def test_script_killed_from_outside_at_several_points(work):
    files = {f"arts_images/{i}.jpg": NOISE.randbytes(1 << 20) for i in range(24)} | {"arts_final.txt": b"1 1\n"}
    (work / "mmrec_datasets.zip").write_bytes(zip_bytes(files))
    temp = work / "dataset/.unpacking/mmrec_datasets.zip/arts_images"
    for images_there in (1, 9, 18):
        run = subprocess.Popen([sys.executable, SCRIPT], cwd=work, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while run.poll() is None and not (temp.is_dir() and len(os.listdir(temp)) >= images_there):
            time.sleep(0.0005)
        run.kill()
        assert run.wait() in (-signal.SIGKILL, 0)  # 0: a busy machine looked too late; the sweep above does not depend on luck
    done = subprocess.run([sys.executable, SCRIPT], cwd=work, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert tree(work) == {f"dataset/{path}": data for path, data in files.items()}


def test_what_an_earlier_run_left_whole_is_used_and_the_rest_is_not(work):
    shots = images("arts", 6)
    (work / "mmrec_datasets.zip").write_bytes(zip_bytes(shots, "arts_images/"))
    temp = work / "dataset/.unpacking/mmrec_datasets.zip/arts_images"
    temp.mkdir(parents=True)
    names = sorted(shots)
    (temp / names[0]).write_bytes(shots[names[0]])
    (temp / names[1]).write_bytes(shots[names[1]][:100])  # cut off
    (temp / names[2]).write_bytes(bytes([shots[names[2]][0] ^ 1]) + shots[names[2]][1:])  # right size, wrong content
    os.utime(temp / names[0], ns=(1, 1))
    assert unzip_data.main([]) == 0
    assert tree(work) == {f"dataset/arts_images/{shot}": data for shot, data in shots.items()}
    assert (work / "dataset/arts_images" / names[0]).stat().st_mtime_ns == 1
    assert (work / "dataset/arts_images" / names[1]).stat().st_mtime_ns > 1


def test_leftovers_of_another_archive_are_not_placed(work):
    (work / "mmrec_datasets.zip").write_bytes(zip_bytes({"arts_images/a.jpg": b"a"}))
    temp = work / "dataset/.unpacking/mmrec_datasets.zip/arts_images"
    temp.mkdir(parents=True)
    (temp / "stranger.jpg").write_bytes(b"s")
    assert unzip_data.main([]) == 0
    assert tree(work) == {"dataset/arts_images/a.jpg": b"a"}


def test_leftover_does_not_replace_a_file_put_in_place_meanwhile(work):
    (work / "mmrec_datasets.zip").write_bytes(zip_bytes({"arts_images/a.jpg": b"aaa", "arts_images/b.jpg": b"bbb"}))
    temp = work / "dataset/.unpacking/mmrec_datasets.zip/arts_images"
    temp.mkdir(parents=True)
    (temp / "a.jpg").write_bytes(b"a")
    (work / "dataset/arts_images").mkdir()
    (work / "dataset/arts_images/a.jpg").write_bytes(b"aaa")
    (work / "dataset/arts_images/mine.jpg").write_bytes(b"mine")
    assert unzip_data.main([]) == 0
    assert tree(work) == {f"dataset/arts_images/{name}.jpg": data for name, data in
                          [("a", b"aaa"), ("b", b"bbb"), ("mine", b"mine")]}


def test_space_counts_only_what_is_still_to_be_written(work, monkeypatch):
    files = {"arts_preX.pt": NOISE.randbytes(80_000), "toys_preX.pt": NOISE.randbytes(8192)}
    (work / "mmrec_datasets.zip").write_bytes(zip_bytes(files))
    temp = work / "dataset/.unpacking/mmrec_datasets.zip"
    temp.mkdir(parents=True)
    (temp / "arts_preX.pt").write_bytes(files["arts_preX.pt"])
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 8192))
    assert unzip_data.main([]) == 0
    assert tree(work / "dataset") == files


# ---- the table

def test_table_sets_counts_beside_the_papers(work, monkeypatch):
    (work / "arts_final.txt").write_text("1 4\n1 5\n3 4\n")
    (work / "arts_images").mkdir()
    (work / "arts_images/x.jpg").touch()
    (work / "arts_images/notes.txt").touch()
    (work / "broken_final.txt").write_text("1 2\n3 x\n")
    (work / "lines_final.txt").write_text("1 2 3\n")
    (work / "empty_final.txt").touch()
    (work / "bare_images").mkdir()
    monkeypatch.setattr(unzip, "PAPER_COUNTS", {"arts": {"users": 2, "items": 3, "interactions": 3}, "bare": {"users": 1234}})
    lines = unzip.dataset_table(work).splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines[1:6]}
    assert rows == {
        "arts": ["2", "2", "2", "3", "3", "3", "1", "n/a"],
        "bare": ["missing", "1,234", "missing", "n/a", "missing", "n/a", "0", "n/a"],
        "broken": ["unreadable", "n/a", "unreadable", "n/a", "unreadable", "n/a", "missing", "n/a"],
        "empty": ["0", "n/a", "0", "n/a", "0", "n/a", "missing", "n/a"],
        "lines": ["unreadable", "n/a", "unreadable", "n/a", "unreadable", "n/a", "missing", "n/a"]}
    assert len(set(map(len, lines[:6]))) == 1
    assert lines[6:8] == ["arts: 2 items, but 3 in the paper", "bare: missing users, but 1,234 in the paper"]


def test_counts_are_quick(work):
    (work / "arts_final.txt").write_text("".join(f"{i // 7 + 1} {i % 9973 + 1}\n" for i in range(300_000)))
    start = time.perf_counter()
    counts = unzip.count_dataset(work, "arts")
    assert time.perf_counter() - start < 3
    assert counts == {"users": 42_858, "items": 9973, "interactions": 300_000, "images": "missing"}
