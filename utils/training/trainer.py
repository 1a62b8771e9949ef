"""One training step, the same for global and personalized PEFT: loss, backward pass, one AdamW."""
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from models import PerPEFT
from utils.common.versions import has_fused_adamw
from utils.items.source import ItemSource
from utils.training.sampling import Batch, Sampler


class Trainer:
    """Trains one model, alone or as one of several ranks.

    In a step, the batch's adapter and projector and SASRec get gradients; AdamW leaves parameters without a gradient as
    they are, weight decay included. Each rank takes a shard of the batch; DDP averages the gradients. The model is on its
    device, with as many groups as will be trained; `l2_emb` weighs the L2 norm of the item embeddings in the loss.
    """

    def __init__(self, model: PerPEFT, source: ItemSource, accelerator: Accelerator, *, lr: float, wdecay: float, l2_emb: float):
        self.model, self.source, self.accelerator, self._l2_emb = model, source, accelerator, l2_emb
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.device = self._parameters[0].device
        self._fused = has_fused_adamw(self.device.type)
        # One optimizer, so that an fp16 overflow skips the whole step and not the part that the adapters or SASRec take in it.
        adamw = torch.optim.AdamW(self._parameters, lr=lr, weight_decay=wdecay, fused=self._fused)
        self.optimizer = accelerator.prepare_optimizer(adamw)
        self._forward = model
        if accelerator.num_processes > 1:
            accelerator.ddp_handler.find_unused_parameters = model.num_groups > 1  # idle groups have no gradient
            self._forward = accelerator.prepare_model(model, device_placement=False)
        self._skipped_steps: Tensor | int = 0  # on the device, so that counting does not wait for it

    @property
    def skipped_steps(self) -> int:
        """Steps so far that left all weights as they were because a gradient overflowed in fp16."""
        return int(self._skipped_steps)

    def steps(self, sampler: Sampler, epoch: int, first: int) -> Iterator[tuple[int, Batch, Tensor]]:
        """Train the steps of an epoch from step `first` (from 0) on; yields each step's number (from 1), batch and loss."""
        for step in range(first, sampler.num_batches):
            batch = sampler.batch(epoch, step)
            loss = self.loss(batch)
            self.update(loss)
            yield step + 1, batch, loss.detach()

    def loss(self, batch: Batch) -> Tensor:
        """The loss of a batch: of the full batch, or of this rank's shard such that the mean over ranks is that."""
        ranks = self.accelerator.num_processes
        shard = batch.shard(self.accelerator.process_index, ranks)
        on_device, inputs = shard.to(self.device), self.source.fetch(shard.items[1:], self.device)
        positive_logits, negative_logits, mask = self._forward(on_device, inputs)  # [batch, time] each
        # Binary cross-entropy, -log(sigmoid(x)) = softplus(-x) of positives and -log(1 - sigmoid(x)) = softplus(x) of negatives.
        terms = F.softplus(-positive_logits) + F.softplus(negative_logits)  # [batch, time]
        loss = (terms * mask).sum() / batch.num_transitions  # a mean over the full batch's real positions
        return ranks * loss + self._l2_emb * torch.linalg.vector_norm(self.model.sasrec.item_emb.weight)

    def update(self, loss: Tensor) -> None:
        """Backward pass and optimizer step."""
        self.accelerator.backward(loss)
        scaler = self.accelerator.scaler
        scale = scaler.scale(loss.new_ones(())) if scaler else None
        self.optimizer.step()
        self.optimizer.zero_grad()
        if scaler:  # the scale shrinks after an overflow, and only then
            self._skipped_steps += scaler.scale(loss.new_ones(())) < scale

    def is_finite(self) -> bool:
        """Whether no trained weight and nothing that AdamW keeps of it is infinite or NaN."""
        moments = [state[name] for state in self.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        return bool(torch.stack([torch.isfinite(tensor).all() for tensor in [*self._parameters, *moments]]).all())

    def state_dict(self) -> dict[str, Any]:
        """All that changes in training, every rank's random state included; called by all ranks."""
        scaler = self.accelerator.scaler
        random = [torch.get_rng_state()] + ([torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else [])
        return {
            "parameters": [parameter.detach() for parameter in self._parameters],
            "optimizer": self.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler else {},
            "skipped_steps": self.skipped_steps,
            "random": gather_object([random]),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`, which may come from another device or another number of ranks."""
        for parameter, saved in zip(self._parameters, state["parameters"], strict=True):
            parameter.copy_(saved)
        for group in state["optimizer"]["param_groups"]:
            group["fused"] = self._fused  # of this device, not of the one that saved
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"] and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self._skipped_steps = state["skipped_steps"]
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        if len(state["random"]) != ranks:
            print(f"number of processes: {len(state['random'])} before, {ranks} now; dropout differs from here on", flush=True)
        if rank < len(state["random"]):
            on_cpu, *on_gpu = state["random"][rank]
            torch.set_rng_state(on_cpu)
            if on_gpu and self.device.type == "cuda":
                torch.cuda.set_rng_state(*on_gpu, self.device)
