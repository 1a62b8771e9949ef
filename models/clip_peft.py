"""CLIP, or another dual encoder, with one peft adapter a group."""
import contextlib
import re

import numpy as np
import torch
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from models.item_encoder import MODALITIES, ItemEncoder
from models.pair import EncoderPair
from models.towers import CLIP_TRAITS, Traits, count_parameters, drop_none, dual_features, tower, tower_name


def channel_statistics(processor: BaseImageProcessor | None) -> tuple[Tensor, Tensor]:
    """Scale and shift, [1, 3, 1, 1] each: pixel * scale + shift equals an image processor's rescaling and normalisation."""
    if processor is None:  # of a text encoder alone
        return torch.ones(1, 3, 1, 1), torch.zeros(1, 3, 1, 1)
    ends = []
    for value in (0, 255):  # of images of one colour; what the processor makes of their pixels is linear in between
        image = np.full((64, 64, 3), value, dtype=np.uint8)
        found = processor(image, return_tensors="np", input_data_format="channels_last")["pixel_values"][0]
        ends.append(torch.from_numpy(found[:, found.shape[1] // 2, found.shape[2] // 2]).double().view(1, 3, 1, 1))
    return ((ends[1] - ends[0]) / 255).float(), ends[0].float()


def _last_layer(attentions: tuple[Tensor, ...] | None) -> Tensor:
    """The mean over heads of the last layer's attention, [items, to, from]."""
    if not attentions or attentions[-1] is None:
        raise ValueError("it returns no attention")
    return attentions[-1].float().mean(1)


class ClipPeftEncoder(ItemEncoder):
    """A frozen dual encoder whose towers carry one peft adapter a group.

    Item features are its L2-normalised image and title embeddings side by side, or one of them alone; the other tower is then
    unused and carries no adapter.

    peft holds one adapter, "default"; every group has its own parameters for it, which `use_group` puts in place. So any
    tuner works that changes a module's parameters alone, and what it keeps beside them (VeRA's projections) is shared.

    Args:
        clip: the foundation model, a dual encoder or an `EncoderPair`; it is frozen and its linear layers are wrapped in place.
        processor: its image processor, for the channel statistics that images are normalised with.
        gradient_checkpointing: recompute activations in the backward pass: less memory, a third more time, the same gradients.
        modality: "both", "image" or "text".
        autocast_dtype: what the foundation model computes in; None for float32.
    Attributes:
        unadapted: the parts of an item, "image" or "text", whose tower has none of the target layers, and so no adapter.
    Raises:
        ValueError: peft cannot put such an adapter into this model.
    """

    def __init__(
        self, clip: PreTrainedModel | EncoderPair, config: PeftConfig, processor: BaseImageProcessor | None,
        gradient_checkpointing: bool = False, modality: str = "both", autocast_dtype: torch.dtype | None = None,
        traits: Traits = CLIP_TRAITS,
    ):  # fmt: skip
        # has `_groups` before the model: parameters() lists them in one order whichever group is active
        super().__init__(None, traits.feature_width(modality, clip.config), count_parameters(clip))
        self._used, self._traits, self._autocast_dtype = MODALITIES[modality], traits, autocast_dtype
        towers = {part: tower_name(clip, part) for part in self._used}
        # Parts that take no part in an item's features: the other tower, and what some models have beside the two.
        models = [name for name, _ in clip.named_children() if name.endswith("_model")]
        patterns = [rf"{name}\..*" for name in models if name not in towers.values()]
        if any(".crossattention." in name for name, _ in clip.named_modules()):  # BLIP's text tower attends to no image here
            patterns.append(r".*\.crossattention\..*")
        if patterns:
            own = getattr(config, "exclude_modules", None) or []  # the user's, as peft matches them: a pattern, or ends of names
            patterns += [own] if isinstance(own, str) else [rf"(.*\.)?{re.escape(name)}" for name in own]
            config.exclude_modules = "|".join(patterns)
        config.base_model_name_or_path = clip.config._name_or_path or None
        self.adapter_config, self._peft, self._clip = config, get_peft_model(clip, config), clip
        if autocast_dtype is not None:
            self._cast_frozen_layers(autocast_dtype)
        if gradient_checkpointing:  # non-reentrant: the first layer's input needs no gradient, its adapter does
            clip.gradient_checkpointing_enable({"use_reentrant": False})
        self._slots = self._adapter_slots()
        self.unadapted = [part for part, name in towers.items() if not any(f".{name}." in slot for slot in self._slots)]
        if len(self.unadapted) == len(towers):
            raise ValueError(f"none of the target layers {config.target_modules} is in the {' or '.join(self.unadapted)} encoder")
        self._groups.append(nn.ParameterList(getattr(*owners[0]) for owners in self._slots.values()))
        for name, statistic in zip(("_scale", "_shift"), channel_statistics(processor)):
            self.register_buffer(name, statistic, persistent=False)

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
        names: dict[nn.Parameter, str] = {}
        slots: dict[str, list[tuple[nn.Module, str]]] = {}
        for path, parameter in self._peft.named_parameters(remove_duplicate=False):
            if parameter.requires_grad:
                module, _, attribute = path.rpartition(".")
                name = names.setdefault(parameter, ".".join(part for part in path.split(".") if part != "default"))
                slots.setdefault(name, []).append((self._peft.get_submodule(module), attribute))
        return slots

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Item features, [items, feature_dim], float32.

        Args:
            pixels: images resized and cropped but not rescaled, uint8 [items, 3, height, width].
            tokens: token ids of the titles, [items, length].
            mask: 1 at tokens, 0 at padding, [items, length], for families that take one.
        """
        images = self._normalised(pixels) if "image" in self._used else None
        with self._autocast(pixels.device):
            return dual_features(self._clip, images, tokens if "text" in self._used else None, mask)

    def _normalised(self, pixels: Tensor) -> Tensor:
        return torch.addcmul(self._shift, pixels.float(), self._scale)  # [items, 3, height, width]

    def _autocast(self, device: torch.device) -> contextlib.AbstractContextManager:
        return torch.autocast(device.type, self._autocast_dtype) if self._autocast_dtype else contextlib.nullcontext()

    def attention(self, pixels: Tensor, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """Attention of the tokens that the towers pool of `forward`'s inputs, in each tower's last layer, the mean over heads.

        Returns:
            the class token's attention to itself and the patches, [items, 1 + patches], and the title's pooled token's to all
            tokens, [items, length]; rows sum to 1; None for an unused tower, and for images without a class token
        Raises:
            ValueError: the model returns no attention.
        """
        of_images = of_titles = None
        with self._autocast(pixels.device):
            if "image" in self._used and self._traits.class_token:
                seen = tower(self._clip, "image")(pixel_values=self._normalised(pixels), output_attentions=True)
                of_images = _last_layer(seen.attentions)[:, 0]  # [items, 1 + patches]
            if "text" in self._used:
                read = tower(self._clip, "text")(output_attentions=True, **drop_none(input_ids=tokens, attention_mask=mask))
                of_titles = self._traits.pool(_last_layer(read.attentions), tokens, mask)  # [items, length]
        return of_images, of_titles

    def train(self, mode: bool = True) -> "ClipPeftEncoder":
        """As any module's, but the statistics of the frozen model's batch norms stay as they are."""
        super().train(mode)
        for module in self._clip.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def use_group(self, group: int) -> None:
        """Let group `group`'s adapter act from now on."""
        self._active = group
        for owners, parameter in zip(self._slots.values(), self._groups[group]):
            for module, attribute in owners:
                module._parameters[attribute] = parameter

    def group_parameters(self, group: int) -> dict[str, nn.Parameter]:
        """The trainable parameters of one group's adapter, by their names in the peft model less the adapter's."""
        return dict(zip(self._slots, self._groups[group]))

    def _live_state(self, group: int) -> dict[str, Tensor]:
        """What peft saves of a group's adapter, by peft's names, in the memory that the adapter acts from."""
        active = self._active
        self.use_group(group)
        state = get_peft_model_state_dict(self._peft, save_embedding_layers=False)
        self.use_group(active)
        return {name: tensor.detach() for name, tensor in state.items()}

    def group_state(self, group: int) -> dict[str, Tensor]:
        """A copy of one group's adapter on the CPU, by the names of a saved peft adapter."""
        return {name: tensor.cpu().contiguous().clone() for name, tensor in self._live_state(group).items()}

    @torch.no_grad()
    def load_group_state(self, group: int, state: dict[str, Tensor]) -> None:
        """Replace one group's adapter by a saved one; if that is of another model, kind or rank, raises a ValueError instead."""
        own = self._live_state(group)
        differing = sorted(state.keys() ^ own.keys())
        differing += [name for name in own if name in state and state[name].shape != own[name].shape]
        if differing:
            raise ValueError(f"these adapter weights are of another model, kind or rank: see {', '.join(differing[:3])}")
        for name, tensor in own.items():
            tensor.copy_(state[name])
