"""A downloaded archive becomes data set files, whole or not at all; an interrupted run continues where it stopped.

Every step can be repeated: the table of contents is checked first; files that are in place already are recognised by size and
CRC-32; the others are written to {target}/.unpacking/{archive name}/ and read back; then they are renamed into place, an image
folder in one step and {name}_final.txt last; only then is the archive deleted.
"""
import os
import re
import shutil
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from utils.common.errors import PerPEFTError
from utils.common.files import sync
from utils.data.table1 import dataset_names

TEMP = ".unpacking"  # inside the target, so that renaming out of it never crosses a file system
CHUNK = 1 << 20
JUNK = {".DS_Store", "Thumbs.db", "desktop.ini"}
LAYOUT = re.compile(r".+(_final\.txt|_item2id_final\.pickle|_texts_final\.pickle|_preX\.pt|_images\.zip)")
METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA}
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, struct.error, ValueError, NotImplementedError, RuntimeError)
Members = dict[str, zipfile.ZipInfo]  # by their path below the target


def unpack_all(archive: Path, target: Path, keep: bool = False) -> list[Path]:
    """Unpack the archive into target, then every {name}_images.zip in target.

    Args:
        archive: the downloaded zip; an earlier run may have unpacked and deleted it.
        target: the folder of the data sets, created if missing.
        keep: keep the archives instead of deleting each once it is verified on disk.
    Returns:
        The unpacked archives, in order.
    Raises:
        PerPEFTError: there is nothing to unpack and no data set, or an archive is refused, damaged, does not fit or contradicts
            files in place; that archive and the target are then as they were.
    """
    if target.exists() and not target.is_dir():
        raise PerPEFTError(f"{target} is a file, but the data sets need a folder of that name; move it away or use --target")
    done = []
    if archive.exists():
        _unpack(archive, target, keep)
        done.append(archive)
    for inner in sorted(target.glob("*_images.zip")):
        if archive not in done or inner.resolve() != archive.resolve():
            _unpack(inner, target, keep)
            done.append(inner)
    if not done and not dataset_names(target):
        raise PerPEFTError(f"{archive} is not here and {target} holds no data set: download mmrec_datasets.zip from the link in "
                           f"README's section Data, put it at {archive.absolute()} and start again")
    shutil.rmtree(target / TEMP, ignore_errors=True)
    return done


def _unpack(archive: Path, target: Path, keep: bool) -> None:
    """Unpack one archive into target and delete it once all of it is verified there."""
    temp, new_target = target / TEMP / archive.name, not target.exists()
    try:
        with zipfile.ZipFile(archive) as zipped:
            missing = _find_missing(_read_members(zipped, archive, target), temp, target, archive)
            if missing:
                try:
                    _extract(zipped, missing, temp, archive)
                except Exception:  # not an interrupt: what that leaves in temp is for the next run
                    shutil.rmtree(target / TEMP, ignore_errors=True)
                    if new_target:
                        with suppress(OSError):
                            target.rmdir()
                    raise
                _place(temp, target)
        shutil.rmtree(temp, ignore_errors=True)
        if not keep:
            archive.unlink()
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise PerPEFTError(f"{archive} cannot be unpacked: {error.strerror}{where}; fix that and start again") from error
    except DAMAGE as error:
        reason = f"{archive} is damaged or not a zip file ({error}); nothing was unpacked, download it again"
        raise PerPEFTError(reason) from error


def _read_members(zipped: zipfile.ZipFile, archive: Path, target: Path) -> Members:
    """Check an archive by its table of contents and find out where its files go."""
    first = min((info.header_offset for info in zipped.infolist()), default=0)
    zipped.fp.seek(-zipfile.sizeEndCentDir - len(zipped.comment), os.SEEK_END)
    end = zipped.fp.read(zipfile.sizeEndCentDir)
    entries = int.from_bytes(end[10:12], "little")  # 65535: too many for two bytes
    # zipfile would take an archive that is cut off within an inner zip for that one, and does not count the entries
    if first != 0 or end[:4] != zipfile.stringEndArchive or entries not in (0xFFFF, len(zipped.infolist()) & 0xFFFF):
        raise zipfile.BadZipFile("its table of contents is cut off or damaged")
    files = []
    for info in zipped.infolist():
        name = info.orig_filename.replace("\\", "/")  # not cut at a NUL byte; Windows programs may write backslashes
        _check_member(name, info, archive, target)
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if not name.endswith("/") and "__MACOSX" not in parts and parts[-1] not in JUNK:
            files.append((parts, info))
    if not files:
        raise PerPEFTError(f"{archive} holds no files; download it again")
    members: Members = {}
    shared = len(os.path.commonprefix([parts[:-1] for parts, _ in files]))  # folders around all files
    for parts, info in files:
        path = _destination(parts, shared, archive.name)
        if path in members:
            both = f"{members[path].filename!r} and {info.filename!r}"
            raise PerPEFTError(f"{archive} is refused: its members {both} both belong at {path}. Nothing was unpacked.")
        members[path] = info
    for folder in _folders(members) & members.keys():
        raise PerPEFTError(f"{archive} is refused: {folder} is a file and a folder in it. Nothing was unpacked.")
    return members


def _check_member(name: str, info: zipfile.ZipInfo, archive: Path, target: Path) -> None:
    """Refuse a member that cannot be unpacked, or not safely; `name` has slashes."""
    kind, is_folder, method = stat.S_IFMT(info.external_attr >> 16), name.endswith("/"), info.compress_type
    parts, method_name = name.split("/"), zipfile.compressor_names.get(method, "unknown")
    outside = name.startswith("/") or ".." in parts or any(re.match(r"[A-Za-z]:", part) for part in parts)
    special = kind not in (0, stat.S_IFDIR if is_folder else stat.S_IFREG) or (is_folder and info.file_size)
    by_hand = f"unpack it with 7-Zip (7z x {archive} -o{target}), delete the archive and start again"
    problems = {
        "has no name, or a control character in it": not name or any(ord(character) < 32 for character in name),
        "would be written outside the target folder": outside,
        "has a name that cannot be used": TEMP in parts or not (is_folder or set(parts) - {"", "."}),
        "is neither a plain file nor a folder (a link or device?)": special,
        f"is encrypted; {by_hand}": info.flag_bits & 0x1,
        f"is compressed by method {method} ({method_name}), which Python cannot unpack; {by_hand}": method not in METHODS,
    }
    for problem in filter(problems.get, problems):
        raise PerPEFTError(f"{archive} is refused: its member {info.orig_filename!r} {problem}. Nothing was unpacked.")


def _destination(parts: list[str], shared: int, archive_name: str) -> str:
    """The path below the target of a file of the archive, regardless of the folders it was packed under."""
    if re.fullmatch(r".+_images\.zip", archive_name):
        return f"{archive_name.removesuffix('.zip')}/{parts[-1]}"
    for folder in parts[:-1]:
        if re.fullmatch(".+_images", folder):
            return f"{folder}/{parts[-1]}"
    return parts[-1] if LAYOUT.fullmatch(parts[-1]) else "/".join(parts[shared:])  # the latter a README or licence, say


def _folders(paths: Iterable[str]) -> set[str]:
    """Every folder around the paths, below the target."""
    return {parent.as_posix() for path in paths for parent in Path(path).parents} - {"."}


def _find_missing(members: Members, temp: Path, target: Path, archive: Path) -> Members:
    """The members that are not in place yet; refuses a file there that differs, which is the user's, and too little space."""
    for folder in _folders(members):
        if os.path.lexists(target / folder) and not (target / folder).is_dir():
            raise PerPEFTError(f"{target / folder} is in the way of a folder from {archive}; move it away and start again")
    there = {path: info for path, info in members.items() if os.path.lexists(target / path)}
    for path, info in tqdm(there.items(), f"{archive.name}: checking files in place", unit="file", disable=None):
        if not _holds(target / path, info):
            raise PerPEFTError(f"{target / path} exists already and differs from the one in {archive}; "
                               "move it away or delete it, then start again")
    missing, need = {path: info for path, info in members.items() if path not in there}, 0
    for path, info in missing.items():
        written = (temp / path).stat().st_size if (temp / path).is_file() else 0  # by an earlier run
        need += -(-max(info.file_size - written, 0) // 4096) * 4096  # whole blocks, which add up over many images
    disk = next(folder for folder in [target.absolute(), *target.absolute().parents] if folder.exists())
    free = shutil.disk_usage(disk).free
    if need > free:
        raise PerPEFTError(f"{archive} needs {need / 1e9:.2f} GB on the disk of {target}, where {free / 1e9:.2f} GB are "
                           "free; make room or choose another --target. Nothing was unpacked.")
    return missing


def _extract(zipped: zipfile.ZipFile, missing: Members, temp: Path, archive: Path) -> None:
    """Write the members to temp, synced and read back, except those that an earlier run has left there whole."""
    expected = {*missing, *_folders(missing)}
    if any(path.relative_to(temp).as_posix() not in expected for path in temp.rglob("*")):
        shutil.rmtree(temp)  # left by another archive of that name, or in place by now
    size = sum(info.file_size for info in missing.values())
    with tqdm(total=size, desc=f"{archive.name}: unpacking", unit="B", unit_scale=True, disable=None) as bar:
        for path, info in missing.items():
            if not _holds(temp / path, info):
                (temp / path).parent.mkdir(parents=True, exist_ok=True)
                with zipped.open(info) as packed, (temp / path).open("wb") as file:
                    shutil.copyfileobj(packed, file, CHUNK)  # at most the declared size; zipfile compares the CRC at the end
                if not _holds(temp / path, info):
                    raise PerPEFTError(f"{path} is not on disk as {archive} declares it: the archive is damaged (download it "
                                       f"again) or the disk of {temp} is. Nothing was unpacked.")
            bar.update(info.file_size)
    for folder, _, _ in os.walk(temp):
        sync(folder)


def _place(temp: Path, target: Path) -> None:
    """Rename everything in temp to its place: a new folder in one step, {name}_final.txt last, since it makes the data set."""
    for source in sorted(temp.iterdir(), key=lambda path: (path.name.endswith("_final.txt"), path.name)):
        place = target / source.name
        if source.is_dir() and place.is_dir():
            _place(source, place)
        else:
            os.replace(source, place)
    sync(target)


def _holds(path: Path, info: zipfile.ZipInfo) -> bool:
    """Whether a file is the member, by size and CRC-32; if so it is synced to disk."""
    if not path.is_file() or path.stat().st_size != info.file_size:
        return False
    crc = 0
    with path.open("rb") as file:
        while data := file.read(CHUNK):
            crc = zlib.crc32(data, crc)
        os.fsync(file.fileno())
    return crc == info.CRC
