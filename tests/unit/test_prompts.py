"""Every pair comes once an epoch, on one rank; a resumed run sees what it would have seen; switch prompts change one thing."""

import json
from dataclasses import asdict

import pytest
import torch

from longlive.evaluation.writer import Writer, tidy
from longlive.miniature.captions import canonical, parse
from longlive.miniature.language import build_tokenizer
from longlive.miniature.prompt_pairs import draw_pair, write_pairs
from longlive.miniature.prompt_pairs import main as prompt_pairs
from longlive.miniature.world import Captioned, held_out, training_set
from longlive.parallel.world import seed_of
from longlive.training.prompts import PromptPair, PromptSampler, read_pairs
from scripts import make_switch_prompts
from scripts.make_switch_prompts import continuations

PAIRS = [PromptPair(f"prompt {i}", f"switch {i}") for i in range(23)]


@pytest.fixture
def write(tmp_path):
    def to(name, text):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return to


def test_every_format_says_the_same(write):
    wanted = [PromptPair("a cat", "a cat sleeps"), PromptPair("  ein Fluß", "雨")]
    texts = write("a.txt", "\ufeffa cat  \n  ein Fluß\n"), write("b.txt", "a cat sleeps\r\n雨")
    assert read_pairs(*texts) == wanted
    assert read_pairs(write("c.jsonl", "\n".join(json.dumps(pair._asdict()) for pair in wanted) + "\n")) == wanted
    assert read_pairs(write("d.jsonl", "\n".join(json.dumps({"prompts": pair}) for pair in wanted))) == wanted
    alone = [PromptPair(pair.prompt) for pair in wanted]
    assert read_pairs(texts[0]) == alone
    assert read_pairs(write("e.jsonl", "\n".join(json.dumps(pair._asdict()) for pair in alone))) == alone
    assert read_pairs(write("e.jsonl", "\n".join(json.dumps({"prompts": [pair.prompt]}) for pair in alone)), texts[1]) == wanted


@pytest.mark.parametrize(
    "name, text, complaint",
    [
        ("a.txt", "a\nb\n \nc\n", "line 3 is blank"),
        ("a.txt", "a\n\n", "line 2 is blank"),
        ("a.txt", "", "contains no prompt"),
        ("a.csv", "a", "are read from .txt"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": ', "line 2: not JSON"),
        ("a.jsonl", '{"prompt": "a", "swich": "b"}', "line 1: .* expected, got"),
        ("a.jsonl", '{"prompts": ["a", "b", "c"]}', "line 1: .* expected, got"),
        ("a.jsonl", '{"prompts": "ab"}', "line 1: .* expected, got"),
        ("a.jsonl", '["a", "b"]', "line 1: .* expected, got"),
        ("a.jsonl", '{"prompts": ["a", " "]}', "line 1: prompt 2 of 2 is empty"),
        ("a.jsonl", '{"prompt": null}', "line 1: prompt 1 of 1 is empty or not text"),
        ("a.jsonl", '{"prompts": ["a", "b"]}\n{"prompts": ["a"]}', "line 2 has no switch prompt"),
    ],
)
def test_what_cannot_be_read_is_named(write, name, text, complaint):
    with pytest.raises(ValueError, match=complaint):
        read_pairs(write(name, text))


def test_files_that_do_not_belong_together(write):
    one = write("one.txt", "a\n")
    with pytest.raises(ValueError, match=r"two.txt has 2 lines and .*one.txt has 1"):
        read_pairs(write("two.txt", "a\nb\n"), one)
    with pytest.raises(ValueError, match="already has switch prompts"):
        read_pairs(write("a.jsonl", '{"prompts": ["a", "b"]}'), one)
    with pytest.raises(ValueError, match="does not exist"):
        read_pairs(one, one.with_name("none.txt"))


@pytest.mark.parametrize("size, batch", [(1, 1), (1, 5), (3, 2), (4, 3), (23, 1)])
def test_every_pair_once_an_epoch_on_one_rank(size, batch):
    samplers = [PromptSampler(PAIRS, batch=batch, seed=3, rank=rank, size=size) for rank in range(size)]
    epochs = []
    for epoch in range(3):
        seen = []
        for _ in range(len(PAIRS) // (size * batch)):
            for sampler in samplers:
                drawn = sampler.next()
                assert len(drawn) == batch and sampler.state()["epoch"] == epoch
                seen += drawn
        assert len(set(seen)) == len(seen) == len(PAIRS) // (size * batch) * size * batch
        assert set(seen) <= set(PAIRS)
        epochs.append(tuple(seen))
    assert len(set(epochs)) == 3  # each epoch in an order of its own
    other = PromptSampler(PAIRS, batch=size * batch, seed=4)
    assert [pair for _ in range(len(PAIRS) // (size * batch)) for pair in other.next()] != list(epochs[0])


def test_the_ranks_together_see_the_same_whatever_their_number():
    alone, three = PromptSampler(PAIRS, batch=6, seed=0), [PromptSampler(PAIRS, batch=2, seed=0, rank=r, size=3) for r in range(3)]
    for _ in range(10):
        assert set(alone.next()) == {pair for sampler in three for pair in sampler.next()}


@pytest.mark.parametrize("steps", [0, 1, 3, 4, 9])
def test_a_resumed_sampler_goes_on_exactly(steps):
    def make(rank, seed=7, pairs=PAIRS):
        return PromptSampler(pairs, batch=3, seed=seed, rank=rank, size=2)

    straight = make(1)
    for _ in range(steps):
        straight.next()
    state = json.loads(json.dumps(straight.state()))
    resumed, other = make(1), make(0)
    resumed.next()  # whatever it did before is forgotten
    resumed.load(state)
    other.load(state)  # the state is the same on every rank
    for _ in range(8):
        wanted = straight.next()
        assert resumed.next() == wanted
        assert not set(other.next()) & set(wanted)
    with pytest.raises(ValueError, match="seed"):
        make(1, seed=8).load(state)
    with pytest.raises(ValueError, match="not those the run started with"):
        make(1, pairs=PAIRS[::-1]).load(state)


def test_too_few_prompts():
    with pytest.raises(ValueError, match="23 prompts do not fill a batch of 6 on each of 4 ranks; give at least 24"):
        PromptSampler(PAIRS, batch=6, seed=0, size=4)
    with pytest.raises(ValueError, match="rank"):
        PromptSampler(PAIRS, batch=1, seed=0, rank=4, size=4)


def test_seeds_of_different_parts_differ():
    assert len({seed_of(*parts) for parts in [(0, 1), (1, 0), (0, 1, 0), ("a", 0), (1,), ("1",)]}) == 6
    torch.Generator().manual_seed(seed_of(0))


def test_a_pair_stays_in_its_set_and_changes_one_attribute():
    generator, captions = torch.Generator().manual_seed(0), training_set()
    changed = set()
    for _ in range(100):
        before, after, attribute = draw_pair(generator, captions)
        assert [name for name in asdict(before) if asdict(before)[name] != asdict(after)[name]] == [attribute]
        assert not {before, after} & set(held_out())
        changed.add(attribute)
    assert changed == set(asdict(captions[0]))
    red, blue, other = (Captioned("circle", *rest) for rest in (("red", "black", "up"), ("blue", "black", "up"), ("cyan", "pink", "up")))
    assert {draw_pair(generator, [red, blue]) for _ in range(20)} == {(red, blue, "color"), (blue, red, "color")}
    with pytest.raises(ValueError, match="differs"):
        draw_pair(generator, [red, other])


def test_written_pairs_are_a_training_set(tmp_path):
    files = write_pairs(tmp_path / "a", num=60, seed=1, phrasings=3)
    pairs = read_pairs(*files)
    assert len(pairs) == 60
    for prompt, switch in pairs:
        before, after = parse(prompt), parse(switch)
        assert sum(before[name] != after[name] for name in before) == 1
    assert prompt_pairs(["--num", "60", "--seed", "1", "--phrasings", "3", "--output", str(tmp_path / "b")]) == 0
    assert read_pairs(tmp_path / "b" / "prompts.txt", tmp_path / "b" / "switch_prompts.txt") == pairs
    assert read_pairs(*write_pairs(tmp_path / "c", num=60, seed=2, phrasings=3)) != pairs
    plain = read_pairs(*write_pairs(tmp_path / "d", num=20, seed=1, phrasings=1))
    assert all(text == canonical(Captioned(**parse(text))) for pair in plain for text in pair)
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"prompts.txt", "switch_prompts.txt"}


@pytest.mark.parametrize(
    "answer, text",
    [
        ("A cat sleeps.", "A cat sleeps."),
        ('  "A cat\n sleeps."\n\nI changed the action.', "A cat sleeps."),
        ("Sure! Here is the new description:\n\n“A cat sleeps.”", "A cat sleeps."),
        ("**New description:** A cat sleeps.\nDescription: a dog", "A cat sleeps."),
        ("<think>Which one?\n\nAction.</think>\n\nA cat sleeps.", "A cat sleeps."),
        ('A sign reads "OPEN"', 'A sign reads "OPEN"'),
        ('"OPEN" says the sign', '"OPEN" says the sign'),
        ("Here, at 12:30, the river bends: a cat sleeps.", "Here, at 12:30, the river bends: a cat sleeps."),
        ("Here is the new description:", ""),
        ("<think>Which one?", ""),
        (" \n\n ", ""),
    ],
)
def test_tidy(answer, text):
    assert tidy(answer, ended=True) == text


def test_tidy_drops_what_was_cut_off():
    assert tidy("A cat sleeps. It is", ended=False) == "A cat sleeps."
    assert tidy('"A cat sleeps. It is', ended=False) == "A cat sleeps."
    assert tidy("A cat sleeps\n\nIt is", ended=False) == "A cat sleeps"
    assert tidy("A cat of 3.5 kg", ended=False) == ""


def test_bad_answers_are_asked_for_again_and_alone():
    rounds, asked = iter([["", " b ", "c goes on."], ["a goes on.", '"B"'], ["b goes on."]]), []

    def write(requests, seed):
        asked.append((requests, seed))
        return [(answer, True) for answer in next(rounds)]

    wanted = ["a goes on.", "b goes on.", "c goes on."]
    assert continuations(["A", "B", "C"], write, first_line=1, seed=0, attempts=3) == wanted
    assert [len(requests) for requests, _ in asked] == [3, 2, 1] and "Description: B" in asked[2][0][0]
    assert len({seed for _, seed in asked}) == 3
    with pytest.raises(ValueError, match=r'line 11: no acceptable answer in 3 attempts for "b"'):
        continuations(["a", "b"], lambda requests, seed: [("b", True)] * len(requests), first_line=10, seed=0, attempts=3)


def test_a_stopped_run_writes_what_it_would_have_written(tmp_path, write, writer, capsys, monkeypatch):
    prompts = write("prompts.txt", "a red circle moving up\na blue ring on black\na cross\nsome {odd} prompt\na dot at rest\n")

    def run(output, *more):
        arguments = f"--model {writer} --prompts {prompts} --output {tmp_path / output} --batch 2 --max-new-tokens 24 --device cpu"
        return make_switch_prompts.main([*arguments.split(), *more])

    assert run("whole.txt") == 0
    whole = (tmp_path / "whole.txt").read_text()
    lines = whole.splitlines()
    assert len(lines) == len(set(lines)) == 5 and all(pair.switch for pair in read_pairs(prompts, tmp_path / "whole.txt"))
    assert not (tmp_path / "whole.txt.partial").exists()

    # Stopped in the middle of the second batch, within a line.
    (tmp_path / "again.txt.json").write_bytes((tmp_path / "whole.txt.json").read_bytes())
    (tmp_path / "again.txt.partial").write_text("kept\n" + "\n".join(lines[1:3]) + "\n" + lines[3][:4])
    written = []
    original = make_switch_prompts.continuations
    monkeypatch.setattr(make_switch_prompts, "continuations", lambda *a, **k: written.append(k["first_line"]) or original(*a, **k))
    assert run("again.txt", "--seed", "1") == 2 and "seed 0 (this run: 1)" in capsys.readouterr().err
    assert not written
    assert run("again.txt", "--attempts", "9") == 0
    assert written == [3, 5]
    assert (tmp_path / "again.txt").read_text().splitlines() == ["kept", *lines[1:]]

    assert run("again.txt") == 0 and written == [3, 5]  # complete: nothing to do
    assert run("other.txt", "--seed", "1") == 0
    assert (tmp_path / "other.txt").read_text() != whole
    prompts.write_text("something else\n")
    assert run("whole.txt") == 2 and "choose another --output" in capsys.readouterr().err


def test_a_chat_template_is_used_and_the_global_generator_is_not(writer, tmp_path):
    template = "{% for message in messages %}user says {{ message.content }} . {% endfor %}{% if add_generation_prompt %}you say{% endif %}"
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    folder = tmp_path / "chat"
    folder.mkdir()
    for file in writer.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokenizer.save_pretrained(folder)
    settings = {"device": torch.device("cpu"), "dtype": torch.float32, "max_new_tokens": 12, "temperature": 1.0, "top_p": 1.0}
    plain, chat = (Writer(path, **settings) for path in (writer, folder))
    assert tokenizer.decode(plain._tokens("a red circle")) == "a red circle"
    assert tokenizer.decode(chat._tokens("a red circle")) == "user says a red circle. you say"
    before = torch.get_rng_state()
    first, same, other = (plain(["a circle", "a long request for a red ring"], seed) for seed in (0, 0, 1))
    assert first == same != other and len(first) == 2
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match="there is no model"):
        Writer(tmp_path / "none", **settings)
