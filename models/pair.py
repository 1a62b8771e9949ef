"""An image encoder and a text encoder of their own, side by side as if they were one dual encoder."""
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from models.towers import Traits

TEXT_POOLINGS = ("cls", "mean")  # of --text_pooling
CLASS_TOKENS = {"cls_token", "class_embedding", "class_token"}  # what image encoders call the parameter


@dataclass
class PairConfig:
    """What a dual encoder's configuration holds, of a pair; without an image encoder, `vision_config` is None."""

    vision_config: PretrainedConfig | None
    text_config: PretrainedConfig
    _name_or_path = ""


class EncoderPair(nn.Module):
    """A frozen image encoder and a frozen text encoder, with the methods of a dual encoder.

    An image's features are its class token's last state, or the mean over its patches where the encoder has none; a title's
    are the first token's last state, or the masked mean. A peft adapter of it opens on
    `nn.ModuleDict({"vision_model": A, "text_model": B})`.

    Args:
        vision_model: None for titles alone.
        text_model: a model that returns one state a token.
        text_pooling: "cls" or "mean".
    """

    base_model_prefix = ""  # peft 0.21 asks for it

    def __init__(self, vision_model: PreTrainedModel | None, text_model: PreTrainedModel, text_pooling: str = "mean"):
        super().__init__()
        self.vision_model, self.text_model = vision_model, text_model
        names = {name.rpartition(".")[2] for name, _ in vision_model.named_parameters()} if vision_model is not None else set()
        self._class_token = bool(names & CLASS_TOKENS)
        self._text_traits = Traits("first" if text_pooling == "cls" else "mean")
        self.config = PairConfig(getattr(vision_model, "config", None), text_model.config)

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """[items, 3, height, width] -> [items, image width]."""
        states = self.vision_model(pixel_values=pixel_values).last_hidden_state  # [items, patches, image width], or a map
        if states.dim() == 4:  # [items, image width, height, width]
            return states.mean((2, 3))
        return states[:, 0] if self._class_token else states.mean(1)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """[items, length] each -> [items, text width]."""
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        states = self.text_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self._text_traits.pool(states, input_ids, attention_mask)  # [items, text width]

    def gradient_checkpointing_enable(self, options: dict) -> None:
        """As transformers' method of that name, in both."""
        for model in self.children():
            model.gradient_checkpointing_enable(options)
