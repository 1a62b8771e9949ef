"""`python -m tests.fake_cuda.run BACKEND FOLDER`: runs on the pretended cuda:0; the last line of the output is what was seen."""
import contextlib
import functools
import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from tests.fake_cuda.device import pretended_cuda  # before anything that imports torch

import pytest  # isort: skip
import torch
from transformers import CLIPModel

import perpeft_iisan
import perpeft_lora_ia3
from models import ClipPeftEncoder
from models.peft_configs import peft_config
from tests.conftest import save_tiny_clip, tiny_arguments, tiny_histories, tiny_titles, write_dataset
from utils.run import opening
from utils.training import evaluation
from utils.training.trainer import Trainer


class Watch:
    """What happens during a run on the pretended device: phases, modules under autocast, and what each step changed."""

    def __init__(self, mode):
        self.mode = mode
        self.autocast = {}  # module class: whether autocast was on in its forward passes
        self.steps = []  # of each: by how many the count of skipped steps rose, and how many parameters changed

    def phase(self, name, function):
        """`function`, during which the mode is in the phase so named."""

        def wrapped(*args, **kwargs):
            outer, self.mode.phase = self.mode.phase, name
            try:
                return function(*args, **kwargs)
            finally:
                self.mode.phase = outer

        return wrapped

    def forward(self, module, _inputs):
        """Note whether autocast is on in a module's forward pass."""
        if any(parameter.is_cuda for parameter in module.parameters()):  # not where a model is tried before it is on its device
            self.autocast.setdefault(type(module).__name__, set()).add(torch.is_autocast_enabled())

    def training(self, function):
        """`Trainer.steps`, each of whose steps is a phase."""

        def wrapped(trainer, *args):
            steps = function(trainer, *args)
            while (step := self.phase("step", next)(steps, None)) is not None:
                yield step

        return wrapped

    def update(self, function):
        """`Trainer.update`, after which the step is noted in `steps`; comparing weights is no part of the step."""

        def noted(trainer, loss):
            before = [parameter.detach().clone() for parameter in trainer._parameters]
            skipped = trainer.skipped_steps
            self.phase("step", function)(trainer, loss)
            changed = sum(not torch.equal(old, new) for old, new in zip(before, trainer._parameters))
            self.steps.append((trainer.skipped_steps - skipped, changed))

        return self.phase(None, noted)

    @contextlib.contextmanager
    def watching(self):
        """Record during a block."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(Trainer, "update", self.update(Trainer.update)))
            stack.enter_context(mock.patch.object(Trainer, "steps", self.training(Trainer.steps)))
            item_table = self.phase("encoding", evaluation.Evaluator.item_table)
            stack.enter_context(mock.patch.object(evaluation.Evaluator, "item_table", item_table))
            for name in ("rank_targets", "last_states"):
                stack.enter_context(mock.patch.object(evaluation, name, self.phase("ranking", getattr(evaluation, name))))
            hook = torch.nn.modules.module.register_module_forward_pre_hook(self.forward)
            stack.callback(hook.remove)
            yield


@contextlib.contextmanager
def first_scale(scale):
    """Let the gradients' scale begin there."""
    original = opening.make_accelerator

    def make_accelerator(*args):
        accelerator = original(*args)
        if accelerator.scaler:
            accelerator.scaler._init_scale = scale
        return accelerator

    with mock.patch.object(opening, "make_accelerator", make_accelerator):
        yield


@contextlib.contextmanager
def interrupted(step):
    """Let the run get SIGTERM in that step."""
    update, steps = Trainer.update, iter(range(1, 10**6))

    def counted(trainer, loss):
        update(trainer, loss)
        if next(steps) == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with mock.patch.object(Trainer, "update", counted), pytest.raises(KeyboardInterrupt):
        yield


def watched_run(train, free_memory):
    """What is seen of a run on the pretended device; the scale begins so high that its first steps overflow in fp16."""
    with pretended_cuda(free_memory) as mode:
        watch = Watch(mode)
        with watch.watching(), first_scale(2.0**19):
            train("cuda:0", "watched", global_epochs=1, num_epochs=1)
    autocast = {name: sorted(on) for name, on in watch.autocast.items()}
    return {"waits": mode.waits, "device_files": mode.device_files, "autocast": autocast, "steps": watch.steps}


def resumed_run(train):
    """Train two steps on the CPU, two on the device, and the rest on the CPU again."""
    settings = {"precision": "fp32", "save_every": 1, "method": "global", "global_epochs": 1, "num_epochs": 1}
    with pretended_cuda():
        for device in ("cpu", "cuda:0"):
            with interrupted(2):
                train(device, "resumed", **settings)
        train("cpu", "resumed", **settings)
    return True


def weights_cast_once(clip):
    """Features by a LoRA-like encoder in fp16, with frozen weights cast once and with autocast's cast in every pass."""
    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    tokens = torch.tensor([[0, 5, 6, 1]] * 2)
    features = {}
    with pretended_cuda(), torch.no_grad(), torch.autocast("cuda", torch.float16):
        for dtype in (torch.float16, None):
            encoder = ClipPeftEncoder(CLIPModel.from_pretrained(clip), peft_config("lora"), None, autocast_dtype=dtype).eval()
            features[dtype] = encoder.to("cuda:0")(pixels.to("cuda:0"), tokens.to("cuda:0")).cpu()
    return bool(features[None].any()) and torch.equal(*features.values())


def own_rules():
    """Check that the pretended device refuses what CUDA does; returns how many waits of five it has recorded."""
    with pretended_cuda() as mode:
        mode.phase = "rules"
        table, rows = torch.ones(3, device="cuda:0"), torch.tensor([0, 2])
        for operation in (lambda: table + torch.ones(3), lambda: torch.ones(3)[rows.to("cuda:0")], table.numpy):
            with pytest.raises((RuntimeError, TypeError)):
                operation()
        before = sum(mode.waits["rules"].values())
        table[table > 0], table[rows], table.sum().item(), table.cpu(), rows.to("cuda:0", non_blocking=True)
        rows.pin_memory().to("cuda:0", non_blocking=True)
    return sum(mode.waits["rules"].values()) - before


def main():
    """Run all in an empty folder."""
    folder = Path(sys.argv[2])
    dataset = SimpleNamespace(train_dir=write_dataset(folder / "dataset", "tiny", tiny_histories(), tiny_titles()), name="tiny")
    clip = save_tiny_clip(folder / "clip", tiny_titles())

    def train(device, name, peft_type="lora", script=perpeft_lora_ia3, **changes):
        script.main(tiny_arguments(dataset, clip, folder / name, peft_type, device=device, **changes))

    iisan = functools.partial(train, peft_type=None, script=perpeft_iisan)
    seen = {
        "waits": own_rules(),
        "cast_once": weights_cast_once(clip),
        "lora": watched_run(train, free_memory=2**36),
        "ia3": watched_run(functools.partial(train, peft_type="ia3"), free_memory=2**36),
        "iisan": watched_run(iisan, free_memory=0),  # the states are copied in every step
        "resumed": resumed_run(train),
    }
    print("\n" + json.dumps(seen))


if __name__ == "__main__":
    main()
