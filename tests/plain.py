"""A saved model and its rankings by peft, transformers and loops alone, one user after another."""
from types import SimpleNamespace

import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from models import SASRec
from tests.conftest import NUM_ITEMS

ITEMS = range(1, NUM_ITEMS + 1)


def clip_inputs(dataset, clip, items=ITEMS):
    """Images and titles of items by CLIP's own processors."""
    images = [Image.open(dataset.train_dir / "tiny_images" / f"B{item:03d}.jpg") for item in items]
    titles = [dataset.titles[item - 1] or "No description available." for item in items]
    inputs = AutoImageProcessor.from_pretrained(clip, use_fast=False)(images, return_tensors="pt")
    tokenizer = AutoTokenizer.from_pretrained(clip)
    return inputs | tokenizer(titles, padding=True, truncation=True, max_length=16, return_tensors="pt")


@torch.no_grad()
def clip_features(model, inputs):
    """CLIP's image and title embeddings side by side, [items, 2 * projection_dim]."""
    output = model.eval()(**inputs)
    return torch.cat([output.image_embeds, output.text_embeds], 1)


@torch.no_grad()
def plain_model(folder, where, dataset, clip):
    """SASRec of a stage's folder, and P and e of all items by the adapter and the projector in `where`."""
    sasrec = SASRec(NUM_ITEMS).eval()
    sasrec.load_state_dict(torch.load(folder / "sasrec.pth", weights_only=True))
    adapted = PeftModel.from_pretrained(CLIPModel.from_pretrained(clip), where / "adapter")
    weights = torch.load(where / "projector.pth", weights_only=True)
    x = torch.cat([torch.zeros(1, 32), clip_features(adapted, clip_inputs(dataset, clip))])
    x = x @ weights["projector.0.weight"].T + weights["projector.0.bias"]
    x = torch.layer_norm(x, (64,), weights["projector.1.weight"], weights["projector.1.bias"], 1e-8).relu()
    x = x @ weights["projector.3.weight"].T + weights["projector.3.bias"]
    P = torch.layer_norm(x, (32,), weights["last_layernorm.weight"], weights["last_layernorm.bias"], 1e-8)
    return with_vectors(sasrec, P)


def with_vectors(sasrec, P):
    """A model of SASRec and items' projected vectors."""
    return SimpleNamespace(sasrec=sasrec, P=P, e=0.5 * P + sasrec.item_emb.weight.detach())


@torch.no_grad()
def plain_state(model, history):
    """The state of a user with this history."""
    maxlen = model.sasrec.pos_emb.num_embeddings - 1
    return model.sasrec.states(torch.tensor([([0] * maxlen + history)[-maxlen:]]), model.P)[0, -1]


def naive_rank(scores, target, excluded):
    """Other candidates that score at least as high; scores[item] for items 1.., excluded items are no candidates."""
    others = [item for item in range(1, len(scores)) if item != target and item not in excluded]
    return sum(1 for item in others if not scores[item] < scores[target])


def plain_ranks(model_of, histories):
    """{user: (valid rank, test rank)} of the users with held-out items; `model_of(user)` and the histories are by user."""
    ranks = {}
    for user, items in histories.items():
        if len(items) >= 3:
            model = model_of(user)
            ranks[user] = tuple(
                naive_rank((model.e @ plain_state(model, items[:-held_out])).tolist(), items[-held_out], items[:-held_out])
                for held_out in (2, 1)
            )
    return ranks
