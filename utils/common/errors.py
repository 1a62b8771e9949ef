"""The one exception that means "the user can fix this"."""


class PerPEFTError(Exception):
    """A mistake in data, options or environment, in one clear sentence: what, where, what to do.

    Scripts print its text and exit with code 2; `--debug` adds the traceback.
    """
