"""The kinds of peft adapters by name, with the paper's settings or peft's defaults."""
import dataclasses
from typing import Any

from peft import IA3Config, LoraConfig, PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from models.towers import Layers

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

CLIP_LAYERS = Layers()
PAPER_RANK = 4


def _tuners() -> dict[str, type[PeftConfig]]:
    """Configuration classes of the installed peft's tuners that work on linear layers, by name."""
    found = {kind.value.lower(): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    fields = {name: {field.name for field in dataclasses.fields(config)} for name, config in found.items()}
    return {name: found[name] for name in sorted(found) if "target_modules" in fields[name] and name not in UNSUITABLE}


TUNERS = _tuners()
PEFT_TYPES = ("lora", "ia3", "dora", *(name for name in TUNERS if name not in ("lora", "ia3")))  # what peft_config takes


def lora_config(rank: int = PAPER_RANK, layers: Layers = CLIP_LAYERS) -> LoraConfig:
    """LoRA on the query and value projections of both towers, alpha twice the rank (the paper's setting)."""
    targets = [*layers.query, *layers.value]
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, lora_dropout=0.1, bias="none")


def ia3_config(layers: Layers = CLIP_LAYERS) -> IA3Config:
    """(IA)3 on keys, values and the first feed-forward layer of both towers (the paper's setting)."""
    targets = [*layers.key, *layers.value, *layers.feed_forward]
    return IA3Config(target_modules=targets, feedforward_modules=list(layers.feed_forward))


def peft_config(
    peft_type: str, rank: int = PAPER_RANK, settings: dict[str, Any] | None = None, layers: Layers = CLIP_LAYERS
) -> PeftConfig:
    """The configuration of one kind of adapter.

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
    if settings is None and peft_type == "ia3":
        return ia3_config(layers)
    if settings is None and peft_type in ("lora", "dora"):
        config = lora_config(rank, layers)
        config.use_dora = peft_type == "dora"
        return config
    kind = TUNERS["lora" if peft_type == "dora" else peft_type]
    chosen = {name: value for name, value in (settings or {}).items() if name not in ORIGIN}
    unknown = sorted(set(chosen) - {field.name for field in dataclasses.fields(kind)})
    if unknown:
        raise ValueError(f"{peft_type} has no setting {', '.join(unknown)}")
    if not chosen.get("target_modules"):
        default = ia3_config(layers) if peft_type == "ia3" else lora_config(layers=layers)
        chosen["target_modules"] = default.target_modules
        if peft_type == "ia3":
            chosen["feedforward_modules"] = default.feedforward_modules
    if peft_type == "dora":
        chosen["use_dora"] = True
    try:
        return kind(**chosen)
    except (TypeError, ValueError) as error:
        raise ValueError(f"peft does not take these {peft_type} settings: {error}") from error
