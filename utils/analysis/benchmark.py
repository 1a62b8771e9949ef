"""What the parts of a training step, the ranking and the store cost, each beside the plain way of doing the same."""
import copy
import functools
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from models import IISANEncoder, ItemEncoder, MMProjector, PerPEFT, SASRec
from models.towers import part_features
from utils.analysis.baselines import PlainIISAN, plain_ranking_loop
from utils.common.versions import has_fused_adamw
from utils.data.dataset import PAPER_GROUPS, Dataset
from utils.data.histories import Histories, leave_last_out
from utils.items.foundation import Foundation
from utils.items.preprocessing import output_size
from utils.items.source import ItemSource
from utils.training.evaluation import ITEMS_AT_ONCE, Evaluator, rank_targets
from utils.training.grouping import kmeans_groups
from utils.training.sampling import Sampler, group_items
from utils.training.trainer import Trainer

MILLISECONDS = 1e3
SECONDS = 8  # after which a comparison ends, if it has 2 rounds
ENCODING_SECONDS = 1.0  # of encoding as many items as a measurement takes
FEWEST_ITEMS = 8
HIDDEN_UNITS = 32  # the default of training


# ---------------------------------------------------------------- measuring


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of one call, a GPU's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return MILLISECONDS * (time.perf_counter() - start)


def compare(ways: dict[str, Callable[[], Any]], device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of several ways of doing the same, taken in turn so that all meet the same noise of the machine.

    One round warms up; then come `repeats` rounds, or fewer where they take longer than SECONDS, but at least two.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    start = time.perf_counter()
    for done in range(-1, repeats):
        if done >= 2 and time.perf_counter() - start > SECONDS:
            break
        for name, work in ways.items():
            times[name].append(timed(work, device))
    return {name: values[1:] for name, values in times.items()}


def ratio(above: list[float], below: list[float]) -> float:
    """Median of the pairwise ratios, which holds when the machine's speed drifts."""
    return statistics.median(a / b for a, b in zip(above, below))


def peak_memory_mib() -> float:
    """The most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# ---------------------------------------------------------------- one adapter: steps and encoding


def first_items(dataset: Dataset, number: int, folder: Path) -> Dataset:
    """A data set of the first `number` items alone, whose store goes into `folder`; every user has 6 of them, drawn."""
    random = np.random.default_rng(0)
    histories = Histories.of_lists([random.permutation(number)[:6] + 1 for _ in range(200)])
    lists = {name: getattr(dataset, name)[:number] for name in ("raw_ids", "titles", "image_paths")}
    return replace(dataset, folder=folder, histories=histories, user_ids=np.arange(1, 201), **lists)


@torch.no_grad()
def items_worth_measuring(foundation: Foundation, dataset: Dataset, device: torch.device) -> int:
    """How many items a CLIP encodes in ENCODING_SECONDS, at least FEWEST_ITEMS and at most all."""
    images = torch.rand(FEWEST_ITEMS, 3, *output_size(foundation.image_processor), device=device)
    clip = foundation.clip.to(device)
    seconds = min(timed(lambda: part_features(clip, "image", pixel_values=images), device) for _ in range(2)) / MILLISECONDS
    return min(dataset.num_items, max(FEWEST_ITEMS, int(FEWEST_ITEMS * ENCODING_SECONDS / seconds)))


def bare_step(encoder: nn.Module, parameters: list[nn.Parameter], inputs: tuple, device: torch.device) -> Callable[[], None]:
    """Forward, backward and fused AdamW of an encoder alone: the least that a training step must cost."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=has_fused_adamw(device.type))

    def step() -> None:
        encoder(*inputs).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def stage_sampler(dataset: Dataset, num_groups: int, batch_size: int, maxlen: int) -> Sampler:
    """As in stage 1 with one group, as in stage 3 with more, of users put into groups at random."""
    train = leave_last_out(dataset.histories).train
    groups = np.random.default_rng(0).integers(num_groups, size=train.num_users)
    everything = [np.arange(1, dataset.num_items + 1)]
    candidates = everything if num_groups == 1 else group_items(train, groups, num_groups)
    return Sampler(train, dataset.num_items, groups, candidates, batch_size, maxlen, seed=(0, num_groups))


def _model(encoder: ItemEncoder, num_items: int, device: torch.device) -> PerPEFT:
    return PerPEFT(encoder, MMProjector(encoder.feature_dim), SASRec(num_items)).to(device)


def step_costs(
    encoder: ItemEncoder,
    source: ItemSource,
    dataset: Dataset,
    device: torch.device,
    num_groups: int,
    batch_size: int,
    repeats: int,
) -> dict[str, float]:
    """Milliseconds of a training step, of sampling and fetching, and the ratio to the bare encoder's step on the same items.

    Args:
        encoder: an item encoder with one adapter; it is trained on.
        source: item inputs.
        dataset: whose histories are sampled.
        device: where to work.
        num_groups: 1 for stage 1, more for stage 3.
        batch_size: users a batch.
        repeats: as in `compare`.
    """
    model = _model(encoder, dataset.num_items, device)
    model.clone_groups(num_groups)
    model.train()
    accelerator = Accelerator(cpu=device.type == "cpu")
    trainer = Trainer(model, source, accelerator, lr=1e-4, wdecay=1e-4, l2_emb=1e-6)
    sampler = stage_sampler(dataset, num_groups, batch_size, model.sasrec.maxlen)
    batch = sampler.batch(1, 0)
    inputs = source.fetch(batch.items[1:], device)

    def step() -> None:
        trainer.update(trainer.loss(sampler.batch(1, 0)))  # the same batch each time, sampled again

    bare: nn.Module = copy.deepcopy(encoder)
    bare.use_group(batch.group)
    parameters = list(bare.group_parameters(batch.group).values())
    if isinstance(encoder, IISANEncoder):
        _, num_states, image_dim = inputs[0].shape
        bare = PlainIISAN(image_dim, inputs[1].shape[2], num_states).to(device)
        parameters = list(bare.parameters())
    times = compare({"step": step, "bare_encoder": bare_step(bare, parameters, inputs, device)}, device, repeats)
    parts = {"sampling": lambda: sampler.batch(1, 0), "fetch": lambda: source.fetch(batch.items[1:], device)}
    times |= compare(parts, device, repeats)
    medians = {f"{name}_ms": statistics.median(values) for name, values in times.items()}
    return {
        "distinct_items": len(batch.items) - 1, **medians, "step_over_bare_encoder": ratio(times["step"], times["bare_encoder"])
    }  # fmt: skip


@torch.no_grad()
def encoding_costs(encoder: ItemEncoder, source: ItemSource, device: torch.device, repeats: int) -> dict[str, float]:
    """Encoding all items for evaluation, beside the bare forward pass on inputs that were fetched before."""
    model = _model(encoder, source.num_items, device).eval()
    nobody = leave_last_out(Histories.of_lists([]))
    evaluator = Evaluator(nobody, source, device, Accelerator(cpu=device.type == "cpu"))
    order = source.reading_order()
    fetched = [source.fetch(order[start : start + ITEMS_AT_ONCE], device) for start in range(0, len(order), ITEMS_AT_ONCE)]

    def bare() -> None:
        for inputs in fetched:
            encoder(*inputs)

    def table() -> None:
        evaluator.item_table(model, 0)

    times = compare({"table": table, "bare": bare}, device, repeats)
    return {
        "encode_items_per_second": source.num_items / statistics.median(times["table"]) * MILLISECONDS,
        "encode_over_bare_encoder": ratio(times["table"], times["bare"]),
    }


# ---------------------------------------------------------------- large data, without an encoder


def _random_histories(num_users: int, num_items: int) -> Histories:
    """Random histories of 5 to 11 interactions, for sizes beyond any data set at hand."""
    random = np.random.default_rng(0)
    lengths = random.integers(5, 12, size=num_users)
    return Histories(random.integers(1, num_items + 1, size=lengths.sum()), np.concatenate([[0], np.cumsum(lengths)]))


@torch.no_grad()
def ranking_costs(num_users: int, num_items: int, device: torch.device, plain_users: int = 0) -> dict[str, float]:
    """Full ranking of random vectors: users a second, and the ratio to the plain loop, which ranks `plain_users` of them."""
    histories = _random_histories(num_users, num_items)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(num_users, HIDDEN_UNITS, generator=generator).to(device)
    inputs = torch.randn(num_items + 1, HIDDEN_UNITS, generator=generator).to(device)
    targets = np.random.default_rng(1).integers(1, num_items + 1, size=num_users)
    users = np.arange(num_users)
    memory = peak_memory_mib()
    rank_targets(states[:256], inputs, targets[:256], histories, users[:256])
    ours = timed(lambda: rank_targets(states, inputs, targets, histories, users), device) / num_users
    found = {"users_per_second": MILLISECONDS / ours, "ms_per_user": ours, "memory_growth_mib": peak_memory_mib() - memory}
    if plain_users:
        few = slice(0, plain_users)
        plain = timed(lambda: plain_ranking_loop(states[few], inputs, targets[few], histories, users[few]), device) / plain_users
        found |= {"plain_ms_per_user": plain, "over_plain_loop": plain / ours}
    return found


def sampling_costs(num_users: int, num_items: int, repeats: int) -> dict[str, float]:
    """Milliseconds of sampling one batch at some size, in stage 1 and in stage 3, and seconds to set the sampler up."""
    histories = _random_histories(num_users, num_items)
    groups = np.random.default_rng(0).integers(PAPER_GROUPS, size=num_users)
    found = {}
    for name, group_of, candidates in (
        ("global", np.zeros(num_users, dtype=np.int64), [np.arange(1, num_items + 1)]),
        ("personalized", groups, group_items(histories, groups, PAPER_GROUPS)),
    ):
        start = time.perf_counter()
        sampler = Sampler(histories, num_items, group_of, candidates, 16, 10, seed=(0,))
        sampler.plan(1)
        found[f"{name}_setup_s"] = time.perf_counter() - start
        drawing = [functools.partial(sampler.batch, 1, step % sampler.num_batches) for step in range(repeats)]
        times = [timed(draw, torch.device("cpu")) for draw in drawing]
        found[f"{name}_ms"] = statistics.median(times)
    return found


def grouping_costs(num_users: int) -> dict[str, float]:
    """Seconds of k-means over random user vectors."""
    vectors = np.random.default_rng(0).normal(size=(num_users, HIDDEN_UNITS))
    return {"seconds": timed(lambda: kmeans_groups(vectors, PAPER_GROUPS, seed=0), torch.device("cpu")) / MILLISECONDS}


def item_table_costs(num_items: int, device: torch.device, repeats: int) -> dict[str, float]:
    """What a step pays for the whole item table, which the loss's L2 norm and AdamW read and write."""
    rows = torch.randperm(num_items)[:200].to(device) + 1
    table = nn.Embedding(num_items + 1, HIDDEN_UNITS, device=device)
    optimizer = torch.optim.AdamW(table.parameters(), lr=1e-4, weight_decay=1e-4, fused=has_fused_adamw(device.type))

    def step() -> None:
        (table(rows).sum() + 1e-6 * torch.linalg.vector_norm(table.weight)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return {"item_table_ms": statistics.median(compare({"step": step}, device, repeats)["step"])}


def store_costs(foundation: Foundation, dataset: Dataset, batch_size: int) -> dict[str, float]:
    """The image store beside the plain way, which opens every image of a batch by CLIP's processor in every step.

    Returns:
        seconds an epoch of both ways, their ratio without and with the store's building, and images built a second
    """
    cpu = torch.device("cpu")
    sampler = stage_sampler(dataset, 1, batch_size, 10)
    items = sampler.batch(1, 0).items[1:]
    paths = [dataset.image_paths[item - 1] for item in items]

    def decode() -> None:
        foundation.image_processor([Image.open(path) for path in paths], return_tensors="pt")

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        store = foundation.store(replace(dataset, folder=Path(folder)))
        building = time.perf_counter() - start
        times = compare({"decode": decode, "store": lambda: store.fetch(items, cpu)}, cpu, repeats=5)
    decoding, reading = (sampler.num_batches * statistics.median(times[name]) / MILLISECONDS for name in ("decode", "store"))
    return {
        "images_per_second": dataset.num_items / building,
        "decoding_s_per_epoch": decoding,
        "store_s_per_epoch": reading,
        "store_over_decoding_every_step": decoding / reading,
        "first_epoch_with_building": decoding / (reading + building),
    }
