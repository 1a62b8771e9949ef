"""What a CPU can show of training on a GPU; `tests/run/test_pretended_cuda.py` runs these checks on the pretended one."""
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import CLIPModel

import perpeft_iisan
import perpeft_lora_ia3
from models import ClipPeftEncoder
from models.peft_configs import peft_config
from tests.conftest import run_interrupted, run_script, tiny_arguments
from tests.fake_cuda.device import PretendedCuda
from utils.training import evaluation
from utils.training.trainer import Trainer

FP32 = {"SASRec", "MultiheadAttention", "PointWiseFeedForward", "MMProjector", "IISAN"}


@pytest.fixture(scope="module", params=["lora", "ia3", "iisan"])
def seen(request, tiny_dataset, tiny_clip, tmp_path_factory):
    """What is seen of a run on the device, whose gradients' scale begins so high that its first steps overflow in fp16.

    waits, device_files: as of `PretendedCuda`, in phases that are steps, encoding and ranking.
    autocast: whether autocast was on in the forward passes of a class of modules.
    steps: of each by how many the count of skipped steps rose, and how many parameters changed.
    """
    script, peft_type = (perpeft_iisan, None) if request.param == "iisan" else (perpeft_lora_ia3, request.param)
    changes = {"device": "cuda:0", "global_epochs": 1, "num_epochs": 1}
    arguments = tiny_arguments(tiny_dataset, tiny_clip, tmp_path_factory.mktemp("runs"), peft_type, **changes)
    cuda = PretendedCuda(free_memory=2**36 if peft_type else 0)  # without room, IISAN's states are copied in every step
    autocast, changed = {}, []

    def forward(module, _inputs):
        if any(parameter.is_cuda for parameter in module.parameters()):  # not where a model is tried before it is on its device
            autocast.setdefault(type(module).__name__, set()).add(torch.is_autocast_enabled())

    def steps(trainer, *args, original=Trainer.steps):
        one, each = cuda.phase("step")(next), original(trainer, *args)
        return iter(lambda: one(each, None), None)

    @cuda.phase(None)  # comparing weights is no part of the step
    def update(trainer, loss, original=Trainer.update):
        if not changed and trainer.accelerator.scaler:
            trainer.accelerator.scaler._init_scale = 2.0**19
        before, skipped = [parameter.detach().clone() for parameter in trainer._parameters], trainer.skipped_steps
        cuda.phase("step")(original)(trainer, loss)
        num_changed = sum(not torch.equal(old, new) for old, new in zip(before, trainer._parameters))
        changed.append((trainer.skipped_steps - skipped, num_changed))

    hook = torch.nn.modules.module.register_module_forward_pre_hook(forward)
    with cuda, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "steps", steps)
        patch.setattr(Trainer, "update", update)
        for owner, name in ((evaluation.Evaluator, "item_table"), (evaluation, "rank_targets"), (evaluation, "last_states")):
            patch.setattr(owner, name, cuda.phase(name)(getattr(owner, name)))
        run_script(arguments, script.main)
    hook.remove()
    return SimpleNamespace(kind=request.param, waits=cuda.waits, device_files=cuda.device_files, autocast=autocast, steps=changed)


def test_no_step_encoding_or_ranking_chunk_waits_for_the_device(seen):
    assert seen.waits == {}


def test_only_the_foundation_model_computes_under_autocast(seen):
    under = {name for name, on in seen.autocast.items() if True in on}
    assert not under & FP32 and FP32 & set(seen.autocast)
    assert seen.kind == "iisan" or seen.autocast["CLIPEncoderLayer"] == {True}


def test_overflow_skips_the_whole_step_and_is_counted(seen):
    skipped = {changed for count, changed in seen.steps if count}
    assert skipped == ({0} if seen.kind != "iisan" else set())  # which computes in fp32, and so overflows never
    (taken,) = {changed for count, changed in seen.steps if not count}  # SASRec, one projector, one adapter
    assert taken > 0


def test_saved_weights_are_no_cuda_tensors(seen):
    assert {Path(name).parent.name for name in seen.device_files} <= {"resume"}  # read with map_location="cpu"


def test_frozen_weights_cast_once_are_what_autocast_computes_with(tiny_clip):
    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    tokens = torch.tensor([[0, 5, 6, 1]] * 2)
    features = []
    with PretendedCuda(), torch.no_grad(), torch.autocast("cuda", torch.float16):
        for dtype in (torch.float16, None):
            encoder = ClipPeftEncoder(CLIPModel.from_pretrained(tiny_clip), peft_config("lora"), None, autocast_dtype=dtype)
            features.append(encoder.eval().to("cuda:0")(pixels.to("cuda:0"), tokens.to("cuda:0")).cpu())
    assert features[0].any() and torch.equal(*features)


def test_run_goes_from_cpu_to_cuda_and_back(tiny_dataset, tiny_clip, tmp_path):
    settings = {"precision": "fp32", "save_every": 1, "method": "global", "global_epochs": 1, "num_epochs": 1}
    on_cpu, on_device = (tiny_arguments(tiny_dataset, tiny_clip, tmp_path, device=name, **settings) for name in ("cpu", "cuda:0"))
    with PretendedCuda():
        for arguments in (on_cpu, on_device):
            run_interrupted(arguments, "update", 3, owner=Trainer)
        run_script(on_cpu)


def test_pretended_device_refuses_two_devices_and_records_waits():
    with PretendedCuda() as cuda, cuda.phase("rules"):
        table, rows = torch.ones(3, device="cuda:0"), torch.tensor([0, 2])
        for operation in (lambda: table + torch.ones(3), lambda: torch.ones(3)[rows.to("cuda:0")], table.numpy):
            with pytest.raises((RuntimeError, TypeError)):
                operation()
        before = cuda.waits.total()
        table[table > 0], table[rows], table.sum().item(), table.cpu(), rows.to("cuda:0", non_blocking=True)
        rows.pin_memory().to("cuda:0", non_blocking=True)
    assert cuda.waits.total() == before + 5
