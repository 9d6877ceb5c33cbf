"""When images arrive, and what a viewer makes of it."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import latency
from latency import Arrival, deadlines_met, percentile, summary, watch


def arrivals(*times, plays=1.0):
    return [Arrival(at, plays) for at in times]


def test_a_video_that_comes_in_time_has_no_stalls():
    seen = watch(arrivals(2.0, 2.5, 3.9, 4.9))
    assert seen == (2.0, 0, 0.0, 6.0)
    assert deadlines_met(arrivals(2.0, 2.5, 3.9, 4.9)) == 1.0


def test_a_late_block_stops_the_viewer_until_it_comes():
    late = arrivals(2.0, 3.5, 4.0, 7.0)  # due at 3, then at 4.5 and 5.5
    seen = watch(late)
    assert seen == (2.0, 2, pytest.approx(0.5 + 1.5), 8.0)
    assert deadlines_met(late) == pytest.approx(1 / 3)  # due at 3, 4 and 5


def test_a_viewer_who_stores_some_begins_later_and_waits_less():
    late = arrivals(2.0, 3.5, 4.0, 7.0)
    seen = watch(late, ahead=2.0)
    assert seen.starts == 3.5 and seen.stalls == 1 and seen.stalled_seconds == pytest.approx(0.5)
    assert watch(late, ahead=100.0) == (7.0, 0, 0.0, 11.0)
    with pytest.raises(ValueError, match="nothing to watch"):
        watch([])


def test_percentiles():
    assert [percentile([3.0, 1.0, 2.0, 5.0, 4.0], p) for p in (0, 50, 90, 100)] == [1.0, 3.0, pytest.approx(4.6), 5.0]


def test_frames_per_second_of_the_parts():
    found = summary(arrivals(1.0, 2.0, 4.0, plays=0.75), fps=16.0, ahead=0.0, network=2.0, decode=1.0, switch_block=2.0)
    assert (found.network_fps, found.decode_fps, found.end_to_end_fps) == (18.0, 36.0, 9.0)
    assert found.first == 1.0 and found.between_most == 2.0 and found.viewer_stalls == 2


def test_command_line(tiny, tmp_path, capsys):
    output = tmp_path / "result.json"
    assert latency.main(["--model", str(tiny), "--device", "cpu", "--seconds", "3", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    found = json.loads(output.read_text())
    assert json.loads(printed.splitlines()[-1]) == found and "second" in printed
    for video in ("first_video", "second_video"):
        assert found[video]["blocks"] == 5 and found[video]["first"] > 0 and found[video]["switch_block"] > 0
        assert found[video]["network_fps"] > 0 and found[video]["decode_fps"] > 0
