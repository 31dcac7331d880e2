"""``on=kaggle``: Kaggle's own client against the emulator, which runs what is pushed."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
from emulators.kaggle import Emulator, emulator
from emulators.kaggle.server import TOKEN
from live import until
from test_conformance import without_folder_for_machines

from mlinfra_sdk import cli_quote, paths
from mlinfra_sdk.catalog import Gpu, parse_gpus
from mlinfra_sdk.doctor import provider_checks
from mlinfra_sdk.errors import KernelDied, ProviderError, RequestError
from mlinfra_sdk.namespace.analysis import cell_names
from mlinfra_sdk.providers import tools
from mlinfra_sdk.providers.base import Offer
from mlinfra_sdk.providers.kaggle import KaggleProvider
from mlinfra_sdk.providers.kaggle.service import ADDRESS, TOOL
from mlinfra_sdk.session import Session
from mlinfra_sdk.spec import Request
from mlinfra_sdk.testing import ProviderSuite
from mlinfra_sdk.worker import batch


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of environments of clients, with Kaggle's client in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLINFRA_HOME", str(tmp_path_factory.mktemp("client")))
        patch.setenv("UV_PYTHON_DOWNLOADS", "never")
        try:
            return tools.python_of(TOOL).parents[2]
        except ProviderError as error:
            if "needs Python" in error.message:
                pytest.skip(f"Kaggle's client cannot run here: {error.message}")
            raise


@pytest.fixture
def service(client: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Emulator]:
    """The service, and a user who has a token. Each test must leave nothing there."""
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.setenv("MLINFRA_HOME", str(tmp_path / "user" / "mlinfra"))
    (paths.cache_dir() / "tools").symlink_to(client)
    access = tmp_path / "user" / ".kaggle" / "access_token"
    access.parent.mkdir()
    access.write_text(TOKEN)
    for name in ("KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY"):
        monkeypatch.delenv(name, raising=False)
    with emulator(tmp_path / "kaggle") as running:
        monkeypatch.setenv(ADDRESS, running.url)
        yield running
        assert not running.kernels and not running.datasets


class TestKaggle(ProviderSuite):
    on = "kaggle"
    # It passes, but sending 100 MB twice takes 40 s; less is sent below.
    test_large_values_arrive_unharmed_both_ways = None

    @pytest.fixture(autouse=True)
    @staticmethod
    def _service(service: Emulator) -> None:
        pass

    @contextmanager
    def broken(self) -> Iterator[None]:
        with without_folder_for_machines(paths.data_dir(), "kaggle"):
            yield


def request(**values: Any) -> Request:
    return Request(**{"on": "kaggle", "idle": 300.0, **values})


def offers(gpu: str | None = None, **more: Any) -> list[Offer]:
    wanted = request(gpu=parse_gpus(gpu) if gpu else None, **more)
    found: list[Offer] = anyio.run(KaggleProvider().offers, wanted)
    return found


def test_cells_run_as_pushed_scripts(service: Emulator, capsys: pytest.CaptureFixture[str]) -> None:
    scale, data = 3, np.arange(50_000.0)
    namespace = {"scale": scale, "data": data, "log": []}
    with Session(namespace=namespace, request=request(gpu=parse_gpus("T4"))) as session:
        session.run(
            "import os; data *= scale; log.append('ran'); big = data.repeat(170)\n"
            "where = os.environ['KAGGLE_KERNEL_RUN_TYPE']; print('from over there')"
        )
        said = capsys.readouterr()
        assert said.out == "from over there\n" and "27.5 hours of GPU are left" in said.err
        assert session.namespace["data"] is data and data[-1] == 149_997
        assert session.namespace["log"] == ["ran"] and session.namespace["where"] == "Batch"
        assert len(session.namespace["big"]) == 8_500_000  # 68 MB: nothing stays behind
        (pushed,) = service.pushed
        assert pushed["machineShape"] == "NvidiaTeslaT4" and pushed["isPrivate"]
        assert pushed["sessionTimeoutSeconds"] == 12 * 3600
        # The next run has another kernel, and is sent what it needs; its error comes home.
        service.unavailable = 2
        with pytest.raises(ZeroDivisionError):
            session.run("scale = scale + log.count('ran')\nscale / 0")
        assert session.namespace["scale"] == 4
        with pytest.raises(Exception, match="does not support input"):
            session.run("input('name? ')")


def test_what_a_cell_prints_is_seen_while_it_runs_and_once(
    service: Emulator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    go = tmp_path / "go"
    wait = f"import os, sys, time\nwhile not os.path.exists({str(go)!r}): time.sleep(0.02)\n"
    shown = ""

    def first_line_is_there() -> bool:
        nonlocal shown
        shown += capsys.readouterr().out
        return "one é" in shown and service.followed > 1

    def no_log_was_given() -> bool:
        return service.followed > 0

    with (
        Session(namespace={}, request=request()) as session,
        ThreadPoolExecutor(1) as pool,
    ):

        def go_when(seen: Callable[[], bool]) -> None:
            try:
                until(seen, "the log")
            finally:
                go.touch()

        service.cuts = 1
        done = pool.submit(go_when, first_line_is_there)
        session.run(
            f"print('one é {{\"mlinfra\": 7')\n{wait}os.write(1, b'of no record')\n"
            "display({'text/plain': 'x' * 200_000}, raw=True)\n"
            "print('two'); print('three', file=sys.stderr); x = 1"
        )
        done.result()
        said = capsys.readouterr()
        assert "two" in said.out and "three" in said.err and session.namespace["x"] == 1
        said_in_all = shown + said.out
        assert [said_in_all.count(it) for it in ("one", "x" * 200_000, "two")] == [1, 1, 1]
        # Without a log that grows, all comes at the end.
        service.has_logs, service.followed = False, 0
        go.unlink()
        done = pool.submit(go_when, no_log_was_given)
        session.run(f"print('four')\n{wait}print('five')")
        done.result()
        assert capsys.readouterr().out == "four\nfive\n"


def test_a_log_is_read_once_in_whatever_pieces() -> None:
    def line(number: int, content: str) -> str:
        said = {"mlinfra": number, "type": "stream", "content": content, "metadata": {}}
        return json.dumps({**said, "crc": zlib.crc32(json.dumps(said).encode())}) + "\n"

    good = line(1, '{"mlinfra": ') + "and so" + line(2, "ü" * 50) + line(3, "three")
    for place in (14, 30):  # within the line's structure, and within one of its texts
        broken = line(4, "never")[:place] + "of another writer" + line(4, "never")[place:]
        text = "pip says so\n" + good + broken + line(5, "five")
        for size in (1, 7, 1000):
            log, found = batch.Log(), []
            for whole in (text[:150], text):
                log.rewind()
                for start in range(0, len(whole), size):
                    pieces = log.read(whole[start : start + size])
                    found += [json.loads(record.content) for record in pieces]
            # What comes after one that is lost is left to the journal.
            assert found == ['{"mlinfra": ', "ü" * 50, "three"] and log.number == 3


def test_an_interrupt_cancels_the_run(service: Emulator, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    with Session(namespace={}, request=request()) as session:

        def interrupt() -> None:
            until(begun.exists, "the run")
            session.interrupt()

        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(interrupt)
            with pytest.raises(KernelDied, match="cancelled"):
                session.run(f"import time; open({str(begun)!r}, 'w'); time.sleep(600)")
            done.result()
        until(lambda: not service.kernels, "the run to be gone")
        # One that nobody follows goes on, and is brought back.
        code = "answer = 6 * 7"
        session.start(code, cell_names(code, session.namespace, code), count=1, label="later")
        until(lambda: session.runs()[0].status == "done", "the run's end")
        session.attach("later")
        assert session.namespace["answer"] == 42
        # What is stopped is ended there.
        code = "import time; time.sleep(600)"
        session.start(code, cell_names(code, session.namespace, code), count=2)
        until(lambda: service.kernels, "the push")
        session.stop()
        assert not service.kernels


def test_what_is_too_much_for_a_script_goes_as_a_dataset_of_its_own(service: Emulator) -> None:
    noise = np.random.default_rng(1).bytes(1_000_000)
    with (
        Session(namespace={"noise": noise}, request=request()) as session,
        ThreadPoolExecutor(1) as pool,
    ):
        session.run("import hashlib; digest = hashlib.sha256(noise).hexdigest()")
        assert session.namespace["digest"] == hashlib.sha256(noise).hexdigest()
        (pushed,) = service.pushed
        assert len(pushed["text"]) < 1_000_000 and len(pushed["datasetDataSources"]) == 1
        until(lambda: not service.datasets, "the dataset to be gone")
        service.full = True
        with pytest.raises(KernelDied, match="maximum of private data is exceeded"):
            session.run("len(noise)")
        # While Kaggle is at it, an interrupt removes it.
        service.full = service.processes = False

        def interrupt() -> None:
            until(lambda: service.datasets, "the upload")
            session.interrupt()

        done = pool.submit(interrupt)
        with pytest.raises(KernelDied, match="cancelled"):
            session.run("len(noise)")
        done.result()
        assert len(service.pushed) == 1


def test_what_cannot_be(service: Emulator) -> None:
    for gpu in ("P100", "A10", "T4:3"):
        with pytest.raises(RequestError, match="Kaggle has no gpu=") as refused:
            offers(gpu)
        assert "P100 is retired" in refused.value.hint
    (offer,) = offers("A10|T4:2")
    assert offer.gpu == Gpu("T4", 2) and offer.price.micro_per_hour == 0
    with pytest.raises(RequestError, match="does not reach Kaggle"):
        offers(data=("s3://bucket/data",))
    noise = np.random.default_rng(1).bytes(1_000_000)
    with Session(namespace={}, request=request()) as session:
        with pytest.raises(RequestError, match="code of this cell is too much for Kaggle"):
            session.run(f"text = {noise.hex()!r}")
        assert not service.pushed


def test_doctor_and_quote_show_the_quota(
    service: Emulator, capsys: pytest.CaptureFixture[str]
) -> None:
    (ready,) = provider_checks("kaggle")
    assert ready.ok and "27.5 hours of GPU are left this week" in ready.detail
    cli_quote.show(cli_quote.ask(request(gpu=parse_gpus("T4"))))
    assert "kaggle: At Kaggle 27.5 hours" in " ".join(capsys.readouterr().out.split())
    access = Path.home() / ".kaggle" / "access_token"
    access.write_text("KGAT_of-another-world")
    (refused,) = provider_checks("kaggle")
    assert not refused.ok and "does not let you in" in refused.detail
    access.unlink()
    (none,) = provider_checks("kaggle")
    assert not none.ok and "no login" in none.detail and "kaggle.com/settings" in none.mend
