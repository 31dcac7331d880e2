"""``on=container`` with podman and runc, on an image that shows this computer's own programs."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from live import until

from mlinfra_sdk.errors import MachineLost, ProviderError, RequestError
from mlinfra_sdk.machines.portal import portal
from mlinfra_sdk.providers.container import ContainerProvider, Options, _passed_through
from mlinfra_sdk.session import Session
from mlinfra_sdk.spec import Request
from mlinfra_sdk.testing import ProviderSuite

ENGINE = "podman --cgroup-manager cgroupfs --runtime /usr/sbin/runc"
LIMITS = ["--network=host", "--ulimit=nofile=1024:1024", "--ulimit=nproc=4096:4096"]
MISSING = [name for name in ("podman", "runc") if shutil.which(name) is None]

pytestmark = pytest.mark.skipif(
    bool(MISSING) or os.getuid() != 0, reason=f"needs root, podman and runc; missing: {MISSING}"
)


def request(on: str, **settings: object) -> Request:
    """Without the repository's files, and with the packages that the machine has."""
    return Request(**({"on": on, "env": "none", "sync": False} | settings))


def podman(*words: str) -> str:
    done = subprocess.run([*ENGINE.split(), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def image() -> None:
    """Make the image ``mlinfra-test``, which has no content: /usr and Python are this
    computer's."""
    tree = io.BytesIO()
    with tarfile.open(fileobj=tree, mode="w") as tar:
        for name in ("bin", "sbin", "lib", "lib64"):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, f"usr/{name}"
            tar.addfile(link)
        for name, mode in (("tmp", 0o1777), ("usr", 0o755), ("root", 0o700), ("etc", 0o755)):
            folder = tarfile.TarInfo(name)
            folder.type, folder.mode = tarfile.DIRTYPE, mode
            tar.addfile(folder)
    subprocess.run(
        [*ENGINE.split(), "import", "--quiet", "-", "mlinfra-test"],
        input=tree.getvalue(),
        check=True,
        stdout=subprocess.DEVNULL,
    )


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Options]:
    """A target with that image."""
    image()
    home = tmp_path_factory.mktemp("container")
    (home / "volume").mkdir()
    python = sys.base_prefix
    seen = ["/usr"] if python.startswith("/usr") else ["/usr", python]
    mounts = [f"--volume={path}:{path}:ro" for path in seen]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLINFRA_HOME", str(home))
        yield Options(
            image="mlinfra-test",
            engine=ENGINE,
            extra=[*LIMITS, *mounts],
            volume=str(home / "volume"),
            python=f"{python}/bin/python3",
        )
        assert names() == []
    podman("rmi", "--force", "mlinfra-test")


def names() -> list[str]:
    return podman("ps", "--all", "--filter=label=mlinfra.user=0", "--format={{.Names}}").split()


@pytest.fixture(scope="module")
def target(options: Options, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A target ``box`` of the user's settings."""
    config = tmp_path_factory.mktemp("config") / "config.toml"
    extra = ", ".join(f'"{word}"' for word in options.extra)
    config.write_text(
        f'[targets.box]\nprovider = "container"\nimage = "{options.image}"\n'
        f'engine = "{options.engine}"\nextra = [{extra}]\nvolume = "{options.volume}"\n'
        f'python = "{options.python}"\n'
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlinfra_sdk.paths.config_file", lambda: config)
        yield "box"


class TestContainer(ProviderSuite):
    on = "box"
    volume: Path

    @pytest.fixture(autouse=True)
    @staticmethod
    def _target(request: pytest.FixtureRequest, target: str, options: Options) -> None:
        request.cls.volume = Path(options.volume)

    @contextmanager
    def broken(self) -> Iterator[None]:
        """The agent cannot make its store."""
        store, away = self.volume / "store", self.volume / "away"
        store.mkdir(exist_ok=True)
        store.rename(away)
        store.touch()
        try:
            yield
        finally:
            store.unlink()
            away.rename(store)


def test_a_container_runs_cells_and_goes_with_its_session(target: str) -> None:
    with Session(namespace={}, request=request(target)) as it:
        it.push(x=[1])
        it.run("import os; x.append(2); one = os.path.exists('/etc/passwd'), os.getpid()")
        assert it.namespace["x"] == [1, 2]
        assert it.namespace["one"][0] is False  # it is not this computer's /etc
        machine = it.machine
        assert machine is not None and names() == [f"mlinfra-{machine.id}"]
    assert names() == []


def test_its_secret_is_not_to_be_seen(options: Options) -> None:
    provider, wanted = ContainerProvider(options), request("container:x")
    assert provider.check() == []
    (offer,) = portal().call(provider.offers(wanted))
    handle = portal().call(provider.launch(offer, wanted, "a1b2c3"))
    secret = portal().call(provider.secret(handle))
    assert len(secret) == 32 and secret.hex() not in podman("inspect", "mlinfra-a1b2c3")
    portal().call(provider.stop(handle))


def test_it_goes_when_nobody_uses_it(target: str) -> None:
    it = Session(namespace={}, request=request(target, idle=2.0))
    it.run("1")
    until(lambda: names() == [], "the container to go", names)
    it.close()


def test_one_that_is_killed_is_a_lost_machine(target: str) -> None:
    with Session(namespace={}, request=request(target, reconnect=5.0)) as it:
        it.run("1")
        machine = it.machine
        assert machine is not None
        podman("kill", f"mlinfra-{machine.id}")
        until(lambda: names() == [], "the container to go", names)
        try:
            it.run("x = 1")  # it may know already, and then starts another one
        except MachineLost:
            it.run("x = 1")
        assert it.namespace["x"] == 1


def test_an_image_that_is_not_there_is_said() -> None:
    broken = ContainerProvider(Options(image="localhost/nobody-has-this", engine=ENGINE))
    wanted = request("container:x")
    (offer,) = portal().call(broken.offers(wanted))
    with pytest.raises(ProviderError, match="run` failed"):
        portal().call(broken.launch(offer, wanted, "f1"))
    assert names() == []


def test_what_cannot_be_is_said() -> None:
    provider = ContainerProvider(Options())
    with pytest.raises(RequestError, match="needs an image"):
        portal().call(provider.offers(Request()))
    absent = ContainerProvider(Options(image="x", engine="no-such-engine"))
    assert absent.check()[0].what == "There is no no-such-engine here."
    assert _passed_through("/usr/bin/docker", [0, 2]) == ['--gpus="device=0,2"']
    assert _passed_through("podman --root x", [1]) == ["--device=nvidia.com/gpu=1"]
