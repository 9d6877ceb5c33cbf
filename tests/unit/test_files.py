"""A file that is being made has one owner, whatever becomes of that one."""

import fcntl
import multiprocessing
import time

import pytest

from longlive.files import owned
from longlive.training import __main__ as train


def hold(path, held):
    with owned(path):
        held.set()
        time.sleep(600)


def test_one_owner_at_a_time(tmp_path):
    path = tmp_path / "new" / "a.mp4"
    refused = pytest.raises(ValueError, match=r"a\.mp4 is being made by process \d+ on .*choose another")
    with owned(path), owned(tmp_path / "new" / "b.mp4"), refused, owned(path):
        pass
    with owned(path):
        pass
    assert not list(path.parent.iterdir())


def test_what_a_killed_process_owned_is_free(tmp_path):
    context = multiprocessing.get_context("fork")
    held = context.Event()
    process = context.Process(target=hold, args=(tmp_path / "a", held))
    process.start()
    assert held.wait(60)
    with pytest.raises(ValueError, match=f"process {process.pid} "), owned(tmp_path / "a"):
        pass
    process.kill()
    process.join()
    assert (tmp_path / ".a.lock").exists()
    with owned(tmp_path / "a"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_disk_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with owned(tmp_path / "a"):
        pass
    assert "has no locks" in caplog.text


def test_a_folder_of_training_has_one_owner(tmp_path, caplog):
    with owned(tmp_path / "run"):
        assert train.main(["--config", "configs/miniature/language.yaml", f"run={tmp_path / 'run'}", "device=cpu"]) == 2
    assert "run is being made by process" in caplog.text
