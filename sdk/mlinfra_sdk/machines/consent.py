"""What is asked before money is spent: launches above a limit, and machines that nothing ends."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mlinfra_sdk import paths, units
from mlinfra_sdk.errors import NotConfirmed
from mlinfra_sdk.machines.market import Quote
from mlinfra_sdk.spec import Request

_ENDED_FOR_SURE = ("provider", "host")
HOW = (
    "Write confirm=no, or a higher limit as in confirm=20, on the cell or in %remote use; "
    "scripts: `mlinfra run --yes`."
)


@dataclass(frozen=True)
class Question:
    """Whether to start what a quote offers. ``said`` is its announcement, ``key`` stands for it,
    ``reason`` says why it is asked; an answer about a target whose machines nothing ends is
    remembered."""

    quote: Quote
    said: str
    key: str
    reason: str
    remember: bool

    def __str__(self) -> str:
        return f"{self.said} {self.reason}"

    def refused(self, why: str, hint: str = "") -> NotConfirmed:
        """The error that ends a launch."""
        return NotConfirmed(f"{self.quote} was not started: {why}.", hint=hint)


class Unconfirmed(Exception):
    """A launch waits for the answer to a question."""

    def __init__(self, question: Question) -> None:
        super().__init__(str(question))
        self.question = question


def check(quote: Quote, request: Request, agreed: Collection[str], said: str) -> None:
    """Raises :class:`Unconfirmed` if the user has to be asked before this is started: it costs more
    than ``confirm=``, or costs money and has no sure end, which is asked once for each target.
    ``agreed`` are the keys of questions that were answered with yes."""
    price, capabilities = quote.offer.price, quote.provider.capabilities
    if request.confirm is None or not capabilities.rented:
        return
    above = price.known and price.micro_per_hour > request.confirm
    key = f"{quote.target} {price.micro_per_hour}"
    reasons = []
    if above and key not in agreed:
        limit = units.format_usd(request.confirm)
        reasons.append(f"That is more than {limit}/h (confirm=).")
    costs = not price.known or price.micro_per_hour > 0
    endless = costs and capabilities.hard_stop not in _ENDED_FOR_SURE
    if endless and quote.target not in agreed and quote.target not in _remembered():
        reasons.append(f"If its worker fails, {capabilities.hard_stop_in_words}.")
        key = quote.target
    if reasons:
        raise Unconfirmed(
            Question(quote, said, key, " ".join(reasons), remember=key == quote.target)
        )


def keys(question: Question) -> set[str]:
    """What a yes to this question agrees to."""
    price = question.quote.offer.price
    return {question.key, f"{question.quote.target} {price.micro_per_hour}"}


def remember(question: Question) -> None:
    """Do not ask again whether this target's machines may be used though nothing ends them."""
    known = sorted({*_remembered(), question.quote.target})
    path = _file()
    with suppress(OSError):  # it is asked again, then
        fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=".confirmed-")  # 0600
        with open(fd, "w") as file:
            json.dump(known, file)
        os.replace(temporary, path)


def _remembered() -> set[str]:
    with suppress(OSError, ValueError):
        known = json.loads(_file().read_text())
        return {name for name in known if isinstance(name, str)}
    return set()


def _file() -> Path:
    return paths.data_dir() / "confirmed.json"
