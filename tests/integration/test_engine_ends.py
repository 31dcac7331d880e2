"""Machines that nobody stops end by themselves, at all kinds of engines; the ledger knows when."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterator, Sequence

import pytest
from engines import Engine, engine, missing
from live import until

from mlinfra_sdk.ledger import Ledger, Machine
from mlinfra_sdk.machines import budgets, lifecycle
from mlinfra_sdk.machines.portal import portal
from mlinfra_sdk.namespace.analysis import cell_names
from mlinfra_sdk.providers import base
from mlinfra_sdk.providers.base import Handle
from mlinfra_sdk.session import Session
from mlinfra_sdk.spec import Request
from mlinfra_sdk.worker.watchdog import Limits

# Packages are sent to a host without an index, and unpacked there.
pytestmark = pytest.mark.timeout(300)

FOR_EVER = "import time\nwhile True: time.sleep(0.05)"
LEASE = 10.0
ENDS: dict[str, tuple[dict[str, object], float, str]] = {
    "idle": ({"idle": 2.0}, 2.0, "idle for 2 s"),
    "time": ({"time": 15.0}, 15.0, "its time of 15 s was over"),
    "lease": ({}, LEASE, "no client for 10 s"),
    # At 3.60 USD an hour, so that there is time to start on a busy computer, too.
    "budget": ({"machine_budget": 15_000}, 14.0, "its budget was spent: machine_budget=$0.0150"),
}
"""By machine: its settings, the seconds that it lives at least, and why it ends."""


@pytest.fixture(scope="module", params=["local", "ssh", "slurm", "container"])
def there(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    """An engine, and a state directory in which it is set up. Budgets may last for seconds."""
    name = request.param
    if missing(name) or (name == "container" and os.getuid() != 0):
        pytest.skip(f"what {name} needs is not installed, or needs root")
    folder = tmp_path_factory.mktemp("ends")
    home = folder / "home"
    home.mkdir(mode=0o700)
    with engine(name, folder / "engine") as it, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLINFRA_HOME", str(home))
        for key, value in it.environment(home).items():
            patch.setenv(key, value)
        config = home / "config" / "mlinfra" / "config.toml"
        patch.setattr("mlinfra_sdk.paths.config_file", lambda: config)
        patch.setattr(budgets, "_SHORTEST", 1.0)
        patch.setattr(budgets, "_TEARDOWN", 0.0)
        yield it
        it.hang_up()


def session(there: Engine, **settings: object) -> Session:
    asked = {"env": "none", "sync": False, **there.request(0), **settings}
    return Session(namespace={}, request=Request(**asked))


def test_it_ends_by_itself_and_is_closed_with_its_own_end(
    there: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with session(there) as first:  # which makes what all of them need
        first.run("1")
    for name, (settings, _, _) in ENDS.items():
        with monkeypatch.context() as patch:
            if name == "lease":  # no setting says it
                patch.setattr(base, "Limits", functools.partial(Limits, lease=LEASE))
            it = session(there, machine=name, **settings)
            it.run("x = 1")
            if name in ("lease", "budget"):  # also in the middle of a run
                it.start(FOR_EVER, cell_names(FOR_EVER, {}, FOR_EVER), count=0)
            it.close()
    ledger = Ledger.open()
    machines = {it.name: it for it in ledger.machines(active=True)}
    assert set(machines) == set(ENDS)
    gone = watched(there, list(machines.values()))
    # Whoever took the moment at which it is noticed for the end would be wrong by seconds.
    until(lambda: time.time() > max(gone.values()) + 3, "some seconds to pass")
    assert portal().call(lifecycle.settle(ledger)) == []
    closed = {it.name: it for it in ledger.machines(active=False)}
    ledger.close()
    for name, (_, least, reason) in ENDS.items():
        known = closed[name]
        assert known.stop_reason == reason
        assert known.started_at is not None and known.stopped_at is not None
        # Engines tell whole seconds.
        assert known.started_at + least <= known.stopped_at <= gone[known.id] + 1, name


def watched(there: Engine, machines: Sequence[Machine]) -> dict[str, float]:
    """Wait until the engine has none of these; gives when each had ended, at the latest."""
    gone: dict[str, float] = {}
    keys = [it.id for it in machines]

    def all_gone() -> bool:
        alive, now = there.alive(keys), time.time()
        gone.update({key: now for key in keys if key not in alive and key not in gone})
        return len(gone) == len(keys)

    until(all_gone, "the ends", lambda: [it.name for it in machines if it.id not in gone])
    told = {it.id: there.ended(Handle.from_json(it.handle)) for it in machines}
    return {key: told[key] or moment for key, moment in gone.items()}
