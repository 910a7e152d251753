"""Checkpoints: what is written comes back, atomically, and what is foreign is refused."""

import json
import math
import os
import pickle
import random
import re
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import adjoint
import flows
from flows.training.checkpoint import (
    CheckpointError,
    ensure_writable,
    load,
    replacing,
    save,
    versions,
    write_json,
)


class Evil:
    """Unpickling an instance creates the file ``marker``."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def same(a, b):
    """Equality of nested data, with types, dtypes and bits of tensors."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.fixture
def state():
    generator = torch.Generator().manual_seed(0)
    return {
        "identity": {"target": "ring", "steps": 10, "sizes": [2, 3]},
        "module": {"weight": torch.randn(7, 5, generator=generator)},
        "optimizer": {0: {"step": torch.tensor(3.0), "betas": (0.9, 0.999)}},
        "half": torch.randn(4, generator=generator).bfloat16(),
        "generator": generator.get_state(),
        "flags": [True, None, "text", 1, 0.1],
    }


def test_round_trip_keeps_values_types_and_bits(tmp_path, state):
    path = tmp_path / "new" / "folders" / "checkpoint.pt"
    save(path, state)
    assert same(load(path), state)
    assert [entry.name for entry in path.parent.iterdir()] == ["checkpoint.pt"]


def test_state_dicts_of_modules_and_optimisers_are_accepted(tmp_path):
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.randn(8, 3)).sum().backward()
    optimizer.step()
    save(tmp_path / "c.pt", {"module": module.state_dict(), "optimizer": optimizer.state_dict()})
    loaded = load(tmp_path / "c.pt")
    assert isinstance(module.state_dict(), OrderedDict)  # what is stored is a plain dict
    assert same(loaded["module"], dict(module.state_dict()))
    assert same(loaded["optimizer"], optimizer.state_dict())
    optimizer.load_state_dict(loaded["optimizer"])


def test_a_view_is_stored_without_the_rest_of_its_storage(tmp_path):
    big = torch.zeros(1_000_000)
    save(tmp_path / "c.pt", {"view": big[:10]})
    assert (tmp_path / "c.pt").stat().st_size < 10_000
    assert same(load(tmp_path / "c.pt"), {"view": torch.zeros(10)})


@pytest.mark.parametrize(
    "value", [np.float64(1.0), {1, 2}, nn.Linear(1, 1), np.zeros(2), Path("x")]
)
def test_objects_are_refused_at_saving_with_their_place(tmp_path, value):
    with pytest.raises(TypeError, match=r"state\['a'\]\[1\] is a"):
        save(tmp_path / "c.pt", {"a": [0, value]})
    assert list(tmp_path.iterdir()) == []


def test_keys_are_checked(tmp_path):
    with pytest.raises(TypeError, match="keys are strings or integers"):
        save(tmp_path / "c.pt", {"a": {(1, 2): 3}})


def test_truncation_at_any_length_is_one_clear_error(tmp_path, state):
    path = tmp_path / "checkpoint.pt"
    save(path, state)
    content = path.read_bytes()
    rng = random.Random(0)
    for length in [0, 1, 4, len(content) - 1, *rng.sample(range(len(content)), 40)]:
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="truncated"):
            load(path)


def test_flipped_bits_are_noticed_or_harmless(tmp_path, state):
    path = tmp_path / "checkpoint.pt"
    save(path, state)
    content = path.read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            assert same(load(path), state)  # padding and time stamps carry no data
        except CheckpointError:
            refused += 1
    assert refused > 50


def test_damage_within_a_tensor_is_found(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save(path, {"weight": torch.full((1000,), 1.5)})
    content = path.read_bytes()
    run = torch.full((1000,), 1.5).numpy().tobytes()
    assert content.count(run) == 1
    path.write_bytes(content.replace(run, run[:-1] + b"\x7f"))
    with pytest.raises(CheckpointError):
        load(path)


def test_a_pickle_with_code_is_refused_and_the_code_does_not_run(tmp_path):
    marker = tmp_path / "code_ran"
    archive, bare = tmp_path / "archive.pt", tmp_path / "bare.pt"
    torch.save({"identity": {}, "module": Evil(marker)}, archive)
    bare.write_bytes(pickle.dumps({"module": Evil(marker)}))

    with pytest.raises(CheckpointError, match=r"refers to '\w+\.mkdir'.*could run code"):
        load(archive)
    with pytest.raises(CheckpointError):
        load(bare)
    assert not marker.exists()

    torch.load(archive, weights_only=False)  # the attack is real: an unsafe reader falls for it
    assert marker.exists()


def test_another_problem_lists_what_differs(tmp_path, state):
    path = tmp_path / "checkpoint.pt"
    save(path, state)
    load(path, expect=state["identity"])
    with pytest.raises(CheckpointError) as caught:
        load(path, expect={"target": "moons", "sizes": [2, 3], "kernel": "ancestral"})
    message = str(caught.value)
    assert "target: 'ring' in the checkpoint, expected 'moons'" in message
    assert "steps: 10 in the checkpoint, expected 'absent'" in message
    assert "kernel: 'absent' in the checkpoint, expected 'ancestral'" in message
    assert "sizes" not in message
    assert "written by adjoint-matching of an unknown version" in message
    save(path, {**state, "versions": versions()})
    with pytest.raises(CheckpointError, match=f"adjoint-matching {re.escape(flows.__version__)}$"):
        load(path, expect={})


def test_a_checkpoint_of_the_first_version_is_refused_with_advice(tmp_path):
    path = tmp_path / "checkpoint.pt"
    old = {"problem": {"target": "ring"}, "versions": {"torch": "2.6"}, "iteration": 3}
    save(path, old)
    for expect in (None, {"target": "ring"}):
        with pytest.raises(CheckpointError, match=r"by adjoint-matching 0\.1, .* train again"):
            load(path, expect=expect)
    save(path, {"problem": "heat equation"})  # what users save may have any names
    assert load(path) == {"problem": "heat equation"}


def test_a_checkpoint_without_problem_or_without_dict_is_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save(path, {"iteration": 1})
    with pytest.raises(CheckpointError, match="does not say what run it belongs to"):
        load(path, expect={"target": "ring"})
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="holds a list, expected a dict"):
        load(path)


def test_a_missing_file_is_not_a_damaged_one(tmp_path):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "absent.pt")


@pytest.mark.parametrize("write", [lambda path: save(path, {}), ensure_writable])
def test_unwritable_places(tmp_path, write):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(NotADirectoryError, match=r"cannot write .*c\.pt.*Not a directory"):
        write(tmp_path / "file" / "below" / "c.pt")
    with pytest.raises(FileExistsError, match=r"cannot write .*c\.pt"):
        write(tmp_path / "file" / "c.pt")
    with pytest.raises(IsADirectoryError, match=r"cannot write .*folder.*it is a folder"):
        write(tmp_path / "folder")


def test_ensure_writable_leaves_nothing_behind_and_keeps_the_file(tmp_path):
    (tmp_path / "c.pt").write_text("old")
    assert ensure_writable(tmp_path / "c.pt") == tmp_path / "c.pt"
    assert (tmp_path / "c.pt").read_text() == "old"
    ensure_writable(tmp_path / "new" / "c.pt")
    assert list((tmp_path / "new").iterdir()) == []


def test_a_save_that_fails_midway_keeps_the_old_checkpoint(tmp_path, state, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    save(path, state)

    def disk_full(plain, file):
        file.write(b"half a checkpoint")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match=r"cannot write '.*checkpoint\.pt': No space left"):
        save(path, {"iteration": 2})
    assert same(load(path), state)
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_full_disk_that_pytorch_reports_as_a_broken_archive_is_named(tmp_path, monkeypatch):
    def closes_badly(plain, file):
        try:
            raise OSError(28, "No space left on device")
        finally:
            raise RuntimeError("unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", closes_badly)
    with pytest.raises(OSError, match=r"c\.pt': No space left on device"):
        save(tmp_path / "c.pt", {"iteration": 2})
    assert not any(tmp_path.iterdir())


def test_the_new_content_is_on_disk_before_it_gets_the_name(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    synced = []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(path.read_bytes()))
    with path.open("rb") as reader:
        with replacing(path) as file:
            file.write(b"new")
            assert path.read_bytes() == b"old"
        assert reader.read() == b"old"  # the name moved to another file, no byte was overwritten
    assert synced[0] == b"old"  # the file, before the rename
    assert path.read_bytes() == b"new"
    assert len(synced) == (2 if os.name == "posix" else 1)  # and the folder after it


def test_json_has_null_for_what_is_no_number(tmp_path):
    inner = {
        "a": math.nan,
        "b": [np.float64(math.inf), 1.5, (-math.inf,)],
        "c": True,
        "d": tmp_path,
    }
    write_json(tmp_path / "r.json", [inner])
    text = (tmp_path / "r.json").read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found == [{"a": None, "b": [None, 1.5, [None]], "c": True, "d": str(tmp_path)}]


def test_versions_name_what_numbers_depend_on():
    assert versions()["torch"] == torch.__version__
    assert versions().keys() == {"adjoint-matching", "python", "torch", "numpy", "platform"}
    assert versions()["adjoint-matching"] == flows.__version__ == adjoint.__version__
    assert all(type(value) is str for value in versions().values())
