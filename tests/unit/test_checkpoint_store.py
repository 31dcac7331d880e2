"""The store of checkpoints: complete or not there, shared content, damage, keep rules."""

from __future__ import annotations

import os
import resource
import secrets
import signal
from pathlib import Path

import msgspec
import numpy as np
import pytest

from mlinfra_sdk.checkpoints.checkpointer import Checkpointer
from mlinfra_sdk.checkpoints.keep import Keep
from mlinfra_sdk.checkpoints.manifest import Manifest, decode, encode
from mlinfra_sdk.checkpoints.store import CheckpointStore
from mlinfra_sdk.errors import CheckpointError, RequestError, StoreError
from mlinfra_sdk.objects.store import ChunkStore

MB = 1_000_000


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", ChunkStore(tmp_path / "store"))


def keeper(store: CheckpointStore, **options: object) -> Checkpointer:
    return Checkpointer("run", store=store, **options)  # type: ignore[arg-type]


def save(ckpt: Checkpointer, step: int, **metrics: float) -> None:
    state = {"weights": np.full(MB, step, "f4"), "frozen": np.arange(MB, dtype="f4"), "step": step}
    ckpt.save(state, step=step, wait=True, **metrics)


def restored(store: CheckpointStore) -> int:
    state = {"weights": np.zeros(MB, "f4"), "frozen": np.zeros(MB, "f4"), "step": 0}
    weights = state["weights"]
    found = keeper(store).restore(state)
    step = state["step"]
    if found is not None:
        assert state["weights"] is weights and (weights == step).all()
        assert (state["frozen"] == np.arange(MB)).all()
    return int(step)


def manifest_file(store: CheckpointStore, number: int) -> Path:
    return store.root / "run" / f"{number:08d}.ckpt"


def test_what_was_saved_is_restored_in_place(store: CheckpointStore) -> None:
    assert restored(store) == 0
    ckpt = keeper(store)
    for step in (1, 2):
        save(ckpt, step)
    assert restored(store) == 2
    assert (store.root.stat().st_mode & 0o777, manifest_file(store, 1).stat().st_mode & 0o777) == (
        0o700,
        0o600,
    )


def test_unchanged_content_is_stored_once(store: CheckpointStore) -> None:
    ckpt = keeper(store)
    for step in (1, 2, 3):
        save(ckpt, step)
    (_, whole, first), (_, _, second), _ = store.sizes("run")
    assert whole > 8 * MB and first > 8 * MB and 4 * MB < second < 4.1 * MB


def test_damaged_and_half_written_ones_are_skipped(store: CheckpointStore) -> None:
    ckpt = keeper(store)
    for step in (1, 2, 3):
        save(ckpt, step)
    whole = manifest_file(store, 3).read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-1] + b"x", b""):
        manifest_file(store, 3).write_bytes(damaged)
        with pytest.warns(RuntimeWarning, match="run #3 is left out"):
            assert restored(store) == 2
    manifest = store.get("run", 2)
    digest = next(iter(manifest.parts["weights"].packed.buffers[0].chunks))
    chunk = next((store.chunks.root / "chunks").glob(f"*/{digest.hex()}"))
    chunk.chmod(0o600)
    data = bytearray(chunk.read_bytes())
    data[1000] ^= 1
    chunk.write_bytes(data)
    with pytest.warns(RuntimeWarning, match="1 of its .* chunks are missing or damaged"):
        assert restored(store) == 1
    with pytest.raises(CheckpointError, match="missing or damaged"):
        store.get("run", 2)
    with pytest.raises(RequestError, match="no checkpoint #9"):
        store.get("run", 9)


def test_checkpoints_survive_the_collection_of_garbage(store: CheckpointStore) -> None:
    save(keeper(store), 1)
    loose = store.chunks.put_chunk(b"loose" * 1000)
    for path in store.chunks.root.glob("chunks/*/*"):  # nobody has used them for long
        os.utime(path, ns=(10**9, path.stat().st_mtime_ns % 10**9 + 10**9))
    assert store.chunks.collect_garbage(0) > 0
    assert not store.chunks.has(loose)
    assert restored(store) == 1
    for pin in store.chunks.pins(""):  # a power failure may lose them: they are not synced
        store.chunks.unpin(pin)
    store.prune("run", Keep())
    assert store.chunks.pins("") == ["checkpoint-run-1"]
    store.remove("run")
    assert store.names() == [] and store.chunks.pins("") == []


def test_keep_rules() -> None:
    def numbers(keep: Keep) -> list[int]:
        made = [
            Manifest("run", number, "", number * 3600.0, metrics={"loss": abs(number - 4)})
            for number in range(1, 11)
        ]
        doomed = {it.number for it in keep.doomed(made)}
        return [it.number for it in made if it.number not in doomed]

    assert numbers(Keep()) == [8, 9, 10]
    assert numbers(Keep(last=1, best="loss")) == [4, 10]
    assert numbers(Keep(last=1, best="loss", mode="max", best_count=2)) == [9, 10]
    assert numbers(Keep(last=1, every="4h")) == [1, 4, 8, 10]
    for wrong in ({"last": 0}, {"mode": "least"}, {"every": "often"}):
        with pytest.raises(RequestError):
            Keep(**wrong)  # type: ignore[arg-type]


def test_pruning_leaves_what_is_shared(store: CheckpointStore) -> None:
    ckpt = keeper(store, keep=Keep(last=1, best="loss"))
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5)):
        save(ckpt, step, loss=loss)
    assert [it.step for it in store.history("run")] == [2, 4]
    assert restored(store) == 4


def test_two_that_save_at_once_get_numbers_of_their_own(store: CheckpointStore) -> None:
    children = []
    for seed in range(3):
        child = os.fork()
        if not child:
            try:
                save(keeper(store, keep=Keep(last=10)), seed)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert [it.number for it in store.history("run")] == [1, 2, 3]


def test_killed_at_any_instant_the_last_whole_one_is_there(store: CheckpointStore) -> None:
    done = store.root.parent / "done"
    source = secrets.SystemRandom()
    for _ in range(8):
        before = int(done.read_text()) if done.exists() else 0
        child = os.fork()
        if not child:
            try:
                ckpt = keeper(store)
                for step in range(before + 1, before + 1000):
                    save(ckpt, step)
                    done.write_text(str(step))
            finally:
                os._exit(1)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        signal.sigtimedwait({signal.SIGCHLD}, source.uniform(0.0, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        confirmed = int(done.read_text() or 0) if done.exists() else 0
        assert restored(store) >= confirmed


def test_a_full_disk_is_said_and_training_goes_on(
    store: CheckpointStore, capsys: pytest.CaptureFixture[str]
) -> None:
    ckpt = keeper(store)
    save(ckpt, 1)
    state = {"weights": np.random.default_rng(0).random(MB), "step": 0}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(StoreError, match="cannot be written"):
            ckpt.save(state, wait=True)
        with pytest.warns(RuntimeWarning, match="was not saved|cannot be written"):
            assert list(keeper(store, resume=False).loop(range(3), state=state, every=1)) == [
                0,
                1,
                2,
            ]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert restored(store) == 1
    assert not list(store.chunks.root.glob("chunks/*/.*")), "nothing half-written is left"


def test_manifests_of_elsewhere(store: CheckpointStore) -> None:
    save(keeper(store), 1)
    manifest = store.get("run", 1)
    assert store.commit(manifest).number == 1, "known already"
    other = msgspec.structs.replace(manifest, id="other")
    assert store.commit(other).number == 2
    assert decode(encode(manifest)) == manifest
    with pytest.raises(RequestError, match="cannot be the name"):
        Checkpointer("../x", store=store)
