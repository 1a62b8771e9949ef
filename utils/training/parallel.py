"""The training step of one of several processes: each takes a part of the batch, and their gradients are summed."""
from typing import Any

import torch

from models import PerPEFT
from utils.training.processes import Processes
from utils.training.sampling import Batch
from utils.training.trainer import Trainer, transition_loss


class ParallelTrainer(Trainer):
    """A trainer whose step equals that of one process with the whole batch, up to the order in which numbers are added.

    All processes hold the same weights and optimizers. A step sums gradients and loss in one exchange.

    Args:
        model, learning_rate, weight_decay, l2_emb, device: as of `Trainer`.
        processes: those that train together.
    """

    def __init__(
        self,
        model: PerPEFT,
        learning_rate: float,
        weight_decay: float,
        l2_emb: float,
        device: torch.device,
        processes: Processes,
    ):
        super().__init__(model, learning_rate, weight_decay, l2_emb, device)
        self._processes = processes

    def part(self, batch: Batch) -> Batch:
        """This process's users of a batch."""
        return batch.part(self._processes.rank, self._processes.size)

    def loss(self, batch: Batch, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The loss of the whole batch, whose gradients are in place when this returns.

        Args:
            batch: this process's part.
            inputs: what the encoder takes of the part's items `batch.items[1:]`.
        """
        own = torch.zeros((), device=self.device)
        if len(batch.seq):  # with fewer users than processes some have none, and add zeros to the sums
            positive_logits, negative_logits, real = self.logits(batch, inputs)
            own = transition_loss(positive_logits, negative_logits, real, int((batch.whole.seq != 0).sum()))
            self.scaler.scale(own).backward()
        return self._sum_gradients(batch, own.detach()) + self._item_table.penalty()

    def update(self, loss: torch.Tensor) -> None:
        """One step of both optimizers; the backward pass is done."""
        self.apply_gradients()

    @torch.no_grad()
    def _sum_gradients(self, part: Batch, own_loss: torch.Tensor) -> torch.Tensor:
        """Put the sums over all processes in place of this one's gradients; gives the sum of losses."""
        item_table = self.model.sasrec.item_emb.weight
        dense = [parameter for parameter in self.model.sasrec.parameters() if parameter is not item_table]
        dense += [*self.model.projectors[part.group].parameters(), *self.model.encoder.group_parameters(part.group).values()]
        items = torch.from_numpy(part.whole.items).to(self.device)  # all processes know the whole batch's
        rows = torch.zeros(len(items), item_table.shape[1], device=self.device, dtype=item_table.dtype)  # [rows, hidden]
        if item_table.grad is not None:
            own = item_table.grad.coalesce()
            rows[torch.searchsorted(items, own.indices()[0])] = own.values()
        gradients = [torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in dense]
        blocks = [own_loss, rows, *gradients]
        flat = self._processes.sum_(torch.cat([block.flatten() for block in blocks]))
        loss, rows, *sums = flat.split([block.numel() for block in blocks])
        item_table.grad = torch.sparse_coo_tensor(
            items[None], rows.view(len(items), -1), item_table.shape, check_invariants=False, is_coalesced=True
        )
        for parameter, total in zip(dense, sums):
            parameter.grad = total.view_as(parameter)
        return loss[0]

    def random_states(self) -> dict[str, Any]:
        """Torch's random states of all processes."""
        states = self._processes.gather(super().random_states())
        return {**states[0], "others": states[1:]}

    def load_random_states(self, states: dict[str, Any]) -> None:
        """Continue from what `random_states` gave; a process that was not there then keeps its own."""
        others = states.get("others", [])
        self._tell_of_other_number(1 + len(others), self._processes.size)
        if self._processes.is_first:
            super().load_random_states({**states, "others": []})
        elif self._processes.rank <= len(others):
            super().load_random_states(others[self._processes.rank - 1])
