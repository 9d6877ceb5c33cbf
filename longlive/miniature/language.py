"""The miniature's tokenizer and text encoder: the classes and conventions of Wan's at a smaller size.

Words of the world are one token each; any other text is split into letter pairs, letters and `<unk>`. Knows nothing of training.
"""

from __future__ import annotations

import json
import string
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from longlive.miniature.captions import COMMON, known_words

TEXT_LEN = 32  # tokens of a prompt that the transformer reads, `</s>` included
SPECIAL = ("<pad>", "</s>", "<unk>")  # ids 0, 1, 2 as in T5
PUNCTUATION = ".,:;!?'\"()-&"
# The most frequent letter pairs and endings of English.
PIECES = """
    th he in er an re on at en nd ti es or te of ed is it al ar st to nt ng se ha as ou io le ve co me de hi ri ro ic ne ea ra
    ce li ch ll be ma si om ur ing ion ent ver tion ly ter
""".split()  # noqa: SIM905


def vocabulary() -> list[str]:
    """Every token in the order of its id; "##" marks a piece that continues a word."""
    letters = [*string.ascii_lowercase]
    begin = [*SPECIAL, *PUNCTUATION, *string.digits, *letters, *known_words(), *COMMON, *PIECES]
    return list(dict.fromkeys(begin)) + [f"##{piece}" for piece in (*letters, *PIECES)]


def is_miniature(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a model with this tokenizer is one of this world: it has every word of the captions as one token."""
    return set(known_words()) <= tokenizer.get_vocab().keys()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Lower-cases, strips accents, splits at white space and at everything that is not a letter, ends with `</s>`, pads on the right."""
    tokens = {token: index for index, token in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordPiece(tokens, unk_token="<unk>", continuing_subword_prefix="##", max_input_chars_per_word=64))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(r"[a-z]+|[^\sa-z]"), behavior="isolated")  # an unknown character never makes its word unknown
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), words])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", tokens["</s>"])]
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="right", truncation_side="right",
        model_max_length=TEXT_LEN, model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def build_text_encoder(vocab_size: int, *, seed: int) -> UMT5EncoderModel:
    """An untrained UMT5 encoder of 64 channels and two layers, with weights that depend on `seed` alone."""
    config = UMT5Config(
        vocab_size=vocab_size, d_model=64, d_kv=16, num_heads=4, d_ff=128, num_layers=2, relative_attention_num_buckets=32,
        relative_attention_max_distance=64, feed_forward_proj="gated-gelu", dropout_rate=0.0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):  # transformers draws from the global generator
        torch.manual_seed(seed)
        return UMT5EncoderModel(config)


def save_language(folder: Path, encoder: UMT5EncoderModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write `tokenizer/` and `text_encoder/` as in a diffusers folder."""
    tokenizer.save_pretrained(folder / "tokenizer")
    settings = folder / "tokenizer" / "tokenizer_config.json"
    # transformers 5 writes a class name unknown to transformers 4; both know this one.
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n")
    encoder.save_pretrained(folder / "text_encoder")
