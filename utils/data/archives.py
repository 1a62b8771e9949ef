"""A downloaded archive becomes data set files whole or not at all, however often the run is cut off.

The way of one archive, every step safe to repeat:
    read_members   the table of contents is judged; nothing is written yet
    _missing       what lies in place already is recognised by size and CRC-32
    _extract       the rest goes to {target}/.unpacking/{archive name}/, skipping what an earlier run left there
    _verify        all of that is read back from disk, compared and fsynced
    _place         renamed into place, an image folder in one step and {name}_final.txt last
    unlink         only now the archive goes
"""
import copy
import os
import re
import shutil
import stat
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils.common.errors import PerPEFTError

TEMP = ".unpacking"  # inside the target, so that renaming out of it never crosses a file system
CHUNK = 1 << 20
BLOCK = 4096  # a file takes whole blocks on disk, which adds up over tens of thousands of images
MAX_RATIO = 200  # texts pack about 4:1 and images 1:1; deflate of zeros reaches 1000:1
RATIO_FREE = 1 << 20  # below this many bytes a ratio is no danger
JUNK = {".DS_Store", "Thumbs.db", "desktop.ini"}
LAYOUT = re.compile(r".+(_final\.txt|_item2id_final\.pickle|_texts_final\.pickle|_preX\.pt|_images\.zip)")
METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}  # zipfile unpacks the others without a bound on memory
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, struct.error, ValueError, NotImplementedError, RuntimeError)

COUNTS = ("users", "items", "interactions", "images")
# Table 1 of the paper: {data set: {"users": .., "items": .., "interactions": ..}}. Empty until someone copies the
# numbers from the paper itself; a count that is not here shows as n/a and is compared with nothing.
PAPER_COUNTS: dict[str, dict[str, int]] = {}


def unpack_all(archive: str | Path, target: str | Path, keep: bool = False) -> list[Path]:
    """Unpack the archive into target, then every {name}_images.zip that lies in target.

    Args:
        archive: the downloaded zip; it may be gone when an earlier run has dealt with it.
        target: the folder of the data sets, made when missing.
        keep: leave the archives where they are instead of deleting each once it is verified on disk.
    Returns:
        The archives that were dealt with, in order.
    Raises:
        PerPEFTError: an archive is refused or damaged or does not fit, or there is nothing to unpack and no data set.
    """
    archive, target = Path(archive), Path(target)
    if target.exists() and not target.is_dir():
        raise PerPEFTError(f"{target} is a file, but the data sets need a folder of that name; move it away or use --target")
    done = []
    if archive.exists():
        unpack(archive, target, keep)
        done.append(archive)
    for inner in sorted(target.glob("*_images.zip")):
        if archive not in done or inner.resolve() != archive.resolve():
            unpack(inner, target, keep)
            done.append(inner)
    if not done and not dataset_names(target):
        raise PerPEFTError(
            f"{archive} is not here and {target} holds no data set: download mmrec_datasets.zip from the link in README's "
            f"section Data, put it at {archive.absolute()} and start again"
        )
    shutil.rmtree(target / TEMP, ignore_errors=True)
    return done


def unpack(archive: str | Path, target: str | Path, keep: bool = False) -> None:
    """Unpack one archive into target and delete it once all of it is verified there.

    Args:
        archive: a zip; one called {name}_images.zip goes to the folder {name}_images, any other as DESIGN lays files out.
        target: the folder of the data sets, made when missing.
        keep: do not delete the archive.
    Raises:
        PerPEFTError: the archive is refused, damaged, does not fit, or contradicts files in place. Archive and target
            are then as they were.
    """
    archive, target = Path(archive), Path(target)
    temp = target / TEMP / archive.name
    with _plain_errors(archive):
        with zipfile.ZipFile(archive) as zipped:
            members = read_members(zipped)
            missing = _missing(members, target, archive)
            _check_space(missing, temp, target, archive)
            if missing:
                new_target = not target.exists()
                try:
                    _extract(zipped, missing, temp)
                    _verify(missing, temp, archive)
                except Exception:  # an interrupt is no Exception: what it leaves in temp is for the next run
                    shutil.rmtree(target / TEMP, ignore_errors=True)
                    if new_target:
                        with suppress(OSError):
                            target.rmdir()
                    raise
                _place(temp, target)
        shutil.rmtree(temp, ignore_errors=True)
        if not keep:
            archive.unlink()


def read_members(zipped: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Judge an archive by its table of contents and say where each file of it goes.

    Args:
        zipped: the open archive.
    Returns:
        {path below the target: member}, without folders and the litter of file managers.
    Raises:
        PerPEFTError: a name leaves the target, two members belong at one place, a member is a link or device, encrypted,
            packed in a way that is not read here, or absurdly well packed, or the archive is cut off or holds no file.
    """
    archive = Path(zipped.filename)
    _refuse_cut_off(zipped)
    infos = zipped.infolist()
    files = []
    for info in infos:
        name = info.orig_filename
        problem = _problem(info)
        if problem:
            raise PerPEFTError(f"{archive} is refused: its member {name!r} {problem}. Nothing was unpacked; download it again.")
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if not info.is_dir() and "__MACOSX" not in parts and parts[-1] not in JUNK:
            files.append((parts, info))
    _refuse_bombs(infos, archive)

    members: dict[str, zipfile.ZipInfo] = {}
    shared = len(os.path.commonprefix([parts[:-1] for parts, _ in files]))  # leading folders that every file lies under
    for parts, info in files:
        path = _destination(parts, shared, archive.name)
        if path in members:
            raise PerPEFTError(f"{archive} is refused: its members {members[path].filename!r} and {info.filename!r} "
                               f"both belong at {path}. Nothing was unpacked.")
        members[path] = info
    if not members:
        raise PerPEFTError(f"{archive} holds no files; download it again")
    for folder in _folders(members):
        if folder in members:
            raise PerPEFTError(f"{archive} is refused: {folder} is a file and a folder in it. Nothing was unpacked.")
    return members


def _problem(info: zipfile.ZipInfo) -> str | None:
    """Say what is wrong with one member, or None."""
    name, kind = info.orig_filename, stat.S_IFMT(info.external_attr >> 16)  # orig_filename: not cut at a NUL byte
    parts = name.split("/")
    if not name or "\\" in name or any(ord(character) < 32 for character in name):
        return "has no name, or a backslash or control character in it"
    if name.startswith("/") or ".." in parts or any(re.match(r"[A-Za-z]:", part) for part in parts):
        return "would be written outside the target folder"
    if TEMP in parts or not (info.is_dir() or set(parts) - {"", "."}):
        return "has a name that cannot be used"
    if kind not in (0, stat.S_IFDIR if info.is_dir() else stat.S_IFREG) or (info.is_dir() and info.file_size):
        return "is neither a plain file nor a folder (a link or device?)"
    if info.flag_bits & 0x1:
        return "is encrypted"
    if info.compress_type not in METHODS:
        return f"is packed by method {info.compress_type}, which is not read here"
    return None


def _refuse_cut_off(zipped: zipfile.ZipFile) -> None:
    """Refuse an archive that is more or less than one whole zip, which zipfile would accept.

    It looks for a table of contents near the end. In a download that broke off within its last kilobytes it may find that of
    an inner zip, and would take that one for the whole; and it does not count the entries, of which damage can hide some.
    """
    first = min((info.header_offset for info in zipped.infolist()), default=0)
    zipped.fp.seek(-zipfile.sizeEndCentDir - len(zipped.comment), os.SEEK_END)
    end = zipped.fp.read(zipfile.sizeEndCentDir)
    entries = int.from_bytes(end[10:12], "little")  # 65535: too many for two bytes
    if first != 0 or end[:4] != zipfile.stringEndArchive or entries not in (0xFFFF, len(zipped.infolist()) & 0xFFFF):
        raise zipfile.BadZipFile("its table of contents is cut off or damaged")


def _refuse_bombs(infos: list[zipfile.ZipInfo], archive: Path) -> None:
    """Refuse members that unpack to absurdly many bytes, alone or together, or that share packed bytes."""
    sizes = [(info.filename, info.file_size, info.compress_size) for info in infos]
    sizes.append(("all members together", sum(info.file_size for info in infos), archive.stat().st_size))
    for name, size, packed in sizes:
        if size > RATIO_FREE and size > MAX_RATIO * packed:
            raise PerPEFTError(f"{archive} is refused: {name} would grow from {packed:,} to {size:,} bytes, "
                               f"more than {MAX_RATIO} times, as zip bombs do. Nothing was unpacked.")
    end = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        if info.header_offset < end:
            raise PerPEFTError(f"{archive} is refused: its member {info.filename!r} overlaps another, as in zip bombs. "
                               "Nothing was unpacked.")
        end = info.header_offset + zipfile.sizeFileHeader + info.compress_size


def _destination(parts: list[str], shared: int, archive_name: str) -> str:
    """Say where below the target a file of the archive belongs, whatever folders it was packed under."""
    if re.fullmatch(r".+_images\.zip", archive_name):
        return f"{archive_name.removesuffix('.zip')}/{parts[-1]}"
    for folder in parts[:-1]:
        if re.fullmatch(".+_images", folder):
            return f"{folder}/{parts[-1]}"
    if LAYOUT.fullmatch(parts[-1]):
        return parts[-1]
    return "/".join(parts[shared:])  # a README or licence, say


def _folders(paths: dict[str, zipfile.ZipInfo]) -> set[str]:
    """Return every folder that the paths lie in, below the target."""
    return {parent.as_posix() for path in paths for parent in Path(path).parents} - {"."}


def _missing(members: dict[str, zipfile.ZipInfo], target: Path, archive: Path) -> dict[str, zipfile.ZipInfo]:
    """Return the members that are not in place yet; a file in place that differs is the user's, so it is refused."""
    for folder in _folders(members):
        if os.path.lexists(target / folder) and not (target / folder).is_dir():
            raise PerPEFTError(f"{target / folder} is in the way of a folder from {archive}; move it away and start again")
    there = {path: info for path, info in members.items() if os.path.lexists(target / path)}
    if there:
        with _bar(archive, "checking what is there", there.values()) as bar:
            for path, info in there.items():
                if not _holds(target / path, info):
                    raise PerPEFTError(f"{target / path} is there already and differs from the one in {archive}; "
                                       "move it away or delete it, then start again")
                bar.update(info.file_size)
    return {path: info for path, info in members.items() if path not in there}


def _check_space(missing: dict[str, zipfile.ZipInfo], temp: Path, target: Path, archive: Path) -> None:
    """Refuse what would not fit on the disk, counting what an earlier run has already written to temp."""
    need = 0
    for path, info in missing.items():
        written = (temp / path).stat().st_size if (temp / path).is_file() else 0
        need += -(-max(info.file_size - written, 0) // BLOCK) * BLOCK
    disk = next(folder for folder in [target.absolute(), *target.absolute().parents] if folder.exists())
    free = shutil.disk_usage(disk).free
    if need > free:
        raise PerPEFTError(f"{archive} would need {need / 1e9:.2f} GB on the disk of {target}, where {free / 1e9:.2f} GB are "
                           "free; make room or choose another --target. Nothing was unpacked.")


def _extract(zipped: zipfile.ZipFile, missing: dict[str, zipfile.ZipInfo], temp: Path) -> None:
    """Write the members to temp, skipping those that an earlier run has left there whole."""
    expected = {*missing, *_folders(missing)}
    if any(path.relative_to(temp).as_posix() not in expected for path in temp.rglob("*")):
        shutil.rmtree(temp)  # left by another archive of that name, or in place by now: it must not be placed
    temp.mkdir(parents=True, exist_ok=True)
    for folder in _folders(missing):
        (temp / folder).mkdir(parents=True, exist_ok=True)
    with _bar(Path(zipped.filename), "unpacking", missing.values()) as bar:
        for path, info in missing.items():
            if _holds(temp / path, info):
                bar.update(info.file_size)
            else:
                _extract_member(zipped, info, temp / path, bar)


def _extract_member(zipped: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path, bar: tqdm) -> None:
    """Write one member; zipfile compares its CRC as the last byte is read."""
    honest = copy.copy(info)
    honest.file_size = sys.maxsize  # else zipfile silently cuts at the declared size, which may be a lie
    written = 0
    with zipped.open(honest) as packed, path.open("wb") as file:
        while data := packed.read(min(CHUNK, info.file_size - written + 1)):
            written += len(data)
            if written > info.file_size:
                raise zipfile.BadZipFile(f"{info.filename} unpacks to more than the {info.file_size:,} bytes that it declares")
            file.write(data)
            bar.update(len(data))
    if written < info.file_size:
        raise zipfile.BadZipFile(f"{info.filename} unpacks to {written:,} bytes, but declares {info.file_size:,}")


def _verify(missing: dict[str, zipfile.ZipInfo], temp: Path, archive: Path) -> None:
    """Read back everything in temp and make it last on disk, folders too."""
    with _bar(archive, "verifying", missing.values()) as bar:
        for path, info in missing.items():
            if not _holds(temp / path, info):
                raise PerPEFTError(f"{path} of {archive} did not arrive on disk as it was written; check the disk of {temp}")
            bar.update(info.file_size)
    for folder, _, _ in os.walk(temp):
        _sync_folder(Path(folder))


def _place(temp: Path, target: Path) -> None:
    """Rename everything in temp to its place: a new folder in one step, {name}_final.txt last, as it makes the data set."""
    for source in sorted(temp.iterdir(), key=lambda path: (path.name.endswith("_final.txt"), path.name)):
        place = target / source.name
        if source.is_dir() and place.is_dir():
            _place(source, place)
        else:
            os.replace(source, place)
    _sync_folder(target)


def _holds(path: Path, info: zipfile.ZipInfo) -> bool:
    """Say whether a file is the member, by size and CRC-32, and if so make it last on disk."""
    if not path.is_file() or path.stat().st_size != info.file_size:
        return False
    crc = 0
    with path.open("rb") as file:
        while data := file.read(CHUNK):
            crc = zlib.crc32(data, crc)
        os.fsync(file.fileno())
    return crc == info.CRC


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder last on disk."""
    with suppress(OSError):  # some network file systems refuse to fsync a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _bar(archive: Path, doing: str, infos: Iterable[zipfile.ZipInfo]) -> tqdm:
    """Open a progress bar that counts the bytes of the members."""
    return tqdm(total=sum(info.file_size for info in infos), unit="B", unit_scale=True, desc=f"{archive.name}: {doing}")


@contextmanager
def _plain_errors(archive: Path) -> Iterator[None]:
    """Turn the many exceptions of a damaged zip or a failing disk into one sentence."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise PerPEFTError(f"{archive} cannot be unpacked: {error.strerror}{where}; mend that and start again") from error
    except DAMAGE as error:
        raise PerPEFTError(f"{archive} is damaged or is no zip file ({error}); nothing of it was unpacked, "
                           "download it again") from error


def dataset_names(target: str | Path) -> list[str]:
    """Name the data sets of which target holds interactions or images.

    Args:
        target: the folder of the data sets; it may be missing.
    Returns:
        The names, sorted.
    """
    target = Path(target)
    names = {path.name.removesuffix("_final.txt") for path in target.glob("?*_final.txt")}
    names |= {path.name.removesuffix("_images") for path in target.glob("?*_images") if path.is_dir()}
    return sorted(names)


def count_dataset(target: str | Path, name: str) -> dict[str, int | str]:
    """Count what one data set holds.

    Args:
        target: the folder of the data sets.
        name: the data set.
    Returns:
        {"users", "items", "interactions", "images"}: each a number, or "missing" or "unreadable".
    """
    interactions, images = Path(target) / f"{name}_final.txt", Path(target) / f"{name}_images"
    counts: dict[str, int | str] = dict.fromkeys(COUNTS, "missing")
    if interactions.is_file():
        try:
            # loadtxt warns about an empty file, which is only a count of 0 here
            pairs = np.loadtxt(interactions, dtype=np.int64, ndmin=2) if interactions.stat().st_size else np.empty((0, 2))
            users, items = pairs.T
            counts |= {"users": len(np.unique(users)), "items": len(np.unique(items)), "interactions": len(pairs)}
        except (ValueError, OSError):  # the full diagnosis belongs to the data check; here the table must still come
            counts |= dict.fromkeys(COUNTS[:3], "unreadable")
    if images.is_dir():
        counts["images"] = sum(entry.name.endswith(".jpg") for entry in os.scandir(images))
    return counts


def dataset_table(target: str | Path) -> str:
    """Lay out the counts of every data set in target beside those of the paper's Table 1.

    Args:
        target: the folder of the data sets.
    Returns:
        The table, and below it a line for each count that differs from the paper's, or is not known of it.
    """
    rows = [["data set"] + [title for count in COUNTS for title in (count, "paper")]]
    differences = []
    for name in dataset_names(target):
        found, paper = count_dataset(target, name), PAPER_COUNTS.get(name, {})
        rows.append([name] + [_digits(value) for count in COUNTS for value in (found[count], paper.get(count, "n/a"))])
        differences += [f"{name}: {_digits(found[count])} {count}, but {_digits(paper[count])} in the paper"
                        for count in COUNTS if count in paper and paper[count] != found[count]]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join([row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])])
             for row in rows]
    if any("n/a" in row for row in rows):
        differences.append("n/a: utils/unzip.py records no such count from the paper's Table 1")
    return "\n".join(lines + differences)


def _digits(value: int | str) -> str:
    return f"{value:,}" if isinstance(value, int) else value
