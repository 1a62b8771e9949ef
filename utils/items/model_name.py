"""What a foundation model is called: one folder or name on the hub, or those of a pair of encoders."""
import hashlib
from dataclasses import dataclass
from pathlib import Path

DEFAULT_CLIP = "openai/clip-vit-base-patch32"


@dataclass(frozen=True)
class PairName:
    """Names of two single encoders in place of a dual encoder's, each a folder or a name on the hub.

    Attributes:
        image_model: None for titles alone.
        text_model: a text encoder.
        text_pooling: "cls" or "mean".
    """

    image_model: str | None
    text_model: str
    text_pooling: str = "mean"

    def __str__(self) -> str:
        return " + ".join([*([self.image_model] if self.image_model else []), f"{self.text_model} ({self.text_pooling})"])


FoundationName = str | PairName


def model_folders(name: FoundationName) -> list[str]:
    """The folders or hub names that a foundation model's files lie in."""
    return [name] if isinstance(name, str) else [part for part in (name.image_model, name.text_model) if part]


def add_model_files(digest: "hashlib._Hash", folder: str | Path) -> None:
    """Add a model folder's settings and weights to a hash that identifies the model wherever it is."""
    for path in sorted(Path(folder).iterdir()):
        if path.suffix in (".json", ".txt", ".safetensors", ".bin"):
            with path.open("rb") as file:
                for block in iter(lambda: file.read(2**20), b""):
                    digest.update(block)


def model_hash(name: FoundationName) -> str | None:
    """What a model is recognised by wherever its folders lie; None for names on the hub."""
    folders = model_folders(name)
    if not all(Path(folder).is_dir() for folder in folders):
        return None
    digest = hashlib.sha256()
    for folder in folders:
        add_model_files(digest, folder)
    if isinstance(name, PairName):
        digest.update(name.text_pooling.encode())
    return digest.hexdigest()[:16]
