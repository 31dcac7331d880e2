"""The emulator as the real client sees it."""

from __future__ import annotations

import asyncio
import io
import os
import sys
import time
from collections.abc import Iterator
from decimal import Decimal

import modal
import psutil
import pytest
from modal.exception import (
    AlreadyExistsError,
    AuthError,
    InvalidError,
    NotFoundError,
    ResourceExhaustedError,
    SandboxTimeoutError,
)

from emulators.modal import Emulator

PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"


@pytest.fixture
def service(modal_emulator: Emulator) -> Iterator[Emulator]:
    """The service, with no sandbox and no fault before and after."""
    yield modal_emulator
    modal_emulator.heal()
    for box in modal_emulator.boxes():
        modal_emulator.preempt(box)


@pytest.fixture
def app(service: Emulator) -> modal.App:
    return modal.App.lookup("tests", create_if_missing=True)


def image() -> modal.Image:
    return modal.Image.debian_slim(python_version=PYTHON).pip_install("ipykernel")


def create(app: modal.App, *argv: str, **options: object) -> modal.Sandbox:
    return modal.Sandbox.create(*argv, app=app, image=image(), **{"timeout": 60, **options})


@pytest.mark.parametrize("gpu", ["A10", None], ids=["V1", "V2"])
def test_commands_have_binary_streams_and_statuses(app: modal.App, gpu: str | None) -> None:
    sandbox = create(app, gpu=gpu)
    assert len(sandbox.object_id) == (25 if gpu else 26)
    echo = sandbox.exec("cat", text=False)
    data = os.urandom(3 << 20)
    echo.stdin.write(data)
    echo.stdin.write_eof()
    echo.stdin.drain()
    assert echo.stdout.read() == data and echo.wait() == 0
    failing = sandbox.exec("sh", "-c", 'echo "$WORD" >&2; exit 3', env={"WORD": "blue"})
    assert failing.stderr.read() == "blue\n" and failing.wait() == 3
    home = sandbox.exec("python", "-c", "import os; print(os.environ['HOME'] == os.getcwd())")
    assert home.stdout.read() == "True\n"
    hanging = sandbox.exec("sleep", "60", timeout=1)
    assert hanging.wait() in (-1, 137)
    assert sandbox.exec("no-such-program").wait() == 127
    sandbox.terminate()
    sandbox.wait(raise_on_termination=False)
    assert sandbox.returncode == 137


def test_the_gpu_that_was_asked_for_is_there(app: modal.App, service: Emulator) -> None:
    query = ("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
    sandbox = create(app, gpu="A100-80GB:2")
    assert sandbox.exec(*query).stdout.read() == "NVIDIA A100 80GB PCIe, 81920 MiB\n" * 2
    service.faults.wrong_gpu = "T4"
    assert create(app, gpu="A10").exec(*query).stdout.read() == "Tesla T4, 15360 MiB\n"


def test_a_sandbox_takes_all_its_processes_along(app: modal.App, service: Emulator) -> None:
    sandbox = create(app)
    shell = sandbox.exec("sh", "-c", "setsid sleep 600 >/dev/null 2>&1 & echo $!")
    pid = int(shell.stdout.read())
    assert psutil.pid_exists(pid)
    service.preempt(service.boxes()[0])
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    assert sandbox.poll() == 1


def test_ends(app: modal.App) -> None:
    with pytest.raises(SandboxTimeoutError):
        create(app, timeout=1).wait()
    began = time.monotonic()
    idle = create(app, idle_timeout=1)
    assert idle.exec("sleep", "2").wait() == 0  # activity
    idle.wait(raise_on_termination=False)
    assert time.monotonic() - began > 2.9
    finished = create(app, "sh", "-c", "exit 4")
    finished.wait()
    assert finished.returncode == 4


def test_names_tags_and_lists(app: modal.App) -> None:
    for gpu in ("T4", None):
        name = f"machine-{gpu}"
        sandbox = create(app, name=name, tags={"key": name}, gpu=gpu)
        with pytest.raises(AlreadyExistsError):
            create(app, name=name, gpu=gpu)
        assert modal.Sandbox.from_name("tests", name).object_id == sandbox.object_id
        assert modal.Sandbox.from_id(sandbox.object_id).get_tags() == {"key": name}
        (found,) = modal.Sandbox.list(app_id=app.app_id, tags={"key": name})
        assert found.object_id == sandbox.object_id
        sandbox.set_tags({"key": "other"})
        assert not list(modal.Sandbox.list(app_id=app.app_id, tags={"key": name}))
        sandbox.terminate()
        sandbox.wait(raise_on_termination=False)
        with pytest.raises(NotFoundError):
            modal.Sandbox.from_name("tests", name)


def test_volumes_outlive_sandboxes(app: modal.App, service: Emulator) -> None:
    volume = modal.Volume.from_name("kept", create_if_missing=True, version=2)
    data = os.urandom(9 << 20)
    with volume.batch_upload(force=True) as batch:
        batch.put_file(io.BytesIO(data), "/data/big")
    assert b"".join(volume.read_file("data/big")) == data
    for gpu in ("T4", None):
        sandbox = create(app, volumes={"/root/kept": volume}, gpu=gpu)
        script = 'wc -c <"$HOME/kept/data/big"; echo more >>"$HOME/kept/log"'
        assert sandbox.exec("sh", "-c", script).stdout.read().strip() == str(len(data))
    assert [it.path for it in volume.listdir("/")] == ["data", "log"]
    assert (service.volume("kept") / "log").read_text() == "more\nmore\n"
    volume.remove_file("log")
    with pytest.raises(FileNotFoundError):
        b"".join(volume.read_file("log"))


def test_secrets_are_in_the_environment(app: modal.App, service: Emulator) -> None:
    service.add_secret("wandb", {"WANDB_API_KEY": "hidden"})
    for gpu in ("T4", None):
        sandbox = create(app, secrets=[modal.Secret.from_name("wandb")], gpu=gpu)
        assert sandbox.exec("printenv", "WANDB_API_KEY").stdout.read() == "hidden\n"
    with pytest.raises(NotFoundError):
        create(app, secrets=[modal.Secret.from_name("missing")])


@pytest.mark.parametrize(
    "options",
    [
        {"gpu": "A11"},
        {"gpu": "A10:5"},
        {"timeout": 24 * 3600 + 1},
        {"timeout": 0},
        {"idle_timeout": 0},
        {"volumes": {"/elsewhere": None}},
    ],
    ids=str,
)
def test_what_is_refused(app: modal.App, service: Emulator, options: dict[str, object]) -> None:
    if "volumes" in options:
        volume = modal.Volume.from_name("kept", create_if_missing=True, version=2)
        options = {"volumes": {"/elsewhere": volume}}
    with pytest.raises(InvalidError):
        create(app, **options)
    assert not service.boxes()


def test_a_wrong_token_is_refused(service: Emulator) -> None:
    client = modal.Client.from_credentials("ak-emulated", "as-wrong")
    with pytest.raises(AuthError):
        modal.App.lookup("tests", client=client)


def test_rates(service: Emulator) -> None:
    rates = modal.Workspace.from_context().billing.rates()
    assert rates["A10"] * 3600 == Decimal("1.1016")


# -- faults ----------------------------------------------------------------------------------


def test_short_faults_are_mended_by_the_client(app: modal.App, service: Emulator) -> None:
    service.faults.unavailable = {"SandboxCreate": 1, "SandboxGetTaskId": 1}
    service.faults.expired = 1
    service.faults.cut_after = 1000
    sandbox = create(app, gpu="L4")
    assert len(service.boxes()) == 1
    process = sandbox.exec("head", "-c", "100000", "/dev/zero", text=False)
    assert process.stdout.read() == bytes(100_000)
    assert service.faults.cut_after == 0 and service.faults.expired == 0


def test_refused_and_failed(app: modal.App, service: Emulator) -> None:
    service.faults.refuse = "GPU limit of this workspace reached"
    with pytest.raises(ResourceExhaustedError, match="GPU limit"):
        create(app, gpu="H100")
    service.heal()
    service.faults.image_log = "Collecting torch\nERROR: No matching distribution\n"
    with pytest.raises(Exception, match="Image build for"):
        create(app)
    assert not service.boxes()


def test_capacity_that_never_comes(app: modal.App, service: Emulator) -> None:
    service.faults.capacity = False

    async def wait() -> None:
        options = {"app": app, "image": image(), "gpu": "B200", "timeout": 60}
        task = asyncio.ensure_future(modal.Sandbox.create.aio(**options))
        while not service.boxes():
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(wait())
    # The service has it still, whether or not the client came to end it.
    for box in service.boxes():
        modal.Sandbox.from_id(box.id).terminate()
        service.wait_ended(box)
    assert not service.boxes()
