"""Paired differences: known ones are found, intervals cover as often as they say, and what does not belong together is refused."""

import dataclasses
import json
import math

import numpy as np
import pytest

from longlive.evaluation import compare as comparison
from longlive.evaluation import values
from longlive.evaluation.__main__ import main
from longlive.evaluation.prepared import Prepared, claim
from longlive.evaluation.suites import Entry
from longlive.evaluation.vbench_run import results_folder
from longlive.evaluation.vbench_score import DIMENSIONS, score
from longlive.files import write_json
from longlive.generation.prompt_files import Script


def prepared(prompts=40, samples=3, **more):
    entries = tuple(Entry(index=i, name=f"p{i}", script=Script("here", (f"p{i}",)), samples=samples) for i in range(prompts))
    usual = {
        "prompt_list": {"source": "here", "digest": "0"},
        "rewritten": None,
        "seed": 0,
        "num_latent_frames": 3,
        "fps": 16.0,
        "block": 3,
    }
    return Prepared(**({"suite": "miniature", "model": {"model": "one"}, "weights": [], "entries": entries, **usual} | more))


def drawn(of, generator, *, shift, within):
    """Values of two models: a prompt shifts all of its videos alike, the second model is better by `shift` on average over prompts."""
    prompt = {entry.name: generator.normal() for entry in of.entries}
    effect = {entry.name: generator.normal() for entry in of.entries}
    names = [(entry.name, f"{entry.name}-{i}") for entry in of.entries for i in range(entry.samples)]
    first = {name: prompt[p] + within * generator.normal() for p, name in names}
    return first, {name: first[name] + shift + effect[p] + within * generator.normal() for p, name in names}


def test_intervals_cover():
    """Of 200 comparisons whose true difference is 0.3 the 95 % interval holds it in most; ignoring that videos share a prompt would not."""
    of, generator, held = prepared(prompts=25, samples=5), np.random.default_rng(0), 0
    for number in range(200):
        first, second = drawn(of, generator, shift=0.3, within=0.2)
        (row,) = comparison.compare({"x": first}, {"x": second}, of, resamples=400, seed=number)
        held += row.low <= 0.3 <= row.high
        assert row.difference == pytest.approx(row.second - row.first) and (row.prompts, row.videos) == (25, 125)
    assert 0.88 <= held / 200 <= 0.98


def test_verdicts():
    of = prepared()
    first, second = drawn(of, np.random.default_rng(1), shift=2.0, within=0.1)
    for metric, words in (("adherence", ("better", "worse")), ("block_flicker", ("worse", "better")), ("motion", ("more", "less"))):
        assert comparison.compare({metric: first}, {metric: second}, of)[0].verdict == words[0]
        assert comparison.compare({metric: second}, {metric: first}, of)[0].verdict == words[1]
    (same,) = comparison.compare({"x": first}, {"x": first}, of)
    assert same.verdict == "not told apart" and same.difference == same.low == same.high == 0


def test_a_few_prompts_say_nothing():
    """However sure a bootstrap over one or two prompts may look."""
    for prompts in (1, 4):
        of = prepared(prompts=prompts)
        (row,) = comparison.compare({"x": dict.fromkeys(of.names, 1.0)}, {"x": dict.fromkeys(of.names, 2.0)}, of)
        assert row.verdict == "of too few prompts" and row.difference == 1 and math.isnan(row.low) == (prompts == 1)


def test_dimensions_without_common_videos_give_no_total():
    of = prepared(prompts=6, samples=1)
    first = {dimension: dict.fromkeys(of.names, 0.5) for dimension in DIMENSIONS}
    second = {dimension: dict(found) for dimension, found in first.items()}
    first["color"], second["color"] = dict.fromkeys(of.names[:3], 0.5), dict.fromkeys(of.names[3:], 0.5)
    rows = {row.metric for row in comparison.compare(first, second, of)}
    assert "scene" in rows and "color" not in rows and "total" not in rows


def test_what_cannot_be_said_is_left_out():
    of = prepared(prompts=4, samples=1)
    first = {"p0-0": 1.0, "p1-0": math.nan, "p2-0": 3.0, "p3-0": 0.0}
    second = {"p0-0": 2.0, "p1-0": 9.0, "p2-0": math.nan, "p3-0": 1.0}
    (row,) = comparison.compare({"x": first}, {"x": second}, of)
    assert (row.videos, row.first, row.second) == (2, 0.5, 1.5)
    nothing = dict.fromkeys(first, math.nan)
    with pytest.raises(ValueError, match="nothing was measured on both"):
        comparison.compare({"x": nothing}, {"x": second}, of)


def test_totals_have_intervals():
    of, generator = prepared(), np.random.default_rng(2)
    names = of.names
    first = {dimension: dict(zip(names, generator.uniform(0.4, 0.6, len(names)))) for dimension in DIMENSIONS}
    second = {dimension: {name: value + 0.05 for name, value in found.items()} for dimension, found in first.items()}
    rows = {row.metric: row for row in comparison.compare(first, second, of)}
    means = [score({dimension: values.mean(found[dimension]) for dimension in DIMENSIONS}) for found in (first, second)]
    for name in ("quality", "semantic", "total"):
        assert rows[name].first == pytest.approx(means[0][name]) and rows[name].second == pytest.approx(means[1][name])
        assert rows[name].low == pytest.approx(rows[name].difference) == pytest.approx(rows[name].high)  # the same shift everywhere
    del second["scene"]
    assert "total" not in {row.metric for row in comparison.compare(first, second, of)}


def test_what_does_not_belong_together():
    of = prepared(prompts=2)
    first = dict.fromkeys(of.names, 1.0)
    with pytest.raises(ValueError, match="not measured on the same videos: 1 are in one folder only, p0-0"):
        comparison.compare({"x": first}, {"x": {name: 1.0 for name in of.names[1:]}}, of)
    (row,) = comparison.compare({"color": first}, {"color": {name: 2.0 for name in of.names[1:]}}, of)  # of videos that show the object
    assert row.videos == len(of.names) - 1 and row.difference == 1
    with pytest.raises(ValueError, match="belongs to no prompt"):
        comparison.compare({"x": {"q-0": 1.0}}, {"x": {"q-0": 1.0}}, of)
    with pytest.raises(ValueError, match="the first has x, the second y"):
        comparison.compare({"x": first}, {"y": first}, of)
    with pytest.raises(ValueError, match="50 resamples"):
        comparison.compare({"x": first}, {"x": first}, of, resamples=50)
    for change in (
        {"seed": 1},
        {"suite": "vbench"},
        {"num_latent_frames": 6},
        {"prompt_list": {"digest": "1"}},
        {"entries": of.entries[:1]},
    ):
        with pytest.raises(ValueError, match=f"they differ in {next(iter(change))}"):
            comparison.check_paired(of, dataclasses.replace(of, **change), ("A", "B"))
    comparison.check_paired(of, dataclasses.replace(of, seed=None, num_latent_frames=6), ("A", "B"))  # of another program
    comparison.check_paired(of, dataclasses.replace(of, model={"model": "two"}), ("A", "B"))


def test_the_command(tmp_path, capsys, caplog):
    of = prepared()
    first, second = drawn(of, np.random.default_rng(3), shift=2.0, within=0.1)
    for name, found in (("A", first), ("B", second)):
        claim(tmp_path / name, dataclasses.replace(of, model={"model": name}))
        values.write(tmp_path / name, "oracle", {"adherence": found, "nothing": dict.fromkeys(found, math.nan)}, {})
        content = {
            "imaging_quality": [0.5, [{"video_path": f"/x/{video}.mp4", "video_results": 100 * value} for video, value in found.items()]]
        }
        write_json(results_folder(tmp_path / name) / "imaging_quality_eval_results.json", content)
    assert main(["compare", str(tmp_path / "A"), str(tmp_path / "B")]) == 0
    assert "| adherence |" in (text := capsys.readouterr().out) and "| B is |" in text
    output = tmp_path / "B" / "results" / "compared"
    rows = {row["metric"]: row for row in json.loads((output / "compared.json").read_text())["rows"]}
    assert rows.keys() == {"adherence", "imaging_quality"} and (output / "compared.png").is_file()
    for name in ("difference", "low", "high"):  # the average of imaging quality is divided by 100, and so are its videos
        assert rows["adherence"][name] == pytest.approx(rows["imaging_quality"][name], abs=1e-5)
    claim(tmp_path / "C", dataclasses.replace(of, seed=3))
    assert main(["compare", str(tmp_path / "A"), str(tmp_path / "C")]) == 2 and "they differ in seed" in caplog.text
    assert main(["compare", str(tmp_path / "A"), str(tmp_path / "D")]) == 2 and "run `prepare` first" in caplog.text
