"""What a job keeps until it is needed again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mlinfra_sdk.jobs import Job
from mlinfra_sdk.namespace.delta import Group, Inputs
from mlinfra_sdk.objects.blob import Packed
from mlinfra_sdk.objects.store import ChunkStore
from mlinfra_sdk.spec import Request


def test_inputs_stay_in_the_store_while_their_job_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLINFRA_HOME", str(tmp_path))
    store = ChunkStore(tmp_path / "store")
    data = store.put_buffer(os.urandom(100_000))
    job = Job("x", 1, "", "", False, Request(), None, run="ab12")
    job.inputs = Inputs([Group(1, ["x"], Packed(data, []))])
    killed = tmp_path / "jobs" / "999999999-cd34"
    killed.parent.mkdir()
    killed.touch()
    foreign = killed.parent / ".DS_Store"
    foreign.touch()
    job.hold(store)
    (owner,) = (path for path in killed.parent.iterdir() if path != foreign)
    assert owner.name.startswith(f"{os.getpid()}-")
    for path in store.root.glob("chunks/*/*"):
        os.utime(path, (path.stat().st_atime - 7200, path.stat().st_mtime - 7200))
    assert store.collect_garbage(0) == 0
    del job
    assert list(killed.parent.iterdir()) == [foreign]
    assert store.collect_garbage(0) == 100_000
