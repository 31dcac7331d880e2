"""``data=``: local folders, a web server and a real S3 server (rclone), through a machine with
everything of its own."""

from __future__ import annotations

import functools
import http.server
import os
import random
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest
from buckets import KEY, SECRET, gs, s3
from faulty import Client, Recorder, client

from mlinfra_sdk import paths, sources
from mlinfra_sdk.datasets.cache import Cache, Entry, key_of, version_of
from mlinfra_sdk.datasets.local import Folder
from mlinfra_sdk.errors import MlinfraError, RequestError, StoreError
from mlinfra_sdk.machines.client import AgentClient
from mlinfra_sdk.machines.datasets import Placed
from mlinfra_sdk.objects.store import CHUNK_SIZE
from mlinfra_sdk.worker import messages as m

LIST = "import os, mlinfra_sdk\np = mlinfra_sdk.data({0!r})\n"
FILES = (
    "found = {os.path.relpath(os.path.join(f, n), p): open(os.path.join(f, n), 'rb').read()"
    " for f, _, names in os.walk(p) for n in names}"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """State and working directory; no credentials."""
    folder = tmp_path_factory.mktemp("datasets")
    patch = pytest.MonkeyPatch()
    patch.setenv("MLINFRA_HOME", str(folder / "home"))
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    patch.setenv("HOME", str(folder))
    for name in [name for name in os.environ if name.startswith("AWS_") and "META" not in name]:
        patch.delenv(name)
    (folder / "work").mkdir()
    patch.chdir(folder / "work")
    yield folder
    patch.undo()


@pytest.fixture(scope="module")
def far(place: Path) -> Iterator[Client]:
    with client(isolate=True) as it:
        it.run("1").get()
        yield it


def use(it: Client, data: str, **more: Any) -> None:
    """Cells of this client have these datasets from now on."""
    request = it.session.request
    it.session.request = msgspec.structs.replace(
        request, data=sources.parse(data), **{"sync": False, **more}
    )


def found(it: Client, name: str) -> dict[str, bytes]:
    it.namespace.clear()
    it.run(LIST.format(name) + FILES).get()
    files: dict[str, bytes] = it.namespace["found"]
    return files


def write(folder: Path, files: dict[str, bytes]) -> dict[str, bytes]:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return files


def random_bytes(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def machine_folder(it: Client) -> Path:
    machine = it.session.machine
    assert machine is not None
    return Path(machine.handle.data["folder"])


# Local folders


def test_a_local_folder(far: Client) -> None:
    files = write(
        Path("images"),
        {"a.bin": random_bytes(10_000_000), "b/c d.bin": b"x" * 100, "b/empty": b"", "ü": b"u"},
    )
    use(far, "./images", sync=True)
    recorder = Recorder()
    far.run("1", recorder).get()
    assert "data" in recorder.phases and recorder.progressed[-1] == (10_000_101, 10_000_101)
    (store,) = machine_folder(far).rglob("store")
    assert sum(file.stat().st_size for file in store.rglob("*") if file.is_file()) < 1_000_000
    assert found(far, "images") == files
    moved = far.session.ledger.transfers(far.session.machine.id)
    assert {it.what for it in moved} == {"datasets"}
    assert sum(it.bytes for it in moved) >= 10_000_000
    beside = far.run("open('images/b/c d.bin').read()").get()
    assert beside == "x" * 100, "also under its own path"
    far.run("open('images.txt', 'w').close()").get()
    assert Path("images.txt").exists(), "what the workspace carries is untouched by it"
    assert not Path("images").is_symlink() and found(far, "images") == files
    (twin,) = machine_folder(far).glob("workspaces/*/images")
    assert twin.is_symlink()


def test_only_what_changed_of_a_local_folder_is_sent(far: Client) -> None:
    big = random_bytes(20_000_000, 2)
    files = write(Path("more"), {f"{i}.bin": random_bytes(100_000, i) for i in range(20)})
    files |= write(Path("more"), {"big": big})
    use(far, "./more")
    assert found(far, "more") == files
    connection = far.session._client
    assert connection is not None
    before = connection.bytes_sent
    files |= write(Path("more"), {"3.bin": b"changed", "big": big[:-1] + b"!"})
    (Path("more") / "4.bin").unlink()
    del files["4.bin"]
    assert found(far, "more") == files
    assert connection.bytes_sent - before < 5_000_000
    before = connection.bytes_sent
    far.run("1").get()
    assert connection.bytes_sent - before < 1000


def test_files_that_have_content_in_common(far: Client) -> None:
    large = random_bytes(10_000_000, 3)
    files = write(
        Path("alike"),
        {
            "a.bin": large,
            "b.bin": large,
            "c.bin": large[:CHUNK_SIZE],
            "z.bin": large[2 * CHUNK_SIZE :],
            "longer.bin": large + b"more",
        },
    )
    use(far, "./alike")
    assert found(far, "alike") == files


def test_two_clients_that_bring_the_same_file_at_once(
    far: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = random_bytes(10_000_000, 4)
    write(Path("one"), {"a.bin": content})
    files = write(Path("two"), {"b.bin": content})
    far.run("1").get()
    client, upload = far.session._client, AgentClient.upload
    assert client is not None
    key, folder = key_of("/one"), Folder(Path("one"), Path("one.index"))
    batch = folder.scan()
    wanted = client.ask(m.OfferFiles(client.next_id(), key, "1", batch), list[bytes])
    client.upload(wanted[1:], source=folder)

    def while_the_other_one_ends(it: AgentClient, *args: Any, **options: Any) -> None:
        upload(it, *args, **options)
        monkeypatch.undo()
        client.send(m.WriteFiles(client.next_id(), key, "1", batch)).result()

    client.upload(wanted[:1], source=folder)
    monkeypatch.setattr(AgentClient, "upload", while_the_other_one_ends)
    use(far, "./two")
    assert found(far, "two") == files


def test_two_clients_that_bring_the_same_dataset_at_once(far: Client) -> None:
    write(Path("both"), {str(number): random_bytes(100, number) for number in range(300)})
    (source,) = sources.parse("./both")
    use(far, "")
    far.run("1").get()
    assert far.session._client is not None

    def place(client: AgentClient) -> None:
        Placed().place(client, (source,), lambda done, total: None, Path.cwd())

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(place, [far.session._client] * 4))


def test_an_empty_folder_and_a_long_name(far: Client) -> None:
    Path("hollow").mkdir()
    use(far, "./hollow")
    assert found(far, "hollow") == {}
    files = write(Path("long"), {"n" * 255: b"1"})
    use(far, "./long")
    assert found(far, "long") == files


def test_one_local_file_under_another_name(far: Client, place: Path) -> None:
    write(place, {"outside/table.csv": b"1,2\n"})
    use(far, f"train={place}/outside/table.csv")
    assert far.run(LIST.format("train") + "p.name, p.read_text()").get() == ("table.csv", "1,2\n")


def test_what_is_not_there(far: Client) -> None:
    use(far, "./nowhere")
    with pytest.raises(RequestError, match="nowhere"):
        far.run("1")
    use(far, "")
    with pytest.raises(RequestError, match=r"'unknown'.*Known: .*images"):
        far.run("import mlinfra_sdk; mlinfra_sdk.data('unknown')").get()


def test_a_folder_is_used_in_place_by_a_machine_that_shares_it(place: Path) -> None:
    write(Path("shared"), {"x": b"here"})
    with client(data=sources.parse("./shared")) as near:
        code = LIST.format("shared") + "open(p / 'y', 'w').close(); str(p)"
        assert near.run(code).get() == str(Path("shared").resolve())
        assert (Path("shared") / "y").exists()


# A web server


class Handler(http.server.SimpleHTTPRequestHandler):
    """Takes ranges, has ETags, and can cut a file after so many bytes."""

    protocol_version = "HTTP/1.1"
    cuts: ClassVar[list[int]] = []
    asked: ClassVar[list[str]] = []

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self.asked.append(f"{self.path} {self.headers.get('Range', '')}".strip())
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        start = 0
        asked = self.headers.get("Range")
        if asked:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        self.end_headers()
        if body:
            end = start + self.cuts.pop() if self.cuts else len(data)
            self.wfile.write(data[start:end])
            if end < len(data):
                self.close_connection = True


@contextmanager
def serving(folder: Path, handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    serve = functools.partial(handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Plain(http.server.SimpleHTTPRequestHandler):
    """Python's own web server, which knows neither ranges nor ETags."""

    def log_message(self, format: str, *args: Any) -> None:
        pass


def read(it: Client, name: str) -> bytes:
    it.namespace.clear()
    it.run(LIST.format(name) + "content = p.read_bytes()").get()
    content: bytes = it.namespace["content"]
    return content


@pytest.mark.parametrize("handler", [Handler, Plain])
def test_a_file_of_a_web_server(far: Client, tmp_path: Path, handler: Any) -> None:
    content = random_bytes(3_000_000)
    write(tmp_path, {"weights.bin": content})
    with serving(tmp_path, handler) as url:
        use(far, f"{url}/weights.bin")
        assert read(far, "weights.bin") == content
    assert read(far, "weights.bin") == content, "not looked at again"


def test_a_file_goes_on_where_it_was_cut(far: Client, tmp_path: Path) -> None:
    content = random_bytes(3_000_000, 3)
    write(tmp_path, {"cut.bin": content})
    Handler.cuts[:] = [1_000_000, 500_000]
    Handler.asked.clear()
    with serving(tmp_path, Handler) as url:
        use(far, f"{url}/cut.bin")
        assert read(far, "cut.bin") == content
    starts = [int(it.split("bytes=")[1][:-1]) for it in Handler.asked]
    assert starts == [0, 500_000, 1_500_000]


def test_a_fetch_that_was_killed_is_gone_on_with(place: Path, tmp_path: Path) -> None:
    content = random_bytes(30_000_000, 4)
    write(tmp_path, {"killed.bin": content})
    Handler.asked.clear()
    root = tmp_path / "cache"
    with serving(tmp_path, Handler) as url:
        order = {"url": f"{url}/killed.bin", "root": str(root), "options": {}}
        command = [sys.executable, "-m", "mlinfra_sdk.datasets.fetch"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(msgspec.msgpack.encode(order))
        process.stdin.close()
        while msgspec.json.decode(process.stdout.readline()).get("done", 0) < 8_000_000:
            pass
        process.kill()
        process.wait()
        data = msgspec.msgpack.encode(order)
        done = subprocess.run(command, input=data, stdout=subprocess.PIPE, check=True)
    told = msgspec.json.decode(done.stdout.splitlines()[-1])
    folder = Cache(root).version(key_of(order["url"]), told["version"])
    assert (folder / "killed.bin").read_bytes() == content
    assert int(Handler.asked[-1].split("bytes=")[1][:-1]) >= 8_000_000


# S3


@pytest.fixture(scope="module")
def buckets(place: Path) -> Iterator[Path]:
    """Folders that rclone serves as buckets, for one user with a key."""
    folder = place / "buckets"
    folder.mkdir()
    with s3(folder) as url:
        os.environ["AWS_ENDPOINT_URL"] = url
        yield folder
        del os.environ["AWS_ENDPOINT_URL"]


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """This user's own, which the agent has not inherited."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)


def everything_below(folder: Path) -> Iterator[bytes]:
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            yield path.read_bytes()


def test_objects_below_a_prefix(far: Client, buckets: Path, keys: None, place: Path) -> None:
    files = write(
        buckets / "bucket" / "train",
        {"a.bin": random_bytes(20_000_000, 5), "deep/b c.txt": b"text", "ü.txt": b"u"},
    )
    write(buckets / "bucket", {"other.txt": b"not this"})
    use(far, "s3://bucket/train", data_credentials=True)
    recorder = Recorder()
    far.run("1", recorder).get()
    assert recorder.progressed and recorder.progressed[-1][1] == 20_000_005
    assert found(far, "train") == files
    secret = SECRET.encode()
    assert not any(secret in content for content in everything_below(place / "home"))


def test_what_has_changed_upstream_is_fetched_by_the_next_machine(
    buckets: Path, keys: None
) -> None:
    files = write(buckets / "changing", {"a.bin": random_bytes(3_000_000, 6), "b.bin": b"old"})
    cache = Cache(paths.data_dir() / "datasets")
    with client(isolate=True) as first:
        use(first, "s3://changing", data_credentials=True)
        assert found(first, "changing") == files
        (before,) = (cache.root / key_of("s3://changing")).glob("*/a.bin")
        files |= write(buckets / "changing", {"b.bin": b"a newer one", "c.bin": b"new"})
        with client(isolate=True) as second:
            use(second, "s3://changing", data_credentials=True)
            assert found(second, "changing") == files
        after = {path.stat().st_ino for path in before.parents[1].glob("*/a.bin")}
        assert after == {before.stat().st_ino}, "what has not changed was not fetched again"
        assert found(first, "changing")["b.bin"] == b"old", "who uses it keeps it"


def test_credentials_go_only_when_the_user_says_so(far: Client, buckets: Path, keys: None) -> None:
    write(buckets / "private", {"x": b"secret"})
    use(far, "s3://private", data_credentials=False)
    with pytest.raises(RequestError, match=r"may not be read.*data_credentials"):
        far.run("1")
    use(far, "s3://private", data_credentials=True)
    assert found(far, "private") == {"x": b"secret"}


def test_wrong_credentials(
    far: Client, buckets: Path, keys: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(buckets / "closed", {"x": b""})
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    use(far, "s3://closed", data_credentials=True)
    with pytest.raises(RequestError, match="may not be read") as caught:
        far.run("1")
    assert "wrong" not in str(caught.value)


def test_no_credentials_here(far: Client, buckets: Path) -> None:
    use(far, "s3://closed", data_credentials=True)
    with pytest.raises(RequestError, match="no credentials of AWS"):
        far.run("1")


@pytest.mark.parametrize("url", ["s3://bucket/missing", "s3://no-such-bucket"])
def test_a_missing_key(far: Client, buckets: Path, keys: None, url: str) -> None:
    use(far, url, data_credentials=True)
    with pytest.raises(RequestError, match=f"nothing at {url}"):
        far.run("1")


# Google Cloud Storage and Hugging Face, whose packages the machine does not have


def test_a_package_that_cannot_be_had(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV_OFFLINE", "1")
    monkeypatch.setenv("UV_NO_CACHE", "1")
    with client(isolate=True) as it:
        use(it, "gs://bucket/x", data_credentials=False)
        with pytest.raises(RequestError, match="gs:// needs the package gcsfs") as caught:
            it.run("1")
        assert "mlinfra-sdk[gs]" in caught.value.hint
    assert not list((place / "home").glob("cache/readers/*"))


@pytest.fixture
def google(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An emulator of Cloud Storage with an empty bucket; gives its address."""
    with gs(tmp_path) as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield environment["STORAGE_EMULATOR_HOST"]


def test_the_machine_gets_the_packages_that_open_a_url(place: Path, google: str) -> None:
    files = {"a.bin": random_bytes(9_000_000, 7), "deep/b.txt": b"text"}
    for name, content in files.items():
        url = f"{google}/upload/storage/v1/b/bucket/o?uploadType=media&name=train/{name}"
        urllib.request.urlopen(urllib.request.Request(url, data=content, method="POST")).close()
    with client(isolate=True) as it:
        use(it, "gs://bucket/train", data_credentials=False)
        assert found(it, "train") == files
        (folder,) = (place / "home").glob("cache/readers/*")
        assert folder.name.startswith("gs-")
        use(it, "gs://bucket/nothing", data_credentials=False)
        with pytest.raises(RequestError, match="nothing at gs://bucket/nothing"):
            it.run("1")


def test_an_interrupted_fetch_is_stopped_and_gone_on_with(
    far: Client, buckets: Path, keys: None
) -> None:
    content = random_bytes(60_000_000, 7)
    write(buckets / "large", {"x.bin": content})

    class Impatient(Recorder):
        def progress(self, done: int, total: int) -> None:
            raise KeyboardInterrupt

    use(far, "s3://large/x.bin", data_credentials=True)
    with pytest.raises(KeyboardInterrupt):
        far.run("1", Impatient())
    assert read(far, "x.bin") == content


# The cache


def make(cache: Cache, name: str, size: int) -> str:
    entries = [Entry("file", size, name)]
    version = version_of(entries)
    key = key_of(name)
    assert cache.begin(key, version, entries) == entries
    (cache.part(key, version) / "file").write_bytes(bytes(size))
    cache.finish(key, version, entries)
    assert cache.has(key, version)
    return version


def test_the_least_recently_used_goes_when_there_is_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path)
    versions = {name: make(cache, name, 1000) for name in ("old", "used", "new")}
    for age, name in enumerate(("new", "used", "old")):
        os.utime(cache.version(key_of(name), versions[name]), (10**9 - age, 10**9 - age))
    lock = cache.use(key_of("used"), versions["used"])
    room = iter([0.0, 0.0, 0.0, 5000.0, 5000.0])
    monkeypatch.setattr(cache, "_room", lambda least_free: next(room))
    cache.evict(2000)
    there = {name for name, it in versions.items() if cache.has(key_of(name), it)}
    assert there == {"used"}
    os.close(lock)
    with pytest.raises(StoreError, match="does not fit"):
        monkeypatch.undo()
        cache.evict(1 << 60)
    assert list(tmp_path.glob("*/*/file")) == []


def test_a_version_that_was_written_to_is_put_together_again(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    version = make(cache, "x", 1000)
    path = cache.version(key_of("x"), version) / "file"
    path.chmod(0o600)
    path.write_bytes(b"")
    assert not cache.has(key_of("x"), version)
    assert cache.begin(key_of("x"), version, [Entry("file", 1000, "x")])


@pytest.mark.parametrize("path", ["../x", "/x", "a/../../x", "", ".", "a//b", "a\0b", "a/"])
def test_files_stay_below_their_root(tmp_path: Path, path: str) -> None:
    with pytest.raises(MlinfraError):
        Cache(tmp_path).begin("k", "v", [Entry(path, 1)])
    assert list(tmp_path.rglob("x")) == []
