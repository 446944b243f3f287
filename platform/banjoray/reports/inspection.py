"""`inspect`: what a model or a job is made of, and what it makes of a text, as tables and as a page of attention."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from banjoray.config.job import HubConfig, ModelConfig, load_job
from banjoray.errors import ConfigError
from banjoray.models.inspect import Anatomy, TextTokens, anatomy, attention_of, text_tokens
from banjoray.models.loading import Base, base_config, find_base, load_tokenizer, quiet_libraries, sketch
from banjoray.registry import Registry
from banjoray.tasks.task import task_for
from banjoray.tuning.footprint import Memory

if TYPE_CHECKING:
    from rich.console import RenderableType

PAGE = Path(__file__).with_name("attention.html.j2")
# An attention page holds layers x heads x tokens x tokens numbers; above so many tokens it is of no use to anybody.
MOST_TOKENS = 128


@dataclass(frozen=True)
class Inspection:
    """What was looked at: a job's model as it is trained (with memory by strategy), a version, or a base model."""

    name: str
    base: Base
    anatomy: Anatomy
    memory: tuple[Memory, ...] = ()
    text: TextTokens | None = None

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {
            "name": self.name,
            "digest": self.base.digest,
            "anatomy": asdict(self.anatomy) | {"weights": self.anatomy.weights, "trained": self.anatomy.trained},
            "memory": [asdict(row) for row in self.memory],
            "text": asdict(self.text) if self.text else None,
        }


def inspect(target: str, registry: str, overrides: Iterable[str] = (), text: str | None = None) -> Inspection:
    """What ``target`` is: a job file, a registered version (emotion@7), a folder, a hub id or banjoray:NAME.

    No weights are loaded. Raises ConfigError, DataError, ModelError, RegistryError.
    """
    quiet_libraries()
    if Path(target).suffix in (".yaml", ".yml"):
        found = _of_job(target, overrides)
    elif list(overrides):
        raise ConfigError(f"--set: '{target}' is no job file; only a job has keys")
    elif "@" in target:
        found = _of_version(target, registry)
    else:
        base = find_base(ModelConfig(base=target), HubConfig())
        found = Inspection(target, base, _bare(base))
    if text is None:
        return found
    return replace(found, text=text_tokens(load_tokenizer(found.base), text))


def _of_job(file: str, overrides: Iterable[str]) -> Inspection:
    from banjoray.training.preflight import shaped
    from banjoray.tuning.plan import checked, plan

    job = load_job(file, overrides).anchored(Path.cwd())
    ready, _ = checked(job)
    config = base_config(ready.base, job, ready.splits.labels, ready.start.tokenizer.pad_token_id)
    drawing = sketch(config, ready.task, job.model.trust_remote_code)
    shaped(job, drawing)
    return Inspection(job.name, ready.base, anatomy(drawing), plan(job).memory)


def _of_version(reference: str, registry: str) -> Inspection:
    from transformers import AutoConfig

    store = Registry(registry)
    version = store.resolve(reference)
    folder = store.fetch(version)
    drawing = sketch(AutoConfig.from_pretrained(folder), task_for(version.task))
    return Inspection(str(version), Base(str(folder), version.digest, {}), anatomy(drawing))


def _bare(base: Base) -> Anatomy:
    import torch
    from transformers import AutoConfig, AutoModel

    with torch.device("meta"):
        return anatomy(AutoModel.from_config(AutoConfig.from_pretrained(base.path, **base.options)))


def inspection_lines(found: Inspection) -> "list[RenderableType]":
    """An inspection as tables for a terminal."""
    from banjoray.reports.tables import memory_table

    whole = found.anatomy
    lines: list[RenderableType] = [f"{found.name}  {whole.kind}, {whole.weights:,} weights", _parts(whole)]
    if whole.stack is not None:
        names = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in whole.block)
        lines.append(f"blocks  {whole.depth} in {whole.stack}, each: {names}")
    if found.memory:
        lines.append(memory_table(found.memory))
    if found.text:
        lines.append(_tokens(found.text))
    return lines


def _parts(whole: Anatomy) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("part")
    for column in ("weights", "share", "trained", "of it"):
        table.add_column(column, justify="right")
    for part in whole.parts:
        share, trained = part.weights / whole.weights, part.trained / part.weights
        table.add_row(part.name, f"{part.weights:,}", f"{share:.2%}", f"{part.trained:,}", f"{trained:.0%}")
    table.add_section()
    table.add_row("all", f"{whole.weights:,}", "", f"{whole.trained:,}", f"{whole.trained / whole.weights:.2%}")
    return table


def _tokens(found: TextTokens) -> Table:
    title = f"{len(found.ids)} tokens, {sum(found.special)} of them special, {found.unknown} unknown"
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left")
    for column in ("", "token", "id", "special", "attended", "segment", "characters"):
        table.add_column(column, justify="right" if column in ("", "id") else "left")
    for number, token in enumerate(found.tokens):
        span = found.spans[number]
        flags = ["yes" if flags[number] else "" for flags in (found.special, found.attended)]
        characters = f"{span[0]}-{span[1]}" if span else ""
        # Not as markup: "[CLS]" would be taken for a style.
        cells = (str(number), token, str(found.ids[number]), *flags, str(found.types[number]), characters)
        table.add_row(*(Text(cell) for cell in cells))
    return table


def attention_page(found: Inspection) -> str:
    """An HTML page, complete in itself, of how every head of every layer looks at the text's tokens.

    Loads the weights. Raises ConfigError: too many tokens; ModelError.
    """
    from transformers import AutoModel

    if found.text is None or len(found.text.ids) > MOST_TOKENS:
        count = len(found.text.ids) if found.text else 0
        raise ConfigError(f"--attention: found {count} tokens; needed a --text of 1 to {MOST_TOKENS}")
    model = AutoModel.from_pretrained(found.base.path, attn_implementation="eager", **found.base.options).eval()
    weights = attention_of(model, found.text)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    data = {"tokens": found.text.tokens, "weights": (weights * 1000).round().astype(int).tolist()}
    # "<" can't end the script that it stands in.
    written = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    page = environment.from_string(PAGE.read_text(encoding="utf-8"))
    layers, heads = weights.shape[:2]
    return page.render(name=found.name, layers=layers, heads=heads, tokens=found.text.tokens, data=written)
