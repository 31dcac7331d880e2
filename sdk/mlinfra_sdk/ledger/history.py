"""By what the ledger knows a cell again."""

from __future__ import annotations

import blake3


def cell_key(code: str) -> str:
    """What the ledger calls a cell: a digest of its code, whatever spaces end its lines."""
    lines = "\n".join(line.rstrip() for line in code.strip().splitlines())
    return blake3.blake3(lines.encode()).hexdigest(length=8) if lines else ""
