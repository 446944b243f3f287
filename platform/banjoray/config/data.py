"""Where the rows of a job come from, and how they are read."""

from typing import Any, Literal

from pydantic import Field, model_validator

from banjoray.config.section import Section


class FilesConfig(Section):
    """One file per split: csv, tsv, json, jsonl, parquet, txt or conll (iob, bio), a local path or an fsspec URL."""

    train: str = Field(description="Rows to learn from.")
    validation: str | None = Field(None, description="Rows that choose the best checkpoint; null: cut from train.")
    test: str | None = Field(None, description="Rows held out until the end.")


class ColumnsConfig(Section):
    """Which column of the data holds what; a dot reaches into a nested column (translation.en)."""

    text: str = Field("text", description="The text, or the first text of a pair.")
    text_pair: str | None = Field(None, description="The second text of a pair; null: single texts.")
    label: str = Field("label", description="The label, a name or a number; or a list of labels (multi_label).")
    tokens: str = Field("tokens", description="The words of a text, a list.")
    tags: str = Field("tags", description="The tag of every word, a list of names or numbers.")
    spans: str | None = Field(
        None, description="Named spans of the text, a list of {start, end, label} in characters; null: tokens and tags."
    )
    question: str = Field("question", description="A question about a context.")
    context: str = Field("context", description="The text that a question is answered from.")
    answers: str = Field(
        "answers", description='Answers: {"text": [...], "answer_start": [...]}, characters of the context from 0.'
    )
    target: str | None = Field(
        None, description="What should be written: a summary, a translation, the text after a prompt (null: none)."
    )
    messages: str | None = Field(
        None,
        description="text-generation: a conversation, a list of {role, content} (system, user, assistant), instead of "
        "text and target; the assistant's turns are learned.",
    )


class DataConfig(Section):
    """Where the rows come from and how they are read."""

    source: str | None = Field(
        None,
        description="Hub id of a data set, or banjoray:NAME for one that ships with banjoray: emotion, answers, "
        "dialogues, entailment, entities, likeness, phrases, questions, subjects.",
    )
    config: str | None = Field(None, description="Configuration of a hub data set.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub data set.")
    files: FilesConfig | None = Field(None, description="Files, instead of source.")
    columns: ColumnsConfig = Field(default_factory=ColumnsConfig, description="Names of the columns.")
    labels: list[str] | None = Field(
        None, min_length=2, description="Order of the label names; null: the data set's own order, or sorted."
    )
    skip_bad_rows: bool = Field(
        False,
        description="Leave out rows that can't be used, and list them in bad_rows.jsonl; false: the first is an error.",
    )
    validation_fraction: float = Field(
        0.1, gt=0, lt=1, description="Share of train cut off, stratified and seeded, where no validation split exists."
    )
    max_rows: int | None = Field(None, ge=2, description="Rows of each split that are read, the first ones; null: all.")
    streaming: bool = Field(
        False,
        description="Fetch rows as they are read and keep the first max_rows alone, for sets larger than the disk.",
    )
    max_length: int = Field(128, ge=4, description="Tokens per row; longer rows are cut, and counted in a warning.")
    stride: int = Field(
        32, ge=0, description="Tokens that two windows of one long row share, where a task cuts windows."
    )
    max_target_length: int = Field(
        128, ge=2, description="Tokens of a summary or translation; longer ones are cut, and counted in a warning."
    )
    prefix: str = Field(
        "", description="Put before every text that is summarized or translated, as 'summarize: ' (T5)."
    )
    packing: bool = Field(
        False,
        description="text-generation: short texts share a block of max_length tokens, and none sees another; "
        "train.batch_size then counts blocks.",
    )
    chat_template: Literal["auto", "always", "never"] = Field(
        "auto",
        description="text-generation: write rows and served prompts by the tokenizer's chat template. auto: messages, "
        "and text with target where there is a template; always: or fail; never. Texts alone stay as they are.",
    )
    src_lang: str | None = Field(
        None, description="Language of the texts, as the tokenizer names it (en_XX); for mBART, NLLB, M2M100 alone."
    )
    tgt_lang: str | None = Field(None, description="Language of the targets, where src_lang is needed.")

    def cutting(self) -> dict[str, Any]:
        """The keys that decide how rows become token ids."""
        keys = {"max_length", "stride", "max_target_length", "prefix", "packing", "src_lang", "tgt_lang"}
        return self.model_dump(mode="json", include=keys | {"chat_template"})

    @model_validator(mode="after")
    def _one_origin(self) -> "DataConfig":
        if (self.source is None) == (self.files is None):
            found = "both" if self.source else "neither"
            raise ValueError(f"needs either 'source' or 'files', found {found}")
        return self

    @model_validator(mode="after")
    def _template_has_rows(self) -> "DataConfig":
        messages, target = self.columns.messages is not None, self.columns.target is not None
        if messages and (target or self.chat_template == "never"):
            beside = "columns.target" if target else "chat_template never"
            raise ValueError(f"found columns.messages with {beside}; messages hold all turns, and need a template")
        if self.chat_template == "always" and not (messages or target):
            raise ValueError("found chat_template always with texts alone; needed columns.messages or columns.target")
        return self

    @model_validator(mode="after")
    def _streams_end(self) -> "DataConfig":
        if self.streaming and self.max_rows is None:
            raise ValueError("streaming: found true without max_rows; set how many rows of each split are kept")
        return self
