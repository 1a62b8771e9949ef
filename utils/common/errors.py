"""The one exception that means "the user can mend this"."""


class PerPEFTError(Exception):
    """A mistake in data, options or surroundings, told in a clear sentence: what, where, what to do.

    The command-line scripts print its text and exit with code 2; a traceback is shown only with `--debug`.
    """
