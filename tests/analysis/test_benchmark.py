"""The benchmark's plain baselines compute the same as the project's own ways, and its JSON holds what is promised."""
import json

import numpy as np
import torch

from models import IISAN
from scripts import benchmark as script
from tests.conftest import run_script
from utils.analysis.baselines import PlainIISAN, plain_ranking_loop
from utils.data.histories import Histories
from utils.training.evaluation import rank_targets


def test_plain_ranking_loop_computes_the_same_ranks():
    random = np.random.default_rng(0)
    histories = Histories.of_lists([random.integers(1, 31, size=random.integers(1, 9)).tolist() for _ in range(12)])
    states, inputs = torch.from_numpy(random.normal(size=(12, 4))), torch.from_numpy(random.normal(size=(31, 4)))
    targets, users = random.integers(1, 31, size=12), np.arange(12)
    plain = plain_ranking_loop(states, inputs, targets, histories, users)
    assert plain.tolist() == rank_targets(states, inputs, targets, histories, users).tolist()
    assert len(set(plain.tolist())) > 3


def test_plain_iisan_computes_the_same_from_the_same_weights():
    torch.manual_seed(0)
    ours, plain = (kind(6, 5, 3, bottleneck=4).double() for kind in (IISAN, PlainIISAN))
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_()
        for weight, copied in zip(ours.state_dict().values(), plain.state_dict().values(), strict=True):  # in the same order
            copied.copy_(weight)
    image_states, text_states = torch.randn(7, 3, 6).double(), torch.randn(7, 3, 5).double()
    torch.testing.assert_close(plain(image_states, text_states), ours(image_states, text_states))


def test_json_holds_the_promised_ratios(tiny_dataset, tiny_clip, tmp_path, monkeypatch):
    path = tmp_path / "figures.json"
    monkeypatch.setattr(script, "SIZES", (40, 80))
    monkeypatch.setattr(script, "CATALOGUE_ITEMS", 50)
    arguments = ["--dataset", tiny_dataset.name, "--train_dir", tiny_dataset.train_dir, "--clip_model", tiny_clip]
    run_script([*arguments, "--device", "cpu", "--repeats", "1", "--json", path], script.main)
    figures = json.loads(path.read_text())
    for peft_type in ("lora", "ia3", "iisan"):
        for name in ("step_over_bare_encoder", "encode_over_bare_encoder", "personalized_step_over_bare_encoder", "sampling_ms"):
            assert figures[peft_type][name] > 0
        assert 8 <= figures[peft_type]["items"] <= 30
    for name in ("ranking_over_plain_loop", "sampling_ms_at_1m_users", "store_over_decoding_every_step", "peak_memory_mib"):
        assert figures[name] > 0
    assert figures["ranking"]["beside_plain_loop"]["plain_ms_per_user"] > 0
    assert set(figures["item_table"]) == {"40_items", "80_items"}
