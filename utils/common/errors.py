"""Which errors are the user's to correct, and which the machine's."""


class PerPEFTError(Exception):
    """A mistake in data, options or environment, in one clear sentence: what, where, what to do.

    Scripts print its text and exit with code 2; `--debug` adds the traceback.
    """


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the memory of the machine or of its device is full; every allocator words it differently."""
    signs = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs))


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
