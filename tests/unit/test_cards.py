"""The run card: what it says, and that it survives wherever a notebook is shown."""

from __future__ import annotations

import json
import re
import time
from html.parser import HTMLParser
from typing import get_args

import pytest

from jupyter_mlinfra.cards import RunState, bundle, message, render_html, render_text
from jupyter_mlinfra.cards.state import ENDED, Phase

PHASES = get_args(Phase)
NASTY = "<script>alert(1)</script>\"'&<b onclick=x>"


class Page(HTMLParser):
    """Collects the tags, attributes and text of some HTML, and checks that tags are balanced."""

    VOID = ("circle", "path", "animatetransform")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def state(phase: Phase = "done", **values: object) -> RunState:
    return RunState(phase=phase, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize("phase", PHASES)
def test_every_phase_is_drawn_without_script_style_sheet_or_outside_resource(phase: Phase) -> None:
    page = Page(render_html(state(phase, seconds={"start": 1.0, "running": 2.0})))
    assert set(page.tags) <= {
        *("div", "details", "summary", "span", "b", "code"),
        *("svg", "circle", "path", "animatetransform"),
    }
    names = {name for name, _ in page.attributes}
    assert not {name for name in names if name.startswith("on")} | (names & {"href", "src"})
    assert "url(" not in str(page.attributes)
    assert ("role", "status") in page.attributes
    labels = [value for name, value in page.attributes if name == "aria-label"]
    assert len(labels) == 1 and labels[0]


def test_every_phase_reads_differently() -> None:
    assert len({render_text(state(phase)) for phase in PHASES}) == len(PHASES)


def test_the_text_is_one_line_with_the_facts() -> None:
    run = state(
        target="modal",
        gpu="A10:2",
        rate=3_600_000,
        seconds={"start": 5.0, "running": 60.0},
        bytes_up=1_234_567,
        bytes_down=900,
        warnings=["Left out: conn (sqlite3.Connection)."],
        note="A note.",
    )
    assert render_text(run) == (
        "Done · modal A10:2 · 1m05s · $0.0650 ($3.60/h) · ↑ 1.23 MB ↓ 900 B"
        " · ⚠ Left out: conn (sqlite3.Connection). · A note."
    )


def test_progress_belongs_to_its_phase() -> None:
    run = state("data", progress=(300_000_000, 1_200_000_000))
    assert render_text(run).startswith("Moving data: 300 MB of 1.2 GB (25 %) · local")
    assert "width:25.0%" in render_html(run)
    assert run.facts()["progress"] == [300_000_000, 1_200_000_000]
    run.enter("running")
    assert render_text(run).startswith("Running · local")
    assert run.facts()["progress"] is None


def test_what_is_free_says_so() -> None:
    assert render_text(state(seconds={"running": 1.0})) == "Done · local · 1s · $0.00"


def test_no_price_is_claimed_before_there_is_an_offer() -> None:
    assert "$" not in render_text(state("quote"))


@pytest.mark.parametrize(
    "run",
    [
        state("error", rate=10**5, seconds={"running": 9.0}, bytes_up=5, warnings=["Beware."]),
        # Hours are shown without the moment between the two drawings.
        state("data", progress=(300_000_000, 1_200_000_000), seconds={"start": 7200.0}),
        state("environment", progress=(5, 0), seconds={"start": 7200.0}),
    ],
)
def test_html_and_text_say_the_same(run: RunState) -> None:
    text = " ".join(Page(render_html(run)).text.split())
    for part in render_text(run).split(" · "):
        assert part in text


def test_details_name_what_moved_and_how_long_each_phase_took() -> None:
    run = state(
        machine="train-1",
        seconds={"start": 1.5, "running": 3.0},
        sent=["X", "y"],
        bytes_up=2000,
        received=[f"v{i}" for i in range(100)],
    )
    text = Page(render_html(run)).text
    assert "Machine train-1" in text
    assert "start 1.5s" in text and "running 3s" in text
    assert "Sent X, y (2 kB)" in text
    assert "v23 and 76 more" in text


def test_what_the_user_controls_is_escaped() -> None:
    run = state(
        machine=NASTY,
        run=NASTY,
        target=NASTY,
        gpu=NASTY,
        sent=[NASTY],
        received=[NASTY],
        warnings=[NASTY],
        note=NASTY,
        seconds={"running": 1.0},
    )
    page = Page(render_html(run))
    assert "script" not in page.tags
    assert "onclick" not in {name for name, _ in page.attributes}
    assert page.text.count(NASTY) == 7


def test_no_text_between_tags_reads_as_mathematics() -> None:
    run = state(rate=100_000, seconds={"running": 9.0}, note="$x$", sent=["$a$"])
    assert not re.search(r"\$[^<>]*\$", re.sub(r"<[^>]*>", "<>", render_html(run)))


def test_the_bundle_holds_json_html_and_text() -> None:
    run = state("running", cost=42, seconds={"start": 1.0})
    data = json.loads(json.dumps(bundle(run)))
    assert set(data) == {"text/html", "text/plain", "application/vnd.mlinfra.run+json"}
    facts = data["application/vnd.mlinfra.run+json"]
    assert facts["phase"] == "running"
    assert facts["cost_micro_usd"] == 42
    assert facts["elapsed"] == pytest.approx(sum(facts["seconds"].values()), abs=1e-5)


def test_the_message_is_marked_as_a_card_and_can_be_updated() -> None:
    content = message(state(), "card-1")
    assert content["metadata"] == {"mlinfra": {"card": True}}
    assert content["transient"] == {"display_id": "card-1"}
    assert set(content) == {"data", "metadata", "transient"}


def test_the_clock_goes_through_the_phases_and_stops_at_the_end() -> None:
    begin = time.monotonic()
    run = RunState()
    run.enter("running")
    run.enter("reconnecting")
    run.enter("running")
    assert set(run.phases()) == {"start", "running", "reconnecting"}
    first = run.phases()["running"]
    assert run.phases()["running"] >= first
    run.enter("done")
    assert run.phase in ENDED
    final = run.phases()
    assert "done" not in final
    assert 0 <= sum(final.values()) <= time.monotonic() - begin
    assert run.phases() == final


def test_a_cut_off_card_says_for_how_long() -> None:
    run = state("reconnecting", entered=time.monotonic() - 83, seconds={"running": 60.0})
    assert render_text(run).startswith("Reconnecting for 1m23s · local · 2m23s")
    assert "<b>Reconnecting for 1m23s</b>" in render_html(run)


def test_a_detached_card_names_its_run() -> None:
    run = state("detached", run="train")
    assert render_text(run).startswith("Detached as train · ")
    assert bundle(run)["application/vnd.mlinfra.run+json"]["run"] == "train"


def test_only_an_end_is_worth_a_notification() -> None:
    facts = {phase: state(phase, notify=True).facts()["notify"] for phase in PHASES}
    assert {phase for phase, notify in facts.items() if notify} == ENDED
    assert not state("done").facts()["notify"]
