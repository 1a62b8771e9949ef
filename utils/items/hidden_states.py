"""CLIP's cached hidden states for IISAN: computed once, kept in `{name}_preX.pt`, read by item number."""
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel

from models.pair import PairConfig
from models.towers import hidden_states, state_shapes
from utils.common.devices import to_device
from utils.common.errors import PerPEFTError
from utils.common.files import save_tensors, write_atomically, write_text_atomically
from utils.common.pickles import refuse_damaged_tensors
from utils.data.dataset import Dataset
from utils.data.problems import Problems
from utils.items.model_name import FoundationName, model_hash
from utils.items.passes import model_inputs
from utils.items.store import DEVICE_SHARE, ImageTitleStore

PADDING_IDS = (0, "0")  # published files may hold a row for the padding item
ROWS_AT_ONCE = 4096


def states_path(train_dir: str | Path, name: str) -> Path:
    """Where a data set's states lie."""
    return Path(train_dir) / f"{name}_preX.pt"


def compute_hidden_states(
    model: PreTrainedModel, processor: Any, store: ImageTitleStore, device: torch.device, items_at_once: int = 64
) -> tuple[torch.Tensor, torch.Tensor]:
    """All items' states, row i of item i + 1.

    Args:
        model, processor: the foundation model and its image processor.
        store: the items' images and titles.
        device: where to compute.
        items_at_once: items a forward pass.
    Returns:
        image states [items, S, image width], title states [items, S, text width], on the CPU
    """
    model = model.eval().to(device)
    image_shape, text_shape = state_shapes(model.config)
    all_image_states = torch.empty(store.num_items, *image_shape)
    all_text_states = torch.empty(store.num_items, *text_shape)
    for rows, images, titles in model_inputs(store, processor, device, "hidden states", items_at_once):
        image_states, text_states = hidden_states(model, images, *titles)
        all_image_states[rows], all_text_states[rows] = image_states.cpu(), text_states.cpu()
    return all_image_states, all_text_states


def save_hidden_states(
    path: Path, image_states: torch.Tensor, text_states: torch.Tensor, raw_ids: list[str], model: FoundationName
) -> None:
    """Save states as they are published, and beside them, in `{name}_preX.json`, which model they came from.

    Args:
        path: the file.
        image_states, text_states, raw_ids: of all items.
        model: the foundation model.
    Raises:
        PerPEFTError: no room or right to write there.
    """
    try:
        note = {"clip_model": str(model), "clip_files": model_hash(model)}
        write_text_atomically(path.with_suffix(".json"), json.dumps(note) + "\n")
        write_atomically(path, lambda temporary: save_tensors((image_states, text_states, list(raw_ids)), temporary))
    except OSError as error:
        raise PerPEFTError(f"the hidden states {path} cannot be written ({error}); make room or choose another folder") from error


def _is_dense(states: Any) -> bool:
    """Whether this is a tensor [items, layers, width] of floats, every one of them in the file."""
    if type(states) not in (torch.Tensor, torch.nn.Parameter) or states.dim() != 3 or not states.is_floating_point():
        return False
    # A tensor may repeat one number any number of times: to look at it would fill the memory.
    if states.shape[2] == 0:  # image states of a text encoder alone
        return True
    return 0 < states.numel() * states.element_size() <= states.untyped_storage().nbytes()


def _read(path: Path) -> tuple[torch.Tensor, torch.Tensor, list]:
    again = "delete it and start again to compute it anew, or fetch it again"
    try:
        refuse_damaged_tensors(path)
        content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PerPEFTError(f"{path} cannot be read ({reason[:500]}); {again}") from error
    if not (isinstance(content, (tuple, list)) and len(content) == 3):
        raise PerPEFTError(f"{path} holds no (image states, title states, ids); {again}")
    image_states, text_states, ids = content
    if isinstance(ids, torch.Tensor) and ids.dim() == 1 and ids.nbytes <= ids.untyped_storage().nbytes():
        ids = ids.tolist()
    plain_ids = isinstance(ids, (list, tuple)) and all(isinstance(raw_id, (str, int)) for raw_id in ids)
    if not _is_dense(image_states) or not _is_dense(text_states) or not plain_ids:
        raise PerPEFTError(f"{path} holds no two float tensors [items, layers, width] and a list of ids; {again}")
    if not len(image_states) == len(text_states) == len(ids) or image_states.shape[1] != text_states.shape[1]:
        raise PerPEFTError(
            f"{path} does not fit together: image states {list(image_states.shape)}, title states {list(text_states.shape)}, "
            f"{len(ids)} ids; {again}"
        )
    return image_states.detach(), text_states.detach(), list(ids)


def _refuse_other_model(note: Path, model: FoundationName) -> None:
    """Raise a PerPEFTError unless the states beside a note come from this model, whatever its folder is called now."""
    try:
        content = json.loads(note.read_text(encoding="utf-8"))
        made_by, files = str(content["clip_model"])[:200], content.get("clip_files")
    except (AttributeError, ValueError, LookupError, TypeError, RecursionError, OSError) as error:
        raise PerPEFTError(f"{note} does not say which model made the states beside it; delete both and start again") from error
    own = model_hash(model)
    if files != own if files and own else made_by != str(model):
        raise PerPEFTError(
            f"{note.with_suffix('.pt')} was computed by CLIP '{made_by}', not '{model}'; pass --clip_model {made_by}, or "
            "delete it and start again to compute it anew"
        )


def _rows_with_numbers_missing(states: torch.Tensor, rows: np.ndarray) -> set[int]:
    """Those of `rows` that hold a NaN or an infinity."""
    wrong: set[int] = set()
    for start in range(0, len(rows), ROWS_AT_ONCE):
        portion = rows[start : start + ROWS_AT_ONCE]
        finite = torch.isfinite(states[torch.from_numpy(portion)]).flatten(1).all(1).numpy()
        wrong.update(portion[~finite].tolist())
    return wrong


class HiddenStateStore:
    """Cached states of all items, for IISAN.

    Attributes:
        image_states: [rows, S, image width], float32 or float16, memory-mapped or on the device.
        text_states: [rows, S, text width].
    """

    def __init__(self, image_states: torch.Tensor, text_states: torch.Tensor, rows: np.ndarray | None = None):
        self.image_states = image_states
        self.text_states = text_states
        rows = np.arange(len(image_states)) if rows is None else rows
        self._rows = torch.from_numpy(rows)  # [num_items], where item i + 1 lies
        self._order = np.argsort(rows, kind="stable") + 1
        self.num_items = len(rows)

    @classmethod
    def open(
        cls, dataset: Dataset, config: PretrainedConfig | PairConfig | None, model: FoundationName | None = None
    ) -> "HiddenStateStore":
        """Read `{name}_preX.pt`; ids may stand in any order, with or without one for the padding item.

        Args:
            dataset: whose items.
            config: of the model that the states must come from; None where it is not known.
            model: as on the command line.
        Raises:
            PerPEFTError: unreadable, of another CLIP, items missing, or states that are not finite, with their ids.
        """
        path = states_path(dataset.folder, dataset.name)
        image_states, text_states, ids = _read(path)
        note = path.with_suffix(".json")
        if model is not None and note.is_file():
            _refuse_other_model(note, model)
        if config is not None:
            found = (tuple(image_states.shape[1:]), tuple(text_states.shape[1:]))
            if found != state_shapes(config):
                raise PerPEFTError(
                    f"{path} holds states of another CLIP: layers and widths {found}, where {model or 'this one'} has "
                    f"{state_shapes(config)}; pass the right --clip_model, or delete the file and start again to compute it anew"
                )
        place = {raw_id: row for row, raw_id in enumerate(ids)}
        problems = Problems()
        problems.add("items without states", [raw_id for raw_id in dataset.raw_ids if raw_id not in place])
        repeated = {raw_id for row, raw_id in enumerate(ids) if place[raw_id] != row and raw_id not in PADDING_IDS}
        problems.add("ids that stand twice", sorted(map(str, repeated)))
        if not problems:
            rows = np.array([place[raw_id] for raw_id in dataset.raw_ids], dtype=np.int64)
            wrong = _rows_with_numbers_missing(image_states, rows) | _rows_with_numbers_missing(text_states, rows)
            problems.add("items whose states hold NaN or infinity", [ids[row] for row in sorted(wrong)])
        problems.raise_any(f"{path} cannot be used; delete it and start again to compute it anew, or fetch it again:")
        return cls(image_states, text_states, rows)

    def place_on(self, device: torch.device) -> None:
        """Keep all states on a GPU if they fit there with room to spare; elsewhere they stay memory-mapped."""
        size = self.image_states.nbytes + self.text_states.nbytes
        if device.type == "cuda" and size <= DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]:
            self.image_states, self.text_states = self.image_states.to(device), self.text_states.to(device)
            self._rows = self._rows.to(device)

    def fetch(self, items: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """States of some items (numbers from 1): [items, S, image width] and [items, S, text width], float32."""
        rows = self._rows[to_device(items - 1, self._rows.device)]
        image_states, text_states = self.image_states.index_select(0, rows), self.text_states.index_select(0, rows)
        return to_device(image_states, device).float(), to_device(text_states, device).float()

    def reading_order(self) -> np.ndarray:
        """All items, in the order of the file."""
        return self._order
