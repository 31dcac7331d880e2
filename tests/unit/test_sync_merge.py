"""Decisions against a model, and whole syncs against real folders: nothing that a side has changed
is lost, and both sides end alike."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from twins import Twins, contents, twins

from mlinfra_sdk.sync.merge import merge
from mlinfra_sdk.sync.names import ancestors

FOLDER = b"d"
PATHS = [b"a", b"b", b"a/x", b"a/y", b"a/x/p", b"b/x", b"c"]


def is_tree(state: dict[bytes, bytes]) -> bool:
    return all(state.get(folder) == FOLDER for path in state for folder in ancestors(path))


@st.composite
def trees(draw: st.DrawFn) -> dict[bytes, bytes]:
    tree: dict[bytes, bytes] = {}
    for path in sorted(PATHS):
        above = ancestors(path)
        if above and tree.get(above[0]) != FOLDER:
            continue
        content = draw(st.sampled_from([None, None, FOLDER, b"f1", b"f2", b"f3", b"x1", b"lt"]))
        if content is not None:
            tree[path] = content
    return tree


@given(base=trees(), here=trees(), there=trees())
@settings(max_examples=400, deadline=None)
def test_merges_lose_nothing_and_end_alike(
    base: dict[bytes, bytes], here: dict[bytes, bytes], there: dict[bytes, bytes]
) -> None:
    begin_here, begin_there, begin_base = dict(here), dict(there), dict(base)
    for number in range(4):
        plan = merge(base, here, there)
        for path in plan.settled:
            assert here.get(path) == there.get(path)
        touched = [*plan.up, *plan.down, *plan.remove_here, *plan.remove_there, *plan.aside]
        assert len(touched) == len(set(touched))
        for path in plan.aside:
            below = [it for it in there if it.startswith(path + b"/")]
            for old in [path, *below]:
                there[b"%s~%d" % (path, number) + old[len(path) :]] = there.pop(old)
        for path in plan.up:
            there[path] = base[path] = here[path]
        for path in plan.down:
            here[path] = base[path] = there[path]
        for path in plan.remove_here:
            del here[path]
            base.pop(path, None)
        for path in plan.remove_there:
            del there[path]
            base.pop(path, None)
        for path in plan.settled:
            if path in here:
                base[path] = here[path]
            else:
                base.pop(path, None)
        if not plan.aside:
            break
    assert here == there == base
    assert is_tree(here)
    assert not plan.aside
    for side in (begin_here, begin_there):
        for path, state in side.items():
            if state != begin_base.get(path) and state != FOLDER:
                assert state in here.values(), f"{path!r} was changed to {state!r} and is lost"
    for path, state in begin_here.items():
        both = begin_base.get(path) == state == begin_there.get(path)
        if both and state != FOLDER:
            assert state in here.values()


names = st.sampled_from(["a", "b", "d/a", "d/b", "d/e/c", "f"])
acts = st.tuples(
    st.booleans(),
    st.sampled_from(["write", "write", "delete", "rmtree", "link", "executable", "mkdir"]),
    names,
    st.integers(0, 3),
)


def act(root: Path, what: str, name: str, number: int, tag: str) -> str | None:
    """Do something as a user would; gives what was written."""
    path = root / name
    if what == "rmtree":
        shutil.rmtree(root / name.split("/")[0], ignore_errors=True)
    elif what == "delete":
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif os.path.lexists(path):
            path.unlink()
    elif any(it.is_file() or it.is_symlink() for it in list(path.parents) if it != root):
        return None
    elif what == "mkdir":
        if not os.path.lexists(path):
            path.mkdir(parents=True)
    elif what == "executable":
        if path.is_file() and not path.is_symlink():
            path.chmod(0o755)
    else:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif os.path.lexists(path):
            path.unlink()
        path.parent.mkdir(parents=True, exist_ok=True)
        if what == "link":
            path.symlink_to(f"target{number}")
        else:
            path.write_text(f"{tag}{number}")
            return f"{tag}{number}"
    return None


WRITES = [(here, "write", "a", 0) for here in (False, True)]


@given(rounds=st.lists(st.lists(acts, max_size=6), min_size=1, max_size=4))
@example(rounds=[WRITES, WRITES, WRITES])  # several conflicts within one second
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_folders_end_alike_and_the_last_writer_of_each_side_is_kept(
    rounds: list[list[tuple[bool, str, str, int]]],
) -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        with twins(folder) as pair:
            check(pair, rounds)
    finally:
        shutil.rmtree(folder)


def check(pair: Twins, rounds: list[list[tuple[bool, str, str, int]]]) -> None:
    pair.sync()
    for number, steps in enumerate(rounds):
        for step, (there, what, name, value) in enumerate(steps):
            side = pair.there if there else pair.here
            act(side, what, name, value, f"{'there' if there else 'here'}{number}.{step}-")
        written = {
            content
            for side in (pair.here, pair.there)
            for content in contents(side).values()
            if isinstance(content, bytes) and f"e{number}.".encode() in content
        }
        report = pair.sync()
        assert contents(pair.here) == contents(pair.there), report
        assert written <= {it for it in contents(pair.here).values() if isinstance(it, bytes)}
        modes = [
            {
                path: path_of.stat().st_mode & 0o100
                for path in contents(root)
                if (path_of := root / path).is_file() and not path_of.is_symlink()
            }
            for root in (pair.here, pair.there)
        ]
        assert modes[0] == modes[1]
        again = pair.sync()
        assert (again.sent, again.received, again.removed, again.removed_there) == (0, [], [], 0)
