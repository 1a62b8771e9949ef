"""An image encoder and a text encoder of their own, side by side as if they were one dual encoder."""
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from models.towers import Architecture, Layers, pool_states

TEXT_POOLINGS = {"cls": "first", "mean": "mean"}  # what --text_pooling names, as `Architecture.title_token`
# Names of the layers in all of the kinds below; of those that a model lacks, nothing comes.
LAYERS = Layers(
    ("q_proj", "query", "q_lin", "attn.q"), ("k_proj", "key", "k_lin", "attn.k"), ("v_proj", "value", "v_lin", "attn.v"),
    ("fc1", "intermediate.dense", "ffn.lin1"),
)  # fmt: skip
IMAGE_MODELS = {  # whether there is a class token, by transformers' model_type
    "beit": True, "clip_vision_model": True, "deit": True, "dinov2": True, "dinov2_with_registers": True, "ijepa": False,
    "siglip_vision_model": False, "vit": True,
}  # fmt: skip
ANY_IMAGE_SIZE = ("dinov2", "dinov2_with_registers")  # these interpolate their position embeddings
TEXT_MODELS = {  # position embeddings that no token takes, by transformers' model_type
    "bert": 0, "camembert": 2, "distilbert": 0, "electra": 0, "mpnet": 2, "roberta": 2, "xlm-roberta": 2,
}  # fmt: skip


@dataclass
class PairConfig:
    """What a dual encoder's configuration holds, of a pair; without an image encoder, `vision_config` is None."""

    vision_config: PretrainedConfig | None
    text_config: PretrainedConfig
    text_pooling: str = "mean"
    model_type = "pair"
    projection_dim = None
    _name_or_path = ""

    @property
    def architecture(self) -> Architecture:
        """The pair as a family."""
        image_type = self.vision_config.model_type if self.vision_config else None
        return Architecture(
            LAYERS,
            title_token=TEXT_POOLINGS[self.text_pooling],
            has_class_token=IMAGE_MODELS.get(image_type, False),
            masks_titles=True,
            reserved_positions=TEXT_MODELS[self.text_config.model_type],
            any_image_size=image_type in ANY_IMAGE_SIZE,
        )

    @property
    def parts(self) -> list[PretrainedConfig]:
        """Configurations of the models."""
        return [config for config in (self.vision_config, self.text_config) if config]


class EncoderPair(nn.Module):
    """A frozen image encoder and a frozen text encoder, with the methods of a dual encoder.

    An image's features are its class token's last state, or the mean over patches; a title's are the first token's last
    state, or the masked mean. A peft adapter of it opens on `nn.ModuleDict({"vision_model": A, "text_model": B})`.

    Args:
        vision_model: of a kind in IMAGE_MODELS; None for titles alone.
        text_model: of a kind in TEXT_MODELS.
        text_pooling: "cls" or "mean".
    """

    base_model_prefix = ""  # peft 0.21 asks for it

    def __init__(self, vision_model: PreTrainedModel | None, text_model: PreTrainedModel, text_pooling: str = "mean"):
        super().__init__()
        if vision_model is not None:
            self.vision_model = vision_model
        self.text_model = text_model
        self.config = PairConfig(vision_model.config if vision_model is not None else None, text_model.config, text_pooling)

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[items, 3, height, width] -> [items, image width]."""
        states = self.vision_model(pixel_values=pixel_values).last_hidden_state  # [items, patches, image width]
        return states[:, 0] if self.config.architecture.has_class_token else states.mean(1)

    def get_text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """[items, length] each -> [items, text width]."""
        states = self.text_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return pool_states(self.config, states, input_ids, attention_mask)

    def gradient_checkpointing_enable(self, options: dict) -> None:
        """As transformers' method of that name, in both."""
        for model in self.children():
            model.gradient_checkpointing_enable(options)
