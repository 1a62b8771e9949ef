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
from PIL import Image
from torch import nn

from models import IISANEncoder, ItemEncoder, MMProjector, PerPEFT, SASRec
from utils.common.devices import autocast_for, has_fused_adamw
from utils.data.dataset import Dataset
from utils.data.histories import Histories, leave_last_out
from utils.items.foundation import Foundation
from utils.items.store import ImageTitleStore
from utils.training.evaluation import ItemSource, encode_all_items, rank_targets
from utils.training.grouping import kmeans_groups
from utils.training.sampling import Batch, Sampler, group_items
from utils.training.trainer import ItemTableGradient, Trainer

MILLISECONDS = 1e3


def wait_for(device: torch.device) -> None:
    """Let a GPU finish what it was given, so that the clock reads true."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of one call."""
    wait_for(device)
    begun = time.perf_counter()
    work()
    wait_for(device)
    return MILLISECONDS * (time.perf_counter() - begun)


def compare(
    ways: dict[str, Callable[[], Any]], device: torch.device, repeats: int, warm_up: int = 2
) -> dict[str, list[float]]:
    """Milliseconds of several ways of working, taken in turn so that all meet the same noise of the machine."""
    for _ in range(warm_up):
        for work in ways.values():
            work()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, work in ways.items():
            times[name].append(timed(work, device))
    return times


def ratio(above: list[float], below: list[float]) -> float:
    """Median of the pairwise ratios, which holds when the machine's speed drifts."""
    return statistics.median(a / b for a, b in zip(above, below))


class PlainIISAN(nn.Module):
    """IISAN written out layer by layer, without batching: the baseline that the project's own is held against."""

    def __init__(self, image_dim: int, text_dim: int, num_states: int, bottleneck: int = 32):
        super().__init__()

        def block(width: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(width, bottleneck), nn.GELU(), nn.Linear(bottleneck, width))

        self.gates = nn.Parameter(torch.zeros(3, num_states))
        self.image, self.text, self.inter = (
            nn.ModuleList(block(width) for _ in range(num_states)) for width in (image_dim, text_dim, text_dim)
        )
        self.combine = nn.ModuleList(nn.Linear(image_dim, text_dim) for _ in range(num_states))

    def forward(self, image_states: torch.Tensor, text_states: torch.Tensor) -> torch.Tensor:
        """Shapes as in `IISAN.forward`."""
        w = torch.sigmoid(self.gates)
        for i in range(len(self.image)):
            t, v = text_states[:, i], image_states[:, i]  # [items, width]
            both = w[2, i] * t + (1 - w[2, i]) * self.combine[i](v)
            if i == 0:
                text, image, joint = t, v, both
            else:
                text, image, joint = w[0, i] * text + (1 - w[0, i]) * t, w[1, i] * image + (1 - w[1, i]) * v, joint + both
            text, image, joint = self.text[i](text) + text, self.image[i](image) + image, self.inter[i](joint) + joint
        return torch.cat([text, image, joint], dim=-1)


def bare_step(encoder: nn.Module, parameters: list[nn.Parameter], inputs: tuple, device: torch.device) -> Callable[[], None]:
    """Forward, backward and fused AdamW of an encoder alone: the least that a training step must cost."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=has_fused_adamw(device))
    scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")
    weights = None

    def step() -> None:
        nonlocal weights
        with autocast_for(device)():
            features = encoder(*inputs)
        if weights is None:
            weights = torch.randn_like(features) / features.numel()
        scaler.scale((features * weights).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step


def stage_sampler(dataset: Dataset, num_groups: int, batch_size: int, maxlen: int) -> Sampler:
    """As in stage 1 with one group, as in stage 3 with more, of users put into groups at random."""
    train = leave_last_out(dataset.histories).train
    if num_groups == 1:
        groups, candidates = np.zeros(train.num_users, dtype=np.int64), [np.arange(1, dataset.num_items + 1)]
    else:
        groups = np.random.default_rng(0).integers(num_groups, size=train.num_users)
        candidates = group_items(train, groups, num_groups)
    return Sampler(train, dataset.num_items, groups, candidates, batch_size, maxlen, seed=(0, num_groups))


def step_costs(
    encoder: ItemEncoder,
    source: ItemSource,
    dataset: Dataset,
    device: torch.device,
    num_groups: int,
    batch_size: int,
    repeats: int,
) -> dict[str, float]:
    """Milliseconds of a training step, of its parts, and the ratio to the bare encoder's step on the same items.

    Args:
        encoder: an item encoder with one adapter; it is trained on.
        source: item inputs.
        dataset: whose histories are sampled.
        device: where to work.
        num_groups: 1 for stage 1, more for stage 3.
        batch_size: users a batch.
        repeats: how many steps the medians are of.
    """
    model = PerPEFT(encoder, MMProjector(encoder.feature_dim), SASRec(dataset.num_items)).to(device)
    model.clone_groups(num_groups)
    model.train()
    trainer = Trainer(model, 1e-4, 1e-4, 1e-6, device)
    sampler = stage_sampler(dataset, num_groups, batch_size, model.sasrec.maxlen)
    batch = sampler.batch(1, 0)
    inputs = source.fetch(batch.items[1:], device)

    def fetch(batch: Batch) -> tuple[torch.Tensor, ...]:
        return source.fetch(batch.items[1:], device)

    def step() -> None:
        same = sampler.batch(1, 0)  # the same batch each time, drawn anew
        trainer.update(trainer.loss(same, fetch(same)))

    bare_encoder: nn.Module = copy.deepcopy(encoder)
    bare_encoder.use_group(batch.group)
    if isinstance(encoder, IISANEncoder):
        _, num_states, image_dim = inputs[0].shape
        bare_encoder = PlainIISAN(image_dim, inputs[1].shape[2], num_states).to(device)
        bare_parameters = list(bare_encoder.parameters())
    else:
        bare_parameters = list(bare_encoder.group_parameters(batch.group).values())
    ways = {"step": step, "bare encoder": bare_step(bare_encoder, bare_parameters, inputs, device)}
    times = compare(ways, device, repeats)

    latest: dict[str, torch.Tensor] = {}
    parts = {  # in the order of a step, each going on from the one before
        "sampling": lambda: sampler.batch(1, 0),
        "fetch": lambda: fetch(batch),
        "forward": lambda: latest.update(loss=trainer.loss(batch, inputs)),
        "backward": lambda: trainer.scaler.scale(latest["loss"]).backward(),
        "optimizer": trainer.apply_gradients,
    }
    part_times = compare(parts, device, repeats)
    return {
        "distinct_items": len(batch.items) - 1,
        **{f"{name}_ms": statistics.median(values) for name, values in part_times.items()},
        "step_ms": statistics.median(times["step"]),
        "bare_encoder_ms": statistics.median(times["bare encoder"]),
        "step_over_bare_encoder": ratio(times["step"], times["bare encoder"]),
    }


@torch.no_grad()
def encoding_costs(
    encoder: ItemEncoder, source: ItemSource, dataset: Dataset, device: torch.device, repeats: int, items_at_once: int = 256
) -> dict[str, float]:
    """Encoding all items for evaluation, beside the bare forward pass on inputs that were fetched before."""
    model = PerPEFT(encoder, MMProjector(encoder.feature_dim), SASRec(dataset.num_items)).to(device).eval()
    order = source.reading_order()
    starts = range(0, len(order), items_at_once)
    fetched = [source.fetch(order[start : start + items_at_once], device) for start in starts]

    def bare() -> None:
        with autocast_for(device)():
            for inputs in fetched:
                encoder(*inputs)

    def ours() -> None:
        encode_all_items(model, 0, source, device, items_at_once, autocast=autocast_for(device))

    times = compare({"ours": ours, "bare": bare}, device, repeats, warm_up=1)
    return {
        "encode_items_per_second": dataset.num_items / statistics.median(times["ours"]) * MILLISECONDS,
        "encode_over_bare_encoder": ratio(times["ours"], times["bare"]),
    }


def plain_ranking_loop(
    states: torch.Tensor, inputs: torch.Tensor, targets: np.ndarray, excluded: Histories, users: np.ndarray
) -> np.ndarray:
    """The plain way of ranking, kept as the baseline: a user at a time, candidates listed, scored and sorted."""
    num_items = inputs.shape[0] - 1
    ranks = []
    for place, user in enumerate(users):
        bought = set(excluded[user].tolist())
        candidates = [int(targets[place])]
        candidates += [item for item in range(1, num_items + 1) if item not in bought and item != targets[place]]
        scores = inputs[torch.tensor(candidates)] @ states[place]  # [candidates]
        ranks.append(int((scores[1:] >= scores[0]).sum()))
    return np.array(ranks)


def _random_histories(num_users: int, num_items: int, seed: int = 0) -> Histories:
    """Histories of 5 to 11 purchases, for sizes that no data set at hand has."""
    random = np.random.default_rng(seed)
    lengths = random.integers(5, 12, size=num_users)
    return Histories(random.integers(1, num_items + 1, size=lengths.sum()), np.concatenate([[0], np.cumsum(lengths)]))


@torch.no_grad()
def ranking_costs(
    num_users: int, num_items: int, device: torch.device, plain_users: int = 0, hidden_units: int = 32
) -> dict[str, float]:
    """Full ranking of random vectors: users a second, and the ratio to the plain loop, which ranks `plain_users` of them."""
    histories = _random_histories(num_users, num_items)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(num_users, hidden_units, generator=generator).to(device)
    inputs = torch.randn(num_items + 1, hidden_units, generator=generator).to(device)
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


def sampling_costs(num_users: int, num_items: int, repeats: int, num_groups: int = 8) -> dict[str, float]:
    """Milliseconds of sampling one batch at some size, in stage 1 and in stage 3, and seconds to set the sampler up."""
    histories = _random_histories(num_users, num_items)
    groups = np.random.default_rng(0).integers(num_groups, size=num_users)
    found = {}
    for name, group_of, candidates in (
        ("global", np.zeros(num_users, dtype=np.int64), [np.arange(1, num_items + 1)]),
        ("personalized", groups, group_items(histories, groups, num_groups)),
    ):
        begun = time.perf_counter()
        sampler = Sampler(histories, num_items, group_of, candidates, 16, 10, seed=(0,))
        sampler.plan(1)
        found[f"{name}_setup_s"] = time.perf_counter() - begun
        drawing = [functools.partial(sampler.batch, 1, step % sampler.num_batches) for step in range(repeats)]
        times = [timed(draw, torch.device("cpu")) for draw in drawing]
        found[f"{name}_ms"] = statistics.median(times)
    return found


def grouping_costs(num_users: int, num_groups: int = 8, hidden_units: int = 32) -> dict[str, float]:
    """Seconds of k-means over random user vectors."""
    vectors = np.random.default_rng(0).normal(size=(num_users, hidden_units))
    begun = time.perf_counter()
    kmeans_groups(vectors, num_groups, seed=0)
    return {"seconds": time.perf_counter() - begun}


def catalogue_costs(num_items: int, device: torch.device, repeats: int, hidden_units: int = 32) -> dict[str, float]:
    """What a step pays for the whole item table, which the loss's L2 norm and AdamW make dense, beside autograd's own way."""
    rows = torch.randperm(num_items)[:200].to(device) + 1

    def parts(sparse: bool) -> tuple[nn.Embedding, torch.optim.Optimizer, ItemTableGradient | None]:
        table = nn.Embedding(num_items + 1, hidden_units, device=device)
        optimizer = torch.optim.AdamW(table.parameters(), lr=1e-4, weight_decay=1e-4, fused=has_fused_adamw(device))
        return table, optimizer, ItemTableGradient(table, 1e-6) if sparse else None

    def step(table: nn.Embedding, optimizer: torch.optim.Optimizer, gradient: ItemTableGradient | None) -> None:
        penalty = gradient.penalty() if gradient else 1e-6 * torch.linalg.vector_norm(table.weight)
        (table(rows).sum() + penalty).backward()
        if gradient:
            gradient.complete()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    ours, autograd = parts(sparse=True), parts(sparse=False)
    times = compare({"ours": lambda: step(*ours), "autograd": lambda: step(*autograd)}, device, repeats)
    return {
        "item_table_ms": statistics.median(times["ours"]),
        "autograd_ms": statistics.median(times["autograd"]),
        "over_autograd": ratio(times["ours"], times["autograd"]),
    }


def store_costs(
    foundation: Foundation, dataset: Dataset, store: ImageTitleStore, batch: Batch, num_batches: int
) -> dict[str, float]:
    """The store beside the plain way, which opens every image of a batch by CLIP's processor in every step.

    Args:
        foundation: whose processors.
        dataset: whose images.
        store: already built.
        batch: a typical one.
        num_batches: of an epoch.
    Returns:
        seconds an epoch of both ways, their ratio without and with the store's building, and its images a second.
    """
    cpu = torch.device("cpu")
    paths = [dataset.image_paths[item - 1] for item in batch.items[1:]]

    def decode() -> None:
        images = [Image.open(path) for path in paths]
        foundation.image_processor(images, return_tensors="pt")

    times = compare({"decode": decode, "store": lambda: store.fetch(batch.items[1:], cpu)}, cpu, repeats=5, warm_up=1)
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        foundation.store(replace(dataset, folder=Path(folder)))
        building = time.perf_counter() - begun
    decoding, reading = (num_batches * statistics.median(times[name]) / MILLISECONDS for name in ("decode", "store"))
    return {
        "images_per_second": dataset.num_items / building,
        "decoding_s_per_epoch": decoding,
        "store_s_per_epoch": reading,
        "store_over_decoding_every_step": decoding / reading,
        "first_epoch_with_building": decoding / (reading + building),
    }


def peak_memory_mib() -> float:
    """The most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
