"""CLIP with one LoRA or (IA)3 adapter a group, through Hugging Face peft."""
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import IA3Config, LoraConfig, PeftConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import nn
from transformers import CLIPModel
from transformers.image_processing_utils import BaseImageProcessor

from models.item_encoder import MODALITIES, ItemEncoder

UNUSED_TOWER = {"image": "text_model", "text": "vision_model"}  # by the modality that is looked at


def lora_config(rank: int = 4, dropout: float = 0.1) -> LoraConfig:
    """LoRA on the query and value projections of both towers, alpha twice the rank (the paper's setting)."""
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"], lora_dropout=dropout, bias="none")


def ia3_config() -> IA3Config:
    """(IA)3 on keys, values and the first feed-forward layer of both towers (the paper's setting)."""
    return IA3Config(target_modules=["k_proj", "v_proj", "fc1"], feedforward_modules=["fc1"])


def channel_statistics(processor: BaseImageProcessor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift, [1, 3, 1, 1] each, by which pixel * scale + shift is what an image processor's rescaling and
    normalisation give."""
    factor = processor.rescale_factor if processor.do_rescale else 1.0
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0] * 3, [1.0] * 3)
    mean, std = torch.tensor(mean).view(1, 3, 1, 1), torch.tensor(std).view(1, 3, 1, 1)
    return factor / std, -mean / std


def clip_features(clip: CLIPModel, images: torch.Tensor | None, tokens: torch.Tensor | None) -> torch.Tensor:
    """CLIP's L2-normalised embeddings of images and titles side by side, or of those of them that are given.

    Args:
        clip: with or without adapters.
        images: normalised, [items, 3, height, width].
        tokens: token ids of the titles, each with its end-of-text token, [items, length].
    Returns:
        [items, 2 * projection_dim], or [items, projection_dim] of one alone
    """
    features = []
    if images is not None:
        pooled = clip.vision_model(pixel_values=images).pooler_output  # [items, vision hidden]
        features.append(F.normalize(clip.visual_projection(pooled).float(), dim=-1))  # [items, projection]
    if tokens is not None:
        # No attention mask: the tower is causal and pools the end-of-text token, so what follows it cannot matter.
        pooled = clip.text_model(input_ids=tokens).pooler_output  # [items, text hidden]
        features.append(F.normalize(clip.text_projection(pooled).float(), dim=-1))  # [items, projection]
    return torch.cat(features, dim=-1)


class ClipPeftEncoder(ItemEncoder):
    """A frozen CLIPModel whose towers carry one peft adapter a group.

    Item features are CLIP's L2-normalised image and title embeddings side by side, [items, 2 * projection_dim], or one of
    them alone; the other tower then takes no part and carries no adapter.

    Args:
        clip: the foundation model; it is frozen and its linear layers are wrapped in place.
        config: what kind of adapter, from `lora_config` or `ia3_config`.
        processor: CLIP's image processor, for the channel statistics that images are normalised with.
        gradient_checkpointing: keep no layer's inner values for the backward pass but compute them again: a fraction of the
            memory, a third more time, the same gradients.
        modality: "both", "image" or "text": what of an item is looked at.
    """

    def __init__(
        self,
        clip: CLIPModel,
        config: PeftConfig,
        processor: BaseImageProcessor,
        gradient_checkpointing: bool = False,
        modality: str = "both",
    ):
        super().__init__()
        self.foundation_parameters = sum(parameter.numel() for parameter in clip.parameters())
        self._modality = modality
        self.feature_dim = len(MODALITIES[modality]) * clip.config.projection_dim
        if modality != "both":
            config.exclude_modules = rf"{UNUSED_TOWER[modality]}\..*"
        config.base_model_name_or_path = clip.config._name_or_path or None
        self._config = config
        self._peft = get_peft_model(clip, config)  # its first adapter is called "default"
        self._clip = clip
        if gradient_checkpointing:  # non-reentrant: the first layer's input needs no gradient, its adapter does
            clip.gradient_checkpointing_enable({"use_reentrant": False})
        self._num_groups = 1
        self._adapted_layers = [module for module in self._peft.modules() if isinstance(module, BaseTunerLayer)]
        scale, shift = channel_statistics(processor)
        self.register_buffer("_scale", scale, persistent=False)
        self.register_buffer("_shift", shift, persistent=False)
        self._release_all_groups()

    @staticmethod
    def _adapter_name(group: int) -> str:
        return "default" if group == 0 else f"group_{group}"

    def _release_all_groups(self) -> None:
        # peft freezes every adapter but the active one; here all stay trainable, and whichever did not act in a step has no
        # gradient, so the optimizer skips it. This also makes switching groups a matter of microseconds.
        for parameter in self.adapter_parameters():
            parameter.requires_grad_(True)

    @property
    def num_groups(self) -> int:
        """How many adapters there are."""
        return self._num_groups

    def forward(self, pixels: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Encode items.

        Args:
            pixels: images resized and cropped but not rescaled, uint8 [items, 3, height, width].
            tokens: token ids of the titles, each with its end-of-text token, [items, length].
        Returns:
            [items, feature_dim]
        """
        used = MODALITIES[self._modality]
        images = torch.addcmul(self._shift, pixels.float(), self._scale) if "image" in used else None
        return clip_features(self._clip, images, tokens if "text" in used else None)

    def attention(
        self, pixels: torch.Tensor, tokens: torch.Tensor, end_of_text: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """How much what CLIP pools looks at each place: in each tower's last layer, the mean over heads.

        Args:
            pixels, tokens: as in `forward`.
            end_of_text: the token whose first occurrence is pooled.
        Returns:
            the class token's attention to itself and the patches, [items, 1 + patches], and the end-of-text token's to all
            tokens, [items, length]; rows sum to 1; None for a tower that takes no part
        """
        used = MODALITIES[self._modality]
        of_images = of_titles = None
        if "image" in used:
            images = torch.addcmul(self._shift, pixels.float(), self._scale)
            layers = self._clip.vision_model(pixel_values=images, output_attentions=True).attentions
            of_images = layers[-1].mean(1)[:, 0]  # [items, heads, to, from] -> [items, 1 + patches]
        if "text" in used:
            layers = self._clip.text_model(input_ids=tokens, output_attentions=True).attentions
            place = (tokens == end_of_text).int().argmax(-1)  # [items]
            of_titles = layers[-1].mean(1)[torch.arange(len(tokens)), place]  # [items, length]
        return of_images, of_titles

    def clone_groups(self, num_groups: int) -> None:
        """Make `num_groups` adapters, every one a copy of the present group 0."""
        for group in range(self._num_groups, num_groups):
            self._peft.add_adapter(self._adapter_name(group), self._config)
        self._num_groups = num_groups
        for group in range(1, num_groups):
            self._load_weights(self.group_parameters(0), group)
        self.use_group(0)
        self._release_all_groups()
        self._peft.train(self.training)  # new adapters come in training mode, whatever the model's

    def use_group(self, group: int) -> None:
        """Let group `group`'s adapter act from now on."""
        name = self._adapter_name(group)
        for layer in self._adapted_layers:
            # What layer.set_adapter does, less its walk over every other adapter's requires_grad.
            layer._active_adapter = [name]

    def group_parameters(self, group: int) -> dict[str, nn.Parameter]:
        """The trainable parameters of one group's adapter, by the name they have in a saved adapter."""
        name = self._adapter_name(group)
        marker = f".{name}"
        return {
            key.replace(marker, ""): parameter
            for key, parameter in self._peft.named_parameters()
            if key.endswith(marker) or f"{marker}." in key
        }

    @torch.no_grad()
    def _load_weights(self, weights: dict[str, torch.Tensor], group: int) -> None:
        # Not peft's own get and set of adapter weights: they tell adapters apart by part of a name, and mix up several (IA)3.
        own = self.group_parameters(group)
        differing = sorted(set(weights) ^ set(own)) + [
            name for name in own if name in weights and weights[name].shape != own[name].shape
        ]
        if differing:
            raise ValueError(f"these adapter weights are of another CLIP, kind or rank: see {', '.join(differing[:3])}")
        for name, parameter in own.items():
            parameter.copy_(weights[name])

    def save_group(self, folder: Path, group: int) -> None:
        """Write `folder/adapter`, which `peft.PeftModel.from_pretrained(clip, folder / "adapter")` opens."""
        adapter = Path(folder) / "adapter"
        adapter.mkdir(parents=True, exist_ok=True)
        weights = {name: parameter.detach().cpu() for name, parameter in self.group_parameters(group).items()}
        # As bytes, so that a full disk is an OSError as anywhere else, and not one of safetensors' own.
        (adapter / "adapter_model.safetensors").write_bytes(safetensors_bytes(weights, metadata={"format": "pt"}))
        inference_mode, self._config.inference_mode = self._config.inference_mode, True
        self._config.save_pretrained(str(adapter))
        self._config.inference_mode = inference_mode

    def load_group(self, folder: Path, group: int) -> None:
        """Read `folder/adapter` into group `group`'s adapter.

        Raises:
            ValueError: the weights are of another kind of adapter or another CLIP, or act at another strength.
        """
        adapter = Path(folder) / "adapter"
        settings = adapter / "adapter_config.json"
        saved = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
        for name in ("lora_alpha", "use_rslora", "use_dora"):  # which no weight's shape tells
            own = getattr(self._config, name, None)
            if saved.get(name, own) != own:
                raise ValueError(f"this adapter was made with {name} {saved[name]}, the model has {own}")
        self._load_weights(load_file(str(adapter / "adapter_model.safetensors")), group)
