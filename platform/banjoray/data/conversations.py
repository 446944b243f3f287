"""Conversations as rows: a list of turns in each, {role, content}, of which the assistant's are learned."""

from collections.abc import Iterator
from typing import Any

from banjoray.data.bad_rows import Finding, short
from banjoray.data.sources import Source

ROLES = ("system", "user", "assistant")
_SHAPE = "a list of {role, content}"


def unusable_conversations(source: Source, column: str) -> Iterator[Finding]:
    """Rows of another shape, with a role that there is not, an empty turn, or without an answer to learn."""
    for start in range(0, len(source.rows), 1000):
        for number, found in enumerate(source.rows[start : start + 1000][column]):
            problem = _problem(found)
            if problem:
                yield Finding(start + number, "conversation", f" {problem}", column)


def _problem(found: Any) -> str | None:
    """What is wrong with the turns of a row."""
    if not isinstance(found, list):
        return f"holds {short(found)}; needed {_SHAPE}"
    for number, turn in enumerate(found, start=1):
        problem = _problem_of_turn(turn)
        if problem:
            return f"holds {problem[0]} in turn {number}; needed {problem[1]}"
    roles = [turn["role"] for turn in found]
    if "assistant" not in roles:
        told = f"turns of {', '.join(roles)}" if roles else "no turns"
        return f"holds {told}; needed one of the assistant, which is what is learned"
    if roles[0] == "assistant":
        return "begins with a turn of the assistant; needed one of the user before it"
    return None


def _problem_of_turn(turn: Any) -> tuple[str, str] | None:
    """What a turn holds, and what it needed; None if nothing is wrong with it."""
    if not isinstance(turn, dict):
        return short(turn), "{role, content}"
    role, content = turn.get("role"), turn.get("content")
    if role not in ROLES:
        return f"role {short(role)}", f"one of {', '.join(ROLES)}"
    if not isinstance(content, str):
        # Readers of JSON Lines put nothing where a turn leaves a key out.
        return "no content" if content is None else f"content {short(content)}", "text"
    if not content.strip():
        return "no content" if not content else "only blanks", "text"
    return None
