"""Train a small CLIP on images and titles in about a minute and save it as an ordinary CLIPModel folder."""
import functools
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPTokenizerFast
from transformers.image_processing_utils import BaseImageProcessor

from models.clip_peft import channel_statistics
from models.towers import dual_features
from utils.common.errors import PerPEFTError
from utils.common.files import folder_written_atomically
from utils.data.images import on_all_cores
from utils.data.problems import Problems, format_image_problem
from utils.items.preprocessing import read_image
from utils.prepare.small_tokenizer import train_tokenizer

IMAGE_SIZE = 48  # pixels a side; in patches of 16 these are 9, so that an image costs about as much as its title
PROJECTION_DIM = 64
STEPS = 1000  # about a minute on 2 CPU cores
BATCH_SIZE = 128
LEARNING_RATE = 1.5e-3  # a model this small stands a high rate, and in so few steps needs it
WARM_UP_SHARE = 0.1  # of the steps, before the rate falls in a half cosine
WEIGHT_DECAY = 0.1
LARGEST_SHIFT = 0.08  # of an image's side, for images that are varied
LARGEST_GRADIENT = 1.0  # norm; without it, one bad step at such a rate can end in a plateau
LARGEST_LOGIT_SCALE = 4.6052  # ln 100, as in CLIP: beyond it the loss becomes unstable
HELD_OUT = 100  # pairs kept from training to measure retrieval (a tenth, of fewer than 1,000)
NEAR_CHANCE = 2  # times as often as by guessing, or less: such a model has learned nothing
FEWEST_PAIRS = 20  # of which 2 are held out


@dataclass(frozen=True)
class Sizes:
    """Sizes of a small CLIP: pixels a side of images and of patches; width, layers and attention heads of both towers.

    With 2 layers of width 64 a LoRA step over 170 items takes about 35 ms on 2 CPU cores, with 4 layers twice that, for no clear
    gain in retrieval after as many steps. A size that is no multiple of its part is a PerPEFTError.
    """

    image_size: int = IMAGE_SIZE
    patch_size: int = 16
    width: int = 64
    layers: int = 2
    heads: int = 4

    def __post_init__(self):
        for larger, smaller in (("image_size", "patch_size"), ("width", "heads")):
            whole, part = getattr(self, larger), getattr(self, smaller)
            if whole % part:
                raise PerPEFTError(f"{larger} {whole} is no multiple of {smaller} {part}; choose one that is")


SMALL = Sizes()
_channel_statistics = functools.cache(lambda: channel_statistics(image_processor()))  # the same at every size


def image_processor(image_size: int = IMAGE_SIZE) -> BaseImageProcessor:
    """CLIP's own image preparation (bicubic, centre crop, CLIP's mean and deviation) at another size."""
    from transformers import CLIPImageProcessor  # transformers 5 prints a remark on torchvision where it is imported

    return CLIPImageProcessor(size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size})


def read_images(paths: list[Path], image_size: int = IMAGE_SIZE) -> torch.Tensor:
    """Read the images of item 1, 2, ... as the small CLIP's own processor does: uint8 [images, 3, image_size, image_size].

    Raises:
        PerPEFTError: images cannot be read; it names the first of them.
    """
    processor = image_processor(image_size)
    images = np.empty((len(paths), 3, image_size, image_size), dtype=np.uint8)
    problems = Problems()
    found = on_all_cores(lambda path: read_image(path, processor), paths)
    for row, image in enumerate(tqdm(found, "images", len(paths), unit="image", disable=None)):
        if isinstance(image, np.ndarray):
            images[row] = image
        else:
            named = format_image_problem(paths[row], row + 1, image)
            problems.add("unreadable images (replace them, or leave their items out)", [named])
    problems.raise_any("a small CLIP cannot be trained on these images:")
    return torch.from_numpy(images)


def train_small_clip(
    images: torch.Tensor, titles: Sequence[str], folder: str | Path, sizes: Sizes = SMALL, *,
    seed: int = 0, steps: int = STEPS, batch_size: int = BATCH_SIZE, vary: bool = True,
) -> dict[str, float]:  # fmt: skip
    """Train a small CLIPModel contrastively on images and their titles, and save it with its tokenizer and processor.

    The folder is one that `CLIPModel`, `CLIPImageProcessor` and `AutoTokenizer` open by from_pretrained. It appears when
    training is done, in place of what was there. On one machine, the same arguments lead to the same weights.

    Args:
        images: uint8 [pairs, 3, image_size, image_size], from `read_images`.
        titles: one an image; the same title may stand at many.
        vary: whether to shift and mirror images at random in every step, so that a few thousand are not memorised.
    Returns:
        `image_to_title` and `title_to_image`, the shares of `held_out` unseen pairs whose partner comes first among all of
        theirs, `chance`, the share that guessing finds, `first_loss`, `last_loss`, `parameters` and `seconds`.
    Raises:
        PerPEFTError: the pairs are too few.
    """
    if len(titles) < FEWEST_PAIRS:
        raise PerPEFTError(f"{len(titles)} images with titles are too few to train a CLIP on; it takes {FEWEST_PAIRS} or more")
    start = time.monotonic()
    tokenizer = train_tokenizer(titles)
    encoded = tokenizer(list(titles), truncation=True, padding=True, return_tensors="pt")
    tokens = encoded["input_ids"]  # [pairs, longest title]
    lengths = encoded["attention_mask"].sum(1)  # [pairs]
    _, title_numbers = torch.unique(tokens, dim=0, return_inverse=True)  # [pairs]: the same number, the same title
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(titles), generator=random)
    num_held_out = min(HELD_OUT, len(titles) // 10)
    held_out, training = order[:num_held_out], order[num_held_out:]

    model = _new_model(tokenizer, sizes, seed)
    optimizer = _optimizer(model)
    losses = []
    bar = tqdm(range(steps), "Training a small CLIP", unit="step", leave=False, disable=None)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * _rate_share(step, steps)
        rows = training[torch.randperm(len(training), generator=random)[:batch_size]]  # [batch]
        seen = _varied(images[rows], random) if vary else images[rows]  # [batch, 3, image_size, image_size]
        similarity = _similarity(model, seen, tokens[rows, : lengths[rows].max()])  # [batch images, batch titles]
        loss = contrastive_loss(model.logit_scale.exp() * similarity, title_numbers[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), LARGEST_GRADIENT)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=LARGEST_LOGIT_SCALE)
        losses.append(loss.item())
        bar.set_postfix(loss=f"{np.mean(losses[-20:]):.3f}", refresh=False)

    with torch.inference_mode():
        similarity = _similarity(model, images[held_out], tokens[held_out])  # [held-out images, held-out titles]
    result = retrieval(similarity, title_numbers[held_out])
    result |= {"held_out": num_held_out, "first_loss": losses[0], "last_loss": float(np.mean(losses[-20:]))}
    result |= {"parameters": model.num_parameters(), "seconds": time.monotonic() - start}
    with folder_written_atomically(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        image_processor(sizes.image_size).save_pretrained(temporary)
    print(
        f"Small CLIP, {result['parameters']:,} parameters, {result['seconds']:.0f} s: among {num_held_out} unseen pairs"
        f" it finds the title of {result['image_to_title']:.0%} of the images and the image of"
        f" {result['title_to_image']:.0%} of the titles (chance {result['chance']:.0%}); saved in {folder}"
    )
    if max(result["image_to_title"], result["title_to_image"]) <= NEAR_CHANCE * result["chance"]:
        print("warning: this CLIP has learned nothing from these images: use a pretrained one", file=sys.stderr)
    return result


def _new_model(tokenizer: CLIPTokenizerFast, sizes: Sizes, seed: int) -> CLIPModel:
    tower = {
        "hidden_size": sizes.width,
        "intermediate_size": 2 * sizes.width,  # 4 times is usual; half of it spares a sixth of a step
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "projection_dim": PROJECTION_DIM,
        "hidden_act": "gelu",  # one operation, where CLIP's quick_gelu is three
    }
    # The EOS id tells CLIPModel which token to pool; left out, it would be 2, which means "the largest id" to transformers.
    specials = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = CLIPConfig(
        text_config={**tower, **specials, "vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length},
        vision_config={**tower, "image_size": sizes.image_size, "patch_size": sizes.patch_size},
        projection_dim=PROJECTION_DIM,
    )
    with torch.random.fork_rng(devices=[]):  # transformers draws weights from the global generator; the caller's goes on
        torch.manual_seed(seed)
        model = CLIPModel(config)
        # transformers starts these at 0.02, which suits long training: larger, a small model finds its words and places in
        # hundreds of steps instead of thousands
        for tower in (model.text_model, model.vision_model):
            tower.embeddings.position_embedding.weight.data.normal_(std=0.2)
        model.text_model.embeddings.token_embedding.weight.data.normal_(std=0.2)
    return model.train()


def _optimizer(model: CLIPModel) -> torch.optim.AdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    others = [parameter for parameter in model.parameters() if parameter.dim() < 2]  # biases, norms, the logit scale
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98))


def _rate_share(step: int, steps: int) -> float:
    """The share of the highest learning rate in a step: rising in a line, then falling in a half cosine to 0."""
    warm_up = max(1, round(WARM_UP_SHARE * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + float(np.cos(np.pi * (step - warm_up) / max(1, steps - warm_up))))


def _similarity(model: CLIPModel, images: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Cosine of every image [p, 3, size, size] with every title [t, length]: [p, t]."""
    scale, shift = _channel_statistics()
    image = dual_features(model, images.float() * scale + shift, None)  # [p, projection]
    title = dual_features(model, None, tokens)  # [t, projection]
    return image @ title.T


def _varied(images: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Shift a batch of images [batch, 3, size, size] by a few pixels, edges repeated, and mirror a random half of it."""
    size = images.shape[-1]
    reach = round(LARGEST_SHIFT * size)
    top, left = torch.randint(2 * reach + 1, (2,), generator=random).tolist()
    mirrored = torch.rand(len(images), 1, 1, 1, generator=random) < 0.5
    images = torch.where(mirrored, images.flip(-1), images)
    padded = F.pad(images.float(), (reach,) * 4, mode="replicate")  # [batch, 3, size + 2 reach, size + 2 reach]
    return padded[:, :, top : top + size, left : left + size]


def contrastive_loss(logits: torch.Tensor, title_numbers: torch.Tensor) -> torch.Tensor:
    """CLIP's symmetric InfoNCE, in which every pair with the same title counts as a match, so that none is a false negative.

    Args:
        logits: scaled cosines, [batch images, batch titles].
        title_numbers: the same number for the same title, [batch].
    """
    same = (title_numbers[:, None] == title_numbers[None, :]).float()  # [batch, batch], symmetric
    target = same / same.sum(1, keepdim=True)  # each row a distribution over its matches
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def retrieval(similarity: torch.Tensor, title_numbers: torch.Tensor) -> dict[str, float]:
    """Top-1 retrieval in both directions, and chance, as shares of the pairs; of those with the same title, all are right.

    Args:
        similarity: [images, titles], pair i at (i, i).
        title_numbers: the same number for the same title, [pairs].
    """
    same = (title_numbers[:, None] == title_numbers[None, :]).float()  # [pairs, pairs]
    return {
        "image_to_title": same.gather(1, similarity.argmax(1, keepdim=True)).mean().item(),
        "title_to_image": same.gather(1, similarity.T.argmax(1, keepdim=True)).mean().item(),
        "chance": same.mean().item(),
    }
