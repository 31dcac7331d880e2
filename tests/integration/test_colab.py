"""``on=colab``: Google's own client against the emulator, whose runtimes are real Jupyter Servers
with real agents and kernels."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from emulators.colab import Emulator, emulator
from emulators.colab.server import LOGIN, Faults
from jupyter_servers import furnished
from live import until

from mlinfra_sdk import paths
from mlinfra_sdk.catalog import Gpu, parse_gpus
from mlinfra_sdk.doctor import provider_checks
from mlinfra_sdk.errors import MachineLost, NoCapacity, ProviderError, RequestError
from mlinfra_sdk.providers import tools
from mlinfra_sdk.providers.base import Offer
from mlinfra_sdk.providers.colab import ColabProvider, Options
from mlinfra_sdk.providers.colab.account import _TOOL, ADDRESS, Account
from mlinfra_sdk.session import Session
from mlinfra_sdk.spec import Request
from mlinfra_sdk.testing import ProviderSuite

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of environments of clients, with Google's client in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLINFRA_HOME", str(tmp_path_factory.mktemp("client")))
        patch.setenv("UV_PYTHON_DOWNLOADS", "never")
        try:
            return tools.python_of(_TOOL).parents[2]
        except ProviderError as error:
            if "needs Python" in error.message:
                pytest.skip(f"Google's client cannot run here: {error.message}")
            raise


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, client: Path) -> Iterator[Emulator]:
    sdk = tmp_path_factory.mktemp("sdk")
    furnished(sdk)
    with emulator(tmp_path_factory.mktemp("colab"), sdk) as service:
        yield service


@pytest.fixture
def service(
    running: Emulator, client: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Emulator]:
    """The service, and a user who has logged in there. Each test must leave no runtime."""
    user = tmp_path / "user"
    login = user / ".config" / "colab-cli" / "token.json"
    login.parent.mkdir(parents=True)
    write_login(login, LOGIN)
    monkeypatch.setenv("HOME", str(user))
    monkeypatch.setenv("MLINFRA_HOME", str(user / "mlinfra"))
    monkeypatch.setenv(ADDRESS, running.url)
    (paths.cache_dir() / "tools").symlink_to(client)
    (user / "notebook").mkdir()
    monkeypatch.chdir(user / "notebook")
    running.faults, running.balance, running.expires = Faults(), 50.0, 3600
    running.ineligible = set()
    yield running
    left = [runtime.endpoint for runtime in running.runtimes.values()]
    for endpoint in left:
        running.reclaim(endpoint)
    assert not left


def write_login(path: Path, token: str) -> None:
    known = {"client_id": "id", "client_secret": "secret", "refresh_token": "refresh"}
    path.write_text(json.dumps({**known, "token": token, "expiry": "2099-01-01T00:00:00Z"}))


class TestColab(ProviderSuite):
    on = "colab"
    service: Emulator

    @pytest.fixture(autouse=True)
    @staticmethod
    def _service(request: pytest.FixtureRequest, service: Emulator) -> None:
        request.cls.service = service
        service.balance = 0.0  # of CPUs only the price for nothing is known

    # Left to on=jupyter, whose wire it is; streams of 100 MB are tried in Colab's protocol, too.
    test_large_values_arrive_unharmed_both_ways = None

    @contextmanager
    def broken(self) -> Iterator[None]:
        self.service.faults.no_machines = True
        yield
        self.service.faults.no_machines = False


def request(**values: Any) -> Request:
    return Request(**{"on": "colab", "idle": 300.0, "env": "none", "sync": False, **values})


def offers(gpu: str | None = None, **options: Any) -> list[Offer]:
    wanted = request(gpu=parse_gpus(gpu) if gpu else None)
    found: list[Offer] = anyio.run(ColabProvider(Options(**options)).offers, wanted)
    return found


def test_cells_run_on_a_gpu_and_tokens_are_renewed(
    service: Emulator, capsys: pytest.CaptureFixture[str]
) -> None:
    with Session(namespace={}, request=request(gpu=parse_gpus("T4"))) as session:
        session.run("x = [6 * 7]")
        runtime = service.only()
        assert runtime.accelerator == "T4" and session.namespace["x"] == [42]
        said = capsys.readouterr().err
        assert "T4 on colab" in said and "50.00 compute units" in said and "may end" in said
        # The old token is refused, before its time was over, in the middle of a run.
        begun, go = runtime.home / "begun", runtime.home / "go"

        def refuse() -> None:
            until(begun.exists, "the run")
            runtime.renew()
            runtime.cut()
            go.touch()

        with ThreadPoolExecutor(1) as pool:
            refused = pool.submit(refuse)
            session.run(
                f"""
                import pathlib, time
                pathlib.Path({str(begun)!r}).touch()
                while not pathlib.Path({str(go)!r}).exists():
                    time.sleep(0.01)
                x.append("after")
                """
            )
            refused.result()
        assert session.namespace["x"] == [42, "after"]
        # One that is about to end is asked for again.
        service.expires = 0
        asked, account = service.calls["GET assignments"], Account()
        assert anyio.run(account.access, runtime.endpoint)[1] == runtime.token
        assert anyio.run(account.runtimes)[runtime.endpoint].token == runtime.token
        assert anyio.run(account.access, runtime.endpoint)[1] == runtime.token
        assert service.calls["GET assignments"] == asked + 2
        service.expires = 3600
    assert not service.runtimes
    # What this account really pays was learnt, and the terms are not told again.
    (offer,) = offers("T4")
    assert offer.gpu == Gpu("T4") and "1.19 units" in offer.price.source
    assert offer.price.micro_per_hour == round(1.19 * 99_900)
    assert "compute units" in offer.note and "may end" not in offer.note


def test_a_runtime_that_colab_takes_back(service: Emulator) -> None:
    with Session(namespace={"y": 1}, request=request()) as session:
        session.run("y += 1; import pathlib; home = str(pathlib.Path.home())")
        first = service.only()
        begun = first.home / "begun"

        def take_back() -> None:
            until(begun.exists, "the run")
            service.reclaim(first.endpoint)

        with ThreadPoolExecutor(1) as pool:
            taken = pool.submit(take_back)
            with pytest.raises(MachineLost, match="Colab has taken it back"):
                session.run(f"import time; open({str(begun)!r}, 'w'); time.sleep(600)")
            taken.result()
        session.run("y += 1; home = str(pathlib.Path.home())")
        assert session.namespace["y"] == 3 and service.only() is not first
        assert session.namespace["home"] == str(service.only().home)


def test_what_is_refused(service: Emulator) -> None:
    with pytest.raises(RequestError, match="no gpu=A10") as unknown:
        offers("A10")
    assert "G4" in unknown.value.hint
    with pytest.raises(RequestError, match="no gpu=T4:2"):
        offers("T4:2")

    async def launch(gpu: str) -> None:
        wanted = request(gpu=parse_gpus(gpu))
        provider = ColabProvider()
        for offer in await provider.offers(wanted):
            await provider.launch(offer, wanted, f"refused-{gpu}")

    service.faults.wrong_gpu = "G4"
    with pytest.raises(NoCapacity, match="no H100 for you now: it gave G4"):
        anyio.run(launch, "H100")
    assert not service.runtimes and not anyio.run(ColabProvider().list)
    service.faults = Faults(refuse=412)
    with pytest.raises(NoCapacity, match="too many sessions"):
        anyio.run(launch, "T4")
    service.faults = Faults()
    service.ineligible = {"L4"}
    with pytest.raises(NoCapacity, match="does not give you L4"):
        anyio.run(launch, "L4")
    service.faults.nonsense = True
    with pytest.raises(ProviderError, match="not as expected") as moved:
        offers("T4")
    assert "google-colab-cli 0.7.5" in moved.value.hint


def test_a_launch_that_is_cancelled_while_colab_assigns(service: Emulator) -> None:
    """Colab has got the call: what it makes then is given back."""
    service.faults.hold = threading.Event()
    asked = service.calls["POST assign"]

    async def cancelled() -> None:
        provider = ColabProvider()
        (offer,) = await provider.offers(request())
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(provider.launch, offer, request(), "cancelled")
            while service.calls["POST assign"] == asked:
                await anyio.sleep(0.02)
            tasks.cancel_scope.cancel()
            service.faults.hold.set()

    anyio.run(cancelled)
    assert service.calls["POST unassign"] and not service.runtimes
    assert not anyio.run(ColabProvider().list)


def test_prices_of_an_account_without_units(service: Emulator) -> None:
    service.balance = 0.0
    free, unknown = offers("T4|A100")
    assert free.price.known and free.price.micro_per_hour == 0
    assert "free of charge" in free.price.source
    assert not unknown.price.known
    service.balance = 10.0
    (offer,) = offers("L4")
    assert offer.price.micro_per_hour == 169_830 and "mccormickml" in offer.price.source


def test_doctor(service: Emulator) -> None:
    (ready,) = provider_checks("colab")
    assert ready.ok and "50.00 compute units are left" in ready.detail
    login = Path.home() / ".config" / "colab-cli" / "token.json"
    write_login(login, "ya29.of-another-world")
    (refused,) = provider_checks("colab")
    assert not refused.ok and "does not let you in" in refused.detail
    login.unlink()
    (none,) = provider_checks("colab")
    assert not none.ok and "no login" in none.detail and "uvx" in none.mend
