"""CLIP's kind of tokenizer, trained on titles."""
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizerFast

MAX_TITLE_TOKENS = 32  # longer titles are cut; a batch is padded only to its longest title, so short ones stay cheap
VOCAB_SIZE = 4096  # at most; a few hundred titles make far fewer
BOS, EOS = "<|startoftext|>", "<|endoftext|>"  # CLIP's own; EOS also pads, as in CLIP


def train_tokenizer(titles: Sequence[str], vocab_size: int = VOCAB_SIZE, max_tokens: int = MAX_TITLE_TOKENS) -> CLIPTokenizerFast:
    """Train CLIP's kind of tokenizer (lower case, byte-level BPE, words end in `</w>`) on titles.

    Every byte is in the vocabulary, so no text is unknown to it. BOS and EOS come last, as in CLIP. Of `vocab_size` tokens at
    most, 514 are the bytes, BOS and EOS. The same titles make the same tokenizer.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    last_letters = [letter + "</w>" for letter in letters]
    untrained = _clip_tokenizer([*letters, *last_letters, BOS, EOS], [], max_tokens).backend_tokenizer
    tokenizer = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = untrained.normalizer, untrained.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        initial_alphabet=letters,
        special_tokens=last_letters,  # numbered beforehand: numbered as met, their chance order would decide between merges
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(titles, trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    merged = dict.fromkeys("".join(pair) for pair in merges)  # without repeats, in order
    return _clip_tokenizer([*letters, *last_letters, *merged, BOS, EOS], merges, max_tokens)


def _clip_tokenizer(tokens: list[str], merges: list[tuple[str, str]], max_tokens: int) -> CLIPTokenizerFast:
    """CLIP's tokenizer from its two files, which is the one way in that sets up all of its text handling."""
    with tempfile.TemporaryDirectory() as folder:
        vocab_file, merges_file = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocab_file.write_text(json.dumps({token: number for number, token in enumerate(tokens)}), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
        merges_file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return CLIPTokenizerFast(str(vocab_file), str(merges_file), model_max_length=max_tokens)
