"""``on=ssh`` on hosts of all kinds: those that have only curl, and one that several users share,
in a network of its own."""

from __future__ import annotations

import os
import platform
import pwd
import shutil
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import msgspec
import pytest
import trustme
from faulty import Recorder
from live import until
from sshd import Sshd, keygen, running

from mlinfra_sdk import providers
from mlinfra_sdk.errors import LinkError, MlinfraError, ProviderError
from mlinfra_sdk.namespace.analysis import cell_names
from mlinfra_sdk.providers import bootstrap, ssh
from mlinfra_sdk.providers.base import Handle
from mlinfra_sdk.providers.remote import shell
from mlinfra_sdk.providers.ssh import Options, SshProvider, SshRemote
from mlinfra_sdk.session import Session
from mlinfra_sdk.spec import Request
from mlinfra_sdk.testing import run

# Packages are sent to a host without an index, and unpacked there.
pytestmark = pytest.mark.timeout(300)
VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"


def launch(host: str, key: str = "k", **options: str) -> Handle:
    provider = SshProvider(Options(host=host, **options))
    return run(provider.launch(None, Request(env="none"), key))  # type: ignore[arg-type]


# -- neither Python nor uv -----------------------------------------------------------------------


@contextmanager
def astral(folder: Path) -> Iterator[str]:
    """What https://astral.sh gives, by TLS on loopback: an installer that puts uv where it is told
    to. Yields what curl must be told to find it."""
    put = f'cd "$UV_UNMANAGED_INSTALL" && ln -s {shutil.which("uv")} uv'
    script = f'mkdir -p "$UV_UNMANAGED_INSTALL" && {put}\n'.encode()

    class Site(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path == "/uv/install.sh"
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write(script if found else b"")

        def log_message(self, *_: object) -> None:
            pass

    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("astral.sh").configure_cert(context)
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield (
            f"connect-to = astral.sh:443:127.0.0.1:{server.server_port}\n"
            f"cacert = {folder}/ca.pem\nnoproxy = *\n"
        )
        server.shutdown()


def hiding(files: list[Path]) -> tuple[str, ...]:
    """The words before a command for which these programs are not there; only root has such."""
    script = "".join(f"mount --bind /dev/null {file.resolve()} && " for file in files)
    return ("unshare", "--mount", "sh", "-c", script + 'exec "$@"', "sh") if files else ()


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
def test_with_curl_alone(tmp_path: Path) -> None:
    """Neither Python nor uv. uv is got; it says why it cannot get Python; once there is one that
    only uv knows of, that is taken."""
    real = Path(sys.base_prefix) / "bin" / f"python{VERSION}"
    places = ("/usr/bin", "/usr/local/bin")
    usual = [file for place in places if (file := Path(place) / real.name).exists()]
    within = hiding(usual)
    if real in usual or subprocess.run([*within, "true"], capture_output=True).returncode:
        pytest.skip("this user may not hide the Python of this host")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in (
        "sh",
        "head",
        "mktemp",
        "tail",
        "tr",
        "find",
        "mkdir",
        "rm",
        "cat",
        "ls",
        "curl",
        "ln",
    ):
        (tools / name).symlink_to(str(shutil.which(name)))
    nowhere = "http://127.0.0.1:9"
    host = running(
        tmp_path / "box",
        within,
        PATH=str(tools),
        UV_OFFLINE="false",
        UV_HTTP_RETRIES="0",
        UV_PYTHON_INSTALL_MIRROR=nowhere,
        UV_DEFAULT_INDEX=f"{nowhere}/simple",
    )
    with host as bare, bare.known(), astral(tmp_path) as settings:
        (bare.home / ".curlrc").write_text("connect-to = astral.sh:443:127.0.0.1:9\nnoproxy = *\n")
        with pytest.raises(ProviderError, match=rf"has no Python {VERSION}.*curl.*127") as caught:
            launch("box")
        assert f"Install Python {VERSION} or uv there" in caught.value.hint

        (bare.home / ".curlrc").write_text(settings)
        with pytest.raises(ProviderError, match=rf"has no Python {VERSION}.*Failed to download"):
            launch("box")
        until(lambda: os.listdir(bare.cache) == ["bin"], "what has failed to be removed")

        name = f"cpython-{platform.python_version()}-linux-{platform.machine()}-gnu"
        managed = bare.home / ".local" / "share" / "uv" / "python" / name / "bin"
        managed.mkdir(parents=True)
        (managed / real.name).symlink_to(real)
        with Session(namespace={}, on="ssh:box", sync=False, env="none") as session:
            session.run("import sys; place = sys.prefix")
            assert session.namespace["place"].startswith(str(bare.cache))
        (made,) = bare.cache.glob("sdk/*/pyvenv.cfg")
        assert f"home = {managed}" in made.read_text()


# -- a host of several users, in a network of its own --------------------------------------------


class Lab(Sshd):
    """A host in a network namespace, with an account and a key for each of two users: alice and
    bob are hosts of ssh, and so is ``thief``, who tries bob's key on alice's account. ``cable`` is
    the network device that leads there."""

    hosts = ("alice", "bob")
    own_home = False

    def __init__(self, folder: Path) -> None:
        number = os.getpid() % 4096
        self.cable = f"mli{os.getpid()}"
        network = f"198.18.{number // 64}.{number % 64 * 4}"  # RFC 2544: for tests
        start, _, last = network.rpartition(".")
        self.ours, self.address = f"{start}.{int(last) + 1}", f"{start}.{int(last) + 2}"
        self.users = {name: f"{name}{os.getpid()}" for name in self.hosts}
        within = ("ip", "netns", "exec", self.cable)
        # uv may try to reach an index, and finds that there is no way to any
        offline = {"UV_OFFLINE": "false", "UV_HTTP_RETRIES": "0", "UV_PYTHON_DOWNLOADS": "never"}
        path = f"{Path(sys.base_prefix) / 'bin'}:/usr/local/bin:/usr/bin:/bin"
        super().__init__(folder, within, PATH=path, **offline)
        (folder / "authorized_keys").unlink()
        (folder / "keys").mkdir()
        for name, user in self.users.items():
            keygen(folder / f"id-{name}")
            shutil.copy(folder / f"id-{name}.pub", folder / "keys" / user)

    def configuration(self) -> str:
        hosts = [("alice", "alice"), ("bob", "bob"), ("thief", "bob")]
        lines = [f"Host *\n  UserKnownHostsFile {self.folder}/known_hosts"]
        for host, key in hosts:
            user = self.users["alice" if host == "thief" else host]
            lines.append(
                f"Host {host}\n  HostName {self.address}\n  Port {self.port}\n  User {user}"
            )
            lines.append(f"  IdentitiesOnly yes\n  IdentityFile {self.folder}/id-{key}")
        return "\n".join(lines) + "\n"

    def cache_of(self, name: str) -> Path:
        return self.folder / name / ".cache" / "mlinfra"

    def ip(self, words: str) -> None:
        subprocess.run(["ip", *words.split()], check=True, capture_output=True)

    @contextmanager
    def built(self) -> Iterator[None]:
        """The network and the accounts."""
        with ExitStack() as stack:
            self.ip(f"netns add {self.cable}")
            stack.callback(self.ip, f"netns del {self.cable}")
            self.ip(f"link add {self.cable} type veth peer name there netns {self.cable}")
            self.ip(f"addr add {self.ours}/30 dev {self.cable}")
            self.ip(f"link set {self.cable} up")
            self.ip(f"-n {self.cable} addr add {self.address}/30 dev there")
            self.ip(f"-n {self.cable} link set there up")
            for name, user in self.users.items():
                words = ["--create-home", "--home-dir", str(self.folder / name), "--password", "*"]
                subprocess.run(["useradd", *words, "--shell", "/bin/sh", user], check=True)
                stack.callback(subprocess.run, ["userdel", "--force", user], capture_output=True)
            yield


@pytest.fixture(scope="module")
def whole_lab() -> Iterator[Lab]:
    if os.getuid() or not all(map(shutil.which, ("ip", "useradd", "userdel"))):
        pytest.skip("only root can make users and networks")
    with tempfile.TemporaryDirectory(prefix="lab-", dir="/tmp") as name, ExitStack() as stack:
        folder = Path(name)
        folder.chmod(0o755)
        lab = Lab(folder)
        try:
            stack.enter_context(lab.built())
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this user may not: {error}")
        lab.start()
        stack.callback(lab.stop)
        yield lab


@pytest.fixture
def lab(whole_lab: Lab) -> Iterator[Lab]:
    with whole_lab.known():
        yield whole_lab


def said(host: str, script: str) -> list[str]:
    return run(shell(SshRemote(host), script))


def test_a_pulled_cable_stops_no_run(lab: Lab) -> None:
    """Long enough for ssh and the link to notice; meanwhile the run ends over there."""
    client, _, server, _ = said("alice", 'echo "$SSH_CONNECTION"')[0].split()
    assert (client, server) == (lab.ours, lab.address)
    go, recorder = lab.folder / "go", Recorder()
    wait = f"while not os.path.exists({str(go)!r}): time.sleep(0.01)"
    code = f"import os, time\nprint('before')\n{wait}\nprint('after')\ndone = os.getuid()"
    with Session(namespace={}, on="ssh:alice", sync=False, env="none") as session:
        session.run("1")
        names = cell_names(code, {}, code)
        thread = threading.Thread(
            target=lambda: session.execute(code, names, frontend=recorder, count=1)
        )
        thread.start()
        until(lambda: "before" in recorder.text, "the first line", lambda: recorder.details)
        lab.ip(f"link set {lab.cable} down")
        try:
            go.touch()
            until(lambda: "reconnecting" in recorder.phases, "the loss to be noticed")
            assert recorder.text == "before\n"
        finally:
            lab.ip(f"link set {lab.cable} up")
        thread.join(100)
        assert recorder.text == "before\nafter\n"
        assert session.namespace["done"] == pwd.getpwnam(lab.users["alice"]).pw_uid


def test_users_of_one_host_do_not_see_each_other(lab: Lab) -> None:
    alice, bob = (providers.load(f"ssh:{name}") for name in lab.hosts)
    with pytest.raises(LinkError, match="refuses to log in"):
        said("thief", "echo hello")
    machine = launch("alice")
    try:
        # The same SDK is bob's, too: what he has to get at her machine is no worse than hers.
        theirs = [lab.cache_of(name) / "sdk" for name in lab.hosts]
        unused = shutil.ignore_patterns("jedi", "__pycache__", "tests")
        shutil.copytree(*theirs, symlinks=True, ignore=unused)
        subprocess.run(["chown", "-R", lab.users["bob"], lab.folder / "bob"], check=True)
        lab.cache_of("bob").chmod(0o700)
        assert [handle.key for handle in run(alice.list())] == ["k"]
        assert run(bob.list()) == []

        folder = lab.cache_of("alice") / "machines" / "k"
        for place in (lab.cache_of("alice"), folder, (folder / "agent.sock").resolve().parent):
            assert said("alice", f"ls -A {place}") != []
            assert said("bob", f"ls -A {place} 2>/dev/null") == []

        (python,) = map(str, lab.cache_of("bob").glob("sdk/*/bin/python"))
        as_hers = Handle("ssh", "k", {**machine.data, "host": "bob"})
        with_his = Handle("ssh", "k", {**as_hers.data, "python": python})
        for handle in (as_hers, with_his):
            assert not run(bob.status(handle)).alive
            with pytest.raises(MlinfraError):
                run(bob.connect(handle))
            with pytest.raises(MlinfraError):
                run(bob.secret(handle))
            run(bob.stop(handle))
        said("bob", f"{python} -I -m mlinfra_sdk.worker.host {machine.data['home']} stop k >&2")

        assert run(alice.status(machine)).alive
        wire = run(alice.connect(machine))
        run(wire.aclose())
    finally:
        run(alice.stop(machine))
    assert run(alice.list()) == []


def test_a_place_that_another_user_made_is_refused(lab: Lab) -> None:
    shared = lab.folder / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    trap, proof = shared / "his", shared / "proof"
    python = trap / "sdk" / bootstrap._shipment().digest / "bin" / "python"
    said(
        "bob",
        f"mkdir -p {python.parent}; echo '#!/bin/sh\n: >{proof}' >{python}; chmod -R 777 {trap}",
    )
    said("alice", f"{python}; ls {proof}")
    assert proof.exists(), "the trap works"
    proof.unlink()
    with pytest.raises(ProviderError, match="belongs to others"):
        launch("alice", home=str(trap))
    assert run(SshProvider(Options(host="alice", home=str(trap))).list()) == []
    said("alice", f"mkdir -m 777 {shared}/hers")
    with pytest.raises(ProviderError, match="others can write to"):
        launch("alice", home=f"{shared}/hers")
    assert not proof.exists()

    sockets = ssh._control_folder()
    os.chown(sockets, pwd.getpwnam(lab.users["bob"]).pw_uid, -1)
    try:
        with pytest.raises(ProviderError, match="should be a folder of yours alone"):
            said("alice", "echo hello")
    finally:
        os.chown(sockets, os.getuid(), -1)


def test_environments_that_nobody_needs_go(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest three stay if they are not too old, and the one of a machine that runs."""
    alice, home = providers.load("ssh:alice"), lab.cache_of("alice")
    run(alice.stop(launch("alice")))
    shipment = bootstrap._shipment()
    ours = home / "sdk" / shipment.digest

    def used(name: str, days: float) -> None:
        """An earlier version's environment, and when it was used for the last time."""
        path = ours.with_name(name)
        (path / "bin").mkdir(parents=True, exist_ok=True)
        (path / "used").unlink(missing_ok=True)  # which may be a hard link to that of another one
        (path / "used").touch()
        os.utime(path / "used", (time.time() - days * 86400,) * 2)
        subprocess.run(["chown", "-R", lab.users["alice"], path], check=True)

    def left() -> set[str]:
        kept = {path.name[0] for path in ours.parent.iterdir() if path != ours}
        return kept | {path.name for path in home.glob("new.*")}

    before = "f" * 20
    shutil.copytree(ours, ours.with_name(before), symlinks=True, copy_function=os.link)
    used(before, 0)
    used("5" * 20, 50)
    with monkeypatch.context() as patch:
        earlier = msgspec.structs.replace(shipment, digest=before)
        patch.setattr(bootstrap, "_shipment", lambda: earlier)
        old = launch("alice", "old")
    until(lambda: left() == {"f"}, "5 to go: this agent will not look again for a while", left)
    used(before, 45)
    for name, days in (("1", 1), ("2", 2), ("3", 3), ("4", 40)):
        used(name * 20, days)
    new = launch("alice", "new")
    until(lambda: left() == {"1", "2", "f"}, "3 and 4 to go", left)
    assert run(alice.status(old)).alive
    run(alice.stop(old))
    run(alice.stop(new))

    used("2" * 20, 31)
    new = launch("alice", "new")
    until(lambda: left() == {"1"}, "2 and f to go", left)
    assert not run(alice.status(old)).alive
    # Whoever knows a machine by an interpreter that has gone finds it by another one.
    known = Handle("ssh", "new", {**new.data, "python": old.data["python"]})
    assert run(alice.status(known)).alive
    run(run(alice.connect(known)).aclose())
    run(alice.stop(known))
    assert run(alice.list()) == []
