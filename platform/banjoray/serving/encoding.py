"""Requests' rows as features, beside the event loop where it takes long enough to be worth a thread."""

import asyncio
from collections.abc import Sequence
from typing import Any

from banjoray.data.tokens import Feature
from banjoray.serving.engine import Engine

# Characters that are encoded in less time than it takes to hand them to a thread and back under load.
AT_ONCE = 2000


async def encoded(engine: Engine, rows: Sequence[dict[str, Any]]) -> list[list[Feature]]:
    """The features of every row, as `Engine.encode` gives them."""
    sizes = (len(cell) if isinstance(cell, str) else AT_ONCE + 1 for row in rows for cell in row.values())
    if sum(sizes) <= AT_ONCE:
        return engine.encode(rows)
    return await asyncio.to_thread(engine.encode, rows)
