"""CLIPs of other sizes by --clip_model: sizes come from their own settings."""
import json

import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

import perpeft_iisan
from tests.conftest import iisan_arguments, run_script, tiny_arguments, tiny_titles
from utils.prepare.small_tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def large_clip(tmp_path_factory):
    """ViT-L/14 in small: patches of 14, an image tower twice as deep and half as wide again as the title tower, plain GELU."""
    folder = tmp_path_factory.mktemp("clip") / "large"
    tokenizer = train_tokenizer([title for title in tiny_titles() if title], vocab_size=600, max_tokens=16)
    specials = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    tower = {"intermediate_size": 64, "num_attention_heads": 2, "projection_dim": 24, "hidden_act": "gelu"}
    text = {**tower, **specials, "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": len(tokenizer)}
    vision = {**tower, "hidden_size": 48, "num_hidden_layers": 4, "image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text | {"max_position_embeddings": 16}, vision_config=vision, projection_dim=24)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    CLIPImageProcessor(**size, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.25]).save_pretrained(folder)
    return folder


def test_lora_takes_its_sizes_from_the_clip(large_clip, tiny_dataset, tmp_path):
    run_script(tiny_arguments(tiny_dataset, large_clip, tmp_path, global_epochs=1, num_epochs=1))
    (folder,) = tmp_path.iterdir()
    counts = json.loads((folder / "summary.json").read_text())["trainable_parameters"]
    # rank 4, A and B of two square projections a layer: four layers 48 wide, two 32 wide
    assert counts["adapter_of_one_group"] == 2 * 2 * 4 * (4 * 48 + 2 * 32)
    projector = torch.load(folder / "global" / "projector.pth", weights_only=True)
    assert projector["projector.0.weight"].shape == (64, 2 * 24)


def test_iisan_takes_its_sizes_from_the_clip(large_clip, tiny_dataset, tmp_path):
    train_dir = tmp_path / "dataset"
    train_dir.mkdir()
    for path in tiny_dataset.train_dir.iterdir():
        if "_preX" not in path.name:  # another CLIP's hidden states may lie there
            (train_dir / path.name).symlink_to(path)
    options = {"train_dir": train_dir, "global_epochs": 1, "num_epochs": 1}
    perpeft_iisan.main(iisan_arguments(tiny_dataset, large_clip, tmp_path / "runs", **options))
    image_states, text_states, _ = torch.load(train_dir / "tiny_preX.pt", weights_only=True)
    assert (image_states.shape[1:], text_states.shape[1:]) == ((3, 48), (3, 32))  # layers 0, 2 and 4 of four, 0 to 2 of two
    (folder,) = (tmp_path / "runs").iterdir()
    projector = torch.load(folder / "global" / "projector.pth", weights_only=True)
    assert projector["projector.0.weight"].shape == (64, 32 + 48 + 32)
