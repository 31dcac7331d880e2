"""The same work on this computer and on a machine of its own, over a real sshd."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from live import Notebook, opened
from sshd import Sshd


@pytest.fixture(autouse=True)
def known(warm_box: Sshd, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with warm_box.known():
        monkeypatch.setenv("MLINFRA_HOME", str(tmp_path / "home"))
        yield


SCRIPT = """
import json
import numpy as np
import mlinfra_sdk
from mlinfra_sdk.ledger import Ledger

class Model:
    def step(self):
        return np.float64(helper(1))

def helper(x):
    return x * 2

def work(state, steps):
    import os
    from tqdm import tqdm
    state["calls"] += 1
    for step in tqdm(range(steps), unit="step"):
        state["w"] += step * Model().step()
    np.random.seed(5)
    return {"w": state["w"], "calls": state["calls"]}

def where(fail):
    import os
    there = "SSH_CONNECTION" in os.environ
    if there and fail:
        raise OSError("not here")
    return float(there)

state = {"calls": 0, "w": np.zeros(3)}
np.random.seed(1)
before = np.random.get_state()[1].copy()
both = dict(on=["local", "ssh:box"])
found = mlinfra_sdk.compare(work, (state, 50), repeat=2, **both)
assert not any(it.error for it in found.targets), [it.error for it in found.targets]
ledger = Ledger.open()
print(json.dumps({
    "here": [state["calls"], state["w"].tolist()],
    "random": bool((np.random.get_state()[1] == before).all()),
    "calls": [[trial.results["_"]["calls"] for trial in it.trials] for it in found.targets],
    "w": [it.trials[1].results["_"]["w"].tolist() for it in found.targets],
    "loops": [[it.loops()[0].done, it.loops()[0].unit] for it in found.targets],
    "phases": [sorted(it.trials[0].seconds) for it in found.targets],
    "agrees": found.agreement(found["ssh:box"]),
    "machines": [len(ledger.machines(active=True)), len(ledger.machines())],
    "differs": mlinfra_sdk.compare(where, (False,), **both)["ssh:box"].differences,
    "fails": mlinfra_sdk.compare(where, (True,), **both)["ssh:box"].error,
}))
"""


def test_functions_are_compared_and_nothing_else_changes(tmp_path: Path) -> None:
    script = tmp_path / "compared.py"
    script.write_text(SCRIPT)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["here"] == [0, [0, 0, 0]] and found["random"]
    # Each trial has the same inputs: none saw what another one has changed.
    assert found["calls"] == [[1, 1], [1, 1]]
    assert found["w"] == [[2 * sum(range(50))] * 3] * 2
    assert found["loops"] == [[50, "step"]] * 2
    assert all({"start", "compute"} <= set(phases) for phases in found["phases"])
    assert found["agrees"] == "the same (2 compared)"  # what it returns, and its argument
    assert found["machines"] == [0, 2]
    assert found["differs"] == ["the result: 0 here, 1 there"]
    assert found["fails"] == "OSError: not here"


def test_in_a_notebook(tmp_path: Path) -> None:
    with opened(tmp_path / "notebook") as notebook:
        check_notebook(notebook)


def check_notebook(notebook: Notebook) -> None:
    (notebook.work / "pyproject.toml").write_text(
        '[tool.mlinfra.targets.apart]\nprovider = "local"\nisolate = true\nenv = "none"\n'
    )
    notebook.run("data = [1, 2, 3]; kept = other = None")
    cell = notebook.run(
        "%%compare on=local,apart keep=kept result=found\n"
        "data.append(4)\nkept = sum(data)\nother = 1\nopen('written', 'w').close()\nprint('here')"
    )
    assert notebook.run("data, kept, other").result == "([1, 2, 3], 10, None)"
    shown = [it["content"]["data"] for it in cell.everything if "data" in it.get("content", {})]
    assert "first result after" in shown[-1]["text/plain"]
    assert "Output on apart" in shown[-1]["text/html"]
    assert notebook.run("found.agreement(found['apart'])").result == "'the same (3 compared)'"
    assert "needs the targets" in notebook.fail("%%compare\n1").error[1]
    assert "a comparison needs two" in notebook.fail("%%compare on=local\n1").error[1]


def test_the_command(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("if __name__ == '__main__':\n    answer = 6 * 7\n    print(answer)\n")
    command = [sys.executable, "-m", "mlinfra_sdk.cli", "compare"]
    words = [str(script), "on=local,ssh:box", "env=none", "--json"]
    done = subprocess.run([*command, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["targets"]["ssh:box"]["agrees"] == "the same (1 compared)"
    assert "ssh:box: done" in done.stderr
    bad = subprocess.run([*command, "none.py", "on=local,ssh:box"], capture_output=True, text=True)
    assert bad.returncode == 2 and "none.py cannot be read" in bad.stderr
