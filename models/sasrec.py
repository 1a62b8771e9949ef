"""SASRec: self-attentive sequential recommendation over multimodal item vectors."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PointWiseFeedForward(nn.Module):
    """Two 1x1 convolutions with a ReLU between, dropout after each; the caller adds the residual."""

    def __init__(self, hidden_units: int, dropout_rate: float):
        super().__init__()
        # Convolutions rather than Linear, so that state_dict shapes are those of published SASRec weights.
        self.conv1 = nn.Conv1d(hidden_units, hidden_units, kernel_size=1)
        self.conv2 = nn.Conv1d(hidden_units, hidden_units, kernel_size=1)
        self.dropout = nn.Dropout(dropout_rate)

    def forward(self, states: Tensor) -> Tensor:
        """Transform every position alone, [batch, time, hidden] -> [batch, time, hidden]."""
        # A 1x1 convolution is a matrix product over the last axis: this saves two transposes.
        inner = F.linear(states, self.conv1.weight.squeeze(-1), self.conv1.bias)
        outer = F.linear(F.relu(self.dropout(inner)), self.conv2.weight.squeeze(-1), self.conv2.bias)
        return self.dropout(outer)


class SASRec(nn.Module):
    """Sequential recommender (Kang and McAuley, ICDM 2018) with the item input of PerPEFT.

    An item's input is `e_i = weight_scalar * P_i + item_emb[i]`, P_i its projected multimodal vector. The score of item j
    after a history is the dot product of the last state with e_j. Padding (item 0, on the left) has position 0 and is not
    masked as an attention key.

    Args:
        num_items: items are 1..num_items; 0 is the padding item.
        hidden_units: width d.
        maxlen: number of last items of a history that are read.
        num_heads: attention heads in each of `num_blocks` blocks; must divide hidden_units.
        dropout_rate: dropout of inputs, attention weights and feed-forward layers.
        weight_scalar: weight of the multimodal vector beside the item embedding.
    """

    def __init__(
        self, num_items: int, hidden_units: int = 32, maxlen: int = 10, num_blocks: int = 2, num_heads: int = 4,
        dropout_rate: float = 0.3, weight_scalar: float = 0.5,
    ):  # fmt: skip
        super().__init__()
        self.num_items, self.hidden_units, self.maxlen = num_items, hidden_units, maxlen
        self.weight_scalar = weight_scalar
        self.item_emb = nn.Embedding(num_items + 1, hidden_units, padding_idx=0)
        self.pos_emb = nn.Embedding(maxlen + 1, hidden_units, padding_idx=0)
        self.emb_dropout = nn.Dropout(dropout_rate)
        self.attention_layernorms = nn.ModuleList(nn.LayerNorm(hidden_units, eps=1e-8) for _ in range(num_blocks))
        self.attention_layers = nn.ModuleList(
            nn.MultiheadAttention(hidden_units, num_heads, dropout_rate, batch_first=True) for _ in range(num_blocks)
        )
        self.forward_layernorms = nn.ModuleList(nn.LayerNorm(hidden_units, eps=1e-8) for _ in range(num_blocks))
        self.forward_layers = nn.ModuleList(PointWiseFeedForward(hidden_units, dropout_rate) for _ in range(num_blocks))
        self.last_layernorm = nn.LayerNorm(hidden_units, eps=1e-8)
        causal_mask = torch.ones(maxlen, maxlen, dtype=torch.bool).triu(1)  # True: may not attend
        self.register_buffer("causal_mask", causal_mask, persistent=False)
        self.register_buffer("positions", torch.arange(1, maxlen + 1), persistent=False)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.dim() >= 2:
                    nn.init.xavier_normal_(parameter)
            self.item_emb.weight[0] = self.pos_emb.weight[0] = 0

    def item_inputs(self, item_vectors: Tensor, items: Tensor | None = None) -> Tensor:
        """The e_i of a table of items, [rows, hidden].

        Args:
            item_vectors: projected multimodal vectors P, row 0 the padding item's, [rows, hidden].
            items: the item of each row, [rows]; by default row i is item i, and rows = num_items + 1. Training passes a small
                table of the batch's distinct items, and sequences then hold row numbers of that table.
        """
        items = torch.arange(self.num_items + 1, device=item_vectors.device) if items is None else items
        embeddings = self.item_emb(items)  # an embedding lookup, so that the padding row gets no gradient
        return self.weight_scalar * item_vectors + embeddings

    def states(self, seq: Tensor, item_vectors: Tensor, items: Tensor | None = None) -> Tensor:
        """The state after every position of every history, [batch, time, hidden].

        Args:
            seq: histories as rows of `item_vectors`, left-padded with 0, [batch, time], time <= maxlen.
            item_vectors, items: as in `item_inputs`.
        """
        return self.states_from_inputs(seq, self.item_inputs(item_vectors, items))

    def states_from_inputs(self, seq: Tensor, inputs: Tensor) -> Tensor:
        """As `states`, with the table of e_i already computed, [rows, hidden]."""
        time = seq.shape[1]
        positions = self.positions[:time] * (seq != 0)  # [batch, time]
        # F.embedding's backward is deterministic on CPU; that of plain indexing is not.
        x = F.embedding(seq, inputs) * self.hidden_units**0.5 + self.pos_emb(positions)  # [batch, time, hidden]
        x = self.emb_dropout(x)
        mask = self.causal_mask[:time, :time]
        blocks = zip(self.attention_layernorms, self.attention_layers, self.forward_layernorms, self.forward_layers)
        for attention_layernorm, attention, forward_layernorm, feed_forward in blocks:
            query = attention_layernorm(x)
            attended, _ = attention(query, x, x, attn_mask=mask, need_weights=False)
            x = forward_layernorm(query + attended)
            x = x + feed_forward(x)  # [batch, time, hidden]
        return self.last_layernorm(x)

    def forward(
        self, seq: Tensor, positives: Tensor, negatives: Tensor, item_vectors: Tensor, items: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits of the positive and of the negative item at every position, [batch, time] each.

        Args:
            seq, positives, negatives: row numbers of `item_vectors`, 0 at padding, [batch, time] each.
            item_vectors, items: as in `item_inputs`.
        """
        inputs = self.item_inputs(item_vectors, items)  # [rows, hidden]
        states = self.states_from_inputs(seq, inputs)  # [batch, time, hidden]
        positive_logits = (states * F.embedding(positives, inputs)).sum(-1)  # [batch, time]
        negative_logits = (states * F.embedding(negatives, inputs)).sum(-1)  # [batch, time]
        return positive_logits, negative_logits
