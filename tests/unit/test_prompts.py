"""Every pair comes once an epoch, on one rank; a resumed run sees what it would have seen; switch prompts change one thing."""

import json
from collections import Counter
from dataclasses import asdict
from itertools import pairwise

import pytest
import torch

from longlive.evaluation.writer import Writer, tidy
from longlive.files import file_digest
from longlive.miniature.captions import canonical, parse
from longlive.miniature.language import build_tokenizer
from longlive.miniature.prompt_pairs import draw_pair, write_chains, write_pairs
from longlive.miniature.prompt_pairs import main as prompt_pairs
from longlive.miniature.world import Captioned, held_out, training_set
from longlive.parallel.world import seed_of
from longlive.training.prompts import PromptSampler, read_chains
from scripts import make_switch_prompts
from scripts.make_switch_prompts import continuations

PAIRS = [(f"prompt {i}", f"switch {i}") for i in range(23)]


@pytest.fixture
def write(tmp_path):
    def to(name, text):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return to


def test_every_format_says_the_same(write):
    wanted = [("a cat", "a cat sleeps"), ("  ein Fluß", "雨")]
    texts = write("a.txt", "\ufeffa cat  \n  ein Fluß\n"), write("b.txt", "a cat sleeps\r\n雨")
    assert read_chains(*texts) == wanted
    assert read_chains(write("c.jsonl", "\n".join(json.dumps({"prompt": one, "switch": two}) for one, two in wanted) + "\n")) == wanted
    assert read_chains(write("d.jsonl", "\n".join(json.dumps({"prompts": pair}) for pair in wanted))) == wanted
    alone = [pair[:1] for pair in wanted]
    assert read_chains(texts[0]) == alone
    assert read_chains(write("e.jsonl", "\n".join(json.dumps({"prompt": one, "switch": None}) for (one,) in alone))) == alone
    assert read_chains(write("e.jsonl", "\n".join(json.dumps({"prompts": one}) for one in alone)), texts[1]) == wanted


@pytest.mark.parametrize(
    "name, text, complaint",
    [
        ("a.txt", "a\nb\n \nc\n", "line 3 is blank"),
        ("a.txt", "a\n\n", "line 2 is blank"),
        ("a.txt", "", "contains no prompt"),
        ("a.csv", "a", "are read from .txt"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": ', "line 2: not JSON"),
        ("a.jsonl", '{"prompt": "a", "swich": "b"}', "line 1: .* expected, got"),
        ("a.jsonl", '{"prompts": []}', "line 1: .* expected, got"),
        ("a.jsonl", '{"prompts": "ab"}', "line 1: .* expected, got"),
        ("a.jsonl", '["a", "b"]', "line 1: .* expected, got"),
        ("a.jsonl", '{"prompts": ["a", " "]}', "line 1: prompt 2 of 2 is empty"),
        ("a.jsonl", '{"prompt": null}', "line 1: prompt 1 of 1 is empty or not text"),
        ("a.jsonl", '{"prompts": ["a", "b"]}\n{"prompts": ["a"]}', "line 2 has 1 prompts and line 1 has 2; give every line as many"),
        ("a.jsonl", '{"prompts": ["a", "b"]}\n{"prompts": ["a", "b", "c"]}', "line 2 has 3 prompts and line 1 has 2"),
    ],
)
def test_what_cannot_be_read_is_named(write, name, text, complaint):
    with pytest.raises(ValueError, match=complaint):
        read_chains(write(name, text))


def test_files_that_do_not_belong_together(write):
    one = write("one.txt", "a\n")
    with pytest.raises(ValueError, match=r"two.txt has 2 lines and .*one.txt has 1"):
        read_chains(write("two.txt", "a\nb\n"), one)
    with pytest.raises(ValueError, match="already has switch prompts"):
        read_chains(write("a.jsonl", '{"prompts": ["a", "b"]}'), one)
    with pytest.raises(ValueError, match="does not exist"):
        read_chains(one, one.with_name("none.txt"))


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
    pairs = read_chains(*files)
    assert len(pairs) == 60
    for prompt, switch in pairs:
        before, after = parse(prompt), parse(switch)
        assert sum(before[name] != after[name] for name in before) == 1
    assert prompt_pairs(["--num", "60", "--seed", "1", "--phrasings", "3", "--output", str(tmp_path / "b")]) == 0
    assert read_chains(tmp_path / "b" / "prompts.txt", tmp_path / "b" / "switch_prompts.txt") == pairs
    assert read_chains(*write_pairs(tmp_path / "c", num=60, seed=2, phrasings=3)) != pairs
    plain = read_chains(*write_pairs(tmp_path / "d", num=20, seed=1, phrasings=1))
    assert all(text == canonical(Captioned(**parse(text))) for pair in plain for text in pair)
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"prompts.txt", "switch_prompts.txt"}
    assert file_digest(files.prompts)[:8] == "818c3626" and file_digest(files.switch)[:8] == "1655c602"  # as ever for these arguments


def test_written_chains_change_one_attribute_at_a_time_as_often_as_weights_say(tmp_path):
    weights = {"background": 6.0, "shape": 0.001}
    path = write_chains(tmp_path / "a", num=300, switches=3, seed=1, phrasings=3, weights=weights)
    chains, changed = read_chains(path), Counter()
    assert len(chains) == 300 and all(len(chain) == 4 for chain in chains)
    for chain in chains:
        for before, after in pairwise(parse(prompt) for prompt in chain):
            (attribute,) = (name for name in before if before[name] != after[name])
            changed[attribute] += 1
            assert Captioned(**after) not in held_out()
    assert 0.65 < changed["background"] / 900 < 0.85 and changed["shape"] < 10 and 0.5 < changed["color"] / changed["motion"] < 2
    words = ["--num", "300", "--switches", "3", "--seed", "1", "--phrasings", "3", "--weights", "background=6", "shape=0.001", "--output"]
    assert prompt_pairs([*words, str(tmp_path / "b")]) == 0 and (tmp_path / "b" / "prompts.jsonl").read_bytes() == path.read_bytes()
    assert read_chains(write_chains(tmp_path / "c", num=300, switches=3, seed=1, phrasings=3)) != chains
    assert prompt_pairs([*words, str(tmp_path / "d"), "--held-out", "150"]) == 0
    said = {prompt for chain in read_chains(tmp_path / "d" / "prompts.jsonl") for prompt in chain}
    assert not {Captioned(**parse(prompt)) for prompt in said} & set(held_out(150))


@pytest.mark.parametrize(
    "words, complaint",
    [
        ("--switches 0", "at least one of each"),
        ("--weights size=2", "'size' is no attribute of this world; choose from shape, color, background, motion"),
        ("--weights shape=0", "choose numbers above 0"),
        ("--held-out 99", "prompts of the test would be trained on; choose 100 or more"),
    ],
)
def test_chains_that_cannot_be_written(tmp_path, capsys, words, complaint):
    assert prompt_pairs(["--num", "3", "--output", str(tmp_path), *words.split()]) == 2
    assert complaint in capsys.readouterr().err and not any(tmp_path.iterdir())


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
    assert len(lines) == len(set(lines)) == 5 and all(len(chain) == 2 for chain in read_chains(prompts, tmp_path / "whole.txt"))
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
