"""Everything wrong with a data set, collected and reported at once."""
from collections.abc import Iterable
from pathlib import Path

from utils.common.errors import PerPEFTError

SHOWN_PROBLEMS = 10
LARGEST_NUMBER = 2**63 - 1
UNREADABLE_IMAGES = "unreadable images (replace them, or continue without them by --missing_images blank)"
BLANK_IMAGES = "missing or unreadable images, replaced by black ones"


def format_value(value: object) -> str:
    """A value from a data file in few characters: the repr of a nested list could fill the memory."""
    if isinstance(value, str):
        return repr(value[:60])
    if value is None or (isinstance(value, (int, float)) and abs(value) <= LARGEST_NUMBER):
        return repr(value)
    return f"<{type(value).__name__}>"


def format_image_problem(path: Path, item: int, error: Exception) -> str:
    """An unreadable image, as all reports name it."""
    return f"{path.name} (item {item}: {error or type(error).__name__})"


class Problems:
    """Problems of several kinds, each with its first ten examples and its count."""

    def __init__(self):
        self._kinds: dict[str, tuple[list[str], int]] = {}  # by kind: the first examples, and how many there are

    def add(self, kind: str, examples: Iterable[object], count: int | None = None) -> None:
        """Note one kind of problem, if there are examples; `count` is how often it occurs, by default their number."""
        examples = list(examples)
        if examples:
            shown, before = self._kinds.get(kind, ([], 0))
            shown = shown + [str(example) for example in examples[: SHOWN_PROBLEMS - len(shown)]]
            self._kinds[kind] = (shown, before + (len(examples) if count is None else count))

    def __bool__(self) -> bool:
        return bool(self._kinds)

    def __str__(self) -> str:
        lines = []
        for kind, (shown, count) in self._kinds.items():
            more = f" and {count - len(shown)} more" if count > len(shown) else ""
            line = f"  {kind} ({count}): {', '.join(shown)}{more}"
            # Names come from the data: what could control a terminal is shown as its code.
            lines.append("".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in line))
        return "\n".join(lines)

    def raise_any(self, heading: str) -> None:
        """Raise one PerPEFTError with every problem, if there are any."""
        if self:
            raise PerPEFTError(f"{heading}\n{self}")
