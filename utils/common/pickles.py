"""Pickles read without running anything: plain dict, list, tuple, str, bytes, numbers, bool and None only."""
import io
import pickle
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from utils.common.errors import PerPEFTError

ONLY_PLAIN = "only plain dicts, lists, strings and numbers are read"
KEY_TYPES = (str, int, float, bool, type(None))
# The operations that build plain values. Those that call, instantiate or fill objects are not among them, nor sets, whose
# members are hashed like keys; GLOBAL, STACK_GLOBAL and INST are, since `find_class` can name what they ask for.
# fmt: off
PLAIN_OPERATIONS = frozenset({
    "PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "DUP", "GET", "BINGET", "LONG_BINGET", "PUT", "BINPUT",
    "LONG_BINPUT", "MEMOIZE", "GLOBAL", "STACK_GLOBAL", "INST", "PERSID", "BINPERSID", "NONE", "NEWTRUE", "NEWFALSE", "INT",
    "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING",
    "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "EMPTY_TUPLE",
    "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_DICT", "DICT", "SETITEM",
    "SETITEMS",
})
# fmt: on


def operations(allowed: frozenset[str]) -> dict[int, Callable]:
    """A dispatch table for `PlainUnpickler` in which the operations not allowed raise an error that names them."""

    def refusal(name: str) -> Callable:
        def refuse(_unpickler: pickle.Unpickler) -> None:
            raise PerPEFTError(f"the pickle makes an object by {name}; {ONLY_PLAIN}")

        return refuse

    names = {ord(code): operation.name for code, operation in pickletools.code2op.items()}
    known = pickle._Unpickler.dispatch
    return {code: method if names[code] in allowed else refusal(names[code]) for code, method in known.items()}


class PlainUnpickler(pickle._Unpickler):
    """Reads plain values and refuses everything else, with time and memory bounded by the size of the pickle.

    This is the unpickler in Python, since the one in C can be brought down by a few bytes: it makes its memo as long as any
    index that the pickle names, and it hashes keys, which for nested tuples takes forever or overflows the stack.
    """

    dispatch = operations(PLAIN_OPERATIONS)

    def __init__(self, content: bytes):
        super().__init__(io.BytesIO(content))  # asked for more bytes than there are, it gives what there is at no cost

    def find_class(self, module: str, name: str) -> Any:
        """Refuse every class and function, so that none that a pickle names is imported or called."""
        raise PerPEFTError(f"the pickle names the type {module}.{name}; {ONLY_PLAIN}")

    def persistent_load(self, pid: Any) -> Any:
        """Refuse references out of the pickle."""
        raise PerPEFTError(f"the pickle holds a persistent reference; {ONLY_PLAIN}")

    def _set_items(self, items: list) -> None:
        target = self.stack[-1]
        if type(target) is not dict:
            raise PerPEFTError(f"the pickle sets entries of a {type(target).__name__}; {ONLY_PLAIN}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in KEY_TYPES:
                raise PerPEFTError(f"the pickle holds a dict with a {type(key).__name__} for a key; {ONLY_PLAIN}")
            if type(key) is int and key.bit_length() > 63:  # of such numbers any amount can share one hash
                raise PerPEFTError("the pickle holds a dict with a number of more than 63 bits for a key")
            target[key] = value

    def load_setitem(self) -> None:
        """SETITEM, for plain keys."""
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def load_setitems(self) -> None:
        """SETITEMS, for plain keys."""
        self._set_items(self.pop_mark())

    def load_dict(self) -> None:
        """DICT, for plain keys."""
        items = self.pop_mark()
        self.append({})
        self._set_items(items)

    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.DICT[0]] = load_dict


def load_pickle(path: str | Path) -> Any:
    """Read a pickle of plain Python values.

    Args:
        path: the pickle file.
    Returns:
        The value in it.
    Raises:
        PerPEFTError: the file is missing, is no pickle, is cut off, or names any type beyond the plain ones.
    """
    path = Path(path)
    try:
        return PlainUnpickler(path.read_bytes()).load()
    except FileNotFoundError:
        raise PerPEFTError(f"{path} is missing") from None
    except PerPEFTError as error:
        raise PerPEFTError(f"{path} is refused: {error}. Write it again with pickle.dump of a plain dict.") from None
    except Exception as error:  # a damaged pickle can raise nearly anything: struct.error, EOFError, MemoryError, ...
        reason = "it is cut off" if isinstance(error, EOFError) else f"{type(error).__name__}: {error}"[:200]
        raise PerPEFTError(f"{path} is not a readable pickle ({reason}). Fetch or write it again.") from None


class _Name(str):
    """Stands for a class, a function or what it made: never a key, never called."""

    __slots__ = ()


TENSOR_PARTS = {
    ("collections", "OrderedDict"),  # a tensor's hooks, of which there are none
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch.storage", "UntypedStorage"),
}


class _TensorContents(PlainUnpickler):
    """Goes over what `torch.save` wrote about dense tensors in plain containers and makes nothing of it."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in TENSOR_PARTS or (module == "torch" and name.endswith("Storage")):
            return _Name(f"{module}.{name}")
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Any:
        if type(pid) is tuple and all(type(part) in (str, int, _Name) for part in pid):
            return _Name("storage")
        return super().persistent_load(pid)

    def load_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        hooks = function == "collections.OrderedDict"
        if type(function) is not _Name or type(arguments) is not tuple or (hooks and arguments):
            raise PerPEFTError("the pickle calls something that is no part of a tensor")
        self.append(_Name("tensor"))

    dispatch = {**PlainUnpickler.dispatch, pickle.REDUCE[0]: load_reduce}


def refuse_damaged_tensors(path: str | Path) -> None:
    """Refuse a file of tensors that `torch.load(weights_only=True, mmap=True)` would misread or not survive.

    torch compares no checksums, so damage among the numbers would pass. And though it runs no code, what a file says of its
    contents can make it hash for ever, overflow its stack or allocate without bound.

    Args:
        path: what `torch.save` wrote of dense tensors in lists, tuples and dicts.
    Raises:
        PerPEFTError: it holds anything else.
        Exception: it is no zip file, cut off or damaged; of the many kinds that zipfile and pickle raise.
    """
    with zipfile.ZipFile(path) as zipped:
        members = zipped.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise PerPEFTError("it is packed, which torch.save never does")
        if sum(member.file_size for member in members) > Path(path).stat().st_size:
            raise PerPEFTError("its parts are larger than the whole")
        damaged = zipped.testzip()
        if damaged is not None:
            raise PerPEFTError(f"its part {damaged} is damaged")
        for member in members:
            if member.filename.endswith("data.pkl"):
                _TensorContents(zipped.read(member)).load()
