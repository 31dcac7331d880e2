"""``on=ssh``: who gets in, what a host lacks, and what outlives a connection, with a real sshd."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest
from faulty import Recorder
from live import until
from sshd import Sshd, keygen, mounted, running

from mlinfra_sdk import providers
from mlinfra_sdk.errors import LinkError, ProviderError, RequestError, StateError
from mlinfra_sdk.namespace.analysis import cell_names
from mlinfra_sdk.providers import bootstrap, ssh
from mlinfra_sdk.providers.remote import Remote, shell
from mlinfra_sdk.providers.ssh import Options, SshProvider, SshRemote
from mlinfra_sdk.session import Session
from mlinfra_sdk.spec import Request, parse, resolve
from mlinfra_sdk.testing import run
from mlinfra_sdk.worker.host import KEPT

# Packages are sent to a host without an index, and unpacked there.
pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Sshd]:
    """A host on which nothing of ours has been yet."""
    with running(tmp_path / "box") as box, box.known():
        yield box


@pytest.fixture
def box(warm_box: Sshd) -> Iterator[Sshd]:
    with warm_box.known():
        yield warm_box


def said(host: str = "box") -> list[str]:
    return run(shell(SshRemote(host), "echo hello"))


def launch(host: str, key: str = "k", **options: str) -> None:
    run(SshProvider(Options(host=host, **options)).launch(None, Request(), key))  # type: ignore


# -- who gets in ---------------------------------------------------------------------------------


def test_a_key_opens_and_noise_of_the_shell_does_no_harm(door: Sshd) -> None:
    (door.home / ".bashrc").write_text("echo Welcome; echo $RANDOM >&2\n")
    assert said() == ["hello"]
    assert SshProvider(Options(host="box")).check() == []


def test_by_way_of_a_jump_host(door: Sshd) -> None:
    assert said("jumped") == ["hello"]


def test_a_key_from_an_agent(door: Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
    door.configure(door.config.replace(f"  IdentityFile {door.folder}/id\n", ""))
    door.configure(
        "\n".join(line for line in door.config.splitlines() if "Identit" not in line) + "\n"
    )
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    with pytest.raises(LinkError, match="refuses to log in without a question"):
        said()
    socket = f"/tmp/mlinfra-test-{os.getpid()}"
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", socket], stdout=subprocess.DEVNULL)
    try:
        until(lambda: os.path.exists(socket), "the agent")
        monkeypatch.setenv("SSH_AUTH_SOCK", socket)
        subprocess.run(["ssh-add", "-q", str(door.folder / "id")], check=True)
        assert said() == ["hello"]
    finally:
        agent.terminate()
        agent.wait()


def test_a_wrong_key_is_refused(door: Sshd) -> None:
    keygen(door.folder / "id")
    with pytest.raises(LinkError, match="refuses to log in") as caught:
        said()
    assert "ssh box" in caught.value.hint
    (problem,) = SshProvider(Options(host="box")).check()
    assert "refuses to log in" in problem.what


def test_a_changed_host_key_is_refused(door: Sshd) -> None:
    door.stop()
    keygen(door.folder / "host_key")
    door.start()
    with pytest.raises(LinkError, match="its host key is not the one that is known") as caught:
        said()
    assert "ssh-keygen -R" in caught.value.hint


def test_an_unknown_host_is_refused(door: Sshd) -> None:
    (door.folder / "known_hosts").write_text("")
    with pytest.raises(LinkError, match="its host key is not known yet"):
        said()


def test_nobody_answers(door: Sshd) -> None:
    door.stop()
    with pytest.raises(LinkError, match="it does not answer"):
        said()
    with pytest.raises(LinkError, match="there is no host of this name"):
        said("nobody.invalid")


@pytest.mark.skipif(not ssh._has_aes(), reason="this processor has no instructions for AES")
def test_the_fast_cipher_unless_the_user_has_chosen(door: Sshd) -> None:
    def negotiated() -> str:
        ssh._ciphers.cache_clear()
        command = SshRemote("box").command("-oLogLevel=DEBUG1", "-oControlPath=none")
        told = subprocess.run([*command, "true"], capture_output=True, text=True).stderr
        return told.split("client->server cipher: ")[1].split()[0]

    assert negotiated() == "aes128-gcm@openssh.com"
    door.configure(f"{door.config}  Ciphers aes256-ctr\n")
    assert negotiated() == "aes256-ctr"
    ssh._ciphers.cache_clear()


def test_no_name_of_a_host_is_an_option_of_ssh() -> None:
    with pytest.raises(RequestError, match="is no name of an ssh host"):
        SshRemote("-oProxyCommand=touch${IFS}x")
    with pytest.raises(RequestError, match="needs a host"):
        run(providers.load("ssh").offers(Request()))


# -- what a host lacks ---------------------------------------------------------------------------


def test_a_full_disk_is_left_as_it_was(door: Sshd) -> None:
    with mounted(door.folder / "small", "size=6m") as may:
        if not may:
            pytest.skip("this user may not mount a small file system")
        home = door.folder / "small" / "ours"
        with pytest.raises(ProviderError, match="has no space left") as caught:
            launch("box", home=str(home))
        assert "home=" in caught.value.hint
        assert [path for path in home.rglob("*") if path.name != "bin"] == []


def test_no_directory_to_write_to(door: Sshd) -> None:
    with pytest.raises(ProviderError, match="no directory that can be written to"):
        launch("box", home="/proc/nowhere")


def test_no_python_of_this_version(door: Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "_VERSION", "3.99")
    with pytest.raises(ProviderError, match=r"has no Python 3\.99") as caught:
        launch("box")
    assert "Install Python 3.99" in caught.value.hint
    until(
        lambda: [path.name for path in door.cache.glob("*")] in ([], ["bin"]),
        "nothing to be left",
        told=lambda: list(door.cache.glob("*")),
    )


class Unhurried(SshProvider):
    """Its hosts take for ever to end a launch that has been confirmed."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.confirmed = anyio.Event()

    def remote(self, data: Mapping[str, str]) -> Remote:
        remote = super().remote(data)
        run_there = remote.exec

        async def run_slowly(argv: Sequence[str]) -> Any:
            wire: Any = await run_there(argv)
            send, receive_into = wire.send, wire.receive_into

            async def watched(buffers: Sequence[bytes]) -> None:
                await send(buffers)
                if list(buffers) == [KEPT]:
                    wire.receive_into = waiting

            async def waiting(space: memoryview, *, fill: bool = False) -> int:
                self.confirmed.set()
                await anyio.sleep_forever()
                return int(await receive_into(space, fill=fill))

            wire.send = watched
            return wire

        remote.exec = run_slowly  # type: ignore[method-assign]
        return remote


def test_a_launch_that_is_cancelled_in_the_last_moment(box: Sshd) -> None:
    """The machine is there and confirmed, but nobody has been given its handle."""

    async def cancelled() -> None:
        provider = Unhurried(Options(host="box"))
        request = Request(on="ssh:box", env="none")
        (offer,) = await provider.offers(request)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(provider.launch, offer, request, "a" * 32)
            await provider.confirmed.wait()
            tasks.cancel_scope.cancel()
        assert await provider.list() == []

    run(cancelled())


def test_a_directory_that_others_can_read(box: Sshd) -> None:
    with Session(namespace={}, on="ssh:box", sync=False, env="none") as session:
        session.run("1")
    box.cache.chmod(0o755)
    try:
        with pytest.raises(StateError, match="others can read it"):
            launch("box")
    finally:
        box.cache.chmod(0o700)


@pytest.mark.parametrize("pip", [False, True])
def test_with_python_alone(tmp_path: Path, pip: bool) -> None:
    """No uv, nor any command that is not everywhere. Either there is no pip, or PYTHONPATH leads
    to the same packages."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("sh", "head", "mktemp", "tail", "tr", "find", "mkdir", "rm", "ls", "cat"):
        (tools / name).symlink_to(str(shutil.which(name)))
    python = tools / f"python{sys.version_info[0]}.{sys.version_info[1]}"
    refusal = "" if pip else "case $* in *'-m pip'*) exit 1 ;; esac\n"
    python.write_text(f'#!/bin/sh\n{refusal}exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    found = {"PYTHONPATH": sysconfig.get_path("purelib")} if pip else {}
    with running(tmp_path / "box", PATH=str(tools), **found) as bare, bare.known():
        with Session(namespace={}, on="ssh:box", sync=False, env="none") as session:
            session.run("import os, sys; place = sys.prefix")
            assert session.namespace["place"].startswith(str(bare.cache))
        assert [path.name for path in bare.cache.glob("new.*")] == []


def test_a_gpu_is_checked_twice(box: Sshd) -> None:
    request = resolve([parse({"on": "ssh:box", "gpu": "A10"}, place="%remote use", origin="")])
    provider = providers.load("ssh:box")
    with pytest.raises(RequestError, match=r"gpu=A10 cannot be met .* no NVIDIA GPU"):
        run(provider.offers(request.request))
    # Even if nvidia-smi promised one: the driver has the last word, and nothing starts.
    with pytest.raises(RequestError, match="gpu=A10 cannot be met"):
        run(provider.launch(None, request.request, "wanted"))  # type: ignore[arg-type]
    assert run(provider.list()) == []


# -- what outlives a connection ------------------------------------------------------------------


def waiting_for(file: Path, before: str, after: str) -> str:
    """A cell that prints a line, waits for a file, and prints another one."""
    wait = f"while not os.path.exists({str(file)!r}): time.sleep(0.01)"
    return f"import os, time\nprint({before!r})\n{wait}\nprint({after!r})"


def test_a_run_goes_on_over_a_new_connection(box: Sshd, tmp_path: Path) -> None:
    go, recorder = tmp_path / "go", Recorder()
    code = waiting_for(go, "before", "after") + "\ndone = 1"
    with Session(namespace={}, on="ssh:box", sync=False) as session:
        session.run("1")
        names = cell_names(code, {}, code)
        thread = threading.Thread(
            target=lambda: session.execute(code, names, frontend=recorder, count=1)
        )
        thread.start()
        until(lambda: "before" in recorder.text, "the first line")
        box.cut()
        go.touch()
        thread.join(100)
        assert recorder.text == "before\nafter\n"
        assert session.namespace["done"] == 1


_CLIENT = """
import os, sys
from mlinfra_sdk.namespace.analysis import cell_names
from mlinfra_sdk.session import Session
session = Session(namespace={}, on="ssh:box", sync=False, env="none", machine="kept", idle="5m")
session.run("x = 20")
code = sys.argv[1]
session.start(code, cell_names(code, session.namespace, code), count=1, label="train")
os.kill(os.getpid(), 9)
"""


def test_a_machine_outlives_its_client_and_is_found_again(box: Sshd, tmp_path: Path) -> None:
    go = tmp_path / "go"
    code = waiting_for(go, "one", "two") + "\nx += 1"
    died = subprocess.run([sys.executable, "-c", _CLIENT, code], capture_output=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
    recorder = Recorder()
    with Session(namespace={}, on="ssh:box", sync=False, env="none", machine="kept") as session:
        try:
            go.touch()
            session.attach("train", frontend=recorder)
            assert recorder.text == "one\ntwo\n"
            assert session.pull("x") == 21
        finally:
            session.stop()
    assert run(providers.load("ssh:box").list()) == []


def test_an_idle_machine_and_one_without_money_end_without_a_client(box: Sshd) -> None:
    async def launched(key: str, request: Request) -> object:
        provider = SshProvider(Options(host="box"))
        handle = await provider.launch(None, request, key)  # type: ignore[arg-type]
        with anyio.fail_after(60):
            while (status := await provider.status(handle)).alive:
                await anyio.sleep(0.2)
        await provider.stop(handle)
        return status.reason

    assert run(launched("idle", Request(idle=2))) == "idle for 2 s"
    paid = Request(paid=2, paid_by="month_budget=$5.00")
    assert run(launched("paid", paid)) == "its budget was spent: month_budget=$5.00"
