"""CLIP, or another dual encoder, with one peft adapter a group."""
import contextlib

import torch
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from models.item_encoder import MODALITIES, ItemEncoder
from models.towers import architecture, dual_features, feature_width, pool_states

TOWERS = {"image": "vision_model", "text": "text_model"}


def channel_statistics(processor: BaseImageProcessor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift, [1, 3, 1, 1] each: pixel * scale + shift equals an image processor's rescaling and normalisation."""
    if processor is None:  # of a text encoder alone
        return torch.ones(1, 3, 1, 1), torch.zeros(1, 3, 1, 1)
    factor = processor.rescale_factor if processor.do_rescale else 1.0
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0] * 3, [1.0] * 3)
    mean, std = torch.tensor(mean).view(1, 3, 1, 1), torch.tensor(std).view(1, 3, 1, 1)
    return factor / std, -mean / std


class ClipPeftEncoder(ItemEncoder):
    """A frozen dual encoder whose towers carry one peft adapter a group.

    Item features are its L2-normalised image and title embeddings side by side, or one of
    them alone; the other tower is then unused and carries no adapter.

    peft holds one adapter, "default"; every group has its own parameters for it, which `use_group` puts in place. So any
    tuner works that changes a module's parameters alone, and what it keeps beside them (VeRA's projections) is shared.

    Args:
        clip: the foundation model, of a family in `models.towers.ARCHITECTURES`; it is frozen and its linear layers are
            wrapped in place.
        config: the kind of adapter, from `models.peft_configs`.
        processor: its image processor, for the channel statistics that images are normalised with.
        gradient_checkpointing: recompute activations in the backward pass: less memory, a third more time, the same gradients.
        modality: "both", "image" or "text".
        autocast_dtype: what the foundation model computes in; None for float32.
    Raises:
        ValueError: peft cannot put such an adapter into this model.
    """

    def __init__(
        self,
        clip: PreTrainedModel,
        config: PeftConfig,
        processor: BaseImageProcessor | None,
        gradient_checkpointing: bool = False,
        modality: str = "both",
        autocast_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.foundation_parameters = sum(parameter.numel() for parameter in clip.parameters())
        self._modality = modality
        self._autocast_dtype = autocast_dtype
        self.feature_dim = feature_width(clip.config, modality)
        unused = TOWERS["text" if modality == "image" else "image"]
        if modality != "both" and hasattr(clip, unused):
            config.exclude_modules = rf"{unused}\..*"
        config.base_model_name_or_path = clip.config._name_or_path or None
        self.adapter_config = config
        # Before the model that they act in, so that parameters() lists them in the same order whichever group is active.
        self._groups = nn.ModuleList()
        self._peft = get_peft_model(clip, config)
        self._clip = clip
        if autocast_dtype is not None:
            self._cast_frozen_layers(autocast_dtype)
        if gradient_checkpointing:  # non-reentrant: the first layer's input needs no gradient, its adapter does
            clip.gradient_checkpointing_enable({"use_reentrant": False})
        self._slots = self._adapter_slots()
        for part in MODALITIES[modality]:
            if not any(f".{TOWERS[part]}." in name for name in self._slots):
                raise ValueError(f"none of the target layers {config.target_modules} is in the {part} encoder")
        self._groups.append(nn.ParameterList(owners[0][0]._parameters[owners[0][1]] for owners in self._slots.values()))
        self._active = 0
        scale, shift = channel_statistics(processor)
        self.register_buffer("_scale", scale, persistent=False)
        self.register_buffer("_shift", shift, persistent=False)

    def _cast_frozen_layers(self, dtype: torch.dtype) -> None:
        """Cast once what autocast would cast in every pass: weights of layers without an adapter.

        The others stay in float32, since some tuners (DoRA) compute with them outside of linear layers.
        """
        adapted = {layer for module in self._peft.modules() if isinstance(module, BaseTunerLayer) for layer in module.modules()}
        for module in self._peft.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)) and module not in adapted:
                module.to(dtype)

    def _adapter_slots(self) -> dict[str, list[tuple[nn.Module, str]]]:
        """By parameter name, the modules and attributes through which a trainable parameter acts; a shared one has several."""
        slots: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in self._peft.modules():
            for attribute, parameter in module._parameters.items():
                if parameter is not None and parameter.requires_grad:
                    slots.setdefault(id(parameter), []).append((module, attribute))
        names = {id(parameter): name for name, parameter in self._peft.named_parameters()}
        return {".".join(p for p in names[key].split(".") if p != "default"): owners for key, owners in slots.items()}

    @property
    def num_groups(self) -> int:
        """How many adapters there are."""
        return len(self._groups)

    def forward(self, pixels: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Encode items.

        Args:
            pixels: images resized and cropped but not rescaled, uint8 [items, 3, height, width].
            tokens: token ids of the titles, [items, length].
            mask: 1 at tokens, 0 at padding, [items, length], for families that take one.
        Returns:
            [items, feature_dim], float32
        """
        used = MODALITIES[self._modality]
        images = self._normalised(pixels) if "image" in used else None
        with self._autocast(pixels.device):
            return dual_features(self._clip, images, tokens if "text" in used else None, mask)

    def _normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(self._shift, pixels.float(), self._scale)  # [items, 3, height, width]

    def _autocast(self, device: torch.device) -> contextlib.AbstractContextManager:
        if self._autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, self._autocast_dtype)

    def attention(
        self, pixels: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Attention of the tokens that the towers pool, in each tower's last layer, the mean over heads.

        Args:
            pixels, tokens, mask: as in `forward`.
        Returns:
            the class token's attention to itself and the patches, [items, 1 + patches], and the title's pooled token's to all
            tokens, [items, length]; rows sum to 1; None for an unused tower, and for images without a class token
        """
        used = MODALITIES[self._modality]
        of_images = of_titles = None
        with self._autocast(pixels.device):
            if "image" in used and architecture(self._clip.config).has_class_token:
                images = self._normalised(pixels)
                layers = self._clip.vision_model(pixel_values=images, output_attentions=True).attentions
                of_images = layers[-1].float().mean(1)[:, 0]  # [items, heads, to, from] -> [items, 1 + patches]
            if "text" in used:
                masked = {} if mask is None else {"attention_mask": mask}
                layers = self._clip.text_model(input_ids=tokens, output_attentions=True, **masked).attentions
                of_titles = pool_states(self._clip.config, layers[-1].float().mean(1), tokens, mask)  # [items, length]
        return of_images, of_titles

    def clone_groups(self, num_groups: int) -> None:
        """Make `num_groups` adapters, every one a copy of the present group 0."""
        self.use_group(0)
        first = self._groups[0]
        copies = [nn.ParameterList(parameter.detach().clone() for parameter in first) for _ in range(num_groups - 1)]
        self._groups = nn.ModuleList([first, *copies]).train(self.training)  # keeps its place in parameters()

    def use_group(self, group: int) -> None:
        """Let group `group`'s adapter act from now on."""
        self._active = group
        for owners, parameter in zip(self._slots.values(), self._groups[group]):
            for module, attribute in owners:
                module._parameters[attribute] = parameter

    def group_parameters(self, group: int) -> dict[str, nn.Parameter]:
        """The trainable parameters of one group's adapter, by their names in the peft model less the adapter's."""
        return dict(zip(self._slots, self._groups[group]))

    def _live_state(self, group: int) -> dict[str, torch.Tensor]:
        """What peft saves of a group's adapter, by peft's names, in the memory that the adapter acts from."""
        active = self._active
        self.use_group(group)
        state = get_peft_model_state_dict(self._peft, save_embedding_layers=False)
        self.use_group(active)
        return {name: tensor.detach() for name, tensor in state.items()}

    def group_state(self, group: int) -> dict[str, torch.Tensor]:
        """A copy of one group's adapter on the CPU, by the names of a saved peft adapter."""
        return {name: tensor.cpu().contiguous().clone() for name, tensor in self._live_state(group).items()}

    @torch.no_grad()
    def load_group_state(self, group: int, state: dict[str, torch.Tensor]) -> None:
        """Replace one group's adapter by a saved one.

        Raises:
            ValueError: it is of another model, kind or rank; nothing is loaded.
        """
        own = self._live_state(group)
        differing = sorted(set(state) ^ set(own)) + [
            name for name in own if name in state and state[name].shape != own[name].shape
        ]
        if differing:
            raise ValueError(f"these adapter weights are of another model, kind or rank: see {', '.join(differing[:3])}")
        for name, tensor in own.items():
            tensor.copy_(state[name])
