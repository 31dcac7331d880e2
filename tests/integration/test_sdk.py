from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from scripts import LIMIT, Place, place


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Place]:
    with place(tmp_path) as it:
        yield it


def test_importing_the_package_imports_nothing_else() -> None:
    code = (
        "import sys; import mlinfra_sdk; "
        "print([m for m in sys.modules if m.startswith('mlinfra_sdk.')]); "
        "print('IPython' in sys.modules, 'msgspec' in sys.modules)"
    )
    printed = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert printed == "['mlinfra_sdk._version']\nFalse False\n"


def test_everything_public_can_be_had() -> None:
    import mlinfra_sdk

    for name in mlinfra_sdk.__all__:
        assert getattr(mlinfra_sdk, name) is not None
    assert set(mlinfra_sdk.__all__) <= set(dir(mlinfra_sdk))
    with pytest.raises(AttributeError, match="no attribute 'Sesion'"):
        mlinfra_sdk.Sesion  # noqa: B018


def test_a_session_in_a_script(here: Place) -> None:
    printed = here.script(
        """
        import os, sys
        import mlinfra_sdk

        class Model:
            def __init__(self):
                self.steps = 0

        class Diverged(Exception):
            pass

        def train(model, losses, *, steps):
            for _ in range(steps):
                model.steps += 1
                losses.append(1 / model.steps)
            print("trained in", os.getpid() != home)
            return model

        def diverge():
            raise Diverged("loss is nan", 3)

        home = os.getpid()
        with mlinfra_sdk.Session() as session:
            model, losses = Model(), []
            alias = losses
            print(session.call(train, model, losses, steps=2) is model, model.steps, alias)
            try:
                session.call(diverge)
            except Diverged as error:
                print(type(error), error.args)
            print(session.run("scale = 10\\nscale * model.steps"), scale)
            session.push(extra=[1, 2])
            session.run("extra.append(scale)")
            print(extra, session.pull("extra", "scale"))
            session.run("big = bytes(100_000_000)")
            print(isinstance(big, mlinfra_sdk.RemoteValue), len(session.pull("big")))
            try:
                session.pull("nothing")
            except mlinfra_sdk.MlinfraError as error:
                print(error)
            session.restart()
            print(session.run("'model' in globals(), model.steps"))
        """
    )
    assert printed.splitlines() == [
        "trained in True",
        "True 2 [1.0, 0.5]",
        "<class '__main__.Diverged'> ('loss is nan', 3)",
        "20 10",
        "[1, 2, 10] [[1, 2, 10], 10]",
        "True 100000000",
        "There is no variable 'nothing', here or on the machine. "
        "Check the spelling; variables come here by themselves after a run.",
        "(True, 2)",
    ]
    here.wait_until_no_agent()


def test_an_error_shows_where_it_was_raised(here: Place) -> None:
    path = here.write(
        "fails.py",
        """
        import mlinfra_sdk

        def step(batch):
            return batch["x"]

        mlinfra_sdk.Session().call(step, {})
        """,
    )
    done = here.run(str(path))
    assert done.returncode == 1
    assert f'File "{path}", line 5, in step\n    return batch["x"]' in done.stderr
    assert done.stderr.endswith("KeyError: 'x'\n")
    assert "__mlinfra_call__" not in done.stderr
    # The script ended by an exception and without close().
    here.wait_until_no_agent()


def test_output_appears_while_the_code_runs(here: Place) -> None:
    path = here.write(
        "live.py",
        """
        import mlinfra_sdk
        session = mlinfra_sdk.Session()
        session.run('''
        import sys
        print("first")
        print("to stderr", file=sys.stderr)
        answer = input("go on? ")
        print("answered", answer)
        "not printed"
        ''')
        """,
    )
    process = here.start(str(path))
    assert process.stdin is not None
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "first\n"
    process.stdin.write("yes\n")
    process.stdin.close()
    # Not communicate(): it would miss what readline has read beyond its line.
    assert process.stdout.read() == "go on? answered yes\n"
    assert process.stderr.read() == "to stderr\n"
    assert process.wait(LIMIT) == 0


def test_the_end_of_stdin_reaches_input(here: Place) -> None:
    printed = here.script(
        """
        import mlinfra_sdk
        session = mlinfra_sdk.Session()
        try:
            session.run("input()")
        except EOFError:
            print("EOF")
        """
    )
    assert printed == "EOF\n"


def test_ctrl_c_interrupts_the_machine(here: Place) -> None:
    path = here.write(
        "long.py",
        """
        import mlinfra_sdk, time

        def work():
            try:
                print("working", flush=True)
                time.sleep(1000)
            finally:
                print("cleaned up")

        session = mlinfra_sdk.Session()
        try:
            session.call(work)
        except KeyboardInterrupt:
            print("interrupted", session.run("1 + 1"))
        session.call(work)
        """,
    )
    process = here.start(str(path))
    assert process.stdout is not None
    assert process.stdout.readline() == "working\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "cleaned up\n"
    assert process.stdout.readline() == "interrupted 2\n"
    assert process.stdout.readline() == "working\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=LIMIT)
    assert out == "cleaned up\n"
    assert "in work" in err and err.rstrip().endswith("KeyboardInterrupt")
    assert process.returncode == -signal.SIGINT
    here.wait_until_no_agent()


def test_a_killed_script_leaves_a_machine_that_ends_by_itself(here: Place) -> None:
    path = here.write(
        "killed.py",
        """
        import os, signal, mlinfra_sdk
        session = mlinfra_sdk.Session(idle="2s")
        session.run("x = 1")
        os.kill(os.getpid(), signal.SIGKILL)
        """,
    )
    assert here.run(str(path)).returncode == -signal.SIGKILL
    here.wait_until_no_agent()
    assert "No machine runs." in here.mlinfra("status").stdout


def test_two_sessions_have_a_machine_each(here: Place) -> None:
    printed = here.script(
        """
        import os, mlinfra_sdk
        one, two = mlinfra_sdk.Session(), mlinfra_sdk.Session()
        x = [1]
        one.run("x.append(2); a = os.getpid()")
        two.run("x.append(3); b = os.getpid()")
        one.run("x.append(4)")
        print(x, len({a, b, os.getpid()}), one.machine.name != two.machine.name)
        one.stop()
        two.run("x.append(5)")
        one.run("x.append(6)")
        print(x)
        """
    )
    assert printed == "[1, 2, 3, 4] 3 True\n[1, 2, 3, 4, 5, 6]\n"
    here.wait_until_no_agent()


def test_threads_take_turns(here: Place) -> None:
    printed = here.script(
        """
        import pathlib, threading, time, mlinfra_sdk
        from concurrent.futures import ThreadPoolExecutor
        session = mlinfra_sdk.Session()
        counter = {"n": 0}
        def add(counter, by):
            counter["n"] += by
            return by
        with ThreadPoolExecutor(4) as pool:
            print(sum(pool.map(lambda by: session.call(add, counter, by), range(10))), counter)
        def wait():
            pathlib.Path("waiting").touch()
            time.sleep(1000)
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(session.call, wait)
            while not pathlib.Path("waiting").exists():
                time.sleep(0.01)
            session.interrupt()
            print(repr(future.exception()))
        """
    )
    assert printed == "45 {'n': 45}\nKeyboardInterrupt()\n"


def test_a_session_inside_of_an_event_loop(here: Place) -> None:
    printed = here.script(
        """
        import asyncio, mlinfra_sdk
        session = mlinfra_sdk.Session()
        async def double(x):
            await asyncio.sleep(0)
            return 2 * x
        async def main():
            print(session.run("await asyncio.sleep(0)\\n3"), session.call(double, 4))
        asyncio.run(main())
        """
    )
    assert printed == "3 8\n"


def test_a_forked_child_has_a_machine_of_its_own(here: Place) -> None:
    printed = here.script(
        """
        import os, sys, mlinfra_sdk
        session = mlinfra_sdk.Session()
        there = session.call(os.getpid)
        child = os.fork()
        if not child:
            other = session.call(os.getpid)
            print(other not in (there, os.getpid()), flush=True)
            sys.exit()
        os.waitpid(child, 0)
        print(session.call(os.getpid) == there)
        """
    )
    assert printed == "True\nTrue\n"
    here.wait_until_no_agent()


def test_what_cannot_come_here_is_a_warning(here: Place) -> None:
    printed = here.script(
        """
        import warnings, mlinfra_sdk
        session = mlinfra_sdk.Session()
        with warnings.catch_warnings(record=True) as caught:
            session.run("import threading; box = {'thread': threading.current_thread()}")
        print([type(w.message).__name__ for w in caught], "'box'" in str(caught[0].message))
        print(caught[0].filename == __file__)
        """
    )
    assert printed == "['RuntimeWarning'] True\nTrue\n"


def test_decorated_functions(here: Place) -> None:
    here.write(
        "helpers.py",
        """
        import os
        import mlinfra_sdk

        @mlinfra_sdk.remote
        def where():
            return os.getpid()
        """,
    )
    printed = here.script(
        '''
        import asyncio, inspect, os
        import mlinfra_sdk
        from helpers import where

        @mlinfra_sdk.remote(idle="5m")
        def work(items, *, n: int = 2):
            """Docs."""
            items.append(n)
            return os.getpid(), where(), fact(n)

        @mlinfra_sdk.remote
        def fact(n):
            return n * fact(n - 1) if n > 1 else 1

        class Counter:
            n = 0
            @mlinfra_sdk.remote
            def up(self):
                self.n += 1
                return self

        @mlinfra_sdk.remote
        async def pause(seconds):
            await asyncio.sleep(seconds)
            return os.getpid()

        async def main():
            first, second = await asyncio.gather(pause(0), pause(0))
            try:
                await asyncio.wait_for(pause(1000), 0.5)
            except asyncio.TimeoutError:
                return first == second == await pause(0) == there

        items = []
        there, nested, product = work(items, n=4)
        print(there != os.getpid(), nested == there == where(), product, items)
        print(work.local([])[0] == os.getpid(), work.session() is fact.session())
        print(inspect.signature(work), work.__doc__, work.__name__)
        counter = Counter()
        print(counter.up() is counter, counter.n)
        print(inspect.iscoroutinefunction(pause), asyncio.run(main()))
        try:
            mlinfra_sdk.remote(idle="soon")(print)
        except mlinfra_sdk.RequestError as error:
            print(error.message)
        '''
    )
    assert printed.splitlines() == [
        "True True 24 [4]",
        "True True",
        "(items, *, n: int = 2) Docs. work",
        "True 1",
        "True True",
        "idle=soon in the decorator of print is not understood.",
    ]
    here.wait_until_no_agent()
