"""The ``%%remote`` and ``%remote`` lines."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jupyter_mlinfra.magics import completion, grammar
from mlinfra_sdk.errors import RequestError
from mlinfra_sdk.spec import CELL, NOTEBOOK, SETTINGS, Gpu, Gpus


def test_a_cell_line() -> None:
    layer = grammar.parse_cell(" gpu=A10:2  idle=1h30m machine='train-1' quiet ")
    assert layer.values == {
        "gpu": Gpus((Gpu("A10", 2),)),
        "idle": 5400,
        "machine": "train-1",
        "quiet": True,
    }
    assert layer.origin == "the %%remote line"
    assert grammar.parse_cell("").values == {}
    assert grammar.parse_cell("isolate=no quiet=yes").values == {"isolate": False, "quiet": True}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("gpuu=A10", "Unknown key 'gpuu'.*Did you mean 'gpu'"),
        ("qiet", "Unknown key 'qiet'.*Did you mean 'quiet'"),
        ("gpu", "'gpu' .* has no value. Write gpu=A10:2"),
        ("gpu = A10", "Write gpu=A10, without spaces"),
        ("gpu =A10", "Write gpu=A10, without spaces"),
        ("gpu= A10", "Write gpu=A10"),
        ("gpu A10", "Write gpu=A10, without spaces"),
        ("--gpu", "Write gpu=A10:2"),
        ("A10:2", "Write gpu=A10:2"),
        ("local", "Write on=local"),
        ("--gpu=A10", "Write gpu=A10"),
        ("--quiet", "Write quiet"),
        ("=3", "Write KEY=VALUE"),
        ("gpu=A10, idle=15m", "gpu=A10, in .* is not understood"),
        ("gpu=A10 gpu=T4", "'gpu' is given twice"),
        ("quiet quiet=no", "'quiet' is given twice"),
        ("name='x", "no closing quotation"),
        ("idle=", "idle= in .* is not understood. Accepted: a duration"),
    ],
)
def test_a_malformed_cell_line_says_what_to_write(line: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        grammar.parse_cell(line)


@given(st.text(max_size=40))
def test_any_line_is_parsed_or_refused(line: str) -> None:
    for parse in (grammar.parse_cell, grammar.parse_command):
        try:
            parse(line)
        except RequestError as error:
            assert error.hint


def test_commands() -> None:
    assert grammar.parse_command("") == grammar.parse_command("status")
    assert grammar.parse_command("pull model history").arguments == ("model", "history")
    assert grammar.parse_command("stop").arguments == ()
    assert grammar.parse_command("stop train-1").arguments == ("train-1",)
    use = grammar.parse_command("use gpu=A10 quiet idle= price=0.1")
    assert use.name == "use"
    assert use.settings.values == {"gpu": Gpus((Gpu("A10"),)), "quiet": True, "price": 100_000}
    assert use.settings.origin == "%remote use"
    assert use.unset == ("idle",)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("statsu", "no subcommand 'statsu'. Did you mean 'status'"),
        ("gpu=A10", "To set defaults write: %remote use gpu=A10"),
        ("status now", "%remote status does not take 'now'"),
        ("stop a b", r"does not take 'b'. Write: %remote stop \[MACHINE\]"),
        ("pull", "needs the name of a variable"),
        ("pull a-b", "'a-b' is not a variable name"),
        ("use wat=", "Unknown key 'wat'"),
        ("use idle=x", "idle=x in %remote use"),
    ],
)
def test_a_malformed_command_says_what_to_write(line: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        grammar.parse_command(line)


def test_help_covers_the_whole_grammar() -> None:
    for name, setting in SETTINGS.items():
        assert (name in grammar.CELL_HELP) == (CELL in setting.where)
        assert (setting.help in grammar.LINE_HELP) == (NOTEBOOK in setting.where)
    for name in grammar.SUBCOMMANDS:
        assert f"%remote {name}" in grammar.LINE_HELP


A100_PARTS = ["A100-PCIE-40GB", "A100-PCIE-80GB", "A100-SXM-40GB", "A100-SXM-80GB"]


def complete(line: str, first_line: bool = True) -> tuple[str, list[str]] | None:
    return completion.complete(
        line, first_line, machines=lambda: ["train", "test"], pullable=lambda: ["model", "history"]
    )


@pytest.mark.parametrize(
    ("line", "fragment", "words"),
    [
        ("%%remote g", "g", ["gpu="]),
        ("%%remote gpu=A10 i", "i", ["idle=", "isolate"]),
        ("%%remote quiet q", "q", []),
        ("%%remote gpu=a10", "a10", ["A10", "A100", "A100-40GB", "A100-80GB", "A10G", *A100_PARTS]),
        ("%%remote gpu=A10|l", "l", ["L4", "L40", "L40S"]),
        ("%%remote on=lo", "lo", ["local"]),
        ("%%remote isolate=", "", ["yes", "no"]),
        ("%%remote machine=t", "t", ["train", "test"]),
        ("%%remote pri", "pri", []),
        ("%%remote wat=", "", []),
        ("%remote re", "re", ["restart"]),
        ("  %remote stop tr", "tr", ["train"]),
        ("%remote stop train x", "x", []),
        ("%remote use pri", "pri", ["price="]),
        ("%remote use gpu=A10 quiet=n", "n", ["no"]),
        ("%remote pull ", "", ["model", "history"]),
        ("%remote pull model ", "", ["history"]),
    ],
)
def test_completion(line: str, fragment: str, words: list[str]) -> None:
    assert complete(line) == (fragment, words)


@pytest.mark.parametrize("line", ["%%remote", "%%remotely x", "%time x", "x = 1", "", "remote "])
def test_other_lines_are_left_alone(line: str) -> None:
    assert complete(line) is None


def test_a_cell_magic_is_completed_in_the_first_line_only() -> None:
    assert complete("%%remote g", first_line=False) is None
    assert complete("%remote sta", first_line=False) == ("sta", ["status"])


def test_every_key_of_a_cell_is_offered() -> None:
    found = complete("%%remote ")
    assert found is not None
    offered = {word.rstrip("=") for word in found[1]}
    assert offered == {name for name, setting in SETTINGS.items() if CELL in setting.where}
