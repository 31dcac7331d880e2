"""Kernels on machines with environments of their own, made by uv from a real index."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import pytest
from faulty import Client, Recorder, agents, processes
from live import until

from mlinfra_sdk.errors import EnvironmentConflict, EnvironmentFailed, MlinfraError
from mlinfra_sdk.machines.portal import portal
from mlinfra_sdk.objects.store import ChunkStore
from mlinfra_sdk.spec import Request
from mlinfra_sdk.worker.environments import Environments
from mlinfra_sdk.worker.recipe import Recipe
from mlinfra_sdk.worker.uv import uv_binary

Make = Callable[..., Client]


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A state directory, and with it a cache of environments, of this module's own."""
    folder = Path(tempfile.mkdtemp(prefix="mlinfra-environments-"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLINFRA_HOME", str(folder))
        yield folder
    for process in processes(folder):
        process.kill()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def make(home: Path) -> Iterator[Make]:
    """Makes clients of machines that have environments of their own."""
    made: list[Client] = []

    def new(**settings: Any) -> Client:
        made.append(Client(Request(**({"on": "local", "isolate": True} | settings))))
        return made[-1]

    yield new
    for it in made:
        it.session.stop()
    assert not unfinished(home)


def unfinished(home: Path) -> list[Path]:
    return list(home.glob("cache/environments/.unfinished-*"))


def value(it: Client, code: str, recorder: Recorder | None = None) -> Any:
    it.run(f"_given = {code}", recorder).get()
    return it.namespace["_given"]


WHERE = "(__import__('sys').prefix, sorted.__module__)[0]"
LISTED = "sorted(d.name.lower() for d in __import__('importlib.metadata').metadata.distributions())"


def test_a_mirror_is_made_cached_and_added_to(home: Path, make: Make) -> None:
    """What a cell imports is there at the version here, and little else; a second machine finds it
    made; what a later cell imports is added and variables stay."""
    first = Recorder()
    it = make()
    it.run("import sortedcontainers\nv = sortedcontainers.__version__", first).get()
    assert it.namespace["v"] == version("sortedcontainers")
    assert "environment" in first.phases
    assert any(detail.startswith("Python 3") for detail in first.details)
    names = value(it, LISTED)
    assert "ipykernel" in names and "pytest" not in names and "uv" not in names
    generation = it.session._generation
    later = Recorder()
    it.run("import json5\nassert v\nw = json5.loads('[1]')", later).get()
    assert it.namespace["w"] == [1]
    assert "environment" in later.phases and it.session._generation == generation
    again = Recorder()
    it.run("import json5", again).get()
    assert "environment" not in again.phases
    cached = list((home / "cache" / "environments").iterdir())
    assert not list(cached[0].rglob("json5"))  # the layer has it

    other, second = make(), Recorder()
    other.run("import sortedcontainers", second).get()
    assert not any(detail.startswith("Python 3") for detail in second.details)
    assert "environment" in second.phases
    assert list((home / "cache" / "environments").iterdir()) == cached


def test_a_module_that_is_changed_later_gets_what_it_imports(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    Path("a_helper.py").write_text("import json\nx = 1\n")
    it = make()
    it.session.request = msgspec.structs.replace(it.session.request, sync=True)
    it.run("import a_helper\nv = a_helper.x").get()
    assert it.namespace["v"] == 1
    Path("a_helper.py").write_text("import sortedcontainers\nx = sortedcontainers.__version__\n")
    it.run("import a_helper\nv = a_helper.x").get()
    assert it.namespace["v"] == version("sortedcontainers")


@pytest.mark.parametrize("what", ["mlinfra.json", "lib", "bin/python", "empty record"])
def test_a_damaged_environment_is_made_again(tmp_path: Path, what: str) -> None:
    cache, store = tmp_path / "cache", ChunkStore(tmp_path / "store")
    recipe = Recipe(".".join(map(str, sys.version_info[:2])), ["sortedcontainers==2.4.0"])

    def made(number: int) -> Environments:
        return Environments(cache, tmp_path / f"{number}", store, kernel="sortedcontainers")

    def prepare(it: Environments) -> None:
        prepared = portal().call(it.prepare(recipe, tell=lambda text: None))
        command = [str(it.python(prepared.key)), "-c", "import sortedcontainers"]
        subprocess.run(command, check=True)

    first = made(1)
    prepare(first)
    for use in first._uses.values():  # its machine ends
        os.close(use)
    (base,) = cache.iterdir()
    path = base / (what if what != "empty record" else "mlinfra.json")
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    if what == "bin/python":  # the host's has got another name
        path.symlink_to(tmp_path / "python3.11")
    elif what == "empty record":
        path.touch()
    prepare(made(2))
    prepare(made(3))


def test_packages_of_objects_are_there(make: Make) -> None:
    from sortedcontainers import SortedDict

    it = make()
    it.namespace["table"] = SortedDict(b=2, a=1)
    it.run("keys = list(table)").get()
    assert it.namespace["keys"] == ["a", "b"]


def project(folder: Path, name: str, text: str, version: str = "1.0") -> Path:
    """A project that builds without anything from an index."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "__init__.py").write_text(text)
    (folder / "pyproject.toml").write_text(
        f'[project]\nname = "{name}"\nversion = "{version}"\n'
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    (folder / "backend.py").write_text(
        "import zipfile, pathlib\n"
        "def build_wheel(folder, config_settings=None, metadata_directory=None):\n"
        f"    file = '{name}-{version}-py3-none-any.whl'\n"
        "    with zipfile.ZipFile(pathlib.Path(folder) / file, 'w') as it:\n"
        f"        it.write('{name}/__init__.py')\n"
        f"        info = '{name}-{version}.dist-info/'\n"
        f"        it.writestr(info + 'METADATA', 'Metadata-Version: 2.1\\nName: {name}\\n"
        f"Version: {version}\\n')\n"
        "        it.writestr(info + 'WHEEL', 'Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\n"
        "Tag: py3-none-any\\n')\n"
        "        it.writestr(info + 'RECORD', '')\n"
        "    return file\n"
    )
    return folder


def install_here(site: Path, name: str, version: str, project: Path | None = None) -> None:
    """As an installer would, in a folder on this process's path."""
    for old in site.glob(f"{name}-*.dist-info"):
        shutil.rmtree(old)
    info = site / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if project is None:
        (site / f"{name}.py").write_text("")
        (info / "RECORD").write_text(f"{name}.py,,\n")
        return
    (site / f"{name}.pth").write_text(f"{project}\n")
    (info / "RECORD").write_text(f"{name}.pth,,\n")
    (info / "direct_url.json").write_text(
        f'{{"url": "{project.as_uri()}", "dir_info": {{"editable": true}}}}'
    )


def test_editable_projects_travel_as_wheels(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site-packages"
    place = project(tmp_path / "project", "edited_one", "word = 'first'\n")
    install_here(site, "edited_one", "1.0", place)
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.syspath_prepend(str(site))
    assert value(make(), "__import__('edited_one').word") == "first"
    project(place, "edited_one", "word = 'the second'\n")
    assert value(make(), "__import__('edited_one').word") == "the second"


def test_what_cannot_be_had_is_explained(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site-packages"
    install_here(site, "sortedcontainers", "77.0")
    monkeypatch.syspath_prepend(str(site))
    it = make()
    with pytest.raises(EnvironmentFailed) as caught:
        it.run("import sortedcontainers")
    text = str(caught.value)
    assert "sortedcontainers==77.0" in text
    assert "sortedcontainers 77.0 is installed here; sortedcontainers is imported." in text
    assert "env=FILE" in text
    assert value(it, "1 + 1") == 2  # a cell without it


def test_a_running_kernel_keeps_its_versions(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site-packages"
    place = project(tmp_path / "one", "kept_one", "")
    install_here(site, "kept_one", "1.0", place)
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.syspath_prepend(str(site))
    it = make()
    it.run("import six").get()
    install_here(site, "six", "1.16.0")
    (site / "json5_user.py").write_text("")
    install_here(site, "json5_user", "1.0")
    (site / "json5_user-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: json5_user\nVersion: 1.0\nRequires-Dist: six\n"
    )
    with pytest.raises(EnvironmentConflict, match=r"six 1\.\S+ would become 1\.16\.0"):
        it.run("import json5_user")
    it.session.restart()
    it.run("import six\nassert six.__version__ == '1.16.0'").get()


def test_requirements_files_decide(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "requirements.txt"
    path.write_text("six==1.16.0\n")
    it = make(env=str(path))
    it.run("import six").get()
    assert value(it, "__import__('six').__version__") == "1.16.0"
    assert "sortedcontainers" not in value(it, LISTED)
    path.write_text("six==1.16.0\nsix==1.17.0\n")
    noted = Recorder()
    it.run("1", noted).get()
    assert any("has changed: `%remote restart`" in note for note in noted.notes)
    with pytest.raises(EnvironmentFailed, match=r"six==1\.1\d\.0"):
        it.session.restart()


def test_a_lock_file_decides(make: Make, tmp_path: Path) -> None:
    minor = platform.python_version().rpartition(".")[0]
    (tmp_path / "pyproject.toml").write_text(
        f'[project]\nname = "locked"\nversion = "1"\nrequires-python = "=={minor}.*"\n'
        'dependencies = ["six<1.17"]\n[dependency-groups]\ndev = ["sortedcontainers"]\n'
    )
    subprocess.run([uv_binary(), "lock", "--quiet"], cwd=tmp_path, check=True)
    it = make(env=str(tmp_path / "uv.lock"))
    assert value(it, "__import__('six').__version__") == "1.16.0"
    assert "sortedcontainers" not in value(it, LISTED)


def test_another_minor_version_of_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a client with another Python than the agent: uv finds one, or says what is missing."""
    own = sys.version_info.minor
    places = [Path("/usr/bin"), Path("/usr/local/bin"), Path.home() / ".local/bin"]
    places += (Path.home() / ".pyenv/versions").glob("*/bin")
    found = sorted(it for place in places for it in place.glob("python3.1[0-9]"))
    others = [it for it in found if int(it.name.rpartition(".")[2]) != own]
    environments = Environments(
        tmp_path / "cache", tmp_path / "layers", ChunkStore(tmp_path / "store"), kernel="six"
    )

    def prepared(version: str) -> Path:
        recipe = Recipe(version, ["six==1.16.0"])
        made = portal().call(environments.prepare(recipe, tell=lambda text: None))
        return environments.python(made.key)

    with pytest.raises(EnvironmentFailed, match=r"Python 3\.99 cannot be had") as caught:
        prepared("3.99")
    assert "install Python 3.99 there" in caught.value.hint
    if not others:
        pytest.skip("there is no other Python here")
    monkeypatch.setenv("PATH", f"{others[-1].parent}:{os.environ['PATH']}")
    version = others[-1].name.removeprefix("python")
    code = "import sys, six; print(*sys.version_info[:2], six.__version__)"
    said = subprocess.run([prepared(version), "-c", code], capture_output=True, text=True)
    assert said.stdout.split() == [*version.split("."), "1.16.0"]


def test_wheels_are_sent_to_a_machine_without_an_index(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = make()
    with monkeypatch.context() as there:
        there.setenv("UV_DEFAULT_INDEX", "http://127.0.0.1:9/simple")
        there.setenv("UV_HTTP_RETRIES", "0")
        it.session.runs()  # the machine starts
    recorder = Recorder()
    it.run("import sortedcontainers\nv = sortedcontainers.__version__", recorder).get()
    assert it.namespace["v"] == version("sortedcontainers")


def test_a_full_disk_leaves_nothing_half_done(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["-t", "tmpfs", "-o", "size=24m,mode=700", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    try:
        monkeypatch.setenv("MLINFRA_HOME", str(disk))
        it = make()
        with pytest.raises(EnvironmentFailed, match="No space left"):
            it.run("1")
        assert not unfinished(disk)
        it.session.stop()
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.fixture
def silent_index() -> Iterator[tuple[str, threading.Event, list[Callable[[], None]]]]:
    """An index that never answers; it says when it was asked, and does something then."""
    asked, act = threading.Event(), []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            kept = []
            while True:
                try:
                    kept.append(server.accept())
                except OSError:
                    return
                asked.set()
                for it in act:
                    it()
                act.clear()

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/simple", asked, act
        server.shutdown(socket.SHUT_RDWR)


def test_an_agent_killed_while_it_builds_leaves_nothing_that_stays(
    home: Path, make: Make, silent_index: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, _, act = silent_index
    it = make()
    with monkeypatch.context() as there:
        there.setenv("UV_DEFAULT_INDEX", url)
        it.session.runs()
    (agent,) = [p for p in agents(home) if "mlinfra_sdk.worker" in p.cmdline()]
    children = []
    act.append(lambda: children.extend(agent.children()))
    act.append(agent.kill)
    with pytest.raises(MlinfraError):
        it.run("import webcolors")
    for child in children:
        child.kill()
    assert unfinished(home)
    it.run("import webcolors").get()  # another machine
    assert not unfinished(home)


def test_an_interrupt_ends_the_build(
    home: Path, make: Make, silent_index: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, _, act = silent_index
    it = make()
    with monkeypatch.context() as there:
        there.setenv("UV_DEFAULT_INDEX", url)
        it.session.runs()
    act.append(lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        it.run("import isoduration")
    until(lambda: not unfinished(home), "the build to end")
