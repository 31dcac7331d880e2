"""What of a folder counts as a checkpoint, and what is put back."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from mlinfra_sdk.checkpoints import announce
from mlinfra_sdk.checkpoints.export import write_file
from mlinfra_sdk.checkpoints.folder import FolderWatch, name_of, watched
from mlinfra_sdk.checkpoints.manifest import File, Manifest
from mlinfra_sdk.checkpoints.store import CheckpointStore
from mlinfra_sdk.errors import CheckpointError
from mlinfra_sdk.objects.blob import BlobRef


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLINFRA_HOME", str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def watch(root: Path) -> FolderWatch:
    return FolderWatch("out", "out", root / "out", CheckpointStore.default())


def write(path: Path, data: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def history() -> list[Manifest]:
    return CheckpointStore.default().history("out")


def kept() -> dict[str, bytes]:
    """The files of the newest checkpoint."""
    store = CheckpointStore.default()
    found = history()
    files = found[-1].files if found else []
    return {it.path: bytes(store.chunks.read(it.content)) for it in files}


def test_what_is_being_written_is_not_kept(root: Path, watch: FolderWatch) -> None:
    write(root / "out" / "a.bin", b"one")
    write(root / "out" / "b.bin.tmp")
    write(root / "out" / ".hidden" / "c")
    watch.tick()
    assert kept() == {}  # it may just have begun
    watch.tick()
    assert kept() == {"a.bin": b"one"}
    watch.tick()
    assert len(history()) == 1  # nothing is new
    write(root / "out" / "a.bin", b"longer")
    watch.tick()
    assert kept() == {"a.bin": b"one"}
    watch.tick()
    assert kept() == {"a.bin": b"longer"}


def test_a_folder_in_it_counts_as_a_whole(root: Path, watch: FolderWatch) -> None:
    write(root / "out" / "step-1" / "weights")
    write(root / "out" / "step-1" / "deep" / "state")
    watch.tick()
    write(root / "out" / "step-1" / "deep" / "late")
    watch.tick()
    assert kept() == {}
    watch.tick()
    assert set(kept()) == {"step-1/weights", "step-1/deep/state", "step-1/deep/late"}
    (root / "out" / "step-1" / "weights").unlink()
    watch.tick()
    assert "step-1/weights" not in kept()


def test_a_folder_without_the_file_that_is_written_last_has_only_begun(
    root: Path, watch: FolderWatch
) -> None:
    for name in ("model.safetensors.index.json", "training_args.bin", "optimizer.pt"):
        write(root / "out" / "checkpoint-5" / name)
    write(root / "out" / "final" / "training_args.bin")  # save_model writes no trainer_state.json
    for _ in range(3):
        watch.tick()
    assert set(kept()) == {"final/training_args.bin"}
    write(root / "out" / "checkpoint-5" / "trainer_state.json")
    for _ in range(2):
        watch.tick()
    assert {path.split("/")[0] for path in kept()} == {"checkpoint-5", "final"}
    assert len(kept()) == 5


def test_checkpoints_of_torch_distributed(root: Path, watch: FolderWatch) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.save({"x": torch.arange(9)}, checkpoint_id=root / "out" / "step-1", no_dist=True)
    metadata = root / "out" / "step-1" / ".metadata"
    metadata.rename(root / "aside")
    for _ in range(3):
        watch.tick()
    assert kept() == {}
    (root / "aside").rename(metadata)
    for _ in range(2):
        watch.tick()
    for path in (root / "out" / "step-1").iterdir():
        path.unlink()
    with run():
        state = {"x": torch.zeros(9, dtype=torch.int64)}
        dcp.load(state, checkpoint_id=root / "out" / "step-1", no_dist=True)
        assert state["x"].tolist() == list(range(9))


def test_who_removes_the_last_file_before_writing_the_next_loses_nothing(
    root: Path, watch: FolderWatch
) -> None:
    path = write(root / "out" / "a.bin", b"one")
    for _ in range(2):
        watch.tick()
    path.unlink()
    for _ in range(2):
        watch.tick()
    assert kept() == {"a.bin": b"one"}
    write(root / "out" / "b.bin", b"two")
    for _ in range(2):
        watch.tick()
    assert kept() == {"b.bin": b"two"}


def test_formats_that_tell_are_looked_at(root: Path, watch: FolderWatch) -> None:
    path = root / "out" / "model.pt"
    path.parent.mkdir()
    torch.save({"x": torch.zeros(10_000)}, path)
    whole = path.read_bytes()
    header = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    tensors = len(header).to_bytes(8, "little") + header + bytes(8)
    write(path, whole[:20_000])
    write(root / "out" / "model.safetensors", tensors[:-1])
    for _ in range(2):
        watch.tick()
    assert kept() == {}  # a writer that has stalled, or was killed
    write(path, whole)
    write(root / "out" / "model.safetensors", tensors)
    for _ in range(2):
        watch.tick()
    assert kept() == {"model.pt": whole, "model.safetensors": tensors}


def test_nothing_outside_is_read_or_written(root: Path, watch: FolderWatch) -> None:
    secret = write(root.parent / "secret", b"secret")
    write(root / "out" / "own", b"own")
    (root / "out" / "link").symlink_to(secret)
    (root / "out" / "folder").symlink_to(root.parent)
    for _ in range(2):
        watch.tick()
    assert kept() == {"own": b"own"}
    store = CheckpointStore.default()
    for path in ("../evil", str(root.parent / "evil"), "folder/evil"):
        with pytest.raises(CheckpointError, match="leads out of"):
            write_file(File(path, 1, 0, BlobRef(0)), store.chunks, root / "out")
    assert not (root.parent / "evil").exists()
    with pytest.warns(RuntimeWarning, match="leads out of the notebook's folder"):
        (root / "far").symlink_to(root.parent)
        with watched("far", "far/home"):
            pass


def run(name: str = "out") -> Any:
    return watched(name, "out")


def test_a_run_that_was_cut_off_finds_its_files_again(
    root: Path, watch: FolderWatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(root / "out" / "deep" / "a.bin", b"one")
    os.utime(path, ns=(5, 5))
    write(root / "out" / "b.bin", b"two")
    for _ in range(2):
        watch.tick()
    path.unlink()
    write(root / "out" / "b.bin", b"mine")  # what is there is left
    with run():
        assert path.read_bytes() == b"one" and path.stat().st_mtime_ns == 5
        assert (root / "out" / "b.bin").read_bytes() == b"mine"
    assert "1 file of out restored, as of " in capsys.readouterr().out
    # That run has come to its end: the next one begins anew, unless it is begun again.
    assert history()[-1].finished
    path.unlink()
    with run():
        assert not path.exists()


def test_a_run_that_is_begun_again_has_them_in_any_case(root: Path) -> None:
    with run():
        write(root / "out" / "last.bin", b"last")
    assert kept() == {"last.bin": b"last"} and history()[-1].finished
    (root / "out" / "last.bin").unlink()
    announce.rerun(True)
    try:
        with run():
            assert (root / "out" / "last.bin").read_bytes() == b"last"
    finally:
        announce.rerun(False)


def test_an_empty_folder_makes_nothing(root: Path) -> None:
    with run():
        pass
    assert history() == [] and not (root / "out").exists()


def test_a_damaged_checkpoint_is_left_out(root: Path, watch: FolderWatch) -> None:
    path = write(root / "out" / "a.bin", b"one" * 1000)
    for _ in range(2):
        watch.tick()
    path.unlink()
    for chunk in (root.parent / "home" / "store").rglob("*"):
        if chunk.is_file() and chunk.stat().st_size == 3000:
            chunk.write_bytes(b"bad")
    with pytest.warns(RuntimeWarning, match="missing or damaged"), run():
        assert not path.exists()


def test_a_disk_that_is_full_is_said_and_harms_nobody(
    root: Path, watch: FolderWatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(root / "out" / "a.bin", b"one")
    (root.parent / "home" / "checkpoints").write_text("in the way")
    for _ in range(4):
        watch.tick()
    assert capsys.readouterr().out.count("were not kept") == 1


def test_names() -> None:
    assert name_of("w", "out/a b") != name_of("v", "out/a b")
    assert name_of("w", "out/a b").startswith("out-a-b-")
