"""Measure what a training step, evaluation, the store and large catalogues cost, each beside the plain way."""
import argparse
import os
import platform
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from models.peft_configs import PAPER_RANK
from utils.analysis import benchmark
from utils.analysis.tables import markdown_table
from utils.common.console import number, run_main, script_parser
from utils.common.devices import choose_device
from utils.common.files import write_json
from utils.data.dataset import Dataset, read_dataset
from utils.items.foundation import Foundation, load_foundation
from utils.items.hidden_states import HiddenStateStore
from utils.items.trial import find_traits
from utils.prepare.demo import make_demo
from utils.prepare.small_tokenizer import train_tokenizer
from utils.run.build import iisan_encoder, peft_encoder, resolve_foundation

RANDOM_CLIP = "random-vit-b32"
SIZES = (62_500, 250_000, 1_000_000)  # users or items: 1x, 4x, 16x
MOST_USERS_TO_GROUP = 250_000  # k-means takes a minute beyond
CATALOGUE_ITEMS = 15_701  # the size at which ranking is compared with the plain loop


def measure(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """All figures, by the names of the JSON file."""
    if options.dataset == "demo":
        make_demo(options.train_dir)
    dataset = read_dataset(options.train_dir, options.dataset)
    clip_model = options.clip_model or ("demo" if options.dataset == "demo" else RANDOM_CLIP)
    machine = {"machine": platform.machine(), "cpus": os.cpu_count(), "threads": torch.get_num_threads(), "device": str(device)}
    figures: dict[str, Any] = {"date": date.today().isoformat(), **machine, "dataset": options.dataset, "clip": clip_model}

    def foundation() -> Foundation:
        torch.manual_seed(0)
        if clip_model == RANDOM_CLIP:
            return random_foundation(dataset)
        return load_foundation(resolve_foundation(clip_model, dataset))

    for peft_type in tqdm(options.peft, "adapters", unit="adapter", disable=None):
        figures[peft_type] = measure_adapter(peft_type, foundation(), dataset, device, options.batch_size, options.repeats)
    if not options.steps_only:
        store = benchmark.store_costs(foundation(), dataset, options.batch_size)
        figures |= {"store": store, "store_over_decoding_every_step": store["store_over_decoding_every_step"]}
        figures |= measure_scale(device, options.repeats)
    figures["peak_memory_mib"] = benchmark.peak_memory_mib()
    return figures


def random_foundation(dataset: Dataset) -> Foundation:
    """CLIP ViT-B/32 with random weights, and a tokenizer trained on the data set's titles."""
    tokenizer = train_tokenizer(dataset.titles, max_tokens=77)
    config = CLIPConfig()
    config.text_config.eos_token_id = tokenizer.eos_token_id
    parts = CLIPModel(config).eval(), CLIPImageProcessor(), tokenizer
    return Foundation(*parts, find_traits(*parts))


def measure_adapter(
    peft_type: str, foundation: Foundation, dataset: Dataset, device: torch.device, batch_size: int, repeats: int
) -> dict[str, float]:
    """Encoding, and steps of stages 1 and 3, with one kind of adapter on as many items as this CLIP encodes in short time."""
    with tempfile.TemporaryDirectory() as folder:
        dataset = benchmark.worth_measuring(foundation, dataset, device, Path(folder))
        source = foundation.store(dataset)
        if peft_type == "iisan":
            source = HiddenStateStore(*foundation.hidden_states(source, device))
            encoder = iisan_encoder(source, None)
        else:
            kind = argparse.Namespace(peft_type=peft_type, rank=PAPER_RANK, peft_config=None, modality="both")
            encoder = peft_encoder(kind, foundation)
        return {"items": dataset.num_items, **benchmark.adapter_costs(encoder, source, dataset, device, batch_size, repeats)}


def measure_scale(device: torch.device, repeats: int) -> dict[str, Any]:
    """How sampling, grouping, ranking and the item table grow at 1x, 4x and 16x, up to a million users and items."""
    found: dict[str, Any] = {"ranking": {}, "sampling": {}, "grouping": {}, "item_table": {}}
    for size in tqdm(SIZES, "sizes", unit="size", disable=None):
        found["ranking"][f"{size}_users"] = benchmark.ranking_costs(min(size, 16_384), CATALOGUE_ITEMS, device)
        found["ranking"][f"{size}_items"] = benchmark.ranking_costs(64, size, device)
        found["sampling"][f"{size}_users_and_items"] = largest = benchmark.sampling_costs(size)
        if size <= MOST_USERS_TO_GROUP:
            found["grouping"][f"{size}_users"] = benchmark.grouping_costs(size)
        found["item_table"][f"{size}_items"] = benchmark.item_table_costs(size, device, repeats)
    found["ranking"]["beside_plain_loop"] = plain = benchmark.ranking_costs(2048, CATALOGUE_ITEMS, device, plain_users=24)
    found["ranking_over_plain_loop"] = plain["over_plain_loop"]
    found["sampling_ms_at_1m_users"] = max(largest["global_ms"], largest["personalized_ms"])
    return found


def rows_of(figures: dict[str, Any], prefix: str = "") -> Iterator[list[str]]:
    """Figures as the rows of a table: name and value."""
    for name, value in figures.items():
        if isinstance(value, dict):
            yield from rows_of(value, f"{prefix}{name}: ")
        else:
            yield [f"{prefix}{name}", f"{value:,.3f}" if isinstance(value, float) else str(value)]


def main() -> None:
    """Parse, measure, print."""
    parser = script_parser(__doc__, "--train_dir", "--device")
    parser.add_argument("--dataset", default="demo", help="whose images, titles and histories")
    parser.add_argument("--clip_model", help=f"folder, hub name or {RANDOM_CLIP} (default; the demo: its own)")
    parser.add_argument("--peft", nargs="+", choices=("lora", "ia3", "iisan"), default=["lora", "ia3", "iisan"])
    parser.add_argument("--batch_size", type=number(int, 1), default=16, help="users a batch")
    parser.add_argument("--repeats", type=number(int, 1), default=15, help="each figure is a median over at most so many")
    parser.add_argument("--steps_only", action="store_true", help="leave out the store and the large sizes")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    figures = measure(options, torch.device(choose_device(options.device)))
    print(markdown_table(["figure", "value"], rows_of(figures)))
    if options.json:
        write_json(options.json, figures)


if __name__ == "__main__":
    run_main(main)
