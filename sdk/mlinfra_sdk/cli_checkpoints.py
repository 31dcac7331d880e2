"""``mlinfra checkpoints``: what is saved, how much room it takes, and getting it out."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from mlinfra_sdk import units
from mlinfra_sdk.checkpoints.export import export
from mlinfra_sdk.checkpoints.keep import Keep
from mlinfra_sdk.checkpoints.store import CheckpointStore
from mlinfra_sdk.errors import RequestError
from mlinfra_sdk.spec import did_you_mean
from mlinfra_sdk.terminal import console, print_json


def dispatch(options: argparse.Namespace) -> int:
    """Carry the command out; gives the exit status."""
    store = CheckpointStore.default()
    name = options.name or ""
    if name and name not in store.names():
        known = store.names()
        raise RequestError(
            f"There are no checkpoints of {name!r}.{did_you_mean(name, known)}",
            hint=f"Known names: {', '.join(known) or 'none'}.",
        )
    if not name and (options.export or options.keep is not None or options.remove):
        raise RequestError("Which checkpoints?", hint="Give their name first.")
    if options.export:
        manifest = store.get(name, options.number) if options.number else store.latest(name)
        if manifest is None:
            raise RequestError(f"No checkpoint of {name!r} is complete.")
        for path in export(manifest, store, Path(options.export)):
            print(path)
    elif options.keep is not None:
        gone = store.prune(name, Keep(last=options.keep))
        print(f"{len(gone)} checkpoints of {name} were removed.")
    elif options.remove:
        store.remove(name, options.number)
        print(f"Checkpoint {name} #{options.number or 'all'} was removed.")
    else:
        show(store, name, as_json=options.json)
    return 0


def show(store: CheckpointStore, name: str = "", *, as_json: bool = False) -> None:
    """A table of the newest checkpoint of each name, or of all of one name."""
    from rich.table import Table

    names = [name] if name else store.names()
    rows = []
    for each in names:
        found = store.sizes(each)
        for manifest, size, added in found if name else found[-1:]:
            taken = added if name else sum(it for _, _, it in found)
            rows.append((manifest, len(found), size, taken))
    if as_json:
        print_json(
            [
                {
                    "name": it.name,
                    "number": it.number,
                    "step": it.step,
                    "created": it.created,
                    "finished": it.finished,
                    "metrics": it.metrics,
                    "bytes": size,
                    "bytes_stored": taken,
                }
                for it, _, size, taken in rows
            ]
        )
        return
    out = console()
    if not rows:
        out.print("There are no checkpoints.")
        return
    table = Table(box=None, pad_edge=False)
    for title in ("name", "number" if name else "kept", "step", "saved", "size", "stored", ""):
        right = title in ("number", "kept", "step", "size", "stored")
        table.add_column(title, justify="right" if right else "left")
    for manifest, count, size, taken in rows:
        metrics = ", ".join(f"{key} {value:g}" for key, value in manifest.metrics.items())
        age = units.format_duration(time.time() - manifest.created)
        table.add_row(
            manifest.name,
            str(manifest.number if name else count),
            str(manifest.step),
            f"{age} ago",
            units.format_size(size),
            units.format_size(taken),
            " · ".join(filter(None, ("finished" if manifest.finished else "", metrics))),
        )
    out.print(table)
