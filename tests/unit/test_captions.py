"""Captions say what they should and nothing else; every text, sensible or not, becomes tokens."""

import json
import re
from copy import deepcopy
from dataclasses import asdict

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from longlive.checkpoints import store
from longlive.config import LanguageConfig
from longlive.miniature.captions import (
    COMMON,
    NAMES,
    TEMPLATES,
    UNSEEN_TEMPLATES,
    canonical,
    caption,
    hint,
    known_words,
    parse,
    summary,
    understood,
    unknown_words,
)
from longlive.miniature.language import TEXT_LEN, build_text_encoder, build_tokenizer, is_miniature, save_language, vocabulary
from longlive.miniature.world import ATTRIBUTES, Captioned, all_captioned, held_out
from longlive.models.text import TextEncoder
from longlive.training.miniature.language import NOT_SAID, LanguageStage, corrupt, labels

SCENE = Captioned(shape="circle", color="red", background="black", motion="right")


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def captions():
    """Two captions of every combination: in the phrasings of training and in the others."""
    generator = torch.Generator().manual_seed(0)
    return [(scene, caption(scene, generator, templates=t)) for scene in all_captioned() for t in (TEMPLATES, UNSEEN_TEMPLATES)]


def test_a_caption_says_its_scene_and_nothing_else(captions):
    for scene, text in captions:
        assert parse(text) == asdict(scene), text
        assert not re.search(r"\ba [aeiou]|\s\s|[{}]", text.lower()), text


def test_canonical():
    assert canonical(SCENE) == "a red circle moving right on a black background"
    assert canonical(SCENE.with_one_change("motion", "still")) == "a red circle standing still on a black background"
    for scene in all_captioned():
        assert parse(canonical(scene)) == asdict(scene)


def test_no_word_means_two_things():
    phrases = [phrase for values in NAMES.values() for options in values.values() for phrase in options]
    assert len(phrases) == len(set(phrases))
    for name, values in NAMES.items():
        for value, options in values.items():
            assert all(parse(option) == {name: value} for option in options)
    assert not any(parse(word) for word in COMMON)


def test_what_is_understood_is_what_is_parsed():
    """One list, for tools and the page: all values of the world, and phrases that mean them."""
    for name, values in ATTRIBUTES.items():
        assert list(understood()[name]) == list(values) and all(value in summary() for value in values)
        for value, phrases in understood()[name].items():
            assert phrases and all(parse(phrase) == {name: value} for phrase in phrases)
            assert phrases[0] in canonical(SCENE.with_one_change(name, value))


def test_a_hint_names_the_words_that_are_not_known(captions):
    assert not any(unknown_words(text) for scene, text in captions[::2]) and hint("A red circle, please!") is None
    assert unknown_words("a dragon over the RED château, a dragon 3") == ["dragon", "château"]
    assert hint("a dragon") == f'the miniature does not know "dragon"; it understands {summary()}'
    assert summary().startswith("shape (circle, square, triangle, cross, ring), color (red,") and "still)" in summary()


def test_a_tokenizer_of_the_world_is_recognised(tokenizer, tmp_path):
    assert is_miniature(tokenizer)
    small = deepcopy(json.loads(tokenizer.backend_tokenizer.to_str()))
    del small["model"]["vocab"]["doughnut"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(small))
    assert not is_miniature(PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json")))


@pytest.mark.parametrize(
    "text, said",
    [
        ("A VIOLET ring, not  moving", {"color": "purple", "shape": "ring", "motion": "still"}),
        ("a brightly lit spring evening in Boxford", {}),
        ("two cats playing in the snow", {}),
        ("", {}),
        ("first red, then blue", {"color": "red"}),
    ],
)
def test_parse(text, said):
    assert parse(text) == said


def test_captions_vary_and_repeat_with_their_seed():
    def draw():
        generator = torch.Generator().manual_seed(3)
        return [caption(SCENE, generator) for _ in range(100)]

    assert draw() == draw()
    assert len(set(draw())) > 90
    assert len(TEMPLATES) >= 12 and not set(TEMPLATES) & set(UNSEEN_TEMPLATES)


def test_every_caption_fits_and_comes_back(tokenizer, captions):
    for _, text in captions:
        ids = tokenizer(text).input_ids
        assert len(ids) <= TEXT_LEN and ids[-1] == 1 and tokenizer.unk_token_id not in ids
        assert parse(tokenizer.decode(ids, skip_special_tokens=True)) == parse(text)
    text = "a red circle moving right, on a black background."
    assert tokenizer.decode(tokenizer(text.upper()).input_ids, skip_special_tokens=True) == text


def test_vocabulary(tokenizer):
    assert len(vocabulary()) == len(set(vocabulary())) == len(tokenizer) <= 512
    assert [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id] == [0, 1, 2]
    for word in known_words():
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1


@pytest.mark.parametrize("text", ["", "🔴", "红色圆圈向右移动", "x" * 500, "\0\t\n", "50% <pad> & «ring»", "ﬁve ⅷ", "café naïve Ж"])
def test_any_text_becomes_tokens(tokenizer, text):
    ids = tokenizer(text, truncation=True).input_ids
    assert 1 <= len(ids) <= TEXT_LEN and ids[-1] == tokenizer.eos_token_id


def test_a_strange_character_takes_no_word_with_it(tokenizer):
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("rëd🔴circle圆").input_ids)
    assert tokens == ["red", "<unk>", "circle", "<unk>", "</s>"]


def test_saved_language_loads_without_a_network(tmp_path, tokenizer):
    encoder = build_text_encoder(len(tokenizer), seed=0)
    save_language(tmp_path, encoder, tokenizer)
    automatic = AutoTokenizer.from_pretrained(tmp_path / "tokenizer", local_files_only=True)
    loaded, own = store.load_text_encoder(tmp_path)
    texts = ["a red circle", canonical(SCENE)]
    for other in (automatic, own):
        assert other(texts, padding=True).input_ids == tokenizer(texts, padding=True).input_ids
        assert other(texts, padding=True).input_ids[0][-1] == other.pad_token_id == 0
    text = TextEncoder(loaded, own, text_len=TEXT_LEN).encode(texts)
    assert text.shape == (2, TEXT_LEN, 64) and (text[0, 4:] == 0).all()
    assert torch.equal(text, TextEncoder(encoder, tokenizer, text_len=TEXT_LEN).encode(texts))


def test_initial_weights_depend_on_the_seed_alone():
    before = torch.get_rng_state()
    one, same, other = (build_text_encoder(100, seed=seed).shared.weight for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_labels_follow_the_words_that_are_left():
    assert labels(["circle to the right"]).tolist() == [[0, NOT_SAID, NOT_SAID, 0]]
    generator = torch.Generator().manual_seed(0)
    text = canonical(SCENE)
    assert corrupt(text, generator, drop=0, insert=0) == text
    assert corrupt(text, generator, drop=1, insert=0) == text  # never an empty prompt
    longer = corrupt(text, generator, drop=0, insert=1).split()
    assert longer[1::2] == text.split()


def test_training_learns_and_resumes_bit_for_bit():
    straight = LanguageStage(LanguageConfig(batch=32), steps=40, seed=0)
    losses = [straight.step(number)["language/loss"] for number in range(20)]
    resumed = LanguageStage(LanguageConfig(batch=32), steps=40, seed=5)
    resumed.load(deepcopy(straight.state()))  # as through a file: the two share nothing
    assert [straight.step(n) for n in range(20, 24)] == [resumed.step(n) for n in range(20, 24)]
    assert losses[-1] < losses[0]
    assert not set(straight.combinations) & set(held_out())
