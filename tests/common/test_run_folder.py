"""Run folders and locks; `tests/toy2d/test_run_folder.py` has the rules on whole runs."""

import json
import threading
import time

import pytest

import flows
from applications.common import lock
from applications.common.errors import RunError
from applications.common.lock import locked
from applications.common.run_folder import RunFiles, check_free, clear, write_config

FILES = RunFiles(("a.pt",), ("a.csv",), marker="sheep", renamed={"goats": "sheep"})
NO = {"resume": False, "overwrite": False}


def test_config_says_which_versions_wrote_it(tmp_path):
    write_config(tmp_path, {"sheep": 3, "versions": {"shears": "2"}})
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["sheep"] == 3
    assert content["versions"]["adjoint-matching"] == flows.__version__
    assert content["versions"]["shears"] == "2"
    assert {"torch", "numpy", "python"} <= {*content["versions"]}


@pytest.mark.parametrize(
    ("config", "version"),
    [
        ({"goats": 3, "versions": {"torch": "2.6"}}, "0.1"),
        ({"options": {"goats": 3}}, "0.1"),
        ({"goats": 3, "versions": {"adjoint-matching": "0.1.7"}}, "0.1.7"),
    ],
)
def test_a_run_with_options_of_another_version_is_not_resumed(tmp_path, config, version):
    (tmp_path / "config.json").write_text(json.dumps({"sheep": 3} | config))
    (tmp_path / "a.pt").write_text("work")
    with pytest.raises(
        ValueError, match=rf"version {version} of .*\(goats is now sheep\)"
    ) as error:
        check_free(tmp_path, FILES, resume=True, overwrite=False)
    assert "continue it with that version, or begin it anew by --overwrite" in str(error.value)
    assert not check_free(tmp_path, FILES, resume=False, overwrite=True)
    assert (tmp_path / "a.pt").read_text() == "work"


def test_a_folder_is_free_continued_or_refused(tmp_path):
    assert not check_free(tmp_path / "nowhere", FILES, **NO)
    write_config(tmp_path, {"sheep": 3})
    (tmp_path / "a.pt").write_text("work")
    (tmp_path / "mine.txt").write_text("mine")
    assert check_free(tmp_path, FILES, resume=True, overwrite=False)
    with pytest.raises(ValueError, match="holds a run already"):
        check_free(tmp_path, FILES, **NO)
    assert not check_free(tmp_path, FILES, resume=False, overwrite=True)
    clear(tmp_path, FILES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "mine.txt"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_lock_keeps_others_out_and_is_given_back(tmp_path, kind):
    pytest.importorskip("fcntl")
    path = tmp_path if kind == "folder" else tmp_path / ".lock"
    message = f"folder: {tmp_path} is in use by a shepherd"
    with locked(path), pytest.raises(RunError, match=message), locked(path, holder="a shepherd"):
        pass
    with locked(path):
        pass


def test_a_patient_process_waits_for_the_lock(tmp_path):
    pytest.importorskip("fcntl")
    held = threading.Event()

    def hold():
        with locked(tmp_path):
            held.set()
            time.sleep(0.15)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    started = time.monotonic()
    with locked(tmp_path, patience=60):
        assert time.monotonic() - started > 0.05
    thread.join()


@pytest.mark.parametrize("system", ["without", "refuses"])
def test_where_there_are_no_locks_only_those_that_must_have_one_fail(tmp_path, monkeypatch, system):
    class Refusing:
        LOCK_EX = LOCK_NB = 0

        def flock(self, handle, how):
            raise OSError("no locks")

    monkeypatch.setattr(lock, "fcntl", None if system == "without" else Refusing())
    with locked(tmp_path):
        pass
    with pytest.raises(OSError, match="locks"), locked(tmp_path, required=True):
        pass
