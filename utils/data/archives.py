"""A downloaded archive becomes data set files, whole or not at all; an interrupted run continues where it stopped.

Every step can be repeated: the table of contents is checked first; files that are in place already are recognised by size and
CRC-32; the others are written to {target}/.unpacking/{archive name}/ and read back; then they are renamed into place, an image
folder in one step and {name}_final.txt last; only then is the archive deleted.
"""
import os
import re
import shutil
import stat
import zipfile
import zlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from utils.common.errors import PerPEFTError
from utils.common.files import sync
from utils.data.table1 import dataset_names

TEMP = ".unpacking"  # inside the target, so that renaming out of it never crosses a file system
CHUNK = 1 << 20
JUNK = {"__MACOSX", ".DS_Store", "Thumbs.db", "desktop.ini"}
LAYOUT = re.compile(r".+(_final\.txt|_item2id_final\.pickle|_texts_final\.pickle|_preX\.pt|_images\.zip)")
METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA}
Members = dict[str, zipfile.ZipInfo]  # by their path below the target


def unpack_all(archive: Path, target: Path, keep: bool = False) -> list[Path]:
    """Unpack the archive, unless an earlier run has, then every {name}_images.zip in target; return what was unpacked, in order.

    Each archive is deleted once it is verified on disk, unless `keep`.

    Raises:
        PerPEFTError: there is nothing to unpack and no data set, or an archive is refused, damaged, does not fit or contradicts
            files in place; that archive and the target are then as they were.
    """
    done = []
    if archive.exists():
        _unpack(archive, target, keep)
        done.append(archive)
    for inner in sorted(target.glob("*_images.zip")):
        if inner.resolve() != archive.resolve():
            _unpack(inner, target, keep)
            done.append(inner)
    if not done and not dataset_names(target):
        raise PerPEFTError(f"{archive} is not here and {target} holds no data set: download mmrec_datasets.zip from the link in "
                           f"README's section Data, put it at {archive.absolute()} and start again")
    shutil.rmtree(target / TEMP, ignore_errors=True)
    return done


def _unpack(archive: Path, target: Path, keep: bool) -> None:
    temp, new_target = target / TEMP / archive.name, not target.exists()
    try:
        with zipfile.ZipFile(archive) as zipped:
            missing = _find_missing(_read_members(zipped, target), temp, target)
            if missing:
                try:
                    _extract(zipped, missing, temp)
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
    except MemoryError:
        raise
    except PerPEFTError as error:
        raise PerPEFTError(f"{archive} is refused: {error}. Nothing was unpacked.") from error
    except Exception as error:  # a damaged zip can raise nearly anything: BadZipFile, zlib.error, struct.error, LZMAError, ...
        problem = f"is damaged or not a zip file ({error}); nothing was unpacked, download it again"
        if isinstance(error, OSError) and error.errno is not None:
            where = f" ({error.filename})" if error.filename else ""
            problem = f"cannot be unpacked: {error.strerror}{where}; fix that and start again"
        raise PerPEFTError(f"{archive} {problem}") from error


def _read_members(zipped: zipfile.ZipFile, target: Path) -> Members:
    """Check an archive by its table of contents and find out where its files go."""
    infos, files, by_hand = zipped.infolist(), [], f"7z x {zipped.filename} -o{target}"
    zipped.fp.seek(-zipfile.sizeEndCentDir - len(zipped.comment), os.SEEK_END)
    end = zipped.fp.read(zipfile.sizeEndCentDir)
    all_listed = int.from_bytes(end[10:12], "little") in (0xFFFF, len(infos) & 0xFFFF)  # 0xFFFF: too many for two bytes
    # zipfile would take an archive that is cut off within an inner zip for that one, and does not count the entries
    if end[:4] != zipfile.stringEndArchive or not all_listed or min((info.header_offset for info in infos), default=0) != 0:
        raise zipfile.BadZipFile("its table of contents is cut off or damaged")
    for info in infos:
        name = info.orig_filename.replace("\\", "/")  # not cut at a NUL byte; Windows programs may write backslashes
        parts = PurePosixPath(name).parts
        if problem := _find_problem(info, name, parts, by_hand):
            raise PerPEFTError(f"its member {info.orig_filename!r} {problem}")
        if not name.endswith("/") and not JUNK & set(parts):
            files.append((parts, info))
    if not files:
        raise PerPEFTError("it holds no files; download it again")
    members: Members = {}
    shared = len(os.path.commonprefix([parts[:-1] for parts, _ in files]))  # folders around all files
    for parts, info in files:
        path = _destination(parts, shared, Path(zipped.filename).stem)
        if (other := members.setdefault(path, info)) is not info:
            raise PerPEFTError(f"its members {other.filename!r} and {info.filename!r} both belong at {path}")
    for folder in _folders(members) & members.keys():
        raise PerPEFTError(f"{folder} is a file and a folder in it")
    return members


def _find_problem(info: zipfile.ZipInfo, name: str, parts: tuple[str, ...], by_hand: str) -> str | None:
    """What keeps a member from being unpacked safely, or at all; `name` has slashes, `by_hand` is a command that unpacks it."""
    is_folder, is_encrypted, kind = name.endswith("/"), info.flag_bits & 1, stat.S_IFMT(info.external_attr >> 16)
    if not (parts or is_folder) or min(name, default="") < " " or TEMP in parts:
        return "has a name that cannot be used (empty, with a control character, or reserved)"
    if name.startswith("/") or ".." in parts or any(re.match("[A-Za-z]:", part) for part in parts):
        return "would be written outside the target folder"
    if kind not in (0, stat.S_IFDIR if is_folder else stat.S_IFREG) or (is_folder and info.file_size):
        return "is neither a plain file nor a folder (a link or device?)"
    if is_encrypted or info.compress_type not in METHODS:
        method = f"compressed by method {info.compress_type} ({zipfile.compressor_names.get(info.compress_type, 'unknown')})"
        return (f"is {'encrypted' if is_encrypted else method}, which Python cannot unpack; unpack it with 7-Zip ({by_hand}), "
                "delete the archive and start again")
    return None


def _destination(parts: tuple[str, ...], shared: int, archive_name: str) -> str:
    """The path below the target of a file of the archive, regardless of the folders it was packed under."""
    for folder in (archive_name, *parts[:-1]):
        if re.fullmatch(".+_images", folder):
            return f"{folder}/{parts[-1]}"
    return parts[-1] if LAYOUT.fullmatch(parts[-1]) else "/".join(parts[shared:])  # the latter a README or licence, say


def _folders(paths: Iterable[str]) -> set[str]:
    """Every folder around the paths, with "." for the target itself."""
    return {parent.as_posix() for path in paths for parent in Path(path).parents}


def _find_missing(members: Members, temp: Path, target: Path) -> Members:
    """The members that are not in place yet; refuses a file there that differs, which is the user's, and too little space."""
    for place in [target / folder for folder in _folders(members)]:
        if os.path.lexists(place) and not place.is_dir():
            raise PerPEFTError(f"{place} is not a folder; move it away or choose another --target")
    missing, need = {}, 0
    for path, info in tqdm(members.items(), f"{temp.name}: checking files in place", unit="file", disable=None):
        place, started = target / path, temp / path
        if not os.path.lexists(place):
            missing[path] = info
            written = started.stat().st_size if started.is_file() else 0  # by an earlier run
            need += -(-max(info.file_size - written, 0) // 4096) * 4096  # whole blocks, which add up over many images
        elif not _holds(place, info):
            raise PerPEFTError(f"{place} exists already and differs; move it away or delete it, then start again")
    free = shutil.disk_usage(next(folder for folder in (target, *target.absolute().parents) if folder.exists())).free
    if need > free:
        raise PerPEFTError(f"it needs {need / 1e9:.2f} GB on the disk of {target}, where {free / 1e9:.2f} GB are free; "
                           "make room or choose another --target")
    return missing


def _extract(zipped: zipfile.ZipFile, missing: Members, temp: Path) -> None:
    """Write the members to temp, synced and read back, except those that an earlier run has left there whole."""
    expected = {*missing, *_folders(missing)}
    if any(path.relative_to(temp).as_posix() not in expected for path in temp.rglob("*")):
        shutil.rmtree(temp)  # left by another archive of that name, or in place by now
    size = sum(info.file_size for info in missing.values())
    with tqdm(total=size, desc=f"{temp.name}: unpacking", unit="B", unit_scale=True, disable=None) as bar:
        for path, info in missing.items():
            place = temp / path
            if not _holds(place, info):
                place.parent.mkdir(parents=True, exist_ok=True)
                with zipped.open(info) as packed, place.open("wb") as file:
                    shutil.copyfileobj(packed, file, CHUNK)  # at most the declared size; zipfile compares the CRC at the end
                if not _holds(place, info):
                    raise PerPEFTError(f"{place} is not as declared: the archive is damaged (download it again) or the disk is")
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
