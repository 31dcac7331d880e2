"""Variables on their way to a machine with a store of its own: how many bytes move, and what
happens to chunks that are damaged, interrupted or have no room."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from faulty import Client, Recorder, client
from live import until

from mlinfra_sdk import paths
from mlinfra_sdk.errors import StoreError
from mlinfra_sdk.machines import moves
from mlinfra_sdk.objects.store import CHUNK_SIZE, ChunkStore

RANDOM = np.random.default_rng(1)
MIB = 1 << 20


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("home")
    before = os.environ.get("MLINFRA_HOME")
    os.environ["MLINFRA_HOME"] = str(folder)
    yield folder
    if before is None:
        del os.environ["MLINFRA_HOME"]
    else:
        os.environ["MLINFRA_HOME"] = before


@pytest.fixture(scope="module")
def far(home: Path) -> Iterator[Client]:
    with client(isolate=True) as it:
        yield it


def moved(it: Client, code: str) -> tuple[int, int]:
    """Bytes that a cell moved over the link, each way."""
    connection = it.session._client
    before = (connection.bytes_sent, connection.bytes_received) if connection else (0, 0)
    result = it.run(code)
    result.get()
    connection = it.session._client
    assert connection is not None
    return connection.bytes_sent - before[0], connection.bytes_received - before[1]


def random_bytes(size: int) -> np.ndarray[Any, Any]:
    return RANDOM.integers(0, 256, size, dtype=np.uint8)


def array() -> tuple[Any, str, float]:
    value = RANDOM.random(40 * MIB // 8)
    return value, "x[: len(x) // 100] += 1", 0.11


def frame() -> tuple[Any, str, float]:
    import pandas

    columns = {f"c{i}": RANDOM.random(MIB) for i in range(8)}
    return pandas.DataFrame(columns), "x.loc[:10, 'c3'] = 0.0", 0.15


def tensors() -> tuple[Any, str, float]:
    import torch

    return {f"t{i}": torch.rand(MIB) for i in range(16)}, "x['t3'] += 1", 0.08


def module() -> tuple[Any, str, float]:
    import torch

    layers = [torch.nn.Linear(1000, 1000) for _ in range(16)]
    change = "import torch\nwith torch.no_grad(): x[3].weight += 1"
    return torch.nn.Sequential(*layers), change, 0.08


def arrays() -> tuple[Any, str, float]:
    return {f"a{i}": RANDOM.random(MIB // 2) for i in range(16)}, "x['a3'][0] = 7", 0.08


def nested() -> tuple[Any, str, float]:
    return [[RANDOM.random(MIB // 2) for _ in range(4)] for _ in range(4)], "x[1][2] *= 2", 0.08


def estimator() -> tuple[Any, str, float]:
    from sklearn.neighbors import KNeighborsRegressor

    model = KNeighborsRegressor(algorithm="brute")
    return model.fit(RANDOM.random((MIB, 8)), RANDOM.random(MIB)), "x.n_neighbors = 7", 0.01


@pytest.mark.parametrize(
    "make", [array, frame, tensors, module, arrays, nested, estimator], ids=lambda f: f.__name__
)
def test_only_what_changed_is_sent(far: Client, make: Any) -> None:
    value, change, share = make()
    far.namespace.clear()
    far.namespace["x"] = value
    whole, _ = moved(far, "y = type(x).__name__")
    assert whole > 30 * MIB
    again, back = moved(far, "y = type(x).__name__")
    assert again < 20_000 and back < 20_000, "unchanged"
    exec(change, far.namespace)
    delta, _ = moved(far, "y = type(x).__name__")
    assert delta < share * whole


def test_what_the_machine_changed_comes_back_as_little(far: Client) -> None:
    far.namespace.clear()
    far.namespace["x"] = RANDOM.random(40 * MIB // 8)
    moved(far, "len(x)")
    sent, received = moved(far, "x[:1000] = 0")
    assert sent < 20_000 and received < 1.1 * CHUNK_SIZE
    assert not far.namespace["x"][:1000].any() and far.namespace["x"][1000:].all()
    assert moved(far, "len(x)")[0] < 20_000


def machine_store(it: Client) -> ChunkStore:
    machine = it.session.machine
    assert machine is not None
    return ChunkStore(Path(machine.handle.data["folder"]) / "store")


def flip(store: ChunkStore, digest: bytes) -> None:
    """A bit of a chunk's file, as a disk does it: without a trace but the content."""
    path = store._path(digest)
    times = path.stat()
    path.chmod(0o600)
    with path.open("r+b") as file:
        byte = file.read(1)
        file.seek(0)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def write_to(store: ChunkStore, digest: bytes) -> None:
    path = store._path(digest)
    path.chmod(0o600)
    path.write_bytes(b"\0" * 100 + path.read_bytes()[100:])


def truncate(store: ChunkStore, digest: bytes) -> None:
    path = store._path(digest)
    path.chmod(0o600)
    os.truncate(path, 5)


def remove(store: ChunkStore, digest: bytes) -> None:
    store._path(digest).unlink()


@pytest.mark.parametrize("damage", [write_to, truncate, remove])
def test_a_chunk_that_is_damaged_here_is_made_again(far: Client, damage: Any) -> None:
    far.namespace.clear()
    far.namespace["x"] = random_bytes(3 * CHUNK_SIZE)
    store = ChunkStore(paths.data_dir() / "store")
    digests = store.put_buffer(far.namespace["x"]).chunks
    damage(store, digests[1])
    assert far.run("int(x.sum())").get() == far.namespace["x"].sum()


def test_a_chunk_that_is_sent_damaged_is_made_and_sent_again(far: Client) -> None:
    far.namespace.clear()
    far.namespace["x"] = random_bytes(3 * CHUNK_SIZE)
    store = ChunkStore(paths.data_dir() / "store")
    flip(store, store.put_buffer(far.namespace["x"]).chunks[1])
    assert far.run("int(x.sum())").get() == far.namespace["x"].sum()


@pytest.mark.parametrize("damage", [write_to, truncate, remove])
def test_a_chunk_that_is_damaged_there_is_sent_again(far: Client, damage: Any) -> None:
    far.namespace.clear()
    x = far.namespace["x"] = random_bytes(3 * CHUNK_SIZE)
    digests = ChunkStore(paths.data_dir() / "store").put_buffer(x).chunks
    far.run("del x").get()
    damage(machine_store(far), digests[1])
    far.namespace["x"] = x
    assert far.run("int(x.sum())").get() == x.sum()


def test_memory_that_is_mapped_from_a_damaged_chunk_is_replaced_before_a_cell(far: Client) -> None:
    far.namespace.clear()
    far.namespace["x"] = random_bytes(3 * CHUNK_SIZE)
    expected = int(far.namespace["x"].sum())
    digests = ChunkStore(paths.data_dir() / "store").put_buffer(far.namespace["x"]).chunks
    far.run("int(x.sum())").get()
    write_to(machine_store(far), digests[1])
    recorder = Recorder()
    assert far.run("int(x.sum())", recorder).get() == expected
    assert [it.msg_type for it in recorder.records if it.msg_type == "error"] == []


def test_a_result_that_the_machine_has_lost_is_an_error_that_says_so(far: Client) -> None:
    """Between the end of the run and the sending of its variables."""
    far.namespace.clear()
    far.run("import numpy; y = numpy.arange(1_000_000)").get()
    store = machine_store(far)
    connection = far.session._client
    assert connection is not None
    digest = store.put_chunk(os.urandom(CHUNK_SIZE))
    flip(store, digest)
    with pytest.raises(StoreError, match="lost 1 chunks"):
        connection.download([digest])
    assert not store.has(digest), "found, and removed"
    assert far.run("int(y.sum())").get() == 499999500000


class Impatient(Recorder):
    """A user who presses Ctrl-C as soon as something has moved."""

    def progress(self, done: int, total: int) -> None:
        super().progress(done, total)
        if done:
            raise KeyboardInterrupt


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress is told at every opportunity."""
    monkeypatch.setattr(moves, "_TELL_EVERY", 0.001)


def test_an_interrupted_upload_goes_on_where_it_was(far: Client, eager: None) -> None:
    far.namespace.clear()
    far.namespace["x"] = random_bytes(64 * CHUNK_SIZE)
    recorder = Impatient()
    with pytest.raises(KeyboardInterrupt):
        far.run("len(x)", recorder)
    (done, total) = recorder.progressed[-1]
    assert total >= 64 * CHUNK_SIZE > done
    sent, _ = moved(far, "len(x)")
    assert sent < total - done + 12 * CHUNK_SIZE


def test_an_interrupted_download_goes_on_where_it_was(far: Client, eager: None) -> None:
    far.namespace.clear()
    far.session.request = msgspec.structs.replace(far.session.request, eager_limit=1 << 40)
    recorder = Impatient()
    with pytest.raises(KeyboardInterrupt):
        far.run("import os; x = bytearray(os.urandom(64 << 22))", recorder)
    (done, total) = recorder.progressed[-1]
    assert total >= 64 * CHUNK_SIZE > done
    info = far.session.runs()[-1]
    connection = far.session._client
    assert connection is not None
    before = connection.bytes_received
    far.session.attach(info.run).get()
    assert len(far.namespace["x"]) == 64 << 22
    assert connection.bytes_received - before < total - done + 12 * CHUNK_SIZE


def test_what_waiting_and_uncollected_runs_need_is_not_removed(far: Client) -> None:
    far.namespace.clear()
    far.run("1").get()
    far.namespace["x"] = random_bytes(3 * CHUNK_SIZE)
    expected = int(far.namespace["x"].sum())
    store = machine_store(far)

    def clear() -> None:
        for path in store.root.glob("chunks/*/*"):
            os.utime(path, (0, 0))
        store.collect_garbage(0)

    go = paths.data_dir() / "go"
    far.start(f"import os, time\nwhile not os.path.exists({str(go)!r}): time.sleep(0.01)")
    far.start("total = int(x.sum()); y = x[::-1].copy()", label="waiting")
    clear()
    assert sum(1 for _ in store.root.glob("chunks/*/*")) >= 3
    go.touch()
    until(lambda: far.session.runs()[-1].ended, "the run to end")
    clear()
    far.session.attach("waiting").get()
    assert far.namespace["total"] == expected
    assert np.array_equal(far.namespace["y"], far.namespace["x"][::-1])
    for info in far.session.runs():
        far.session.attach(info.run).get()
    clear()
    assert list(store.root.glob("chunks/*/*")) == []
    assert far.run("int(x.sum())").get() == expected
