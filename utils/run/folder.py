"""The run folder: locked while a run trains in it, and either new, started or finished."""
import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from utils.common.errors import PerPEFTError
from utils.common.files import remove_leftovers, write_json
from utils.run import reports
from utils.run.settings import FINGERPRINTS, read_settings

RUN_FILES = (
    "resume", "global", "personalized", "global_ranks.csv", "personalized_ranks.csv", "groups.csv", "metrics.csv", "curves.png",
    "groups.png", "figures", "report.html", "tensorboard", "wandb",
)  # fmt: skip  # and summary.json


class RunFolder:
    """One run folder.

    Attributes:
        path: `{output_dir}/{run name}`.
    """

    def __init__(self, path: Path):
        self.path = path
        self._resume, self._summary = path / "resume", path / "summary.json"
        self._config = self._resume / "config.json"

    def lock(self) -> contextlib.AbstractContextManager:
        """Make the folder and keep other processes from training in it, until the returned lock is released.

        Raises:
            PerPEFTError: it cannot be made, or another process holds it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # Held by the operating system: a process that dies releases it.
            return FileLock(self.path / ".lock").acquire(blocking=False)
        except Timeout:
            message = f"another process is training in {self.path}; wait for it, or choose another --output_dir"
            raise PerPEFTError(message) from None
        except OSError as error:
            raise PerPEFTError(f"cannot make the run folder {self.path} ({error}); choose another --output_dir") from error

    @property
    def is_finished(self) -> bool:
        """Whether a run has ended here."""
        return self._summary.is_file()

    @property
    def has_state(self) -> bool:
        """Whether a run was started here and has a state to continue from."""
        return self._config.is_file() and any(self._resume.glob("*.pt"))

    def saved_settings(self) -> dict[str, Any] | None:
        """The settings of the run that is here, finished or started; None where there is nothing to continue.

        Raises:
            PerPEFTError: they are damaged.
        """
        if self.is_finished:
            return read_settings(self._summary, nested=True)
        return read_settings(self._config, nested=False) if self.has_state else None

    def check_settings(self, settings: dict[str, Any]) -> None:
        """Refuse to mix runs.

        Raises:
            PerPEFTError: the folder holds a run with other settings.
        """
        saved = self.saved_settings()
        if saved is None:
            return
        names = [name for name in sorted(saved.keys() | settings.keys()) if saved.get(name) != settings.get(name)]
        if names:
            differences = "; ".join(
                f"{name} was {saved.get(name)}, is now {settings.get(name)}{FINGERPRINTS.get(name, '')}" for name in names
            )
            raise PerPEFTError(
                f"{self.path} holds a run with other settings: {differences}. Use the same settings to continue it, --restart to "
                "discard it, or another --output_dir or --trial beside it."
            )

    def begin(self, settings: dict[str, Any], restart: bool) -> None:
        """Prepare the folder: continue the run that is here, or clear it for a new one."""
        remove_leftovers(self.path)
        if self.has_state and not restart:
            print(f"continuing {self.path}", flush=True)
            return
        self.clear()  # without a saved state there is nothing to lose, and the rest of a half-cleared run must not be used
        self._resume.mkdir()
        write_json(self._config, settings)

    def clear(self) -> None:
        """Remove the files of a run, and nothing else that is there.

        The files that mark a run go first: after a kill in between there is nothing to continue, and the next start clears the
        rest.
        """
        remove_leftovers(self.path)
        for path in (self._config, self._summary, *(self.path / name for name in RUN_FILES)):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def remove_state(self) -> None:
        """Remove what only a continuation needs."""
        shutil.rmtree(self._resume, ignore_errors=True)

    def print_finished(self) -> None:
        """Print the table of the finished run."""
        self.remove_state()  # left by a run that was killed right after its summary
        print(f"{self.path} is finished; --restart trains it again")
        reports.print_results(json.loads(self._summary.read_text(encoding="utf-8")), self.path)
