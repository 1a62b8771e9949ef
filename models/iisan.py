"""IISAN: side adapters over a frozen foundation model's cached hidden states."""
import torch
from torch import Tensor, nn

from models.item_encoder import ItemEncoder


def _side_blocks(number: int, width: int, bottleneck: int) -> nn.ModuleList:
    """Down, GELU, Up; every weight and bias starts near zero, so that a block starts as no change."""
    blocks = nn.ModuleList()
    for _ in range(number):
        block = nn.Sequential(nn.Linear(width, bottleneck), nn.GELU(), nn.Linear(bottleneck, width))
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=1e-4)
        blocks.append(block)
    return blocks


class IISAN(nn.Module):
    """Intra- and inter-modal side adapted network (Fu et al., SIGIR 2024).

    Three streams (title, image, both) climb the cached layers of CLIP; learned gates weigh each layer against what the
    stream holds so far. Submodule names are those of the authors' weights.

    Args:
        image_dim, text_dim: widths of the towers' hidden states.
        num_states: S, the number of cached layers.
        bottleneck: inner width of the side blocks.
        modality: "both", or "image" or "text" for that one's stream alone.
    """

    def __init__(
        self, image_dim: int = 768, text_dim: int = 512, num_states: int = 7, bottleneck: int = 32, modality: str = "both"
    ):
        super().__init__()
        self._modality = modality
        self.weight_scalar = nn.Parameter(torch.zeros(3, num_states))  # gates before the sigmoid: text, image, both
        self.out_dim = {"both": text_dim + image_dim + text_dim, "image": image_dim, "text": text_dim}[modality]
        if modality != "text":
            self.ImgBlocks = _side_blocks(num_states, image_dim, bottleneck)
        if modality != "image":
            self.TextBlocks = _side_blocks(num_states, text_dim, bottleneck)
        if modality == "both":
            self.InterBlocks = _side_blocks(num_states, text_dim, bottleneck)
            self.CombProj = nn.ModuleList(nn.Sequential(nn.Linear(image_dim, text_dim)) for _ in range(num_states))

    def forward(self, image_states: Tensor, text_states: Tensor) -> Tensor:
        """Title, image and joint stream side by side, [items, text_dim + image_dim + text_dim], or one alone.

        Args:
            image_states: the image's CLS token after each cached layer, [items, S, image_dim].
            text_states: the title's end-of-text token after each cached layer, [items, S, text_dim].
        """
        image_layers, text_layers = image_states.transpose(0, 1), text_states.transpose(0, 1)  # [S, items, width]
        # unbind, not indexing: its backward pass is one stack, where each index would make a gradient of the whole tensor
        text_gates, image_gates, joint_gates = torch.sigmoid(self.weight_scalar).unbind()  # [S] each
        streams = []
        if self._modality != "image":
            streams.append(_stream(self.TextBlocks, text_layers, text_gates.unbind()))
        if self._modality != "text":
            streams.append(_stream(self.ImgBlocks, image_layers, image_gates.unbind()))
        if self._modality == "both":
            projected = torch.stack([project(layer) for project, layer in zip(self.CombProj, image_layers, strict=True)])
            projected = projected.to(text_layers.dtype)  # fp16 under autocast; lerp takes one type alone
            # w * text + (1 - w) * projection
            joint_layers = torch.lerp(projected, text_layers, joint_gates.view(-1, 1, 1))  # [S, items, text_dim]
            streams.append(_stream(self.InterBlocks, joint_layers))
        return torch.cat(streams, dim=-1)


def _stream(blocks: nn.ModuleList, layers: Tensor, gates: tuple[Tensor, ...] | None = None) -> Tensor:
    """One stream up its layers, [S, items, width] -> [items, width]; each is mixed with the state by its gate of S, or added."""
    layers = layers.unbind()
    state = layers[0]
    for i, (block, layer) in enumerate(zip(blocks, layers, strict=True)):
        if i and gates is not None:
            state = torch.lerp(layer, state, gates[i])  # w * state + (1 - w) * this layer
        elif i:
            state = layer + state
        state = block(state) + state
    return state


class IISANEncoder(ItemEncoder):
    """One IISAN a group behind the item-encoder interface; the foundation model itself is not needed."""

    state_file = "iisan.pth"

    def __init__(self, iisan: IISAN, foundation_parameters: int | None = None):
        super().__init__(iisan, iisan.out_dim, foundation_parameters)
