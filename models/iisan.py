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


class _LayerwiseLinear(nn.Module):
    """S linear layers as one batched product; saved and loaded as `{i}.0.weight` and `{i}.0.bias`, like a list of layers."""

    def __init__(self, num_states: int, in_dim: int, out_dim: int):
        super().__init__()
        layers = [nn.Linear(in_dim, out_dim) for _ in range(num_states)]
        self.weight = nn.Parameter(torch.stack([layer.weight.detach() for layer in layers]))  # [S, out, in]
        self.bias = nn.Parameter(torch.stack([layer.bias.detach() for layer in layers]))  # [S, out]

    def forward(self, states: Tensor) -> Tensor:
        """[S, items, in] -> [S, items, out], layer i by the i-th weights."""
        return torch.baddbmm(self.bias.unsqueeze(1), states, self.weight.transpose(1, 2))

    def _named_slices(self, prefix: str) -> dict[str, Tensor]:
        return {f"{prefix}{i}.0.{name}": getattr(self, name)[i] for i in range(len(self.weight)) for name in ("weight", "bias")}

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        for key, part in self._named_slices(prefix).items():
            destination[key] = part if keep_vars else part.detach().clone()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs):
        slices = self._named_slices(prefix)
        missing_keys.extend(key for key in slices if key not in state_dict)
        unexpected_keys.extend(key for key in state_dict if key.startswith(prefix) and key not in slices)
        for key, part in slices.items():
            if key in state_dict and state_dict[key].shape != part.shape:
                error_msgs.append(f"{key} has shape {tuple(state_dict[key].shape)}, not {tuple(part.shape)}")
            elif key in state_dict:
                part.detach().copy_(state_dict[key])


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
            self.CombProj = _LayerwiseLinear(num_states, image_dim, text_dim)

    def forward(self, image_states: Tensor, text_states: Tensor) -> Tensor:
        """Title, image and joint stream side by side, [items, text_dim + image_dim + text_dim], or one alone.

        Args:
            image_states: the image's CLS token after each cached layer, [items, S, image_dim].
            text_states: the title's end-of-text token after each cached layer, [items, S, text_dim].
        """
        image_layers, text_layers = image_states.transpose(0, 1), text_states.transpose(0, 1)  # [S, items, width]
        # unbind, not indexing, of what needs a gradient: its backward is one stack, where every index would fill a table
        text_gates, image_gates, joint_gates = torch.sigmoid(self.weight_scalar).unbind()  # [S] each
        streams = []
        if self._modality != "image":
            streams.append(_own_stream(text_layers, text_gates, self.TextBlocks))
        if self._modality != "text":
            streams.append(_own_stream(image_layers, image_gates, self.ImgBlocks))
        if self._modality == "both":
            projected = self.CombProj(image_layers).to(text_layers.dtype)  # fp16 under autocast; lerp takes one type alone
            # w * text + (1 - w) * projection, all layers in one batched product
            joint_layers = torch.lerp(projected, text_layers, joint_gates.view(-1, 1, 1))  # [S, items, text_dim]
            streams.append(_joint_stream(joint_layers, self.InterBlocks))
        return torch.cat(streams, dim=-1)


def _own_stream(layers: Tensor, gates: Tensor, blocks: nn.ModuleList) -> Tensor:
    """One modality's stream up its own layers, [S, items, width] and [S] -> [items, width]."""
    state = blocks[0](layers[0]) + layers[0]
    for layer, gate, block in zip(layers[1:], gates[1:].unbind(), blocks[1:], strict=True):
        state = torch.lerp(layer, state, gate)  # w * state + (1 - w) * this layer
        state = block(state) + state
    return state


def _joint_stream(layers: Tensor, blocks: nn.ModuleList) -> Tensor:
    """The stream of both modalities, [S, items, width] -> [items, width]."""
    state: Tensor | float = 0.0
    for layer, block in zip(layers.unbind(), blocks, strict=True):
        state = layer + state
        state = block(state) + state
    return state


class IISANEncoder(ItemEncoder):
    """One IISAN a group behind the item-encoder interface; the foundation model itself is not needed."""

    state_file = "iisan.pth"

    def __init__(self, iisan: IISAN, foundation_parameters: int | None = None):
        super().__init__(iisan, iisan.out_dim, foundation_parameters)

    def forward(self, image_states: Tensor, text_states: Tensor) -> Tensor:
        """Features by the active group's side network; shapes as in `IISAN.forward`."""
        return self.active(image_states, text_states)
