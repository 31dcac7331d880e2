"""``on=modal`` through the whole stack: the real client against the emulator, whose sandboxes have
real agents and kernels."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
from emulators.modal import Emulator
from scripts import LIMIT, Place, place

from mlinfra_sdk.catalog import Gpu, parse_gpus
from mlinfra_sdk.errors import MachineLost, MlinfraError, ProviderError, RequestError
from mlinfra_sdk.link.relay import MARKER
from mlinfra_sdk.machines import lifecycle
from mlinfra_sdk.machines.portal import portal
from mlinfra_sdk.machines.reconcile import reconcile
from mlinfra_sdk.providers.base import Handle, Offer
from mlinfra_sdk.providers.modal import ModalProvider, Options, tunnel
from mlinfra_sdk.session import Session
from mlinfra_sdk.spec import Request
from mlinfra_sdk.testing import ProviderSuite

T4 = parse_gpus("T4")


class TestModal(ProviderSuite):
    """What every backend must do, with CPU sandboxes (Modal's V2 calls)."""

    on = "modal"
    service: Emulator

    @pytest.fixture(autouse=True)
    @staticmethod
    def _service(request: pytest.FixtureRequest, service: Emulator) -> None:
        request.cls.service = service

    @contextmanager
    def broken(self) -> Iterator[None]:
        self.service.faults.image_log = "ERROR: No matching distribution found for ipykernel==0\n"
        try:
            yield
        finally:
            self.service.heal()


@pytest.fixture
def service(
    modal_emulator: Emulator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Emulator]:
    """The service; each test must leave no sandbox."""
    monkeypatch.setenv("MLINFRA_HOME", str(tmp_path / "home"))
    (tmp_path / "notebook").mkdir()
    monkeypatch.chdir(tmp_path / "notebook")
    yield modal_emulator
    modal_emulator.heal()
    left = modal_emulator.boxes()
    for box in left:
        modal_emulator.preempt(box)
    assert not left


@pytest.fixture
def here(service: Emulator, tmp_path: Path) -> Iterator[Place]:
    with place(tmp_path) as it:
        yield it


def request(**values: Any) -> Request:
    return Request(**{"on": "modal", "idle": 300.0, "env": "none", "sync": False, **values})


def session(**values: Any) -> Session:
    return Session(namespace={}, request=request(**values))


def test_cells_run_in_a_sandbox_with_the_gpu(
    service: Emulator, capsys: pytest.CaptureFixture[str]
) -> None:
    with session(gpu=T4, time=3600.0) as it:
        it.namespace["data"] = data = np.arange(1_000_000.0)
        it.run("import os; data[0] = 7; box = os.environ['MODAL_SANDBOX_ID']; print('there')")
        (box,) = service.boxes()
        assert it.namespace["box"] == box.id and box.v1
        assert it.namespace["data"] is data and data[0] == 7
        assert "there" in capsys.readouterr().out
        with pytest.raises(ZeroDivisionError):
            it.run("1 / 0")
        definition = box.definition
        assert definition.timeout_secs == 4200 and definition.idle_timeout_secs == 420
        assert definition.resources.gpu_config.gpu_type == "T4"
        assert definition.resources.milli_cpu == 1000 and definition.resources.memory_mb == 4096
        python = f"FROM python:{sys.version_info[0]}.{sys.version_info[1]}"
        lines = "\n".join(service.image_lines(box))
        assert python in lines and "ipykernel==" in lines

        # The tunnel is cut for good in the middle of a run: a relay's command takes over; then
        # that ends, and another one does.
        begun, go = box.home / "begun", box.home / "go"

        def cut() -> None:
            wait_for(begun.exists)
            assert service.cut_execs(box, "mlinfra_sdk.link.relay") == 0
            assert service.cut_tunnels(closed=True)
            wait_for(lambda: service.cut_execs(box, "mlinfra_sdk.link.relay") == 1)
            go.touch()

        with meanwhile(cut):
            it.run(
                f"""
                import pathlib, time
                print("before the cut")
                pathlib.Path({str(begun)!r}).touch()
                while not pathlib.Path({str(go)!r}).exists():
                    time.sleep(0.01)
                print("after the cut")
                """
            )
        assert capsys.readouterr().out == "before the cut\nafter the cut\n"


@contextmanager
def meanwhile(act: Callable[[], object]) -> Iterator[None]:
    """Do something in another thread while the block runs."""
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(act)
        yield
    done.result()


def test_the_tunnel_is_open_only_to_who_knows_the_secret(
    service: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    with session() as it:
        it.run("1")
        assert it.machine is not None
        address = it.machine.handle.data["tunnel"]
        host, _, port = address.partition(":")
        connection = socket.create_connection((host, int(port)), timeout=30)
        with ssl.create_default_context().wrap_socket(connection, server_hostname=host) as stranger:
            stranger.sendall(os.urandom(4096))
            said = b""
            with suppress(ConnectionError, ssl.SSLError):
                while data := stranger.recv(4096):
                    said += data
        assert said.startswith(MARKER) and len(said) < 1000
        assert it.run("40 + 2") == 42
        # Modal's side of it has to prove who it is, too.
        monkeypatch.delenv("SSL_CERT_FILE")
        assert portal().call(tunnel.connect(address)) is None


def test_without_a_tunnel_no_port_is_open(service: Emulator) -> None:
    provider = ModalProvider(Options(tunnel=False))
    (offer,) = portal().call(provider.offers(request()))
    handle = portal().call(provider.launch(offer, request(), "closed"))
    (box,) = service.boxes()
    assert not box.definition.open_ports.ports and not handle.data["tunnel"]
    wire = portal().call(provider.connect(handle))
    portal().call(wire.aclose())
    portal().call(provider.stop(handle))


def test_what_lies_in_the_volume_outlives_the_machine(service: Emulator) -> None:
    service.add_secret("tracking", {"TRACKING_KEY": "not shown"})
    code = "import os, pathlib; kept = pathlib.Path.home() / 'mlinfra' / 'model.txt'"
    with session() as it:
        it.run(f"{code}; kept.write_text('weights'); cache = os.environ['HF_HOME']")
        assert it.namespace["cache"].endswith("/mlinfra/huggingface")
        (box,) = service.boxes()
        assert not box.v1
    with session() as it:
        it.run(f"{code}; text = kept.read_text()")
        assert it.namespace["text"] == "weights"
    assert (service.volume("mlinfra") / "model.txt").exists()


def provider(**options: Any) -> ModalProvider:
    return ModalProvider(Options(**options))


async def launch(key: str, options: dict[str, Any] | None = None, **values: Any) -> Handle:
    """A machine without a session."""
    it, wanted = provider(**(options or {})), request(**values)
    offers = await it.offers(wanted)
    return await it.launch(offers[0], wanted, key)


def test_a_key_is_one_sandbox_which_is_found_and_stopped_twice(service: Emulator) -> None:
    service.add_secret("tracking", {"TRACKING_KEY": "not shown"})

    async def scenario() -> None:
        options = {"secrets": ("tracking",), "volume": ""}
        first = await launch("k1", options)
        again = await launch("k1", options)
        assert first == again and len(service.boxes()) == 1
        it = provider()
        assert await it.list() == [Handle("modal", "k1", {"sandbox": first.data["sandbox"]})]
        wire = await it.remote(first.data).exec(["sh", "-c", "printenv TRACKING_KEY; cat"])
        data = os.urandom(5_000_000)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wire.send, [data[:3], data[3:]])
            assert await received(wire, 10 + len(data)) == b"not shown\n" + data
        await wire.aclose()
        assert (await it.status(first)).alive
        await it.stop(first)
        await it.stop(first)
        status = await it.status(first)
        assert not status.alive and "stopped" in status.reason
        assert await it.list() == []
        unknown = Handle("modal", "k2", {"sandbox": "sb-unknown"})
        await it.stop(unknown)
        assert not (await it.status(unknown)).alive

    anyio.run(scenario)


async def received(wire: Any, count: int) -> bytes:
    data, space = b"", memoryview(bytearray(1 << 20))
    while len(data) < count:
        got = await wire.receive_into(space)
        assert got
        data += space[:got]
    return data


@pytest.mark.parametrize("fault", ["capacity", "start", "image"])
def test_a_launch_that_is_cancelled_leaves_nothing(service: Emulator, fault: str) -> None:
    service.faults.capacity = fault != "capacity"
    service.faults.start_delay = 600.0 if fault == "start" else 0.0

    async def scenario() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(launch, "gone")
            while not service.calls["ImageGetOrCreate" if fault == "image" else "SandboxCreateV2"]:
                await anyio.sleep(0.01)
            if fault != "image":
                while not service.boxes():
                    await anyio.sleep(0.01)
            tasks.cancel_scope.cancel()

    service.calls.clear()
    anyio.run(scenario)
    assert not service.boxes()


def test_an_interrupt_ends_the_wait_for_capacity(service: Emulator, here: Place) -> None:
    service.faults.capacity = False
    script = here.write(
        "wait.py",
        """
        import mlinfra_sdk
        try:
            with mlinfra_sdk.Session(on="modal", gpu="T4", env="none", sync=False) as session:
                session.run("1")
        except KeyboardInterrupt:
            print("interrupted")
        """,
    )
    process = here.start(str(script))
    wait_for(service.boxes)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=LIMIT)
    assert out == "interrupted\n" and "Traceback" not in err, err
    assert not service.boxes()


def wait_for(condition: Callable[[], object]) -> None:
    async def wait() -> None:
        with anyio.fail_after(LIMIT):
            while not condition():
                await anyio.sleep(0.02)

    anyio.run(wait)


def test_a_killed_client_leaves_no_sandbox_and_another_process_finds_one(
    service: Emulator, here: Place
) -> None:
    code = """
        import msgspec, os, sys
        import mlinfra_sdk
        session = mlinfra_sdk.Session(on="modal", machine="shared", env="none", sync=False)
        session.run("import os; box = os.environ['MODAL_SANDBOX_ID']")
        session.configure(msgspec.structs.replace(session.request, idle=float(sys.argv[1])))
        session.run("pass")
        print(box, flush=True)
        sys.stdin.read()
        """
    script = str(here.write("client.py", code))
    first = here.start(script, "300")
    assert first.stdout is not None
    box_id = first.stdout.readline().strip()
    first.kill()
    first.communicate()
    (box,) = service.boxes()
    assert box.id == box_id
    second = here.start(script, "1")
    assert second.stdout is not None
    assert second.stdout.readline().strip() == box_id
    second.kill()
    second.communicate()
    service.wait_ended(box)
    assert box.result.exitcode == 21  # idle
    listed = here.mlinfra("status")
    assert listed.stdout.startswith("No machine runs."), listed


def test_a_machine_that_is_taken_away_in_a_run(service: Emulator) -> None:
    with session(reconnect=60.0) as it:
        it.run("x = 1")
        (box,) = service.boxes()
        marker = box.home / "begun"

        def preempt() -> None:
            wait_for(marker.exists)
            service.preempt(box)

        with meanwhile(preempt), pytest.raises(MachineLost):
            it.run(f"open({str(marker)!r}, 'w').close(); import time; time.sleep(600)")
        it.run("y = x + 1")
        assert it.namespace["y"] == 2
        assert [other.id for other in service.boxes()] != [box.id]


def error_of(**values: Any) -> MlinfraError:
    with pytest.raises(MlinfraError) as caught:
        anyio.run(lambda: launch("refused", **values))
    return caught.value


def test_another_gpu_than_asked_for_is_an_error(service: Emulator) -> None:
    service.faults.wrong_gpu = "T4"
    error = error_of(gpu=parse_gpus("A10"))
    assert isinstance(error, RequestError) and "T4" in str(error)


def test_refusals_say_what_to_do(service: Emulator) -> None:
    error = error_of(gpu=parse_gpus("RTX4090"))
    assert isinstance(error, RequestError) and "It has T4" in str(error)
    error = error_of(time=25 * 3600.0)
    assert isinstance(error, RequestError) and "24h" in error.hint
    service.faults.refuse = "this workspace may use 10 GPUs"
    error = error_of(gpu=T4)
    assert isinstance(error, ProviderError)
    assert "10 GPUs" in error.message and "another GPU" in error.hint
    service.heal()
    service.faults.image_log = "ERROR: No matching distribution found for ipykernel==0\n"
    error = error_of()
    assert "image" in error.message and "modal image logs" in error.message


def test_prices_are_the_accounts_own_where_it_tells_them(service: Emulator) -> None:
    service.rates["A10"] = "0.0004"

    def price(gpu: str | None, **options: Any) -> Any:
        wanted = request(gpu=parse_gpus(gpu) if gpu else None)
        offers: list[Offer] = anyio.run(provider(**options).offers, wanted)
        return offers[0].gpu, offers[0].price

    bare = price(None)[1].micro_per_hour
    assert bare == round(1e6 * 3600 * (0.00003942 + 4 * 0.00000667))
    assert price(None, cpu=2.0, memory="8GiB")[1].micro_per_hour == pytest.approx(2 * bare, abs=1)
    gpu, own = price("A10:2")
    assert gpu == Gpu("A10", 2) and own.source == "your Modal account"
    assert own.micro_per_hour == bare + 2 * 1_440_000
    service.rates["A10"] = "40"  # neither per second nor per hour
    listed = price("A10:2")[1]
    assert listed.micro_per_hour == bare + 2 * 1_101_600 and "modal.com" in listed.source
    service.rates["A10"] = "0.000306"
    with pytest.raises(RequestError, match="not understood"):
        price(None, memory="much")


def test_check(service: Emulator, here: Place) -> None:
    code = """
        import json
        from mlinfra_sdk.providers.modal import ModalProvider
        print(json.dumps([(it.what, it.mend) for it in ModalProvider().check()]))
        """
    script = str(here.write("check.py", code))
    started = []
    for token in ("as-emulated", "as-wrong", None):
        here.env["MODAL_TOKEN_SECRET"] = token or ""
        if token is None:
            del here.env["MODAL_TOKEN_ID"]
        started.append(here.start(script))
    right, wrong, none = (json.loads(process.communicate()[0]) for process in started)
    assert right == []
    ((what, mend),) = wrong
    assert "does not let you in" in what and "modal token new" in mend
    ((what, mend),) = none
    assert "no token" in what and "modal token new" in mend


def test_without_the_package(here: Place) -> None:
    """It is imported only when it is used, and its absence is a problem with a remedy."""
    code = """
        import sys
        from mlinfra_sdk.providers.modal import ModalProvider
        assert "modal" not in sys.modules
        sys.modules["modal"] = None
        sys.modules["modal.exception"] = None
        import importlib.util
        print([it.mend for it in ModalProvider().check()])
        """
    process = subprocess.run(
        [sys.executable, str(here.write("check.py", code))],
        env=here.env,
        capture_output=True,
        text=True,
    )
    assert 'pip install "mlinfra-sdk[modal]"' in process.stdout, process.stderr


def test_the_bill_is_taken_over_once_when_it_is_complete(service: Emulator) -> None:
    with session(gpu=T4) as it:
        it.run("x = 1")
        assert it.machine is not None
        key = it.machine.id
        it.stop()
        ledger = it.ledger
        service.faults.billed_earlier = 6 * 3600.0
        assert portal().call(reconcile(ledger)) == [], "the hour is not over"
        with sqlite3.connect(ledger.path) as connection:  # nobody waits for it
            for column in ("intended_at", "started_at", "stopped_at"):
                connection.execute(f"UPDATE machines SET {column} = {column} - 6 * 3600")
        assert portal().call(reconcile(ledger)) == [], "it was asked within the hour"
        ((machine, bill),) = portal().call(reconcile(ledger, again_after=0.0))
        expected = service.billed(key)
        assert (machine.id, bill.amount) == (key, pytest.approx(expected * 1e6, abs=1))
        assert portal().call(reconcile(ledger, again_after=0.0)) == []
        assert [charge.amount for charge in ledger.charges()] == [bill.amount]
        costs = ledger.costs()
        assert costs.billed.total == costs.best.total == bill.amount
        assert costs.estimate.total > 0


def test_the_end_is_the_services_own(service: Emulator) -> None:
    """Although its clock is an hour ahead, and nobody looks before some time has passed."""
    with session() as it:
        it.run("x = 1")
        assert it.machine is not None
        (box,) = service.boxes()
        service.faults.clock_ahead = 3600.0
        service.preempt(box)
        time.sleep(1.5)
        (machine,) = it.ledger.machines(active=True)
        assert portal().call(lifecycle.settle(it.ledger)) == []
        (machine,) = it.ledger.machines()
        assert machine.stopped_at == pytest.approx(box.over, abs=1.0)
        assert time.time() - box.over > 1.4


def test_a_sandbox_ends_with_its_budget_and_nobody_there(service: Emulator) -> None:
    provider = ModalProvider()
    wanted = request(paid=3.0, paid_by="month_budget=$5.00")
    (offer, *_) = portal().call(provider.offers(wanted))
    handle = portal().call(provider.launch(offer, wanted, "paid"))
    (box,) = service.boxes()
    service.wait_ended(box)
    assert box.result.exitcode == 25
    status = portal().call(provider.status(handle))
    assert (status.alive, status.reason) == (False, "its budget was spent")
