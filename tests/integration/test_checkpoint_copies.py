"""Checkpoints in an object store: a real S3 server (rclone), the emulators of Google's and Azure's,
and one that does not answer."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from buckets import KEY, SECRET, az, gs, s3
from environments import on_top

import mlinfra_sdk
from mlinfra_sdk.checkpoints import checkpointer, mirror
from mlinfra_sdk.errors import StoreError

s3fs = pytest.importorskip("s3fs")

TRAIN = """
import os, sys
import numpy as np
import mlinfra_sdk

ckpt = mlinfra_sdk.checkpoint("run", to=sys.argv[2], keep=mlinfra_sdk.Keep(last=2))
state = dict(weights=np.zeros(3_000_000), generator=np.random.default_rng(0))
steps = []
for step in ckpt.loop(range(6), state=state, every=1):
    if step == int(sys.argv[1]):
        break
    steps.append(step)
    state["weights"] += state["generator"].normal(size=3_000_000)
    ckpt.wait()
print(steps, float(state["weights"].sum()))
"""
"""Each checkpoint has six chunks of its own: several are on their way at the same time."""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("s3") / "buckets"
    (folder / "bucket").mkdir(parents=True)
    with s3(folder, fresh=False) as url:
        yield url


@pytest.fixture
def keys(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MLINFRA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)


def train(
    home: Path, cut: int = -1, to: str = "s3://bucket/runs", python: str = sys.executable
) -> tuple[str, str]:
    """In a process and a home of its own; what it printed, and its messages."""
    done = subprocess.run(
        [python, "-c", TRAIN, str(cut), to],
        env={**os.environ, "MLINFRA_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


def loop(ckpt: Any, steps: int = 5) -> list[str]:
    """Train to the end; the warnings."""
    weights = np.zeros(10_000)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in ckpt.loop(range(steps), state={"weights": weights}, every=1):
            weights += 1
    assert weights[0] == steps
    return [
        str(it.message)
        for it in caught
        if "Checkpoints at" in str(it.message) or "copied" in str(it.message)
    ]


def test_a_run_goes_on_from_the_bucket_alone(keys: None, tmp_path: Path) -> None:
    """Pushed and pruned; the newest manifest there is damaged, so the one before is used."""
    whole = train(tmp_path / "whole")[0]
    bucket = s3fs.S3FileSystem(skip_instance_cache=True)
    bucket.rm("bucket/runs", recursive=True)

    assert train(tmp_path / "first", cut=3)[0].startswith("[0, 1, 2]")
    manifests = sorted(bucket.ls("bucket/runs/run", detail=False, refresh=True))[:2]
    assert [Path(it).name[:8] for it in manifests] == ["00000002", "00000003"]
    assert len(bucket.ls("bucket/runs/run/chunks", refresh=True)) == 2 * 6, "of two checkpoints"
    bucket.pipe_file(manifests[1], bucket.cat_file(manifests[1])[:-1] + b"x")

    shown, messages = train(tmp_path / "second")
    assert shown == f"[2, 3, 4, 5] {whole.split()[-1]}"
    assert "00000003" in messages and "damaged" in messages
    assert "Going on from checkpoint run #2 (step 2)" in messages


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """That of an environment with what opens gs:// and az://; all else comes from this one, where
    other tests want them not to be."""
    return on_top(tmp_path_factory.mktemp("clouds") / "venv", "gcsfs", "adlfs")


MAKE_CONTAINER = """
import os
from azure.storage.blob import BlobServiceClient
text = os.environ["AZURE_STORAGE_CONNECTION_STRING"]
BlobServiceClient.from_connection_string(text).create_container("bucket")
"""


@pytest.mark.parametrize("scheme", ["gs", "az"])
def test_other_clouds(
    scheme: str, python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with {"gs": gs, "az": az}[scheme](tmp_path) as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        if scheme == "az":
            subprocess.run([python, "-c", MAKE_CONTAINER], check=True)
        to = f"{scheme}://bucket/runs"
        whole, _ = train(tmp_path / "whole", to=f"{to}/whole", python=python)
        first, _ = train(tmp_path / "first", 3, to, python)
        assert first.startswith("[0, 1, 2]")
        rest, messages = train(tmp_path / "second", -1, to, python)
        assert rest == f"[3, 4, 5] {whole.split()[-1]}"
        assert "Going on from checkpoint run #3 (step 3)" in messages


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_are_told_once(
    keys: None, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "wrong-" + "x" * 20)
    began = time.monotonic()
    ckpt = mlinfra_sdk.checkpoint("closed", to="s3://bucket/runs")
    (told,) = loop(ckpt)
    assert "s3://bucket/runs/closed could not be read" in told and "credentials" in told
    assert "Training goes on" in told and "xxx" not in told
    assert ckpt.checkpoints()[-1].finished, "all are here"
    with pytest.raises(StoreError, match="could not be read"):
        ckpt.restore({"weights": np.zeros(10_000)})
    with pytest.raises(StoreError, match="could not be written"):
        ckpt.wait()
    assert time.monotonic() - began < 60


def test_what_could_not_be_read_is_not_pruned(keys: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that began anew for that reason leaves there what it should have gone on from."""
    bucket = s3fs.S3FileSystem(skip_instance_cache=True)
    keep = mlinfra_sdk.Keep(last=1)
    assert not loop(mlinfra_sdk.checkpoint("kept", to="s3://bucket/runs", keep=keep))
    (before,) = bucket.glob("bucket/runs/kept/*.ckpt")

    monkeypatch.setenv("MLINFRA_HOME", os.environ["MLINFRA_HOME"] + "-2")
    ckpt = mlinfra_sdk.checkpoint("kept", to="s3://bucket/runs", keep=keep)
    with monkeypatch.context() as patch, pytest.raises(StoreError, match="no answer"):
        patch.setattr(mirror, "PATIENCE_S", 1e-6)
        ckpt.restore({})
    ckpt.save({"weights": np.ones(10)}, wait=True)
    bucket.invalidate_cache()
    assert before in bucket.glob("bucket/runs/kept/*.ckpt")
    assert len(bucket.glob("bucket/runs/kept/*.ckpt")) == 2

    again = mlinfra_sdk.checkpoint("kept", to="s3://bucket/runs", keep=keep, resume=False)
    assert not loop(again, steps=1)
    bucket.invalidate_cache()
    (newest,) = bucket.glob("bucket/runs/kept/*.ckpt")
    assert newest != before, "a new run's low numbers are newer than an old one's"


def test_a_store_that_does_not_answer_holds_no_loop(
    keys: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes connections and is silent, as behind a dead link."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        options = {"endpoint_url": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        place: dict[str, Any] = {"to": "s3://bucket/runs", "storage_options": options}

        monkeypatch.setattr(mirror, "PATIENCE_S", 1.0)
        began = time.monotonic()
        (told,) = loop(mlinfra_sdk.checkpoint("start", **place))
        assert "could not be read: no answer for 1" in told
        assert time.monotonic() - began < 60

        (told,) = loop(mlinfra_sdk.checkpoint("later", resume=False, **place))
        assert "could not be written: no answer for 1" in told

        monkeypatch.setattr(mirror, "PATIENCE_S", 100.0)
        monkeypatch.setattr(checkpointer, "_LAST_COPY_S", 0.5)
        began = time.monotonic()
        ckpt = mlinfra_sdk.checkpoint("end", resume=False, **place)
        (told,) = loop(ckpt)
        assert time.monotonic() - began < 60, "the loop has not waited for a request"
        assert "still being copied to s3://bucket/runs/end" in told
        assert ckpt.checkpoints()[-1].finished
