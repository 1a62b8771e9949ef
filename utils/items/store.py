"""The image and title store: every image decoded once, every title tokenized once, then read by item number."""
import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from models.towers import Traits
from utils.common.devices import to_device
from utils.common.errors import PerPEFTError, first_line
from utils.common.files import build_once, folder_written_atomically
from utils.data.dataset import Dataset
from utils.data.images import DECODING, on_all_cores
from utils.data.problems import BLANK_IMAGES, UNREADABLE_IMAGES, Problems, format_image_problem
from utils.items.preprocessing import output_size, read_image
from utils.items.source import fits_on


def image_status(path: Path) -> os.stat_result | None:
    """What the disk says of an image file, in one question; None where there is none."""
    try:
        return path.stat()
    except OSError:
        return None


def _store_key(dataset: Dataset, processor: BaseImageProcessor | None, tokenizer: PreTrainedTokenizerBase, traits: Traits) -> str:
    """A hash of everything that the store's content follows from."""
    digest = hashlib.sha256()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    # The options of the tokenizer's last call are part of its state, but do not change these titles' tokens.
    vocabulary = json.dumps(state | {"truncation": None, "padding": None}, sort_keys=True)
    digest.update(json.dumps(processor.to_dict() if processor else None, sort_keys=True, default=str).encode())
    padded = " padded" if traits.pads_titles else ""
    digest.update(f"{vocabulary} {tokenizer.pad_token_id} {traits.longest_title} {DECODING}{padded}".encode())
    for raw_id, title, path in zip(dataset.raw_ids, dataset.titles, dataset.image_paths):
        status = image_status(path)
        stamp = f"{status.st_size} {status.st_mtime_ns}" if status else "missing"
        digest.update(f"{raw_id}\0{title}\0{stamp}\n".encode())
    return digest.hexdigest()[:16]


def _write_images(path: Path, dataset: Dataset, processor: BaseImageProcessor, missing_images: str) -> None:
    unreadable: list[str] = []
    pixels = np.empty((3, *output_size(processor)), np.uint8)
    images = on_all_cores(lambda path: read_image(path, processor), dataset.image_paths)
    with path.open("w+b") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (dataset.num_items, *pixels.shape)}
        np.lib.format.write_array_header_1_0(file, header)
        if hasattr(os, "posix_fallocate"):  # which macOS lacks: a full disk is an error at once, not after minutes
            os.posix_fallocate(file.fileno(), file.tell(), dataset.num_items * pixels.nbytes)
        for row, image in enumerate(tqdm(images, "images", dataset.num_items, unit="image", disable=None)):
            pixels[:] = 0 if isinstance(image, Exception) else image
            file.write(pixels)
            is_reported = missing_images != "error" and isinstance(image, FileNotFoundError)
            if isinstance(image, Exception) and not is_reported:
                unreadable.append(format_image_problem(dataset.image_paths[row], row + 1, image))
    problems = Problems()
    problems.add(UNREADABLE_IMAGES if missing_images == "error" else BLANK_IMAGES, unreadable)
    if missing_images == "error":
        problems.raise_any(f"data set '{dataset.name}' in {dataset.folder} cannot be used:")
    elif problems:
        print(f"warning: data set '{dataset.name}':\n{problems}", file=sys.stderr)


def padding_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """What fills short titles: where there is no token for it, end of text, after which CLIP reads nothing."""
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)


def _write_titles(path: Path, titles: list[str], tokenizer: PreTrainedTokenizerBase, traits: Traits) -> None:
    padding = "max_length" if traits.pads_titles else False
    encoded = tokenizer(titles, truncation=True, max_length=traits.longest_title, padding=padding)["input_ids"]
    lengths = np.array([max(1, len(tokens)) for tokens in encoded])  # a title without tokens is one of padding
    table = np.full((len(titles), lengths.max()), padding_token(tokenizer), dtype=np.int32)
    for row, tokens in enumerate(encoded):
        table[row, : len(tokens)] = tokens
    np.savez(path, tokens=table, lengths=lengths)


@dataclass
class ImageTitleStore:
    """Images and titles of all items, ready for the foundation model; array row i is item i + 1.

    Attributes:
        pixels: uint8 [items, 3, height, width], resized and cropped, not rescaled; a memory map, or on a GPU.
        tokens: int32 [items, longest title], padded after the end-of-text token.
        lengths: tokens of each title, [items].
        masked: whether `fetch` returns an attention mask too.
    """

    pixels: np.ndarray | torch.Tensor
    tokens: np.ndarray | torch.Tensor
    lengths: np.ndarray
    masked: bool = False

    def __post_init__(self):
        self.num_items = len(self.pixels)

    @classmethod
    def open(
        cls, dataset: Dataset, processor: BaseImageProcessor | None, tokenizer: PreTrainedTokenizerBase, traits: Traits,
        missing_images: str = "error",
    ) -> "ImageTitleStore":  # fmt: skip
        """Open the store of a data set, building it first if it is not there.

        It lies in `{train_dir}/{name}_store/`, keyed by a hash of the processor's and tokenizer's settings and of the data
        set's files, and is renamed into place when complete.

        Args:
            processor, tokenizer, traits: the foundation model's own; without a processor, every item has one black pixel.
            missing_images: "error", or "blank" for black images in place of missing or unreadable ones.
        Raises:
            PerPEFTError: unreadable images, all of them named at once, or no room to write.
        """
        key = _store_key(dataset, processor, tokenizer, traits)
        folder = dataset.folder / f"{dataset.name}_store" / (key if missing_images == "error" else f"{key}_blank")
        try:
            with build_once(folder) as missing:
                if missing:
                    with folder_written_atomically(folder) as temporary:
                        _write_titles(temporary / "titles.npz", dataset.titles, tokenizer, traits)
                        if processor is None:
                            np.save(temporary / "images.npy", np.zeros((dataset.num_items, 3, 1, 1), dtype=np.uint8))
                        else:
                            _write_images(temporary / "images.npy", dataset, processor, missing_images)
        except OSError as error:
            advice = "make room or allow writing there"
            raise PerPEFTError(f"the image store {folder} cannot be written ({error}); {advice}") from error
        try:
            titles = np.load(folder / "titles.npz", allow_pickle=False)
            pixels = np.load(folder / "images.npy", mmap_mode="r", allow_pickle=False)
            return cls(pixels, titles["tokens"], titles["lengths"], traits.masks_titles)
        except Exception as error:  # numpy and zipfile raise many kinds for a damaged file
            reason = first_line(error)
            raise PerPEFTError(f"the image store {folder} is damaged ({reason}); delete it, it will be rebuilt") from error

    def place_on(self, device: torch.device) -> None:
        """Keep the whole store on a GPU if it fits there with room to spare, so that a step copies no image."""
        if fits_on(device, self.pixels):
            self.pixels, self.tokens = torch.tensor(self.pixels).to(device), torch.tensor(self.tokens).to(device)

    def fetch(self, items: np.ndarray, device: torch.device) -> tuple[torch.Tensor, ...]:
        """The encoder's inputs for some items (numbers from 1), on a device.

        Returns:
            pixels uint8 [items, 3, height, width], tokens int64 [items, longest title among them], and a mask like the tokens,
            1 at tokens and 0 at padding, where the text tower takes one
        """
        lengths = self.lengths[items - 1]
        longest = lengths.max(initial=1)
        rows = items - 1 if isinstance(self.pixels, np.ndarray) else to_device(items - 1, device)
        found = to_device(self.pixels[rows], device), to_device(self.tokens[rows, :longest], device).long()
        mask = np.arange(longest) < lengths[:, None]  # [items, longest]
        return (*found, to_device(mask, device).long()) if self.masked else found

    def reading_order(self) -> np.ndarray:
        """All items by title length, so that a batch of them holds little padding."""
        return np.argsort(self.lengths, kind="stable") + 1
