from __future__ import annotations

import pytest

from mlinfra_sdk.errors import VersionMismatch
from mlinfra_sdk.machines.versions import check
from mlinfra_sdk.worker.messages import AgentInfo
from mlinfra_sdk.worker.versions import versions


def agent(**changed: str) -> AgentInfo:
    return AgentInfo({**versions(), **changed}, "store", 0.0, False, 0.0)


def test_the_same_versions_fit() -> None:
    check("m", agent())


def test_another_patch_release_of_python_fits() -> None:
    major, minor, _ = versions()["Python"].split(".")
    check("m", agent(Python=f"{major}.{minor}.99"))


@pytest.mark.parametrize(("what", "there"), [("Python", "3.9.1"), ("cloudpickle", "99.0")])
def test_skew_is_told_before_any_run(what: str, there: str) -> None:
    with pytest.raises(VersionMismatch) as caught:
        check("box", agent(**{what: there}))
    text = str(caught.value)
    assert "box" in text and f"{what} {there}" in text and versions()[what] in text
