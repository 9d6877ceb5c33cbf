"""The text encoder equals the original T5 on golden vectors; prompts are cleaned, cut, cached and refused as they should be."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from longlive.checkpoints import convert, store
from longlive.models.text import TextEncoder, embed, normalize_prompt

GOLDEN = Path(__file__).parents[1] / "golden"
SENTENCE = "a red cat walks slowly over the green hill while it rains and then sun comes out again to shine"


def word_tokenizer() -> Tokenizer:
    """One token a word, `</s>` at the end: the vocabulary of the golden encoder has 64 entries."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *dict.fromkeys(SENTENCE.split())])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


@pytest.fixture
def folder(tmp_path):
    torch.save(load_file(GOLDEN / "text_encoder_weights.safetensors"), tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    (tmp_path / "google" / "umt5-xxl").mkdir(parents=True)
    word_tokenizer().save(str(tmp_path / "google" / "umt5-xxl" / "tokenizer.json"))
    tokens = {"tokenizer_class": "T5Tokenizer", "pad_token": {"content": "<pad>"}, "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "google" / "umt5-xxl" / "tokenizer_config.json").write_text(json.dumps(tokens))
    return tmp_path


def text_encoder(folder, **settings) -> TextEncoder:
    encoder, tokenizer = store.load_text_encoder(folder)
    return TextEncoder(encoder, tokenizer, **{"text_len": 12, **settings})


def test_original_t5_reproduces_the_golden_vectors(folder):
    encoder, _ = store.load_text_encoder(folder)
    golden = load_file(GOLDEN / "text_encoder.safetensors")
    text = embed(encoder, golden["ids"], golden["mask"])
    assert (text - golden["prompt_embeds"]).abs().max() < 2e-4
    assert (text[golden["mask"] == 0] == 0).all()


def test_a_prompt_alone_without_padding_equals_a_padded_batch(folder):
    text = text_encoder(folder)
    prompts = ["a red cat walks", "the sun comes out again to shine"]
    tokens = text.tokenizer(prompts, padding="max_length", max_length=12, return_tensors="pt")
    assert torch.allclose(text.encode(prompts), embed(text.encoder, tokens.input_ids, tokens.attention_mask), atol=1e-5)


def test_t5_names_go_both_ways_and_tied_weights_stay_tied(folder):
    weights = load_file(GOLDEN / "text_encoder_weights.safetensors")
    encoder, _ = store.load_text_encoder(folder)
    assert encoder.encoder.embed_tokens.weight is encoder.shared.weight
    back = convert.text_to_wan(encoder.state_dict())
    assert back.keys() == weights.keys() and all(torch.equal(back[name], weights[name]) for name in weights)


def test_transformers_own_folder_gives_the_same_encoder(folder, tmp_path_factory):
    encoder, tokenizer = store.load_text_encoder(folder)
    other = tmp_path_factory.mktemp("diffusers")
    encoder.save_pretrained(other / "text_encoder")
    tokenizer.save_pretrained(other / "tokenizer")
    one, two = text_encoder(folder), text_encoder(other)
    assert torch.equal(one.encode(["a red cat"]), two.encode(["a red cat"]))


def test_dtype_is_kept_as_stored_or_as_asked(folder):
    encoder, _ = store.load_text_encoder(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.bfloat16}
    text = TextEncoder(encoder, PreTrainedTokenizerFast(tokenizer_object=word_tokenizer()), text_len=12)
    assert text.encode(["a cat"]).dtype == torch.bfloat16
    assert text.to(dtype=torch.float32).encode(["a cat"]).dtype == torch.float32


def test_prompts_are_cleaned_as_wan_was_trained():
    assert normalize_prompt("  the Mona Lisa doesnâ€™t\n\t smile &amp;amp; waits ") == "the Mona Lisa doesn't smile & waits"


def test_an_empty_prompt_is_refused(folder):
    with pytest.raises(ValueError, match="prompt 2 of 2 is empty"):
        text_encoder(folder).encode(["a cat", " &nbsp; \n"])


def test_a_long_prompt_is_cut_and_the_warning_says_where(folder, caplog):
    text = text_encoder(folder, text_len=6)
    with caplog.at_level(logging.WARNING):
        long = text.encode(["a red cat walks slowly over the green hill"])
    assert 'has 10 tokens and the model reads 6: cut after "…a red cat walks slowly", "over the green hill…" is not read' in caplog.text
    assert torch.equal(long, text.encode(["a red cat walks slowly"]))
    assert long.shape == (1, 6, 32)


def test_a_prompt_that_just_fits_is_not_cut(folder, caplog):
    text_encoder(folder, text_len=6).encode(["a red cat walks slowly"])
    assert not caplog.records


def test_results_are_remembered_and_the_oldest_forgotten(folder, monkeypatch):
    text = text_encoder(folder, cached_prompts=2)
    encoded = []
    encode_new = text._encode_new
    monkeypatch.setattr(text, "_encode_new", lambda prompts: (encoded.extend(prompts), encode_new(prompts))[1])
    first = text.encode(["a cat", "a hill", "a  cat"])
    assert encoded == ["a cat", "a hill"] and torch.equal(first[0], first[2])
    text.encode(["a cat"])
    text.encode(["the sun"])
    text.encode(["a cat"])
    assert encoded == ["a cat", "a hill", "the sun"]
    text.encode(["a hill"])
    assert encoded[-1] == "a hill"


def test_on_demand_gives_the_same_and_leaves_the_weights_where_they_were(folder):
    text = text_encoder(folder, mode="on_demand")
    before = [parameter.data_ptr() for parameter in text.encoder.parameters()]
    assert torch.equal(text.encode(["a cat"]), text_encoder(folder).encode(["a cat"]))
    assert [parameter.data_ptr() for parameter in text.encoder.parameters()] == before
    with pytest.raises(ValueError, match="on_demand"):
        text_encoder(folder, mode="lazy")


def test_an_encoder_on_the_cpu_stays_there(folder):
    text = text_encoder(folder, mode="cpu", device="meta")
    assert text.encode(["a cat"]).device.type == "meta" and text.encoder.device.type == "cpu"
