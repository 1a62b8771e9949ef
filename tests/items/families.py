"""Small dual encoders of every kind in transformers, and pairs of encoders, with random weights and their own processors."""
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from models.clip_peft import ClipPeftEncoder
from models.peft_configs import peft_config
from models.towers import layers_of
from tests.conftest import tiny_titles
from utils.items.model_files import PairName

WORDS = sorted({word for title in tiny_titles() if title for word in title.split()} | {"no", "description", "available", "."})
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL = {"image_size": 32, "patch_size": 16}
SQUARE = {"height": 32, "width": 32}
PROJECTED = {"projection_dim": 16}
RESIZED, CROPPED = {"size": SQUARE}, {"size": {"shortest_edge": 32}, "crop_size": SQUARE}
ROLES = {
    "[PAD]": "pad_token", "[UNK]": "unk_token", "[CLS]": "cls_token", "[SEP]": "sep_token", "[MASK]": "mask_token",
    "<pad>": "pad_token", "<unk>": "unk_token", "<s>": "bos_token", "</s>": "eos_token",
}  # fmt: skip
TOKENIZERS = {  # special tokens before the words and after them, and the form of a title
    "bert": ("[PAD] [UNK] [CLS] [SEP] [MASK]", "", "[CLS] $A [SEP]"),
    "roberta": ("<s> <pad> </s> <unk>", "", "<s> $A </s>"),
    "siglip": ("<unk> </s>", "", "$A </s>"),  # which pads by its end of text
    "clip": ("<pad> <unk> <s>", "</s>", "<s> $A </s>"),  # the end of text has the highest number
}

EFFICIENT = {
    "image_size": 32, "hidden_dim": 320, "in_channels": [32, 16], "out_channels": [16, 64], "kernel_sizes": [3, 3],
    "strides": [1, 2], "depthwise_padding": [], "num_block_repeats": [1, 1], "expand_ratios": [1, 2], "width_coefficient": 0.25,
    "depth_coefficient": 1.0, "num_hidden_layers": 8,
}  # fmt: skip
GROUPS = {"depths": [1, 1], "num_group_tokens": [4, 0], "num_output_groups": [4, 2], "assign_mlp_ratio": [0.5, 4]}
CODES = {"num_groups": 2, "hidden_size": 8, "vocab_size": 32}
FUSED = {"hidden_size": 32, "multimodal_config": TOWER, "image_codebook_config": CODES}
LARGER = {"hidden_size": 48, "num_hidden_layers": 4, "image_size": 28, "patch_size": 14, "hidden_act": "gelu"}  # twice as deep
CROPPED_28 = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}, "image_mean": [0.4, 0.5, 0.6]}
CROPPED_48 = {"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}}
SCALED = RESIZED | {"rescale_offset": True, "include_top": False}
UNCROPPED = RESIZED | {"do_center_crop": False}
VIT, VIT_AND_BERT = ("ViTImageProcessor", RESIZED), ({"model_type": "vit"}, {"model_type": "bert"}, PROJECTED)
# By transformers' model_type: the class, its tokenizer, its image processor and that one's settings; where they are not the
# usual ones, settings of the image tower, of the text tower, and of both.
FAMILIES = {
    "clip": ("CLIP", "clip", "CLIPImageProcessor", CROPPED),
    "larger clip": ("CLIP", "clip", "CLIPImageProcessor", CROPPED_28, LARGER, {}, {"projection_dim": 24}),  # ViT-L/14 in small
    "siglip": ("Siglip", "siglip", "SiglipImageProcessor", RESIZED, {}, {"projection_size": 32}, {}),
    "chinese_clip": ("ChineseCLIP", "bert", "ChineseCLIPImageProcessor", UNCROPPED),
    "altclip": ("AltCLIP", "roberta", "CLIPImageProcessor", CROPPED, {}, {"project_dim": 24}),
    "align": ("Align", "bert", "EfficientNetImageProcessor", SCALED, EFFICIENT, {}, {"projection_dim": 320}),
    "blip": ("Blip", "bert", "BlipImageProcessor", RESIZED),
    "clipseg": ("CLIPSeg", "clip", *VIT),
    "flava": ("Flava", "bert", "FlavaImageProcessor", RESIZED | {"crop_size": SQUARE}, {}, {}, PROJECTED | FUSED),
    "groupvit": ("GroupViT", "clip", "CLIPImageProcessor", CROPPED, GROUPS, {}, {**PROJECTED, "projection_intermediate_dim": 24}),
    "owlvit": ("OwlViT", "clip", "OwlViTImageProcessor", UNCROPPED),
    "owlv2": ("Owlv2", "clip", "OwlViTImageProcessor", UNCROPPED),
    "vision-text-dual-encoder": ("VisionTextDualEncoder", "bert", *VIT, *VIT_AND_BERT),
    # of transformers 5
    "metaclip_2": ("MetaClip2", "clip", "CLIPImageProcessor", CROPPED),
    "aimv2": ("Aimv2", "clip", "CLIPImageProcessor", CROPPED),
    "tipsv2": ("Tipsv2", "siglip", "CLIPImageProcessor", CROPPED, {}, {}, {}),
}
AVAILABLE = [name for name, family in FAMILIES.items() if hasattr(transformers, f"{family[0]}Model")]  # in what is installed
# Single encoders: the class, its settings beside a tower's, its options, and its image processor if it has one.
ENCODERS = {
    "vit": ("ViT", SMALL, {"add_pooling_layer": False}, *VIT),
    "dinov2": ("Dinov2", SMALL | {"mlp_ratio": 2}, {}, "BitImageProcessor", CROPPED_48),  # which interpolates positions
    "siglip": ("SiglipVision", SMALL, {}, *VIT),
    "bert": ("Bert", {"hidden_size": 24}, {"add_pooling_layer": False}),
    "distilbert": ("DistilBert", {"hidden_size": 24, "num_hidden_layers": 4, "hidden_dim": 48}, {}),
}
PAIRS = ("vit + bert (mean)", "vit + bert (cls)", "dinov2 + distilbert (mean)", "siglip + bert (mean)")


def save_tokenizer(kind, folder):
    """Save a word-level tokenizer that writes titles as a family's does; returns the settings of a model that reads them."""
    before, after, form = TOKENIZERS[kind]
    vocabulary = {word: number for number, word in enumerate([*before.split(), *WORDS, *after.split()])}
    roles = {"pad_token": "</s>"} | {ROLES[word]: word for word in vocabulary if word in ROLES}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, roles["unk_token"]))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    around = [(word, vocabulary[word]) for word in form.split() if word != "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(single=form, special_tokens=around)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16, **roles)
    tokenizer.save_pretrained(folder)
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id} if tokenizer.eos_token_id else {}
    positions = 18 if kind == "roberta" else 16  # two are reserved there
    return {"vocab_size": len(tokenizer), "max_position_embeddings": positions, "pad_token_id": tokenizer.pad_token_id, **ends}


@torch.random.fork_rng(devices=[])
def save_model(prefix, folder, settings, **options):
    """Save a model of transformers with the same random weights every time."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**settings)
    getattr(transformers, f"{prefix}Model")(config, **options).save_pretrained(folder)


def save_encoder(name, folder):
    prefix, settings, options, *image_processor = ENCODERS[name]
    if image_processor:
        processor, form = image_processor
        getattr(transformers, processor)(**form).save_pretrained(folder)
    else:
        settings = save_tokenizer("bert", folder) | settings
    save_model(prefix, folder, TOWER | settings, **options)
    return str(folder)


def seeded(name, folder):
    """Save a family's small model, or a pair's two, with the same weights every time; returns what `load_foundation` takes."""
    if name in PAIRS:
        image, _, text, pooling = name.split()
        return PairName(save_encoder(image, folder / image), save_encoder(text, folder / text), pooling.strip("()"))
    prefix, tokenizer, processor, form, *special = FAMILIES[name]
    vision, text, both = [*special, *({}, {}, PROJECTED)[len(special) :]]
    towers = {"text_config": TOWER | save_tokenizer(tokenizer, folder) | text}
    towers["image_config" if name == "flava" else "vision_config"] = TOWER | SMALL | PROJECTED | vision
    save_model(prefix, folder, towers | both)
    getattr(transformers, processor)(**form).save_pretrained(folder)
    return str(folder)


def encoder_of(foundation, kind="lora", **options):
    config = peft_config(kind, layers=layers_of(foundation.clip))
    return ClipPeftEncoder(foundation.clip, config, foundation.image_processor, traits=foundation.traits, **options).eval()
