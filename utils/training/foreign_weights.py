"""A global model to start from that another run, or the authors' code, has saved."""
import glob
import tempfile
from pathlib import Path

from models import IISANEncoder, PerPEFT
from utils.common.errors import PerPEFTError
from utils.training.checkpoints import load_weights


def load_foreign_global(model: PerPEFT, where: Path, run_folder: Path, peft_type: str, dataset: str) -> None:
    """Read the global model of another run, or one that the authors' code has saved, into a model with one group.

    It lies in `where`: a run folder, its `global/`, the authors' `pretrained_models/`, or one of the files in it that are called
    `sasrec_{peft}_{dataset}_{epoch}_{lr}_{wdecay}.pth`, beside which `projector_...pth` and `clip_encoder_.../` (LoRA, IA3) or
    `encoder_...pth` (IISAN) of the same ending lie. Raises a PerPEFTError if nothing or several are there, weights of
    a model of another shape or of a run that has not ended, or the weights of `run_folder` itself, which starts from them.
    """
    if run_folder.resolve() in (where.resolve(), *where.resolve().parents):
        raise PerPEFTError(f"--init_from {where} is this run's own folder; choose another --output_dir")
    source = where.parent if where.name == "global" else where
    if (source / "resume").is_dir():
        raise PerPEFTError(f"--init_from {where} is a run that has not ended; finish it first, with its own command")
    own = [folder for folder in (where / "global", where) if (folder / "sasrec.pth").is_file()]
    if own:
        load_weights(model, own[0], "global")
        return
    prefix = f"sasrec_{peft_type}_{dataset}_"
    found = [where] if where.is_file() else sorted(where.glob(f"{glob.escape(prefix)}*.pth"))
    if len(found) != 1:
        reason = f"neither a run folder with global/sasrec.pth nor a folder with {prefix}...pth is there"
        if found:
            reason = f"there are several, choose one of them: {', '.join(path.name for path in found[:5])}"
        raise PerPEFTError(f"--init_from {where}: {reason}")
    folder, ending = found[0].parent, found[0].stem.removeprefix("sasrec_")
    parts = {
        found[0].name: "sasrec.pth",
        f"projector_{ending}.pth": "projector.pth",
        f"clip_encoder_{ending}": "adapter",
        f"encoder_{ending}.pth": IISANEncoder.state_file,
    }
    with tempfile.TemporaryDirectory() as temporary:  # the same files under this project's names
        for theirs, ours in parts.items():
            if (folder / theirs).exists():
                (Path(temporary) / ours).symlink_to((folder / theirs).resolve())
        try:
            load_weights(model, Path(temporary), "global")
        except PerPEFTError as error:
            raise PerPEFTError(f"--init_from {found[0]}: {str(error).replace(temporary, str(folder))}") from error
