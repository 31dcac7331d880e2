"""What a remote cell shows is what a local one would show: whole, in order, once."""

from __future__ import annotations

import json

import pytest
from live import Notebook


def test_stdout_stderr_displays_and_result_keep_their_order(notebook: Notebook) -> None:
    cell = notebook.remote(
        "import sys\n"
        "from IPython.display import display\n"
        "print('a')\n"
        "print('b', file=sys.stderr)\n"
        "display(1)\n"
        "print('c')\n"
        "display(2)\n"
        "'last'"
    )
    assert cell.kinds == [
        *("stdout", "stderr", "display_data", "stdout", "display_data", "execute_result")
    ]
    assert (cell.stdout, cell.stderr, cell.result) == ("a\nc\n", "b\n", "'last'")


def test_every_line_comes_exactly_once(notebook: Notebook) -> None:
    cell = notebook.remote(
        "import sys, time\n"
        "for i in range(5000):\n"
        "    print(i)\n"
        "    if i % 1000 == 0:\n"
        "        sys.stdout.flush()"
    )
    assert cell.stdout.split() == [str(i) for i in range(5000)]


def test_output_below_python_and_of_subprocesses(notebook: Notebook) -> None:
    cell = notebook.remote(
        "import ctypes, os, subprocess, sys\n"
        "libc = ctypes.CDLL(None)\n"
        "libc.puts(b'from C')\n"
        "libc.fflush(None)\n"
        "os.write(2, b'to 2\\n')\n"
        "subprocess.run(['sh', '-c', 'echo child; echo child error >&2'], check=True)\n"
        "del libc"
    )
    # A thread of ipykernel reads these from a pipe: they may come a little after the end.
    notebook.wait(lambda: "child\n" in cell.stdout and "child error" in cell.stderr)
    assert sorted(cell.stdout.splitlines()) == ["child", "from C"]
    assert sorted(cell.stderr.splitlines()) == ["child error", "to 2"]
    again = notebook.remote("import os; os.write(1, b'again\\n');")
    notebook.wait(lambda: again.stdout == "again\n")


def test_output_of_forked_children(notebook: Notebook) -> None:
    cell = notebook.remote(
        "import multiprocessing\n"
        "for i in range(3):\n"
        "    child = multiprocessing.get_context('fork').Process(target=print, args=(i,))\n"
        "    child.start()\n"
        "    child.join()\n"
        "del child"
    )
    notebook.wait(lambda: len(cell.stdout.split()) == 3)
    assert cell.stdout == "0\n1\n2\n"


def test_stderr_is_no_error(notebook: Notebook) -> None:
    cell = notebook.remote(
        "import sys, warnings\n"
        "warnings.warn('careful')\n"
        "print('Traceback (most recent call last):', file=sys.stderr)"
    )
    assert "UserWarning: careful" in cell.stderr
    assert cell.kinds == ["stderr"]


def test_update_display_of_an_earlier_cell(notebook: Notebook) -> None:
    first = notebook.remote(
        "from IPython.display import display\nh = display('one', display_id=True)"
    )
    (shown,) = first.of("display_data")
    second = notebook.remote("h.update('two')")
    (updated,) = second.of("update_display_data")
    assert updated["content"]["data"]["text/plain"] == "'two'"
    assert updated["content"]["transient"] == shown["content"]["transient"]
    assert shown["content"]["transient"]["display_id"]


@pytest.mark.parametrize("wait", [True, False])
def test_clear_output(notebook: Notebook, wait: bool) -> None:
    cell = notebook.remote(
        "from IPython.display import clear_output\n"
        "print('before')\n"
        f"clear_output(wait={wait})\n"
        "print('after')"
    )
    assert cell.kinds == ["stdout", "clear_output", "stdout"]
    (clear,) = cell.of("clear_output")
    assert clear["content"] == {"wait": wait}


def test_execute_result_has_the_local_count_and_history_follows(notebook: Notebook) -> None:
    cell = notebook.remote("41 + 1")
    (message,) = cell.of("execute_result")
    count = cell.reply["execution_count"]
    assert message["content"]["execution_count"] == count
    assert notebook.evaluate(f"(_, Out[{count}], _{count})") == "(42, 42, 42)"
    assert notebook.remote(f"print(_{count}, Out[{count}])").stdout == "42 42\n"
    assert notebook.remote("_ + 1").result == "43"


def test_a_semicolon_hides_the_result(notebook: Notebook) -> None:
    assert notebook.remote("6 * 7;").kinds == []


def test_mime_bundles_arrive_whole(notebook: Notebook) -> None:
    bundle = {
        "text/plain": "plain",
        "text/html": "<b>html</b>",
        "text/latex": "$x$",
        "application/json": {"a": [1, None]},
        "application/vnd.custom+json": {"b": "c"},
        "image/svg+xml": "<svg/>",
    }
    cell = notebook.remote(
        "from IPython.display import display\n"
        f"display({bundle!r}, raw=True, metadata={{'text/html': {{'isolated': True}}}})"
    )
    (message,) = cell.of("display_data")
    assert message["content"]["data"] == bundle
    assert message["content"]["metadata"] == {"text/html": {"isolated": True}}
    rich = notebook.remote(
        "class Rich:\n"
        "    def _repr_html_(self): return '<i>rich</i>'\n"
        "    def _repr_png_(self): return b'\\x89PNG\\r\\n'\n"
        "    def __repr__(self): return 'rich'\n"
        "Rich()"
    )
    assert set(rich.data[0]) == {"text/plain", "text/html", "image/png"}


def test_payloads_reach_the_front_end(notebook: Notebook) -> None:
    (pager,) = notebook.remote("len?").reply["payload"]
    assert pager["source"] == "page"
    assert "number of items" in pager["data"]["text/plain"]
    (following,) = notebook.remote("get_ipython().set_next_input('y = 1')").reply["payload"]
    assert (following["source"], following["text"]) == ("set_next_input", "y = 1")
    (notebook.work / "snippet.py").write_text("loaded = 1\n")
    (loaded,) = notebook.remote("%load snippet.py").reply["payload"]
    assert loaded["source"] == "set_next_input"
    assert "loaded = 1" in loaded["text"]


def test_outputs_of_threads_after_the_end_appear_under_their_cell(notebook: Notebook) -> None:
    cell = notebook.remote(
        "import threading, pathlib, time\n"
        "def late():\n"
        "    while not pathlib.Path('go').exists():\n"
        "        time.sleep(0.01)\n"
        "    print('late', flush=True)\n"
        "threading.Thread(target=late).start()\n"
        "print('early')"
    )
    assert cell.stdout == "early\n"
    (notebook.work / "go").touch()
    notebook.wait(lambda: cell.stdout == "early\nlate\n")


def test_a_very_long_line_and_ten_megabytes(notebook: Notebook) -> None:
    cell = notebook.remote("print('x' * 3_000_000)")
    assert cell.stdout == "x" * 3_000_000 + "\n"
    cell = notebook.remote("for i in range(10):\n    print(str(i) * 1_000_000)")
    assert cell.stdout == "".join(str(i) * 1_000_000 + "\n" for i in range(10))


def test_binary_comm_buffers_both_ways(notebook: Notebook) -> None:
    opening = notebook.remote(
        "from comm import create_comm\n"
        "blob = bytes(range(256)) * 1000\n"
        "channel = create_comm(target_name='test', data={'hello': 1}, buffers=[blob])\n"
        "def echo(message):\n"
        "    reverse = [bytes(buffer)[::-1] for buffer in message['buffers']]\n"
        "    channel.send({'echo': message['content']['data']}, buffers=reverse)\n"
        "    print('heard')\n"
        "channel.on_msg(echo)"
    )
    (opened,) = opening.of("comm_open")
    blob = bytes(range(256)) * 1000
    assert opened["content"]["data"] == {"hello": 1}
    assert [bytes(buffer) for buffer in opened["buffers"]] == [blob]
    content = {"comm_id": opened["content"]["comm_id"], "data": {"n": 7}}
    reaction = notebook.comm("comm_msg", content, [b"abc", blob])
    notebook.wait(lambda: reaction.of("comm_msg") and reaction.stdout)
    (echo,) = reaction.of("comm_msg")
    assert echo["content"]["data"] == {"echo": {"n": 7}}
    assert [bytes(buffer) for buffer in echo["buffers"]] == [b"cba", blob[::-1]]
    assert reaction.stdout == "heard\n"
    closing = notebook.remote("channel.close()")
    assert [m["content"]["comm_id"] for m in closing.of("comm_close")] == [content["comm_id"]]


def test_input_and_getpass(notebook: Notebook) -> None:
    cell = notebook.remote(
        "from getpass import getpass\n"
        "first = input('name? ')\n"
        "second = getpass('secret? ')\n"
        "print(first, second)",
        answers=["Ada", "s3cret"],
    )
    assert cell.prompts == [
        {"prompt": "name? ", "password": False},
        {"prompt": "secret? ", "password": True},
    ]
    assert cell.stdout == "Ada s3cret\n"


def test_input_without_a_front_end_that_can_answer(notebook: Notebook) -> None:
    cell = notebook.fail("%%remote\ninput('name? ')", allow_stdin=False)
    assert cell.error[0] == "StdinNotImplementedError"
    assert notebook.remote("1 + 1").result == "2"


def test_top_level_await(notebook: Notebook) -> None:
    cell = notebook.remote(
        "import asyncio\n"
        "async def double(x):\n"
        "    await asyncio.sleep(0)\n"
        "    return 2 * x\n"
        "values = await asyncio.gather(*map(double, range(3)))\n"
        "values"
    )
    assert cell.result == "[0, 2, 4]"
    assert notebook.evaluate("values") == "[0, 2, 4]"


def test_magics_inside_the_cell(notebook: Notebook) -> None:
    notebook.run("who, n = 'world', 3")
    assert notebook.remote("%%bash\necho in bash").stdout == "in bash\n"
    assert notebook.remote("!echo hello {who}").stdout.split() == ["hello", "world"]
    assert notebook.remote("lines = !printf '%s\\n' one two\nprint(lines)").stdout == (
        "['one', 'two']\n"
    )
    assert notebook.evaluate("list(lines)") == "['one', 'two']"
    assert "per loop" in notebook.remote("%%timeit -n 2 -r 2\nsum(range(n))").stdout
    assert "per loop" in notebook.remote("%timeit -n 2 -r 2 sum(range(n))").stdout
    timed = notebook.remote("%%time\nmade = n + 1")
    assert "Wall time" in timed.stdout
    assert notebook.evaluate("made") == "4"
    captured = notebook.remote("%%capture caught\nprint('inside')")
    assert captured.kinds == []
    assert notebook.evaluate("caught.stdout") == "'inside\\n'"
    assert notebook.remote("%%writefile written.txt\ntext").stdout.startswith("Writing")
    assert (notebook.work / "written.txt").read_text() == "text\n"


def test_matplotlib_inline_with_the_users_parameters(notebook: Notebook) -> None:
    notebook.run("%matplotlib inline\nimport matplotlib.pyplot as plt")
    notebook.run("plt.rcParams['figure.figsize'] = (2, 1); plt.rcParams['figure.dpi'] = 50")
    cell = notebook.remote("plt.plot([1, 2])\nprint(plt.rcParams['figure.dpi'])")
    assert cell.stdout == "50.0\n"
    (figure,) = cell.of("display_data")
    assert figure["content"]["data"]["image/png"]
    assert "Figure size 100x50" in figure["content"]["data"]["text/plain"]
    assert "image/png" in notebook.run("plt.plot([1, 2])").data[-1]


def test_nested_progress_bars_do_not_flood(notebook: Notebook) -> None:
    code = (
        "from tqdm import tqdm\n"
        "for _ in tqdm(range(20), desc='outer'):\n"
        "    for _ in tqdm(range(2000), desc='inner', leave=False):\n"
        "        pass"
    )
    local, remote = notebook.run(code), notebook.remote(code)
    assert "outer: 100%" in remote.stderr
    # tqdm decides by the clock how often it draws: what it draws may differ, not by what it does.
    assert len(remote.of("stream")) <= 3 * len(local.of("stream")) + 20
    assert len(remote.stderr) <= 3 * len(local.stderr) + 2000


def test_a_bar_of_widgets(notebook: Notebook) -> None:
    code = "from tqdm.notebook import tqdm as bar\nfor _ in bar(range(3), desc='epochs'):\n    pass"
    cell = notebook.remote(code)
    (shown,) = [data for data in cell.data if "application/vnd.jupyter.widget-view+json" in data]
    opened = {message["content"]["comm_id"] for message in cell.of("comm_open")}
    assert shown["application/vnd.jupyter.widget-view+json"]["model_id"] in opened


def test_a_long_silence_is_no_timeout(notebook: Notebook) -> None:
    cell = notebook.remote("import time\ntime.sleep(12)\n'awake'")
    assert cell.result == "'awake'"
    assert cell.kinds == ["execute_result"]


def test_the_card_is_one_display_above_the_outputs(notebook: Notebook) -> None:
    cell = notebook.remote("print('text')")
    first, *updates = cell.cards
    kinds = [m["msg_type"] for m in cell.everything if m["msg_type"] != "status"]
    assert kinds[:2] == ["execute_input", "display_data"]
    assert {message["msg_type"] for message in updates} == {"update_display_data"}
    ids = {message["content"]["transient"]["display_id"] for message in cell.cards}
    assert len(ids) == 1
    facts = cell.cards[-1]["content"]["data"]["application/vnd.mlinfra.run+json"]
    assert (facts["phase"], facts["cost_micro_usd"]) == ("done", 0)
    assert json.dumps(first["content"]["data"]["text/html"])


def test_quiet_adds_nothing(notebook: Notebook) -> None:
    cell = notebook.run("%%remote quiet\nprint('only this')")
    assert cell.cards == []
    assert cell.kinds == ["stdout"]
