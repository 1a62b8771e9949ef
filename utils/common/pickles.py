"""Pickles read without running anything: plain dicts, lists, strings, bytes, numbers, bools and None only.

The opcodes of a pickle are checked before anything is built of it. Without calls, types, tuples (as keys, nested ones can take
forever to hash), memo indices beyond the file's size and huge integers, it takes no more time and memory than its size allows.
"""
import io
import pickle
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any

from utils.common.errors import PerPEFTError

ONLY_PLAIN = "only plain dicts, lists, strings and numbers are read"
NAMES = ("GLOBAL", "INST", "STACK_GLOBAL")
_PLAIN = (
    "PROTO FRAME STOP MARK GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE NONE NEWTRUE NEWFALSE INT BININT BININT1 "
    "BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 "
    "BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT DICT SETITEM SETITEMS"
)
PLAIN_OPCODES = frozenset(_PLAIN.split())
TUPLES = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")
TENSOR_OPCODES = (PLAIN_OPCODES - {"MEMOIZE", "DICT", "SETITEM", "SETITEMS"}) | {"EMPTY_TUPLE", *TUPLES, "BINPERSID", "REDUCE"}
TENSOR_NAMES = re.compile(r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch(\.storage)? \w*Storage")
MAX_TUPLES = 32  # a tensor takes four, and no file has more than three
OLD_TORCH_FILE = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # what torch.save wrote first before torch 1.6


def _check_opcodes(content: bytes, allowed: frozenset[str], names: re.Pattern | None = None) -> None:
    """Refuse a pickle with other opcodes than `allowed`, up to the first type that it names unless that is in `names`."""
    tuples: set[int] = set()  # memo indices
    num_tuples, top_is_tuple = 0, False
    for opcode, argument, _ in pickletools.genops(content):
        name = opcode.name
        if name in NAMES:
            if names is None:
                return  # the unpickler's find_class refuses it
            if name != "GLOBAL" or not names.fullmatch(argument):
                raise PerPEFTError(f"the pickle names the type {argument or name}, which is not part of a tensor")
        elif name not in allowed:
            raise PerPEFTError(f"the opcode {name} of the pickle is not allowed; {ONLY_PLAIN}")
        if name.endswith("PUT"):
            if argument > len(content):
                raise PerPEFTError(f"the pickle has a memo index of {argument}")
            if top_is_tuple:
                tuples.add(argument)
            continue
        if isinstance(argument, int) and argument.bit_length() > 63:
            raise PerPEFTError("the pickle holds an integer of more than 63 bits")
        if name.endswith("GET") and argument in tuples:
            raise PerPEFTError("the pickle uses a tuple twice")
        top_is_tuple = name in TUPLES
        num_tuples += top_is_tuple
        if num_tuples > MAX_TUPLES:
            raise PerPEFTError("the pickle holds more tuples than a few tensors take")


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise PerPEFTError(f"the pickle names the type {module}.{name}; {ONLY_PLAIN}")


def load_pickle(path: str | Path) -> Any:
    """Read a pickle of plain Python values.

    Raises:
        PerPEFTError: the file is missing, is not a pickle, is cut off, or holds anything but plain values.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        _check_opcodes(content, PLAIN_OPCODES)
        return _PlainUnpickler(io.BytesIO(content)).load()
    except FileNotFoundError:
        raise PerPEFTError(f"{path} is missing") from None
    except PerPEFTError as error:
        raise PerPEFTError(f"{path} is refused: {error}. Write it again with pickle.dump of a plain dict.") from None
    except Exception as error:  # a damaged pickle can raise nearly anything: struct.error, EOFError, MemoryError, ...
        reason = f"{type(error).__name__}: {error}"[:200]
        raise PerPEFTError(f"{path} is not a readable pickle ({reason}). Download or write it again.") from None


def refuse_damaged_tensors(path: str | Path) -> None:
    """Refuse a file that `torch.load(weights_only=True, mmap=True)` would misread or not survive.

    torch compares no checksums, so damage among the numbers would pass; and though it runs no code, a few bytes can make it
    hash forever, overflow its stack or allocate without bound.

    Args:
        path: what `torch.save` wrote of up to three dense tensors in lists and tuples.
    Raises:
        PerPEFTError: it holds anything else, or is in the format before torch 1.6.
        Exception: it is not a zip file, cut off or damaged; of the many kinds that zipfile and pickletools raise.
    """
    with open(path, "rb") as file:
        if file.read(len(OLD_TORCH_FILE)) == OLD_TORCH_FILE:
            command = f"python3 -c \"import torch; p = '{path}'; torch.save(torch.load(p, weights_only=True), p)\""
            raise PerPEFTError(f"it is in torch's format before version 1.6; convert it by {command}")
    with zipfile.ZipFile(path) as zipped:
        members = zipped.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise PerPEFTError("it is compressed, which torch.save never does")
        if sum(member.file_size for member in members) > Path(path).stat().st_size:
            raise PerPEFTError("its parts are larger than the whole")
        if (damaged := zipped.testzip()) is not None:
            raise PerPEFTError(f"its part {damaged} is damaged")
        for member in members:
            if member.filename.endswith("data.pkl"):
                _check_opcodes(zipped.read(member), TENSOR_OPCODES, TENSOR_NAMES)
