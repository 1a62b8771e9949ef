"""One training run: the paper's three stages, called one after another by the training scripts."""
import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from sklearn.metrics import adjusted_rand_score

from models import PerPEFT
from models.towers import count_parameters
from utils.common.devices import seed_everything
from utils.common.errors import PerPEFTError
from utils.common.files import write_json
from utils.data.dataset import Dataset, read_true_groups
from utils.data.histories import leave_last_out
from utils.items.source import ItemSource
from utils.run import plots, reports
from utils.run.build import has_groups, trainable_counts
from utils.run.distributed import stop_signals
from utils.run.folder import FINGERPRINTS, RunFolder, read_summary
from utils.run.tracking import EpochLog
from utils.training import checkpoints
from utils.training.evaluation import Evaluator, Ranks, last_states
from utils.training.grouping import kmeans_groups, random_groups
from utils.training.progress import Progress
from utils.training.sampling import Sampler, group_items
from utils.training.trainer import Trainer


@dataclass(frozen=True)
class Stage:
    """One training stage: its epochs, and the items that its negatives come from."""

    name: str  # "global" or "personalized"
    number: int  # 1 or 3, as in the paper; the stage's random draws are a function of it
    epochs: int
    candidates: list[np.ndarray]  # for each group the items that negatives are drawn from


class Run:
    """One training run: its data, its model, its folder, and the three stages as methods, to be called in order.

    Args:
        model: with one group, freshly initialised.
        source: item inputs for the model's encoder.
        settings: all that determines the run's metrics, options and fingerprints, as they were when it was opened.
        accelerator: the ranks that train together; all call every method, and rank 0 writes.
    """

    def __init__(
        self, options: argparse.Namespace, dataset: Dataset, model: PerPEFT, source: ItemSource, folder: Path,
        settings: dict[str, Any], accelerator: Accelerator,
    ):  # fmt: skip
        self.options, self.dataset, self.model, self.source = options, dataset, model, source
        self.folder, self.settings, self.accelerator = folder, settings, accelerator
        self.device = torch.device(options.device)
        self.split = leave_last_out(dataset.histories)
        self.evaluator = Evaluator(self.split, source, self.device, accelerator)
        self.groups = np.zeros(dataset.num_users, dtype=np.int64)  # before stage 2, everyone is in group 0
        self.checkpoint: checkpoints.Checkpoint | None = None  # of the stage that is trained
        self.epoch_log: EpochLog | None = None  # of rank 0, with --log_with
        self._all_items = np.arange(1, dataset.num_items + 1)
        self._rows: dict[str, list[dict[str, Any]]] = {"global": [], "personalized": []}
        self._grouping_seconds = 0.0

    def train_global(self) -> None:
        """Stage 1: one adapter and one projector for all users, negatives from all items.

        Methods that end here train for as many epochs as PerPEFT does in all its stages.
        """
        options = self.options
        if not options.init_from:
            epochs = options.global_epochs + (0 if has_groups(options) else options.num_epochs)
            self._train(Stage("global", 1, epochs, [self._all_items]))
            return
        started = time.monotonic()
        if (self.folder / "global").is_dir():  # else the model is the one to start from, read when the run was opened
            self.load_global()
        ranks = self.evaluate()  # by all processes together, so the main one writes the folder after all have looked for it
        row = {"stage": "global", "epoch": 0, "train_loss": math.nan, "seconds": time.monotonic() - started, "skipped_steps": 0}
        self._rows["global"] = [row | ranks.metrics()]
        self._save_best("global", ranks)
        self._report_epoch("global", 0)

    def group_users(self) -> None:
        """Stage 2: users into C groups by the global model's last state over their train and valid interactions."""
        started, path = time.monotonic(), self.folder / "groups.csv"
        exists = path.is_file()
        self.accelerator.wait_for_everyone()  # all ranks check before rank 0 writes
        if not exists:
            by_interest = self.options.grouping == "kmeans"
            vectors = self.user_vectors(self.item_table(0)) if by_interest else None  # all ranks encode together
            if self.accelerator.is_main_process:
                C, seed = self.options.C, self.options.trial
                groups = kmeans_groups(vectors, C, seed) if by_interest else random_groups(self.dataset.num_users, C, seed)
                reports.write_groups(path, self.dataset.user_ids, groups)
            self.accelerator.wait_for_everyone()
        self.groups = self._read_groups()
        self._grouping_seconds = time.monotonic() - started
        sizes, agreement = self.group_sizes(), self.agreement()
        if self.accelerator.is_main_process:
            plots.draw_groups(self.folder / "groups.png", sizes)
        shown = "" if agreement is None else f"; adjusted Rand index to the true groups {agreement:.2f} (chance 0)"
        print(f"groups of {', '.join(map(str, sizes))} users{shown}", flush=True)

    def train_personalized(self) -> None:
        """Stage 3: an adapter and a projector a group, warm-started from stage 1, negatives from the group's own items."""
        num_groups, from_all = self.options.C, self.options.negatives == "all"
        self.model.clone_groups(num_groups)
        candidates = [self._all_items] * num_groups if from_all else group_items(self.split.train, self.groups, num_groups)
        self._train(Stage("personalized", 3, self.options.num_epochs, candidates))

    def report(self) -> None:
        """Write summary.json, print the results table, and remove what only a continuation needs."""
        if self.accelerator.is_main_process:
            self._write_metrics()  # a run that was killed between its last state and its last report continues here
            summary = self._summary()
            write_json(self.folder / "summary.json", summary)
            RunFolder(self.folder).remove_state()
            reports.print_results(summary, self.folder)
        self.accelerator.wait_for_everyone()

    def _train(self, stage: Stage) -> None:
        """Train a stage, or what is left of it, and load its best weights."""
        options = self.options
        seed_everything(options.trial * 10 + stage.number, self.accelerator.process_index)
        sampler = Sampler(
            self.split.train, self.dataset.num_items, self.groups, stage.candidates, options.batch_size, options.maxlen,
            seed=(options.trial, stage.number), mixed=options.negatives == "mixed" and stage.name == "personalized",
        )  # fmt: skip
        trainer = Trainer(self.model, self.source, self.accelerator, lr=options.lr, wdecay=options.wdecay, l2_emb=options.l2_emb)
        progress = Progress(stage.name, stage.epochs, sampler.num_batches, self.device, self.accelerator)
        self.checkpoint = checkpoint = checkpoints.Checkpoint(self.folder / "resume" / f"{stage.name}.pt", self.accelerator)
        checkpoint.restore(trainer, progress)
        self._rows[stage.name] = progress.rows
        with stop_signals(self.accelerator, progress.interval) as stop_requested:
            for epoch in progress.remaining():
                self.model.train()
                for step, batch, loss in trainer.steps(sampler, epoch, progress.step):
                    progress.add(step, batch, loss)
                    signal_number = stop_requested(step % sampler.num_batches)  # 0, so always, after an epoch's last step
                    if signal_number or step % options.save_every == 0 or step == sampler.num_batches:
                        checkpoint.save(trainer, progress)
                    if signal_number:
                        raise KeyboardInterrupt(signal_number)
                ranks = self.evaluate()
                if progress.end_epoch(ranks.metrics(), trainer.skipped_steps):
                    self._save_best(stage.name, ranks)
                # The best weights are on disk before the state that says so: a kill between the two repeats the same epoch.
                checkpoint.save(trainer, progress)
                self._report_epoch(stage.name, stage.epochs)
                if signal_number := stop_requested(0):  # one that came during the evaluation
                    raise KeyboardInterrupt(signal_number)
        checkpoints.load_weights(self.model, self.folder / stage.name, stage.name)

    def _save_best(self, stage: str, ranks: Ranks) -> None:
        """Save the weights, and the ranks that they reach."""
        if self.accelerator.is_main_process:
            checkpoints.save_weights(self.model, self.folder / stage, stage)
            reports.write_ranks(self.folder / f"{stage}_ranks.csv", self.dataset.user_ids, ranks)

    def evaluate(self) -> Ranks:
        """Ranks of all evaluated users' valid and test items, each user in their own group."""
        return self.evaluator.ranks(self.model, self.groups)

    def item_table(self, group: int) -> torch.Tensor:
        """The e_i of all items as one group sees them, [num_items + 1, hidden]; row 0 is the padding item's."""
        return self.evaluator.item_table(self.model, group)

    def user_vectors(self, item_table: torch.Tensor) -> np.ndarray:
        """What users are grouped by: the global model's last state over their train and valid interactions, [users, hidden]."""
        everyone = np.arange(self.dataset.num_users)
        return last_states(self.model.sasrec, item_table, self.split.train_and_valid, everyone).cpu().numpy()

    def load_global(self) -> None:
        """Load the saved best weights of stage 1; the model has one group."""
        checkpoints.load_weights(self.model, self.folder / "global", "global")

    def load_personalized(self) -> None:
        """Load the saved groups and best weights of stage 3."""
        self.groups = self._read_groups()
        self.model.clone_groups(self.options.C)
        checkpoints.load_weights(self.model, self.folder / "personalized", "personalized")

    def evaluate_saved(self) -> dict[str, Any]:
        """Rank with the saved best weights of both stages and print the table; nothing is trained or written."""
        saved, summary = read_summary(self.folder / "summary.json"), {}
        for stage, load in {"global": self.load_global, "personalized": self.load_personalized}.items():
            if stage in saved:
                load()
                row = {"epoch": saved[stage]["best_epoch"], **self.evaluate().metrics()}
                summary[stage] = reports.stage_summary([row])
        reports.print_results(summary, self.folder)
        return summary

    def group_sizes(self) -> list[int]:
        """Users in each group."""
        return np.bincount(self.groups, minlength=self.options.C).tolist()

    def agreement(self) -> float | None:
        """Adjusted Rand index of the groups to the data set's true groups, where it has some."""
        true_groups = read_true_groups(self.dataset)
        return None if true_groups is None else adjusted_rand_score(true_groups, self.groups)

    def _read_groups(self) -> np.ndarray:
        path = self.folder / "groups.csv"
        groups = reports.read_groups(path)
        if groups.shape != (self.dataset.num_users,) or groups.min() < 0 or groups.max() >= self.options.C:
            raise PerPEFTError(f"{path} does not fit {self.dataset.num_users} users in {self.options.C} groups; use --restart")
        return groups

    def _write_metrics(self) -> None:
        rows = self._rows["global"] + self._rows["personalized"]
        reports.write_metrics(self.folder / "metrics.csv", rows)
        plots.draw_curves(self.folder / "curves.png", rows)
        if self.epoch_log is not None:
            self.epoch_log.log(rows)

    def _report_epoch(self, stage: str, epochs: int) -> None:
        if self.accelerator.is_main_process:
            self._write_metrics()
            print(reports.format_epoch(self._rows[stage], epochs), flush=True)

    def _summary(self) -> dict[str, Any]:
        rows, processes = self._rows, self.accelerator.num_processes
        sizes = {name: count_parameters(getattr(self.model, name)) for name in ("sasrec", "projectors")}
        taken = {stage: sum(row["seconds"] for row in own) for stage, own in rows.items()}
        return {
            "config": {name: value for name, value in self.settings.items() if name not in FINGERPRINTS},
            "versions": reports.versions(),
            **{name: self.settings[name] for name in FINGERPRINTS},
            "trainable_parameters": {**sizes, **trainable_counts(self.model.encoder)},
            "seconds": {"global": taken["global"], "grouping": self._grouping_seconds, "personalized": taken["personalized"]},
            "skipped_steps": {stage: sum(row["skipped_steps"] for row in own) for stage, own in rows.items()},
            **{stage: reports.stage_summary(own) for stage, own in rows.items() if own},
            "device": str(self.device),
            **({"processes": processes} if processes > 1 else {}),
            "dataset": {**self.dataset.counts(), "evaluated_users": len(self.split.evaluated_users)},
            **({"group_sizes": self.group_sizes()} if rows["personalized"] else {}),
        }
