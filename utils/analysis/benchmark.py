"""What the parts of a training step, the ranking and the store cost, each beside the plain way of doing the same."""
import copy
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
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

CPU = torch.device("cpu")
MILLISECONDS = 1e3
SECONDS = 8  # after which a comparison ends, if it has 2 rounds
ENCODING_SECONDS = 1.0  # of encoding as many items as a measurement takes
FEWEST_ITEMS = 8
HIDDEN_UNITS, MAXLEN = 32, 10  # the defaults of training


# ---------------------------------------------------------------- measuring


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of one call, a GPU's work included."""
    synchronize = partial(torch.cuda.synchronize, device) if device.type == "cuda" else (lambda: None)
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return MILLISECONDS * (time.perf_counter() - start)


def compare(device: torch.device, repeats: int, **ways: Callable[[], Any]) -> tuple[dict[str, float], float]:
    """Time several ways of doing the same in turn, so that all meet the same noise of the machine.

    One round warms up; then come `repeats` rounds, or fewer where they take longer than SECONDS, but at least two.

    Returns:
        median milliseconds by name, and the median ratio of the first to the last in a round, which holds when the machine's
        speed drifts
    """
    rounds = []
    start = time.perf_counter()
    for done in range(-1, repeats):
        if done >= 2 and time.perf_counter() - start > SECONDS:
            break
        rounds.append([timed(work, device) for work in ways.values()])
    times = np.array(rounds[1:])  # [rounds, ways]
    return dict(zip(ways, np.median(times, axis=0).tolist())), float(np.median(times[:, 0] / times[:, -1]))


def peak_memory_mib() -> float:
    """The most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


# ---------------------------------------------------------------- one adapter: steps and encoding


@torch.no_grad()
def worth_measuring(foundation: Foundation, dataset: Dataset, device: torch.device, folder: Path) -> Dataset:
    """A data set, or as many of its items as a CLIP encodes in ENCODING_SECONDS, at least FEWEST_ITEMS.

    The histories of the smaller one are drawn, 6 items a user, and its store goes into `folder`.
    """
    images = torch.rand(FEWEST_ITEMS, 3, *output_size(foundation.image_processor), device=device)
    encode = partial(part_features, foundation.clip.to(device), "image", pixel_values=images)
    seconds = min(timed(encode, device) for _ in range(2)) / MILLISECONDS
    number = max(FEWEST_ITEMS, int(FEWEST_ITEMS * ENCODING_SECONDS / seconds))
    if number >= dataset.num_items:
        return dataset
    random = np.random.default_rng(0)
    histories = Histories.of_lists([random.permutation(number)[:6] + 1 for _ in range(200)])
    lists = {name: getattr(dataset, name)[:number] for name in ("raw_ids", "titles", "image_paths")}
    return replace(dataset, folder=folder, histories=histories, user_ids=np.arange(1, 201), **lists)


def _adamw_step(parameters: list[nn.Parameter], loss: Callable[[], torch.Tensor], device: torch.device) -> Callable[[], None]:
    """Forward, backward and fused AdamW of a loss: the least that a training step must cost."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=has_fused_adamw(device.type))

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _sampler(train: Histories, num_items: int, num_groups: int, batch_size: int, *seed: int) -> tuple[Sampler, float]:
    """A sampler as in stage 1 with one group, as in stage 3 with more, which are drawn; and the seconds that its set-up took."""
    groups = np.random.default_rng(0).integers(num_groups, size=train.num_users)
    candidates = [np.arange(1, num_items + 1)] if num_groups == 1 else group_items(train, groups, num_groups)
    start = time.perf_counter()
    sampler = Sampler(train, num_items, groups, candidates, batch_size, MAXLEN, seed)
    sampler.plan(1)
    return sampler, time.perf_counter() - start


def adapter_costs(
    encoder: ItemEncoder, source: ItemSource, dataset: Dataset, device: torch.device, batch_size: int, repeats: int
) -> dict[str, float]:
    """Encoding, and steps of stages 1 and 3, with one kind of adapter; `encoder` has one, which is trained on."""
    model = PerPEFT(encoder, MMProjector(encoder.feature_dim), SASRec(dataset.num_items)).to(device)
    found = _encoding_costs(model, source, device, repeats)
    found |= _step_costs(model, source, dataset, device, 1, batch_size, repeats)
    personalized = _step_costs(model, source, dataset, device, PAPER_GROUPS, batch_size, repeats)
    return found | {f"personalized_{name}": value for name, value in personalized.items()}


def _step_costs(
    model: PerPEFT, source: ItemSource, dataset: Dataset, device: torch.device, num_groups: int, batch_size: int, repeats: int
) -> dict[str, float]:
    """Milliseconds of a training step, of sampling and fetching, and the ratio to the bare encoder's step on the same items."""
    model.clone_groups(num_groups)
    model.train()
    trainer = Trainer(model, source, Accelerator(cpu=device.type == "cpu"), lr=1e-4, wdecay=1e-4, l2_emb=1e-6)
    sampler, _ = _sampler(leave_last_out(dataset.histories).train, dataset.num_items, num_groups, batch_size, 0, num_groups)
    sample = partial(sampler.batch, 1, 0)  # the same batch each time, sampled again
    batch = sample()
    fetch = partial(source.fetch, batch.items[1:], device)
    inputs = fetch()
    bare: nn.Module = copy.deepcopy(model.encoder)
    bare.use_group(batch.group)
    parameters = list(bare.group_parameters(batch.group).values())
    if isinstance(bare, IISANEncoder):
        _, num_states, image_dim = inputs[0].shape
        bare = PlainIISAN(image_dim, inputs[1].shape[2], num_states).to(device)
        parameters = list(bare.parameters())
    bare_step = _adamw_step(parameters, lambda: bare(*inputs).square().sum(), device)
    times, over_bare = compare(device, repeats, step=lambda: trainer.update(trainer.loss(sample())), bare_encoder=bare_step)
    times |= compare(device, repeats, sampling=sample, fetch=fetch)[0]
    milliseconds = {f"{name}_ms": value for name, value in times.items()}
    return {"distinct_items": len(batch.items) - 1, **milliseconds, "step_over_bare_encoder": over_bare}


@torch.no_grad()
def _encoding_costs(model: PerPEFT, source: ItemSource, device: torch.device, repeats: int) -> dict[str, float]:
    """Encoding all items for evaluation, beside the bare forward pass on inputs that were fetched before."""
    model.eval()
    nobody = leave_last_out(Histories.of_lists([]))
    evaluator = Evaluator(nobody, source, device, Accelerator(cpu=device.type == "cpu"))
    order = source.reading_order()
    fetched = [source.fetch(order[start : start + ITEMS_AT_ONCE], device) for start in range(0, len(order), ITEMS_AT_ONCE)]

    def bare() -> None:
        for inputs in fetched:
            model.encoder(*inputs)

    times, over_bare = compare(device, repeats, table=partial(evaluator.item_table, model, 0), bare=bare)
    items_per_second = source.num_items / times["table"] * MILLISECONDS
    return {"encode_items_per_second": items_per_second, "encode_over_bare_encoder": over_bare}


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

    def ms_per_user(rank: Callable[..., Any], number: int) -> float:
        return timed(lambda: rank(states[:number], inputs, targets[:number], histories, users[:number]), device) / number

    memory = peak_memory_mib()
    ms_per_user(rank_targets, 256)  # warms up
    ours = ms_per_user(rank_targets, num_users)
    found = {"users_per_second": MILLISECONDS / ours, "ms_per_user": ours, "memory_growth_mib": peak_memory_mib() - memory}
    if plain_users:
        plain = ms_per_user(plain_ranking_loop, plain_users)
        found |= {"plain_ms_per_user": plain, "over_plain_loop": plain / ours}
    return found


def sampling_costs(size: int) -> dict[str, float]:
    """Milliseconds of sampling one batch of so many users and items, in stages 1 and 3, and seconds to set the sampler up."""
    histories = _random_histories(size, size)
    found = {}
    for name, num_groups in (("global", 1), ("personalized", PAPER_GROUPS)):
        sampler, found[f"{name}_setup_s"] = _sampler(histories, size, num_groups, 16, 0)
        times = [timed(partial(sampler.batch, 1, step % sampler.num_batches), CPU) for step in range(50)]
        found[f"{name}_ms"] = float(np.median(times))
    return found


def grouping_costs(num_users: int) -> dict[str, float]:
    """Seconds of k-means over random user vectors."""
    vectors = np.random.default_rng(0).normal(size=(num_users, HIDDEN_UNITS))
    return {"seconds": timed(lambda: kmeans_groups(vectors, PAPER_GROUPS, seed=0), CPU) / MILLISECONDS}


def item_table_costs(num_items: int, device: torch.device, repeats: int) -> dict[str, float]:
    """What a step pays for the whole item table, which the loss's L2 norm and AdamW read and write."""
    rows = torch.randperm(num_items)[:200].to(device) + 1
    table = nn.Embedding(num_items + 1, HIDDEN_UNITS, device=device)

    def loss() -> torch.Tensor:
        return table(rows).sum() + 1e-6 * torch.linalg.vector_norm(table.weight)

    times, _ = compare(device, repeats, step=_adamw_step([table.weight], loss, device))
    return {"item_table_ms": times["step"]}


def store_costs(foundation: Foundation, dataset: Dataset, batch_size: int) -> dict[str, float]:
    """The image store beside the plain way, which opens every image of a batch by CLIP's processor in every step.

    Returns:
        seconds an epoch of both ways, their ratio without and with the store's building, and images built a second
    """
    sampler, _ = _sampler(leave_last_out(dataset.histories).train, dataset.num_items, 1, batch_size, 0, 1)
    items = sampler.batch(1, 0).items[1:]
    paths = [dataset.image_paths[item - 1] for item in items]

    def decode() -> None:
        foundation.image_processor([Image.open(path) for path in paths], return_tensors="pt")

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        store = foundation.store(replace(dataset, folder=Path(folder)))
        building = time.perf_counter() - start
        times, _ = compare(CPU, repeats=5, decode=decode, store=lambda: store.fetch(items, CPU))
    decoding, reading = (sampler.num_batches * times[name] / MILLISECONDS for name in ("decode", "store"))
    return {
        "images_per_second": dataset.num_items / building,
        "decoding_s_per_epoch": decoding,
        "store_s_per_epoch": reading,
        "store_over_decoding_every_step": decoding / reading,
        "first_epoch_with_building": decoding / (reading + building),
    }
