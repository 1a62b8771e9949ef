"""A small dual encoder of every kind in transformers, with random weights and its own kind of processor and tokenizer."""

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoModel, PreTrainedTokenizerFast

from models.clip_peft import ClipPeftEncoder
from models.peft_configs import peft_config
from models.towers import layers_of
from tests.conftest import tiny_titles

WORDS = sorted({word for title in tiny_titles() if title for word in title.split()} | {"no", "description", "available", "."})
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL = {"image_size": 32, "patch_size": 16}
SQUARE = {"height": 32, "width": 32}
PROJECTED = {"projection_dim": 16}
RESIZED, CROPPED = {"size": SQUARE}, {"size": {"shortest_edge": 32}, "crop_size": SQUARE}
BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
BERT_NAMES = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), BERT))
ROBERTA_NAMES = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "cls_token": "<s>"}
CLIP_NAMES = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
TOKENIZERS = {  # special tokens before the words and after them, the form of a title, and what they are for
    "bert": (BERT, (), "[CLS] $A [SEP]", BERT_NAMES),
    "roberta": (("<s>", "<pad>", "</s>", "<unk>"), (), "<s> $A </s>", ROBERTA_NAMES),
    "siglip": (("<pad>", "</s>", "<unk>"), (), "$A </s>", {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "</s>"}),
    "clip": (("<pad>", "<unk>", "<s>"), ("</s>",), "<s> $A </s>", CLIP_NAMES),  # the end of text has the highest number
}


def save_tokenizer(kind, folder):
    """Save a word-level tokenizer that writes titles as a family's does; returns it."""
    before, after, form, names = TOKENIZERS[kind]
    vocabulary = {word: number for number, word in enumerate([*before, *WORDS, *after])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, names["unk_token"]))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    around = [(word, vocabulary[word]) for word in (*before, *after) if word in form]
    tokenizer.post_processor = processors.TemplateProcessing(single=form, special_tokens=around)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16, **names)
    tokenizer.save_pretrained(folder)
    return tokenizer


EFFICIENT = {
    "image_size": 32, "hidden_dim": 320, "in_channels": [32, 16], "out_channels": [16, 64], "kernel_sizes": [3, 3],
    "strides": [1, 2], "depthwise_padding": [], "num_block_repeats": [1, 1], "expand_ratios": [1, 2], "width_coefficient": 0.25,
    "depth_coefficient": 1.0, "num_hidden_layers": 8,
}  # fmt: skip
GROUPS = {"depths": [1, 1], "num_group_tokens": [4, 0], "num_output_groups": [4, 2], "assign_mlp_ratio": [0.5, 4]}
LARGER = {"hidden_size": 48, "num_hidden_layers": 4, "image_size": 28, "patch_size": 14, "hidden_act": "gelu"}  # twice as deep
CROPPED_28 = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}, "image_mean": [0.4, 0.5, 0.6]}
SCALED = RESIZED | {"rescale_offset": True, "include_top": False}
UNCROPPED = RESIZED | {"do_center_crop": False}
# By transformers' model_type: the class, its tokenizer, its image processor and that one's settings; where they are not the
# usual ones, settings of the image tower, of the text tower, and of both.
FAMILIES = {
    "clip": ("CLIP", "clip", "CLIPImageProcessor", CROPPED),
    "larger clip": ("CLIP", "clip", "CLIPImageProcessor", CROPPED_28, LARGER, {}, {"projection_dim": 24}),  # ViT-L/14 in small
    "siglip": ("Siglip", "siglip", "SiglipImageProcessor", RESIZED, {}, {"projection_size": 32}, {}),
    "chinese_clip": ("ChineseCLIP", "bert", "ChineseCLIPImageProcessor", UNCROPPED),
    "altclip": ("AltCLIP", "roberta", "CLIPImageProcessor", CROPPED, {}, {"project_dim": 24}),
    "align": ("Align", "bert", "EfficientNetImageProcessor", SCALED, EFFICIENT, {}, {"projection_dim": 320}),
    "blip": ("Blip", "bert", "BlipImageProcessor", RESIZED, {}, {"projection_dim": 16}),
    "clipseg": ("CLIPSeg", "clip", "ViTImageProcessor", RESIZED),
    "flava": ("Flava", "bert", "FlavaImageProcessor", RESIZED | {"crop_size": SQUARE}),
    "groupvit": ("GroupViT", "clip", "CLIPImageProcessor", CROPPED, GROUPS, {}, {**PROJECTED, "projection_intermediate_dim": 24}),
    "owlvit": ("OwlViT", "clip", "OwlViTImageProcessor", UNCROPPED),
    "owlv2": ("Owlv2", "clip", "OwlViTImageProcessor", UNCROPPED),
    # of transformers 5
    "metaclip_2": ("MetaClip2", "clip", "CLIPImageProcessor", CROPPED),
    "aimv2": ("Aimv2", "clip", "CLIPImageProcessor", CROPPED),
    "tipsv2": ("Tipsv2", "siglip", "CLIPImageProcessor", CROPPED, {}, {}, {}),
}


@torch.random.fork_rng(devices=[])
def seeded(name, folder):
    """Save a family's small model with the same weights every time; returns the folder."""
    torch.manual_seed(0)
    if name == "vision-text-dual-encoder":
        return _save_own_pair(folder)
    prefix, tokenizer_kind, processor, form, *special = FAMILIES[name]
    vision, text, both = [*special, *({}, {}, PROJECTED)[len(special) :]]
    tokenizer = save_tokenizer(tokenizer_kind, folder)
    positions = 18 if tokenizer_kind == "roberta" else 16  # two are reserved there
    words = {"vocab_size": len(tokenizer), "max_position_embeddings": positions, "pad_token_id": tokenizer.pad_token_id}
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id} if tokenizer.eos_token_id else {}
    text, vision = TOWER | words | ends | text, TOWER | SMALL | PROJECTED | vision
    towers = {"text_config": text, "image_config" if name == "flava" else "vision_config": vision}
    if name == "flava":
        towers |= {"multimodal_config": TOWER, "image_codebook_config": {"num_groups": 2, "hidden_size": 8, "vocab_size": 32}}
        towers["hidden_size"] = 32
    config = getattr(transformers, f"{prefix}Config")(**towers, **both)
    if name == "altclip":
        config.text_config.project_dim = 24
    getattr(transformers, f"{prefix}Model")(config).save_pretrained(folder)
    getattr(transformers, processor)(**form).save_pretrained(folder)
    return folder


def _save_own_pair(folder):
    """A ViT and a BERT with projections, as `VisionTextDualEncoderModel` pairs them."""
    tokenizer = save_tokenizer("bert", folder)
    text = transformers.BertConfig(**TOWER, vocab_size=len(tokenizer), max_position_embeddings=16)
    towers = transformers.ViTConfig(**TOWER, **SMALL), text
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(*towers, projection_dim=16)
    AutoModel.from_config(config).save_pretrained(folder)
    transformers.ViTImageProcessor(**RESIZED).save_pretrained(folder)
    return folder


def available_families():
    """Those that the installed transformers has."""
    found = [name for name, family in FAMILIES.items() if hasattr(transformers, f"{family[0]}Model")]
    return [*found, "vision-text-dual-encoder"]


def encoder_of(foundation, kind="lora", **options):
    """A foundation model with adapters, in eval mode."""
    config = peft_config(kind, layers=layers_of(foundation.clip))
    return ClipPeftEncoder(foundation.clip, config, foundation.image_processor, traits=foundation.traits, **options).eval()
