"""What a benchmark wants to see: names, seeds and samples follow from its list, whatever part of it is taken."""

import itertools
import json

import pytest

from longlive.evaluation.suites import (
    SUITES,
    interactive_prompts,
    miniature_prompts,
    miniature_switches,
    names_of,
    part_of,
    prompts_of,
    vbench_prompts,
)
from longlive.miniature.captions import parse
from longlive.miniature.world import ATTRIBUTES

LIST = [
    {"prompt_en": "In a still frame, a stop sign", "dimension": ["temporal_flickering"]},
    {"prompt_en": "a refrigerator", "dimension": ["object_class"], "auxiliary_info": {"object_class": {"object": "refrigerator"}}},
    {"prompt_en": "The bund Shanghai, oil painting", "dimension": ["appearance_style"], "auxiliary_info": {"appearance_style": {"s": 1}}},
    {"prompt_en": "a person is clay pottery making", "dimension": ["human_action"]},
    {"prompt_en": "The bund Shanghai, oil painting", "dimension": ["overall_consistency", "aesthetic_quality", "imaging_quality"]},
]


@pytest.fixture
def full_info(tmp_path):
    path = tmp_path / "VBench_full_info.json"
    path.write_text(json.dumps(LIST))
    return path


def test_the_list(full_info):
    found = vbench_prompts(full_info)
    assert [entry.index for entry in found.entries] == [0, 1, 2, 3] and found.source == "VBench_full_info.json, 5 entries"
    assert [entry.samples for entry in found.entries] == [25, 5, 5, 5]
    twice = found.entries[2]  # one prompt in two places: its videos have the same names, so they are the same videos
    assert twice.dimensions == ("appearance_style", "overall_consistency", "aesthetic_quality", "imaging_quality")
    assert twice.auxiliary == {"appearance_style": {"s": 1}}
    names = names_of(found.entries)
    assert len(names) == len(set(names)) == 40 and names[0] == "In a still frame, a stop sign-0" and names[-1].endswith("making-4")


def test_a_changed_list_has_another_digest(full_info):
    before = vbench_prompts(full_info)
    full_info.write_text(json.dumps(LIST, indent=1))
    assert vbench_prompts(full_info).digest == before.digest  # the same in other bytes
    full_info.write_text(json.dumps([*LIST[:3], {**LIST[3], "prompt_en": "a person is dancing"}, LIST[4]]))
    assert vbench_prompts(full_info).digest != before.digest


def test_longer_prompts_keep_the_names(full_info, tmp_path):
    path = tmp_path / "longer.txt"
    path.write_text("".join(f"longer {number}\n" for number in range(5)))
    found = vbench_prompts(full_info, rewritten=path)
    assert [entry.script.prompts for entry in found.entries] == [("longer 0",), ("longer 1",), ("longer 2",), ("longer 3",)]
    assert names_of(found.entries) == names_of(vbench_prompts(full_info).entries)
    path.write_text("one\ntwo\n")
    with pytest.raises(ValueError, match="2 lines for 5 prompts"):
        vbench_prompts(full_info, rewritten=path)
    path.write_text("one\n\nthree\nfour\nfive\n")
    with pytest.raises(ValueError, match="line 2 is empty"):
        vbench_prompts(full_info, rewritten=path)


def test_a_part(full_info):
    found = vbench_prompts(full_info)
    part = part_of(found, dimensions=["human_action", "object_class"], samples=2)
    assert names_of(part.entries) == [f"{n}-{i}" for n in ("a refrigerator", "a person is clay pottery making") for i in (0, 1)]
    assert [entry.index for entry in part.entries] == [1, 3] and part.digest == found.digest
    assert [entry.index for entry in part_of(found, limit=1).entries] == [0]
    for wrong, words in (
        ({"limit": 0}, "at least one"),
        ({"dimensions": ["colour"]}, "no dimension"),
        ({"dimensions": ["scene"]}, "no prompts"),
    ):
        with pytest.raises(ValueError, match=words):
            part_of(found, **wrong)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[", "cannot be read"),
        ("{}", "a list of objects"),
        ('[{"prompt_en": "a"}]', "a list of objects"),
        ('[{"prompt_en": "a", "dimension": ["beauty"]}]', "beauty is no dimension"),
        ('[{"prompt_en": "a/b", "dimension": ["scene"]}]', "cannot be the name of a file"),
        ('[{"prompt_en": "a_b", "dimension": ["scene"]}]', "underscore"),
    ],
)
def test_what_is_no_list(full_info, content, words):
    full_info.write_text(content)
    with pytest.raises(ValueError, match=words):
        vbench_prompts(full_info)
    with pytest.raises(ValueError, match=r"setup_vbench\.sh"):
        vbench_prompts(full_info.with_name("other.json"))


def test_scripts_that_come_with_the_package(tmp_path):
    found = interactive_prompts()
    assert len(found.entries) == 20 and len(names_of(found.entries)) == 160
    for entry in found.entries:
        assert len(entry.script.prompts) == 6 and entry.script.durations == (10.0,) * 6
        assert len(set(entry.script.prompts)) == 6 and all(40 <= len(prompt.split()) <= 80 for prompt in entry.script.prompts)
    switch = prompts_of("switch", full_info=lambda: tmp_path)
    assert [entry.script.prompts for entry in switch.entries] == [entry.script.prompts[:2] for entry in found.entries]
    assert all(entry.script.durations == (5.0, 5.0) for entry in switch.entries) and switch.digest != found.digest
    own = tmp_path / "own.jsonl"
    own.write_text('{"prompts": ["a", "b"], "switch_frame_indices": [3]}\n')
    with pytest.raises(ValueError, match="give the duration of each prompt"):
        interactive_prompts(own)


def test_the_miniature_world():
    assert len(miniature_prompts().entries) == 100
    for entry in miniature_switches(10).entries:
        said = [parse(prompt) for prompt in entry.script.prompts]
        assert len(said) == 4 and all(one.keys() == ATTRIBUTES.keys() for one in said)
        assert all(sum(one[name] != two[name] for name in ATTRIBUTES) == 1 for one, two in itertools.pairwise(said))
    assert miniature_switches(10) == miniature_switches(10)


def test_files_belong_to_suites(full_info, tmp_path):
    assert prompts_of("vbench", full_info=lambda: full_info) == vbench_prompts(full_info)
    assert [entry.samples for entry in prompts_of("long", full_info=lambda: full_info).entries] == [5, 5, 5, 5]
    for suite in SUITES:
        if suite not in ("interactive", "switch"):
            with pytest.raises(ValueError, match="scripts belongs to interactive and switch"):
                prompts_of(suite, full_info=lambda: full_info, prompts=tmp_path / "x.jsonl")
    with pytest.raises(ValueError, match="belong to vbench and long"):
        prompts_of("miniature", full_info=lambda: full_info, rewritten=tmp_path / "x.txt")
    with pytest.raises(ValueError, match="there is no suite 'vbnech'"):
        prompts_of("vbnech", full_info=lambda: full_info)
