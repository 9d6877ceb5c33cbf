"""A rewritten prompt keeps its line and its words; a run that was killed writes what it would have written; the record says how."""

import argparse
import hashlib
import json
import shutil

import pytest
import torch
import transformers
from transformers import LlamaForCausalLM

from longlive.evaluation.rewrite import FUNCTION_WORDS, REQUEST, add_arguments, descriptions, lost_words, run
from longlive.miniature.language import build_tokenizer

PROMPTS = ["a circle", "the cross", "Circles!", "it", "crossing a cross", "a {circle}", "at a\tcross"]


@pytest.mark.parametrize(
    "prompt, text, lost",
    [
        ("a horse", "A HORSE.", []),
        ("two horses riding", "two men ride a horse", []),
        ("a person rides, walked", "riding, a person walks", []),
        ("glasses and a glass", "a glass", []),
        ("a person's face", "the faces of persons", []),
        ("a café", "the cafe\u0301", []),
        ("slow-motion", "in slow motion", []),
        ("a red car", "a car", ["red"]),
        ("two dogs and six cats", "six dogs and a cat", ["two"]),
        ("a bird singing", "a bird of s", ["singing"]),
        ("a king", "k", ["king"]),
        ("there will be those", "", []),
        ("a Vase, a vase on a table", "a pot", ["vase", "table"]),
    ],
)
def test_lost_words(prompt, text, lost):
    assert lost_words(prompt, text) == lost


def test_every_word_that_is_left_out_is_found():
    prompt = "three bicycles left beneath yellow bridges while trains passing quickly behind ancient towers through foggy valley"
    for out in prompt.split():
        text = " ".join(word for word in prompt.split() if word != out).upper()
        assert lost_words(prompt, text) == ([] if out == "while" else [out])
    assert lost_words(prompt, prompt) == []


def test_places_and_counts_are_no_function_words():
    places = "above behind below beneath beside between bottom front inside left near over right through under each both still"
    assert FUNCTION_WORDS.isdisjoint(places.split())


def test_what_lacks_words_is_asked_for_again_and_alone():
    rounds = iter([["a dog", "a cat sits here", ""], ["a big dog", "a mouse runs"], ["a brown dog", "the mouse and the house"]])
    asked = []

    def write(requests, seed):
        asked.append((requests, seed))
        return [(answer, True) for answer in next(rounds)]

    prompts = ["brown  dog", "a cat", "mouse, house"]
    wanted = ["a brown dog", "a cat sits here", "the mouse and the house"]
    assert descriptions(prompts, write, first_line=1, seed=0, attempts=3) == wanted
    assert [len(requests) for requests, _ in asked] == [3, 2, 2] and "Prompt: brown dog\n" in asked[1][0][0]
    assert len({seed for _, seed in asked}) == 3


def test_the_best_is_kept_only_if_that_is_enough():
    def say(*answers):
        rounds = iter(answers)
        return lambda requests, seed: [(next(rounds), True)]

    prompt = ["a vase on a white table"]
    with pytest.raises(ValueError, match=r'line 7: no acceptable answer in 2 attempts .*the best was "a vase is not on the table"'):
        descriptions(prompt, say("a vase is not on the table", "a pot is"), first_line=7, seed=0, attempts=2)
    answers = say(
        "", *prompt, "a pot upon a table is seen", "a vase is on the table", "a vase is not on the table", "a white table is not there yet"
    )
    assert descriptions(prompt, answers, first_line=7, seed=0, attempts=6, lenient=True) == ["a vase is not on the table"]
    with pytest.raises(ValueError, match="all were empty"):
        descriptions(prompt, say("", ""), first_line=1, seed=0, attempts=2, lenient=True)


@pytest.mark.parametrize("num, length, enough", [(3, 3, False), (3, 4, True), (80, 59, False), (80, 60, True)])
def test_a_description_is_longer_unless_the_prompt_is_long(num, length, enough):
    def write(requests, seed):
        return [(" ".join(["yes"] * length), True)]

    prompt = " ".join(["no"] * num)
    if enough:
        assert descriptions([prompt], write, first_line=1, seed=0, attempts=1)
    else:
        with pytest.raises(ValueError, match="no acceptable answer"):
            descriptions([prompt], write, first_line=1, seed=0, attempts=1)


@pytest.fixture(scope="module")
def shapes(writer, tmp_path_factory):
    """The folder of a model like `writer` that says "circle" and "cross" as often as it stops."""
    folder, tokenizer = tmp_path_factory.mktemp("models") / "shapes", build_tokenizer()
    model = LlamaForCausalLM.from_pretrained(writer)
    model.lm_head.weight.data[tokenizer.convert_tokens_to_ids(["circle", "cross"]), 0] = 1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def command(shapes, tmp_path):
    """`rewrite` as a command line calls it, into a folder of its own."""

    def call(output, *more, prompts=PROMPTS, model=shapes):
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        line = f"--model {model} --output {tmp_path / output} --batch 2 --attempts 99 --max-new-tokens 24 --device cpu".split()
        return run(parser.parse_args([*line, *more]), prompts)

    return call


def record_of(path):
    return json.loads(path.with_name(f"{path.name}.json").read_text())


def test_line_i_keeps_the_words_of_prompt_i(command, tmp_path):
    assert command("one.txt").startswith("wrote ") and command("one.txt").endswith("is complete: 7 lines")
    lines = (tmp_path / "one.txt").read_bytes().decode().split("\n")
    assert lines.pop() == "" and len(lines) == len(set(lines)) == len(PROMPTS) and all(line.strip() == line for line in lines)
    assert all(lost_words(prompt, line) == [] and len(line.split()) > len(prompt.split()) for prompt, line in zip(PROMPTS, lines))
    assert any(lost_words(prompt, line) for prompt, line in zip(PROMPTS, lines[1:]))  # else their order would prove nothing


def test_the_seed_decides(command, tmp_path):
    before = torch.get_rng_state()
    command("one.txt")
    command("two.txt")
    command("other.txt", "--seed", "1")
    one, two, other = ((tmp_path / f"{name}.txt").read_bytes() for name in ("one", "two", "other"))
    assert one == two != other and torch.equal(torch.get_rng_state(), before)
    assert (tmp_path / "one.txt.json").read_bytes() == (tmp_path / "two.txt.json").read_bytes()


def test_a_killed_run_writes_what_it_would_have_written(command, tmp_path):
    command("whole.txt")
    whole, record = (tmp_path / "whole.txt").read_bytes(), (tmp_path / "whole.txt.json").read_bytes()

    with pytest.raises(ValueError, match=r"line \d: no acceptable answer in 1 attempts"):
        command("again.txt", "--attempts", "1", "--seed", "3")
    assert (tmp_path / "again.txt.partial").exists() and not (tmp_path / "again.txt").exists()
    with pytest.raises(ValueError, match=r"seed 3 \(this run: 0\)"):
        command("again.txt")
    begun = record_of(tmp_path / "again.txt") | {"seed": 0}
    command("again.txt", "--seed", "3")
    command("seed.txt", "--seed", "3")
    assert (tmp_path / "again.txt").read_bytes() == (tmp_path / "seed.txt").read_bytes() != whole

    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for size in (0, 1, ends[0], ends[1] - 1, ends[1], ends[2], ends[3] + 2, ends[5], len(whole)):  # a kill leaves a beginning
        (tmp_path / "whole.txt").unlink()
        (tmp_path / "whole.txt.json").write_text(json.dumps(begun))
        (tmp_path / "whole.txt.partial").write_bytes(whole[:size])
        command("whole.txt")
        assert (tmp_path / "whole.txt").read_bytes() == whole and (tmp_path / "whole.txt.json").read_bytes() == record
    assert {path.name.partition(".")[2] for path in tmp_path.iterdir()} == {"txt", "txt.json"}


def test_what_is_there_is_kept_not_made_again(command, tmp_path):
    command("one.txt")
    lines = (tmp_path / "one.txt").read_text().splitlines()
    (tmp_path / "one.txt").unlink()
    (tmp_path / "one.txt.partial").write_text("\n".join(["a circle of mine", *lines[1:3], "half a li"]))
    command("one.txt")
    assert (tmp_path / "one.txt").read_text().splitlines() == ["a circle of mine", *lines[1:]]


@pytest.mark.parametrize(
    "more, what",
    [
        (("--seed", "1"), "seed"),
        (("--batch", "3"), "batch"),
        (("--temperature", "0.9"), "temperature"),
        (("--top-p", "0.9"), "top_p"),
        (("--max-new-tokens", "25"), "max_new_tokens"),
        (("--dtype", "bfloat16"), "dtype"),
        (("--lenient",), "lenient"),
    ],
)
@pytest.mark.parametrize("complete", [True, False], ids=["complete", "partial"])
def test_other_settings_are_refused(command, tmp_path, more, what, complete):
    command("one.txt")
    if not complete:
        (tmp_path / "one.txt").rename(tmp_path / "one.txt.partial")
    with pytest.raises(ValueError, match=rf"one.txt\S* was written with {what} "):
        command("one.txt", *more)


def test_other_prompts_and_other_weights_are_refused(command, shapes, tmp_path):
    command("one.txt")
    with pytest.raises(ValueError, match="was written with prompts "):
        command("one.txt", prompts=PROMPTS[::-1])
    other = tmp_path / "copy" / shapes.name
    shutil.copytree(shapes, other)
    assert "is complete" in command("one.txt", model=other)
    weights = other / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="was written with weights "):
        command("one.txt", model=other)
    weights.unlink()
    with pytest.raises(ValueError, match="there are no weights"):
        command("one.txt", model=other)


def test_the_record(command, shapes, tmp_path):
    command("one.txt", "--temperature", "0.9")
    found = record_of(tmp_path / "one.txt")
    assert found.pop("weights") == {"model.safetensors": hashlib.sha256((shapes / "model.safetensors").read_bytes()).hexdigest()}
    assert len(found.pop("prompts")) == len(found.pop("request")) == 16
    assert found == {
        "model": "shapes", "seed": 0, "batch": 2, "max_new_tokens": 24, "temperature": 0.9, "top_p": 0.95,
        "device": "cpu", "dtype": "float32", "torch": torch.__version__, "transformers": transformers.__version__,
        "lenient": False, "request_text": REQUEST,
        "lines": 7, "lines_lacking_words": 0, "lacking_words": {}, "lines_not_longer": [],
    }  # fmt: skip


def test_lenient_keeps_the_best_and_says_what_is_missing(command, tmp_path):
    prompts = ["a circle", "a zeppelin crosses", "it"]
    with pytest.raises(ValueError, match='line 2: no acceptable answer in 20 attempts for "a zeppelin crosses"'):
        command("strict.txt", "--attempts", "20", prompts=prompts)
    assert "1 of them lack words" in command("one.txt", "--attempts", "20", "--lenient", prompts=prompts)
    lines = (tmp_path / "one.txt").read_text().splitlines()
    assert [lost_words(prompt, line) for prompt, line in zip(prompts, lines)] == [[], ["zeppelin"], []]
    found = record_of(tmp_path / "one.txt")
    assert (found["lenient"], found["attempts"]) == (True, 20)
    assert (found["lines"], found["lines_lacking_words"], found["lacking_words"]) == (3, 1, {"2": ["zeppelin"]})
    with pytest.raises(ValueError, match=r"attempts 20 \(this run: 21\)"):
        command("one.txt", "--attempts", "21", "--lenient", prompts=prompts)


def test_what_cannot_be_written(command, tmp_path):
    with pytest.raises(ValueError, match=r"prompt 2 of 2 is empty"):
        command("one.txt", prompts=["a", " "])
    with pytest.raises(ValueError, match=r"a \.txt file and at least 1"):
        command("one.json")
    assert not any(tmp_path.iterdir())
    command("one.txt")
    (tmp_path / "one.txt").write_text("a circle\n")
    with pytest.raises(ValueError, match="has 1 lines for 7 prompts"):
        command("one.txt")
