"""CLIP's cached hidden states for IISAN: computed once, kept in `{name}_preX.pt`, read by item number."""
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from models.item_encoder import MODALITIES
from models.towers import evenly_spaced, tower, tower_name
from utils.common.errors import PerPEFTError, first_line
from utils.common.files import save_tensors, write_atomically, write_json
from utils.common.pickles import refuse_damaged_tensors
from utils.data.dataset import Dataset
from utils.data.problems import Problems
from utils.items.model_files import FoundationName, known_model, model_hash, model_options
from utils.items.source import FeatureStore

AGAIN = "delete it and start again to compute it, or download it again"


def states_path(train_dir: str | Path, name: str) -> Path:
    """Where a data set's states lie."""
    return Path(train_dir) / f"{name}_preX.pt"


def has_states(train_dir: str | Path, name: str, modality: str = "both") -> bool:
    """Whether a data set's states are there, and hold what a modality needs as far as the note beside them says."""
    path = states_path(train_dir, name)
    return path.is_file() and _note(path).get("modality", "both") in ("both", modality)


def _note(path: Path) -> dict[str, Any]:
    """What the note beside states says of them; nothing where there is none, as beside published ones, or it is damaged."""
    try:
        content = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def state_shapes(model: nn.Module) -> dict[str, set[tuple[int, int]]]:
    """[S, width] that a model's "image" and "text" states can have, computed alone or together, by its configuration.

    Empty where the configuration of a tower names no depth or no width.
    """
    configs = {part: tower(model, part).config for part in MODALITIES["both"] if tower_name(model, part)}
    depths = {part: getattr(config, "num_hidden_layers", None) for part, config in configs.items()}
    widths = {part: getattr(config, "hidden_size", None) for part, config in configs.items()}
    if not all(isinstance(size, int) for size in (*depths.values(), *widths.values())):
        return {}
    both = list(depths.values())
    return {part: {(len(evenly_spaced(used)[0]), widths[part]) for used in ([depths[part]], both)} for part in configs}


def save_hidden_states(
    path: Path, image_states: torch.Tensor, text_states: torch.Tensor, raw_ids: list[str], model: FoundationName
) -> None:
    """Save all items' states as they are published, and beside them, in `{name}_preX.json`, which model they came from.

    Raises:
        PerPEFTError: no room or right to write there.
    """
    try:
        modality = "text" if image_states.shape[2] == 0 else "image" if text_states.shape[2] == 0 else "both"
        note = {"clip_model": str(model), "clip_files": model_hash(model), "modality": modality, "options": model_options(model)}
        path.unlink(missing_ok=True)  # first, so that a note never stands beside another model's states
        write_json(path.with_suffix(".json"), note)
        write_atomically(path, lambda temporary: save_tensors((image_states, text_states, list(raw_ids)), temporary))
    except OSError as error:
        raise PerPEFTError(f"the hidden states {path} cannot be written ({error}); make room or allow writing there") from error


def _is_dense(states: Any) -> bool:
    """Whether this is a tensor [items, layers, width] of floats, every one of them in the file."""
    if type(states) not in (torch.Tensor, torch.nn.Parameter) or states.dim() != 3 or not states.is_floating_point():
        return False
    # What was not used has no width. A tensor may repeat one number any number of times: to look at it would fill the memory.
    return states.shape[2] == 0 or 0 < states.nbytes <= states.untyped_storage().nbytes()


def _read(path: Path) -> tuple[dict[str, torch.Tensor], list]:
    """States by part, "image" and "text", and the ids of their rows."""
    try:
        refuse_damaged_tensors(path)
        content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise PerPEFTError(f"{path} cannot be read ({first_line(error)[:500]}); {AGAIN}") from error
    if not (isinstance(content, (tuple, list)) and len(content) == 3):
        raise PerPEFTError(f"{path} holds no (image states, title states, ids); {AGAIN}")
    image_states, text_states, ids = content
    if isinstance(ids, torch.Tensor) and ids.dim() == 1 and ids.nbytes <= ids.untyped_storage().nbytes():
        ids = ids.tolist()
    plain_ids = isinstance(ids, (list, tuple)) and all(isinstance(raw_id, (str, int)) for raw_id in ids)
    if not _is_dense(image_states) or not _is_dense(text_states) or not plain_ids:
        raise PerPEFTError(f"{path} holds no two float tensors [items, layers, width] and a list of ids; {AGAIN}")
    if not len(image_states) == len(text_states) == len(ids) or image_states.shape[1] != text_states.shape[1]:
        raise PerPEFTError(
            f"{path} does not fit together: image states {list(image_states.shape)}, title states {list(text_states.shape)}, "
            f"{len(ids)} ids; {AGAIN}"
        )
    return {"image": image_states.detach(), "text": text_states.detach()}, list(ids)


def made_by(path: Path) -> tuple[str, str | None]:
    """The name and the hash of the model that states came from, by the note beside them; a PerPEFTError if it does not say."""
    note, where = _note(path), path.with_suffix(".json")
    if "clip_model" not in note:
        raise PerPEFTError(f"{where} does not say which model made the states beside it; delete both and start again")
    return str(note["clip_model"])[:200], note.get("clip_files")


def _check_model(path: Path, used: dict[str, torch.Tensor], model: FoundationName | None) -> None:
    """Refuse states that are left out, or of another model, whatever its folder is called now: by the note, or else by shapes."""
    expected: dict[str, set[tuple[int, int]]] = {}
    if model is not None and path.with_suffix(".json").is_file():
        (name, files), own_files = made_by(path), model_hash(model)
        if files != own_files if files and own_files else name != str(model):
            options = _note(path).get("options", f"--clip_model {name}")
            raise PerPEFTError(
                f"{path} was computed by '{name}', not '{model}'; pass {options}, or delete it and start again to compute it"
            )
    elif model is not None and (skeleton := known_model(model)) is not None:
        expected = state_shapes(skeleton)
    for part, states in used.items():
        own, found = expected.get(part), tuple(states.shape[1:])
        if states.shape[2] == 0:
            raise PerPEFTError(f"{path} holds no {part} states; delete it and start again to compute them")
        if own and found not in own:
            raise PerPEFTError(
                f"{path} holds states of another CLIP: layers and widths of the {part} states are {found}, where "
                f"{model} has {' or '.join(map(str, sorted(own)))}; pass the right --clip_model, or delete the "
                "file and start again to compute it"
            )


def _rows_of_items(path: Path, raw_ids: list[str], ids: list, used: list[torch.Tensor]) -> np.ndarray:
    """Where the items lie in a file with the rows `ids`, [num_items]; refuses missing or repeated ones, and states not finite."""
    place = {raw_id: row for row, raw_id in enumerate(ids)}
    problems, rows = Problems(), np.empty(0, np.int64)
    problems.add("items without states", [raw_id for raw_id in raw_ids if raw_id not in place])
    repeated = {raw_id for row, raw_id in enumerate(ids) if place[raw_id] != row}
    problems.add("ids that stand twice", sorted(map(str, repeated - {0, "0"})))  # the padding item's, in published files
    if not problems:
        rows = np.array([place[raw_id] for raw_id in raw_ids], dtype=np.int64)
        wrong: set[int] = set()
        for states, portion in itertools.product(used, torch.from_numpy(rows).split(4096)):
            finite = torch.isfinite(states[portion]).flatten(1).all(1)
            wrong.update(portion[~finite].tolist())
        problems.add("items whose states hold NaN or infinity", [ids[row] for row in sorted(wrong)])
    problems.raise_any(f"{path} cannot be used; {AGAIN}:")
    return rows


class HiddenStateStore(FeatureStore):
    """Cached states of all items for IISAN, `tensors`: of images [rows, S, image width], of titles [rows, S, text width]."""

    @classmethod
    def open(cls, dataset: Dataset, model: FoundationName | None = None, modality: str = "both") -> "HiddenStateStore":
        """Read `{name}_preX.pt`; ids may stand in any order, with or without one for the padding item.

        Args:
            model: that the states must come from, as on the command line.
            modality: "both", "image" or "text"; the states of the other are left out.
        Raises:
            PerPEFTError: unreadable, of another CLIP, items missing, or states that are not finite, with their ids.
        """
        path = states_path(dataset.folder, dataset.name)
        states, ids = _read(path)
        used = {part: states[part] for part in MODALITIES[modality]}
        _check_model(path, used, model)
        rows = _rows_of_items(path, dataset.raw_ids, ids, list(used.values()))
        return cls(*(found if part in used else found[:, :, :0] for part, found in states.items()), rows=rows)
