"""Questions as SQuAD has them: its nested file as rows, and a look at whether every answer stands where it says.

A row is a question, its context, and answers {"text": [...], "answer_start": [...]}: the character of the context, from
0, at which each text begins. Rajpurkar et al., EMNLP 2016 (v1.1) and ACL 2018 (v2, with questions that have no answer).
"""

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np

from banjoray.data.bad_rows import BadCell, BadRow, Finding, half_a_character, short
from banjoray.data.sources import Source

if TYPE_CHECKING:
    import datasets

_SHAPE = '{"text": [...], "answer_start": [...]}'
_KINDS = {str: "text", int: "a whole number", list: "a list", dict: "an object"}


def flattened(path: str, name: str, columns: Mapping[str, str], skips: bool) -> Source | None:
    """The questions of SQuAD's nested file (v1.1 or v2), a row each; None for another kind of JSON.

    ``columns`` says what the columns question, context and answers are called; the questions' ids are in ``id``. A part
    of the file that is not as SQuAD has it is left out where the job ``skips`` bad rows; else raises DataError.
    """
    tree = _tree(path)
    if tree is None:
        return None
    found: list[dict[str, Any]] = []
    numbers: list[int] = []
    bad: list[BadRow] = []
    row = 0
    for question in _questions(tree):
        if isinstance(question, BadCell):
            bad.append(BadRow(name, None, name, question.kind, question.told))
            continue
        try:
            found.append(_row(*question))
            numbers.append(row)
        except BadCell as error:
            bad.append(BadRow(name, row + 1, name, error.kind, error.told))
        row += 1
    if bad and not skips:
        raise bad[0].refusal(len(bad))
    return Source(_rows(found, columns), name, skips, np.array(numbers, dtype=int), tuple(bad)).some_left()


def _row(where: str, context: str, asked: Any) -> dict[str, Any]:
    row = {"question": _part(asked, "question", str, where), "context": context, "answers": _answers(asked, where)}
    return row | {"id": str(asked.get("id", "")).encode(errors="replace").decode()}


def _rows(found: list[dict[str, Any]], columns: Mapping[str, str]) -> "datasets.Dataset":
    import datasets

    text = datasets.Value("string")
    kinds: dict[str, Any] = dict.fromkeys(("id", "question", "context"), text)
    kinds["answers"] = {"text": datasets.List(text), "answer_start": datasets.List(datasets.Value("int64"))}
    names = {key: columns.get(key, key) for key in kinds}
    return datasets.Dataset.from_dict(
        {names[key]: [row[key] for row in found] for key in kinds},
        datasets.Features({names[key]: kind for key, kind in kinds.items()}),
    )


def misplaced_answers(source: Source, columns: Mapping[str, str]) -> Iterator[Finding]:
    """Rows with an answer that does not stand in its context where it says, or with what is no answer at all.

    ``columns`` are keys of data.columns and their names. No answers, or nothing in their place: the question has none.
    """
    context, answers = columns["context"], columns["answers"]
    ids = {"id"} & set(source.rows.column_names)
    for start in range(0, len(source.rows), 1000):
        cells = source.rows[start : start + 1000]
        for number, (found, text) in enumerate(zip(cells[answers], cells[context], strict=True)):
            problem = _problem(found, text)
            if problem:
                called = f" (id {cells['id'][number]})" if ids else ""
                yield Finding(start + number, "answers", f" {problem}", answers, called)


def _tree(path: str) -> dict[str, Any] | None:
    """The content of a file that is SQuAD's by its shape."""
    try:
        with fsspec.open(path, "rb") as file:
            tree = json.load(file)
    except ValueError:
        # Not JSON, or a JSON document per line: who reads such files says what is wrong with it.
        return None
    articles = tree.get("data") if isinstance(tree, dict) else None
    if isinstance(articles, list) and any(isinstance(part, dict) and "paragraphs" in part for part in articles):
        found: dict[str, Any] = tree
        return found
    return None


def _questions(tree: dict[str, Any]) -> Iterator[tuple[str, str, Any] | BadCell]:
    """Where each question is in the file, its context, and what the file has of it; what is wrong with other parts."""
    for number, article in enumerate(tree["data"]):
        place = f"data[{number}]"
        try:
            paragraphs = _part(article, "paragraphs", list, place)
        except BadCell as error:
            yield error
            continue
        for part, paragraph in enumerate(paragraphs):
            at = f"{place}.paragraphs[{part}]"
            try:
                context, asked = _part(paragraph, "context", str, at), _part(paragraph, "qas", list, at)
            except BadCell as error:
                yield error
                continue
            yield from ((f"{at}.qas[{question}]", context, found) for question, found in enumerate(asked))


def _answers(asked: dict[str, Any], where: str) -> dict[str, list[Any]]:
    """The answers of a question, in the shape of a row; none where it says that there is none."""
    impossible = asked.get("is_impossible", False)
    # What v2 calls plausible answers are wrong ones. Its older copies leave answers out where there are none.
    given = [] if impossible and "answers" not in asked else _part(asked, "answers", list, where)
    if impossible and given:
        raise BadCell("answers", f": {where} has answers and is_impossible; needed one of them")
    places = [f"{where}.answers[{number}]" for number in range(len(given))]
    return {
        key: [_part(answer, key, kind, place) for answer, place in zip(given, places, strict=True)]
        for key, kind in (("text", str), ("answer_start", int))
    }


def _part(tree: Any, key: str, kind: type, where: str) -> Any:
    """What stands under ``key``; raises BadCell: nothing, another kind, or half a character."""
    if not isinstance(tree, dict) or key not in tree:
        found = f"keys {sorted(map(str, tree))}" if isinstance(tree, dict) else short(tree)
        raise BadCell("not as SQuAD", f": {where} holds {found}; needed '{key}', as SQuAD's file has it")
    found = tree[key]
    if type(found) is not kind:
        raise BadCell("not as SQuAD", f": {where}.{key} holds {short(found)}; needed {_KINDS[kind]}")
    if kind is str and half_a_character(found):
        raise BadCell("not UTF-8", f": {where}.{key} holds half a character (a lone surrogate); needed text")
    return found


def _problem(found: Any, context: str) -> str | None:
    """What is wrong with the answers to a question about ``context``."""
    if found is None or found == {}:
        return None
    if not isinstance(found, dict) or not {"text", "answer_start"} <= found.keys():
        return f"holds {short(found)}; needed {_SHAPE}"
    # Readers of JSON Lines put nothing where a row leaves a key out.
    texts, starts = ([] if found[key] is None else found[key] for key in ("text", "answer_start"))
    if not isinstance(texts, list) or not isinstance(starts, list):
        return f"holds {short(found)}; needed two lists, {_SHAPE}"
    if len(texts) != len(starts):
        return f"holds {len(texts)} in text and {len(starts)} in answer_start; needed one start for each text"
    problems = (_misplaced(text, start, context) for text, start in zip(texts, starts, strict=True))
    return next((problem for problem in problems if problem), None)


def _misplaced(text: Any, start: Any, context: str) -> str | None:
    """What is wrong with one answer."""
    if not isinstance(text, str) or not text.strip():
        return f"holds {short(text)} in text; needed text"
    if not isinstance(start, int) or isinstance(start, bool) or start < 0:
        return f"holds {short(start)} in answer_start; needed a whole number, characters from 0"
    stands = context[start : start + len(text)]
    if stands == text:
        return None
    other = context.find(text)
    elsewhere = "which it does not have" if other < 0 else f"which stands at {other}"
    return f"says that {short(text)} is at character {start} of its context, {elsewhere}; there is {short(stands)}"
