"""Questions as SQuAD has them: its nested file as rows, and a look at whether every answer stands where it says.

A row is a question, its context, and answers {"text": [...], "answer_start": [...]}: the character of the context, from
0, at which each text begins. Rajpurkar et al., EMNLP 2016 (v1.1) and ACL 2018 (v2, with questions that have no answer).
"""

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import fsspec

from banjoray.errors import DataError

if TYPE_CHECKING:
    import datasets

    from banjoray.data.sources import Source

_SHAPE = '{"text": [...], "answer_start": [...]}'
_KINDS = {str: "text", int: "a whole number", list: "a list", dict: "an object"}


def flattened(path: str, name: str, columns: Mapping[str, str]) -> "datasets.Dataset | None":
    """The questions of SQuAD's nested file (v1.1 or v2), a row each; None for another kind of JSON.

    ``columns`` says what the columns question, context and answers are called; the questions' ids are in ``id``.
    Raises DataError that names the part of the file that is not as SQuAD has it.
    """
    import datasets

    tree = _tree(path)
    if tree is None:
        return None
    found: dict[str, list[Any]] = {key: [] for key in ("id", "question", "context", "answers")}
    for where, context, asked in _questions(tree, name):
        found["question"].append(_part(asked, "question", str, where))
        found["id"].append(str(asked.get("id", "")))
        found["context"].append(context)
        found["answers"].append(_answers(asked, where))
    text = datasets.Value("string")
    kinds = dict.fromkeys(found, text)
    kinds["answers"] = {"text": datasets.List(text), "answer_start": datasets.List(datasets.Value("int64"))}
    names = {key: columns.get(key, key) for key in found}
    try:
        return datasets.Dataset.from_dict(
            {names[key]: cells for key, cells in found.items()},
            datasets.Features({names[key]: kind for key, kind in kinds.items()}),
        )
    except UnicodeEncodeError:
        raise DataError(f"data: {name} holds half a character (a lone surrogate); needed text") from None


def check_answers(source: "Source", columns: Mapping[str, str]) -> None:
    """Refuse an answer that does not stand in its context where it says, and what is no answer at all.

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
                raise DataError(f"data: {source.where(start + number)}{called}, column '{answers}' {problem}")


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


def _questions(tree: dict[str, Any], name: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Where each question is in the file, its context, and what the file has of it."""
    for number, article in enumerate(tree["data"]):
        place = f"{name}: data[{number}]"
        for part, paragraph in enumerate(_part(article, "paragraphs", list, place)):
            at = f"{place}.paragraphs[{part}]"
            context = _part(paragraph, "context", str, at)
            for question, asked in enumerate(_part(paragraph, "qas", list, at)):
                yield f"{at}.qas[{question}]", context, asked


def _answers(asked: dict[str, Any], where: str) -> dict[str, list[Any]]:
    """The answers of a question, in the shape of a row; none where it says that there is none."""
    impossible = asked.get("is_impossible", False)
    # What v2 calls plausible answers are wrong ones. Its older copies leave answers out where there are none.
    given = [] if impossible and "answers" not in asked else _part(asked, "answers", list, where)
    if impossible and given:
        raise DataError(f"data: {where} has answers and is_impossible; needed one of them")
    places = [f"{where}.answers[{number}]" for number in range(len(given))]
    return {
        key: [_part(answer, key, kind, place) for answer, place in zip(given, places, strict=True)]
        for key, kind in (("text", str), ("answer_start", int))
    }


def _part(tree: Any, key: str, kind: type, where: str) -> Any:
    """What stands under ``key``; raises DataError: nothing, or another kind."""
    if not isinstance(tree, dict) or key not in tree:
        found = f"keys {sorted(map(str, tree))}" if isinstance(tree, dict) else _short(tree)
        raise DataError(f"data: {where} holds {found}; needed '{key}', as SQuAD's file has it")
    found = tree[key]
    if type(found) is not kind:
        raise DataError(f"data: {where}.{key} holds {_short(found)}; needed {_KINDS[kind]}")
    return found


def _problem(found: Any, context: str) -> str | None:
    """What is wrong with the answers to a question about ``context``."""
    if found is None or found == {}:
        return None
    if not isinstance(found, dict) or not {"text", "answer_start"} <= found.keys():
        return f"holds {_short(found)}; needed {_SHAPE}"
    # Readers of JSON Lines put nothing where a row leaves a key out.
    texts, starts = ([] if found[key] is None else found[key] for key in ("text", "answer_start"))
    if not isinstance(texts, list) or not isinstance(starts, list):
        return f"holds {_short(found)}; needed two lists, {_SHAPE}"
    if len(texts) != len(starts):
        return f"holds {len(texts)} in text and {len(starts)} in answer_start; needed one start for each text"
    problems = (_misplaced(text, start, context) for text, start in zip(texts, starts, strict=True))
    return next((problem for problem in problems if problem), None)


def _misplaced(text: Any, start: Any, context: str) -> str | None:
    """What is wrong with one answer."""
    if not isinstance(text, str) or not text.strip():
        return f"holds {_short(text)} in text; needed text"
    if not isinstance(start, int) or isinstance(start, bool) or start < 0:
        return f"holds {_short(start)} in answer_start; needed a whole number, characters from 0"
    stands = context[start : start + len(text)]
    if stands == text:
        return None
    other = context.find(text)
    elsewhere = "which it does not have" if other < 0 else f"which stands at {other}"
    return f"says that {_short(text)} is at character {start} of its context, {elsewhere}; there is {_short(stands)}"


def _short(found: Any) -> str:
    told = repr(found)
    return told if len(told) <= 60 else f"{told[:57]}..."
