"""The kinds of peft adapters by name, with the paper's settings or peft's defaults."""
import dataclasses
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from models.towers import CLIP_LAYERS, Layers

# peft's tuners that have target layers, but cannot be used here, and why
UNSUITABLE = {
    "adalora": "peft allows one AdaLoRA adapter a model, whose ranks change with the number of steps; use lora or dora",
    "adaption_prompt": "peft has it for language models alone",
    "lily": "its layers average over all items that are encoded together, so an item's vector would depend on the others",
    "ln_tuning": "it trains layer norms, which have no target layers here",
    "osf": "it changes the foundation model's own weights, which all groups share",
    "poly": "it needs a task number with every input",
    "shadow": "it adds a small copy of a language model",
    "trainable_tokens": "it trains token embeddings, which have no target layers here",
}
# Settings that describe where a configuration came from, not the adapter.
ORIGIN = ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision", "task_type")

PAPER_RANK = 4
TUNERS = {  # configuration classes of the installed peft's tuners that work on linear layers, by name
    name: config
    for name, config in sorted((kind.value.lower(), config) for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items())
    if name not in UNSUITABLE and "target_modules" in config.__dataclass_fields__
}
PEFT_TYPES = ("lora", "ia3", "dora", *(name for name in TUNERS if name not in ("lora", "ia3")))  # what peft_config takes


def peft_config(
    peft_type: str, rank: int = PAPER_RANK, settings: dict[str, Any] | None = None, layers: Layers = CLIP_LAYERS
) -> PeftConfig:
    """The configuration of one kind of adapter, on both towers.

    Args:
        peft_type: one of PEFT_TYPES: lora and ia3 with the paper's settings, dora as lora with `use_dora`, the others with
            peft's defaults on the query and value projections.
        rank: of lora and dora.
        layers: names of the foundation model's layers; CLIP's by default.
        settings: as in peft's adapter_config.json, instead of those; target layers may be left out.
    Raises:
        ValueError: an unsuitable kind, or settings that it does not have or that do not go together.
    """
    if peft_type in UNSUITABLE:
        raise ValueError(f"{peft_type} cannot be used: {UNSUITABLE[peft_type]}")
    if peft_type not in PEFT_TYPES:
        raise ValueError(f"{peft_type} is not one of this peft's tuners for linear layers: {', '.join(PEFT_TYPES)}")
    kind = TUNERS["lora" if peft_type == "dora" else peft_type]
    chosen = {name: value for name, value in (settings or {}).items() if name not in ORIGIN}
    if settings is None and peft_type in ("lora", "dora"):
        chosen = {"r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.1, "bias": "none"}  # the paper's
    unknown = sorted(set(chosen) - {field.name for field in dataclasses.fields(kind)})
    if unknown:
        raise ValueError(f"{peft_type} has no setting {', '.join(unknown)}")
    if not chosen.get("target_modules"):
        chosen["target_modules"] = {*layers["query"], *layers["value"]}
        if peft_type == "ia3":
            chosen["target_modules"] = {*layers["key"], *layers["value"], *layers["feed_forward"]}
            chosen["feedforward_modules"] = set(layers["feed_forward"])
    if peft_type == "dora":
        chosen["use_dora"] = True
    try:
        return kind(**chosen)
    except (TypeError, ValueError) as error:
        raise ValueError(f"peft does not take these {peft_type} settings: {error}") from error
