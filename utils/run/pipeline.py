"""The paper's three stages over one run folder; the training scripts call them one after another."""
import argparse
import contextlib
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from sklearn.metrics import adjusted_rand_score

from models import ItemEncoder, MMProjector, NoProjector, PerPEFT, SASRec
from utils.common.devices import autocast_for, seed_everything
from utils.common.errors import PerPEFTError
from utils.common.files import remove_leftovers
from utils.data.dataset import Dataset, read_dataset, read_true_groups, require_dataset
from utils.data.histories import leave_last_out
from utils.items.foundation import EncoderKind, build_encoder, contents_fingerprint, needs_contents, trainable_counts
from utils.prepare.demo import make_demo
from utils.run import reports as reporting
from utils.run.trackers import NoTracker, open_tracker, require_tracker
from utils.training.checkpoints import (
    ResumeState,
    load_foreign_global,
    load_global,
    load_personalized,
    save_global,
    save_personalized,
)
from utils.training.evaluation import ItemSource, encode_all_items, last_states, metrics_of, rank_all_users
from utils.training.grouping import kmeans_groups, random_groups
from utils.training.parallel import ParallelTrainer
from utils.training.processes import Processes, joined_processes
from utils.training.sampling import Sampler, group_items
from utils.training.trainer import Trainer, best_row, train_stage

# Options that may differ between the start of a run and its continuation: they change no figure.
FREE_OPTIONS = {
    "device", "train_dir", "output_dir", "restart", "inference_only", "save_every", "gradient_checkpointing", "debug",
    "log_with",
}  # fmt: skip
# What is kept beside the options to know the data again, and what a difference means.
FINGERPRINTS = {
    "dataset_fingerprint": " (the data set's purchases or raw ids have changed)",
    "contents_fingerprint": " (the data set's titles or images, or the files of the CLIP, have changed)",
}
RUN_FILES = (
    "resume", "global", "personalized", "global_ranks.csv", "personalized_ranks.csv", "groups.csv", "metrics.csv", "curves.png",
    "groups.png", "report.html", "figures", "tensorboard", "wandb",
)  # fmt: skip  # and summary.json


def run_name(options: argparse.Namespace) -> str:
    """The run folder's name: data set, adapter, what differs from PerPEFT if anything, learning rate, weight decay, seed."""
    parts = [options.dataset, options.peft_type]
    if options.method in ("global", "large_global"):  # frozen and none stand in the adapter's place
        parts.append(options.method)
    if options.modality != "both":
        parts.append(options.modality)
    if options.negatives != "group":
        parts.append(f"negatives_{options.negatives}")
    if options.grouping != "kmeans":
        parts.append(f"grouping_{options.grouping}")
    return "_".join([*parts, f"lr{options.lr:g}", f"wd{options.wdecay:g}", f"seed{options.trial}"])


def has_groups(options: argparse.Namespace) -> bool:
    """Whether a run has groups: the methods that PerPEFT is compared with have none."""
    return options.method == "perpeft"


def least_users(options: argparse.Namespace) -> int:
    """How many users a run's data set must have."""
    return options.C if has_groups(options) else 1


def dataset_fingerprint(dataset: Dataset) -> str:
    """A hash of histories and raw ids: a run continues only on the data that it began with."""
    digest = hashlib.sha256()
    for array in (dataset.user_ids, dataset.histories.items, dataset.histories.offsets):
        digest.update(np.ascontiguousarray(array, dtype=np.int64).tobytes())
    digest.update("\0".join(dataset.raw_ids).encode())
    return digest.hexdigest()[:16]


def fingerprints(options: argparse.Namespace, dataset: Dataset) -> dict[str, str | None]:
    """What a run's data is known again by."""
    return {
        "dataset_fingerprint": dataset_fingerprint(dataset),
        "contents_fingerprint": contents_fingerprint(options.peft_type, dataset, options.clip_model),
    }


class Run:
    """One training run: its data, its model, its folder, and the three stages as methods, to be called in order.

    Args:
        options: as parsed by `utils.run.options`.
        dataset: what is recommended to whom.
        model: with one group, freshly initialised.
        source: item inputs for the model's encoder.
        folder: the run folder.
        settings: all that the run's figures follow from, options and fingerprints, as they were when it was opened.
        processes: those that train together. Every one calls every method; what is in `processes.first` the first one does.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        dataset: Dataset,
        model: PerPEFT,
        source: ItemSource,
        folder: Path,
        settings: dict[str, Any],
        processes: Processes,
    ):
        self.settings = settings
        self.processes = processes
        self.options = options
        self.dataset = dataset
        self.model = model
        self.source = source
        self.folder = folder
        self.split = leave_last_out(dataset.histories)
        self.device = torch.device(options.device)
        self.groups = np.zeros(dataset.num_users, dtype=np.int64)  # before stage 2, everyone is in group 0
        self._rows: dict[str, list[dict[str, Any]]] = {"global": [], "personalized": []}
        self._seconds: dict[str, float] = {}
        self._states: list[ResumeState] = []
        self._tracker = NoTracker()
        self._ranks: dict[str, np.ndarray] = {}  # of the last evaluation

    def open_tracker(self) -> None:
        """Begin or go on to log epochs where `--log_with` says."""
        self._tracker = open_tracker(self.options.log_with, self.folder, self.settings)

    def close_tracker(self) -> None:
        """Nothing is logged any more."""
        self._tracker.finish()

    def saved(self) -> str | None:
        """How far what is on disk has come, in words; None where nothing is there to continue from."""
        states = [state.saved for state in self._states if state.saved]
        return f"{self.folder} is saved up to {states[-1]}" if states else None

    def train_global(self) -> None:
        """Stage 1: one adapter and one projector for all users, negatives from all items.

        Methods that end here train for as many epochs as PerPEFT does in all its stages.
        """
        options = self.options
        if options.init_from:
            self._take_over_global()
            return
        epochs = options.global_epochs + (0 if has_groups(options) else options.num_epochs)
        self._train("global", epochs, [self._all_items()], save_global)
        load_global(self.model, self.folder / "global")

    def read_source(self) -> None:
        """Load the global model that `--init_from` names; called before anything in the run folder is touched.

        Raises:
            PerPEFTError: it is not there, does not fit, or is this very run's.
        """
        source = Path(self.options.init_from)
        if self.folder.resolve() in (source.resolve(), *source.resolve().parents):
            raise PerPEFTError(f"--init_from {source} is this run's own folder; give another --output_dir")
        load_foreign_global(self.model, source, self.options.peft_type, self.options.dataset)

    def _take_over_global(self) -> None:
        begun = time.monotonic()
        if self.processes.first((self.folder / "global").is_dir):  # taken over before this run was broken off
            load_global(self.model, self.folder / "global")
        metrics = self.evaluate()
        row = {"stage": "global", "epoch": 0, "train_loss": math.nan, "seconds": time.monotonic() - begun, "skipped_steps": 0}
        self._rows["global"] = [row | metrics]
        self._keep_best("global", save_global)
        self.processes.first(lambda: self._report_epoch("global", 0))

    def _all_items(self) -> np.ndarray:
        return np.arange(1, self.dataset.num_items + 1)

    def group_users(self) -> None:
        """Stage 2: users into C groups by the global model's last state over their train and valid purchases."""
        begun = time.monotonic()
        path = self.folder / "groups.csv"
        if not self.processes.first(path.is_file):
            vectors = None if self.options.grouping == "random" else self.user_vectors(self.item_inputs(0))
            self.processes.first(lambda: self._write_groups(path, vectors))
        self.groups = self._read_groups()
        self._seconds["grouping"] = time.monotonic() - begun
        self.processes.first(lambda: reporting.draw_groups(self.folder / "groups.png", self.group_sizes()))
        print(f"groups of {', '.join(map(str, self.group_sizes()))} users{self._agreement_told()}", flush=True)

    def _write_groups(self, path: Path, vectors: np.ndarray | None) -> None:
        if vectors is None:
            groups = random_groups(self.dataset.num_users, self.options.C, self.options.trial)
        else:
            groups = kmeans_groups(vectors, self.options.C, self.options.trial)
        reporting.write_groups(path, self.dataset.user_ids, groups)

    def item_inputs(self, group: int) -> torch.Tensor:
        """The e_i of all items as one group of the present model sees them, [num_items + 1, hidden]; row 0 is the padding's."""
        self.model.eval()
        return self.model.sasrec.item_inputs(self.encode(group)).detach()

    def user_vectors(self, inputs: torch.Tensor) -> np.ndarray:
        """What users are grouped by: the global model's last state over their train and valid purchases, [users, hidden].

        Args:
            inputs: the global model's `item_inputs`.
        """
        everyone = np.arange(self.dataset.num_users)
        return last_states(self.model.sasrec, inputs, self.split.train_and_valid, everyone).cpu().numpy()

    def train_personalized(self) -> None:
        """Stage 3: an adapter and a projector a group, warm-started from stage 1, negatives from the group's own items."""
        num_groups = self.options.C
        self.model.clone_groups(num_groups)
        if self.options.negatives == "all":
            candidates = [self._all_items()] * num_groups
        else:
            candidates = group_items(self.split.train, self.groups, num_groups)
        self._train("personalized", self.options.num_epochs, candidates, save_personalized)
        load_personalized(self.model, self.folder / "personalized")

    def report(self) -> dict[str, Any]:
        """Write summary.json, print the closing table, and clear away what only a continuation needs."""
        return self.processes.first(self._report)

    def _report(self) -> dict[str, Any]:
        self._write_metrics()  # a run that was killed after its last state, before its last report, comes here at once
        self._tracker.log(self._rows["global"] + self._rows["personalized"])
        summary = self._summary()
        reporting.write_json(self.folder / "summary.json", summary)
        shutil.rmtree(self.folder / "resume", ignore_errors=True)
        print_results(summary, self.folder)
        return summary

    def group_sizes(self) -> list[int]:
        """Users in each group."""
        return np.bincount(self.groups, minlength=self.options.C).tolist()

    def _agreement_told(self) -> str:
        true_groups = read_true_groups(self.dataset)
        if true_groups is None:
            return ""
        return f"; adjusted Rand index to the true groups {adjusted_rand_score(true_groups, self.groups):.2f} (chance 0)"

    def _read_groups(self) -> np.ndarray:
        path = self.folder / "groups.csv"
        groups = reporting.read_groups(path)
        if groups.shape != (self.dataset.num_users,) or groups.min() < 0 or groups.max() >= self.options.C:
            raise PerPEFTError(f"{path} does not fit {self.dataset.num_users} users in {self.options.C} groups; use --restart")
        return groups

    def encode(self, group: int) -> torch.Tensor:
        """All items' projected vectors as one group sees them, [num_items + 1, hidden]; the model is in eval mode."""
        autocast = autocast_for(self.device)
        return encode_all_items(self.model, group, self.source, self.device, autocast=autocast, processes=self.processes)

    def evaluate(self) -> dict[str, float]:
        """Valid and test metrics of the present model, over all evaluated users, each in their own group."""
        self.model.eval()
        self._ranks = rank_all_users(self.model, self.split, self.groups, self.encode, self.processes)
        return {
            f"{split}_{name}": value for split in ("valid", "test") for name, value in metrics_of(self._ranks[split]).items()
        }

    def _keep_best(self, stage: str, save_weights: Callable[[PerPEFT, Path], None]) -> None:
        """Keep the weights, and the ranks of the last evaluation, which were theirs."""

        def keep() -> None:
            save_weights(self.model, self.folder / stage)
            reporting.write_ranks(self.folder / f"{stage}_ranks.csv", self.dataset.user_ids, self._ranks)

        self.processes.first(keep)

    def _train(
        self, stage: str, epochs: int, candidates: list[np.ndarray], save_weights: Callable[[PerPEFT, Path], None]
    ) -> None:
        options = self.options
        number = 1 if stage == "global" else 3
        seed_everything(options.trial * 10 + number, self.processes.rank)  # the weights are there, and alike in all processes
        sampler = Sampler(
            self.split.train,
            self.dataset.num_items,
            self.groups,
            candidates,
            options.batch_size,
            options.maxlen,
            seed=(options.trial, number),
        )

        state = ResumeState(self.folder / "resume" / f"{stage}.pt")
        self._states.append(state)

        def report(rows: list[dict[str, Any]]) -> None:
            self._rows[stage] = rows
            self.processes.first(lambda: self._report_epoch(stage, epochs))

        self._rows[stage] = train_stage(
            stage,
            self._trainer(),
            sampler,
            self.source,
            epochs,
            self.evaluate,
            lambda: self._keep_best(stage, save_weights),
            report,
            state,
            options.save_every,
            self.processes,
        )

    def _trainer(self) -> Trainer:
        options = self.options
        arguments = (self.model, options.lr, options.wdecay, options.l2_emb, self.device)
        return Trainer(*arguments) if self.processes.size == 1 else ParallelTrainer(*arguments, self.processes)

    def _write_metrics(self) -> None:
        rows = self._rows["global"] + self._rows["personalized"]
        reporting.write_metrics(self.folder / "metrics.csv", rows)
        reporting.draw_curves(self.folder / "curves.png", rows)

    def _report_epoch(self, stage: str, epochs: int) -> None:
        self._write_metrics()
        self._tracker.log(self._rows["global"] + self._rows["personalized"])
        row = self._rows[stage][-1]
        mark = " (best so far)" if best_row(self._rows[stage]) is row else ""
        skipped = f", {row['skipped_steps']} steps skipped for fp16 overflow" if row["skipped_steps"] else ""
        print(
            f"{stage} epoch {row['epoch']}/{epochs}: loss {row['train_loss']:.4f}, "
            f"valid HR@20 {100 * row['valid_HR@20']:.2f} NDCG@20 {100 * row['valid_NDCG@20']:.2f}{mark}, {row['seconds']:.1f} s"
            f"{skipped}",
            flush=True,
        )

    def _summary(self) -> dict[str, Any]:
        sasrec = sum(parameter.numel() for parameter in self.model.sasrec.parameters())
        projectors = sum(parameter.numel() for parameter in self.model.projectors.parameters())
        return {
            "config": {name: value for name, value in self.settings.items() if name not in FINGERPRINTS},
            "versions": reporting.versions(),
            "device": str(self.device),
            **({"processes": self.processes.size} if self.processes.size > 1 else {}),
            "dataset": {**self.dataset.counts(), "evaluated_users": len(self.split.evaluated_users)},
            **{name: self.settings[name] for name in FINGERPRINTS},
            **({"group_sizes": self.group_sizes()} if self._rows["personalized"] else {}),
            "trainable_parameters": {"sasrec": sasrec, "projectors": projectors, **trainable_counts(self.model.encoder)},
            "seconds": {
                "global": sum(row["seconds"] for row in self._rows["global"]),
                "grouping": self._seconds.get("grouping", 0.0),
                "personalized": sum(row["seconds"] for row in self._rows["personalized"]),
            },
            "skipped_steps": {stage: sum(row["skipped_steps"] for row in rows) for stage, rows in self._rows.items()},
            **{stage: reporting.stage_summary(rows) for stage, rows in self._rows.items() if rows},
        }

    def load_global(self) -> None:
        """Take the saved best weights of stage 1; the model has one group."""
        load_global(self.model, self.folder / "global")

    def load_personalized(self) -> None:
        """Take the saved groups and best weights of stage 3."""
        self.groups = self._read_groups()
        self.model.clone_groups(self.options.C)
        load_personalized(self.model, self.folder / "personalized")

    def evaluate_saved(self) -> dict[str, Any]:
        """Rank with the saved best weights of both stages and print the table; nothing is trained or written."""
        self.load_global()
        results = {"global": self.evaluate()}
        if has_groups(self.options):
            self.load_personalized()
            results["personalized"] = self.evaluate()
        saved = reporting.read_metrics(self.folder / "metrics.csv")
        best = {stage: best_row([row for row in saved if row["stage"] == stage])["epoch"] for stage in results}
        summary = {stage: reporting.stage_summary([{"epoch": best[stage], **metrics}]) for stage, metrics in results.items()}
        print_results(summary, self.folder)
        return summary


def print_results(summary: dict[str, Any], folder: Path) -> None:
    """Print the closing table and where everything lies."""
    print(f"\n{reporting.results_table(summary)}\n(percent) {folder}", flush=True)


def fixed_options(options: argparse.Namespace) -> dict[str, Any]:
    """The options that a run's figures follow from."""
    return {name: value for name, value in sorted(vars(options).items()) if name not in FREE_OPTIONS}


def _refuse_other_settings(found: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    differing = [name for name in sorted(found.keys() | wanted.keys()) if found.get(name) != wanted.get(name)]
    if differing:
        differences = "; ".join(
            f"{name} was {found.get(name)}, is now {wanted.get(name)}{FINGERPRINTS.get(name, '')}" for name in differing
        )
        raise PerPEFTError(
            f"{folder} holds a run with other settings: {differences}. Use the same settings to continue it, --restart to "
            "throw it away, or another --output_dir or --trial beside it."
        )


def read_settings(path: Path, nested: bool) -> dict[str, Any]:
    """The options and fingerprints of a run from its resume/config.json, or from its summary.json, where they are `nested`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {**content["config"], **{name: content[name] for name in FINGERPRINTS}} if nested else dict(content)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise PerPEFTError(f"{path} is damaged ({reason}); start over with --restart, or give another --output_dir") from error


def _clear(folder: Path) -> None:
    """Remove what a run leaves, and nothing else that may lie there.

    What makes the folder count as holding a run goes first: after a kill on the way there is nothing to continue, and the next
    start clears the rest.
    """
    remove_leftovers(folder)
    config, summary = folder / "resume" / "config.json", folder / "summary.json"
    for path in (config, summary, *(folder / name for name in RUN_FILES)):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _made_and_locked(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PerPEFTError(f"the run folder {folder} cannot be made ({error}); choose another --output_dir") from error
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)  # held by the operating system: a process that dies lets go of it
    except Timeout:
        raise PerPEFTError(f"another process is training in {folder}; wait for it, or give another --output_dir") from None
    try:
        yield
    finally:
        lock.release()


def _is_finished(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether a folder holds this run finished; False too where it holds it begun, or nothing to go on with.

    Raises:
        PerPEFTError: it holds another run.
    """
    config, summary = folder / "resume" / "config.json", folder / "summary.json"
    if summary.is_file():
        _refuse_other_settings(read_settings(summary, nested=True), settings, folder)
    elif _has_state(folder):
        _refuse_other_settings(read_settings(config, nested=False), settings, folder)
    return summary.is_file()


def _tell_finished(folder: Path) -> None:
    shutil.rmtree(folder / "resume", ignore_errors=True)  # left by a run that was killed right after its summary
    print(f"{folder} is finished; --restart trains it anew")
    print_results(json.loads((folder / "summary.json").read_text(encoding="utf-8")), folder)


def _has_state(folder: Path) -> bool:
    resume = folder / "resume"
    return (resume / "config.json").is_file() and any(resume.glob("*.pt"))


def _begin_or_continue(folder: Path, settings: dict[str, Any], restart: bool) -> None:
    remove_leftovers(folder)
    if _has_state(folder) and not restart:
        print(f"continuing {folder}", flush=True)
        return
    _clear(folder)  # without a saved state there is nothing to lose, and what a half-cleared run left must not be taken up
    (folder / "resume").mkdir()
    reporting.write_json(folder / "resume" / "config.json", settings)


@contextlib.contextmanager
def open_run(options: argparse.Namespace) -> Iterator[Run | None]:
    """Join the other processes if there are any, read the data, build the model, and open or create the run folder, which is
    locked meanwhile.

    Args:
        options: as parsed by `utils.run.options`.
    Yields:
        The run; None when the folder holds this run already finished (its table is printed again).
    Raises:
        PerPEFTError: bad data, missing weights, a folder of other settings or one that another process trains in.
    """
    require_tracker(options.log_with)
    if options.dataset != "demo":
        require_dataset(options.train_dir, options.dataset)
    with joined_processes(options.device) as processes, _opened_run(options, processes) as run:
        yield run


@contextlib.contextmanager
def _opened_run(options: argparse.Namespace, processes: Processes) -> Iterator[Run | None]:
    options.device = str(processes.device)
    if options.dataset == "demo":
        make_demo(options.train_dir)
    contents = needs_contents(options.peft_type, options.train_dir, options.dataset)
    dataset = read_dataset(options.train_dir, options.dataset, contents, options.missing_images, least_users(options))
    folder = Path(options.output_dir) / run_name(options)
    # By way of JSON, as it will be compared with what lies in a file.
    settings = json.loads(json.dumps({**fixed_options(options), **fingerprints(options, dataset)}))
    with contextlib.ExitStack() as stack:
        if not options.inference_only:  # which writes nothing
            processes.first(lambda: stack.enter_context(_made_and_locked(folder)))
        restart = options.restart and not options.inference_only
        finished = processes.first(lambda: not restart and _is_finished(folder, settings))
        if options.inference_only and not finished:
            raise PerPEFTError(f"{folder} holds no finished run; train it first by the same command without --inference_only")
        if finished and not options.inference_only:
            processes.first(lambda: _tell_finished(folder))
            yield None
            return
        run = Run(options, dataset, *build_model(options, dataset), folder, settings, processes)
        if options.init_from and not options.inference_only and processes.first(lambda: restart or not _has_state(folder)):
            run.read_source()
        processes.wait()
        if not options.inference_only:  # only now, when all is there that training takes, may a restart throw anything away
            processes.first(lambda: _begin_or_continue(folder, settings, restart))
            processes.first(run.open_tracker)
        try:
            yield run
        except BaseException as error:
            error.saved = run.saved()  # for the last words of `utils.run.options.run_main`
            raise
        finally:
            run.close_tracker()


def build_model(options: argparse.Namespace, dataset: Dataset) -> tuple[PerPEFT, ItemSource]:
    """The model with one group, on its device, and the source of its item inputs."""
    device = torch.device(options.device)
    seed_everything(options.trial)
    kind = EncoderKind(options.peft_type, options.rank, options.modality, options.gradient_checkpointing)
    encoder, source = build_encoder(kind, dataset, options.clip_model, device, options.missing_images)
    projector = (MMProjector if encoder.feature_dim else NoProjector)(encoder.feature_dim, options.hidden_units)
    sasrec = SASRec(
        dataset.num_items,
        options.hidden_units,
        options.maxlen,
        options.num_blocks,
        options.num_heads,
        options.dropout_rate,
        options.weight_scalar,
    )
    model = PerPEFT(encoder, projector, sasrec).to(device)
    source.place_on(device)
    print(
        f"{options.dataset}: {dataset.num_users} users, {dataset.num_items} items, {len(dataset.histories.items)} purchases; "
        f"{_adapter_told(options.peft_type, encoder)}; on {device}",
        flush=True,
    )
    return model, source


def _adapter_told(peft_type: str, encoder: ItemEncoder) -> str:
    counts = trainable_counts(encoder)
    if not counts["adapter_of_one_group"]:
        return {"frozen": "CLIP frozen, no adapter", "none": "item embeddings only"}[peft_type]
    share = counts["adapter_share_of_foundation_model"]
    share_told = "" if share is None else f", {100 * share:.2f}% of the foundation model"
    return f"{peft_type} adapter of {counts['adapter_of_one_group']:,} parameters a group{share_told}"
