"""Notebooks with real kernels; each must leave no process and no machine behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from live import Notebook, opened
from sshd import Sshd, mounted, running

from mlinfra_sdk.worker import host


@pytest.fixture(scope="module")
def notebook(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Notebook]:
    """One notebook for all tests of a module that do not harm it."""
    with opened(tmp_path_factory.mktemp("notebook")) as notebook:
        yield notebook


@pytest.fixture
def open_notebook(tmp_path: Path) -> Iterator[Callable[..., Notebook]]:
    """Opens notebooks of a test's own, in folders by their names."""
    with ExitStack() as stack:

        def open_one(name: str = "notebook", **options: Any) -> Notebook:
            return stack.enter_context(opened(tmp_path / name, **options))

        yield open_one


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], None]:
    """Has a state directory share the environments that the bootstrap makes for the SDK on hosts:
    to make one takes half a minute."""
    shared = tmp_path_factory.mktemp("sdk")

    def prepare(home: Path) -> None:
        (home / "host").mkdir(mode=0o700)
        (home / "host" / "sdk").symlink_to(shared)

    return prepare


@pytest.fixture(scope="session")
def warm_box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    """A host without an index of packages, and without exec for temporary files where this user
    may mount such a folder. The first test that uses it waits for its environment to be made."""
    folder = tmp_path_factory.mktemp("box")
    with mounted(folder / "tmp", "size=64m,noexec") as temporary:
        environment = {"TMPDIR": str(folder / "tmp")} if temporary else {}
        with running(folder, **environment) as box:
            yield box


@pytest.fixture(autouse=True)
def _nothing_left_on_the_box(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test leaves a machine on the host that all of them share: neither the next one nor its own
    second try could tell which it is."""
    yield
    if "warm_box" in request.fixturenames:
        machines = request.getfixturevalue("warm_box").cache / "machines"
        left = host.living(machines)
        for folder in left:
            host.stop(folder)
        assert left == []
