"""Settings of the data: sources, tokenizer, where prepared tokens lie."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

NOT_IN_LABELS = re.compile(r"[^A-Za-z0-9._-]+")
MAX_BAD_ROWS = 0.01
"""Default of data.max_bad_rows."""


FORMATS = {
    "json": ("jsonl", "ndjson", "jsonlines"),
    "text": ("txt", "plain", "md"),
    "csv": ("tsv",),
    "parquet": ("pq",),
    "megatron": ("idx",),
    "npy": (),
}
"""Formats of files -> what else they are called, and what names of such files end with."""
TOKEN_FORMATS = ("megatron", "npy")
"""Those that hold ids of tokens instead of text."""


def problem_of_path(path: str, data_files: object) -> str | None:
    """Why a source's path is none; None: it may be one. What is no format of ours may be a folder,
    a data set of the Hub, or another format of datasets.
    """
    place = Path(path).expanduser()
    if place.is_file():
        ends = place.name.lower().split(".")[1:]
        # of a store of Megatron's the other half
        ends = ["idx" if end == "bin" else end for end in ends]
        formats = [form for form, others in FORMATS.items() if {form, *others} & set(ends)]
        return (
            f"is {path!r}, a file; give path={formats[0] if formats else '|'.join(FORMATS)} "
            f"and data_files={path}"
        )
    if path in FORMATS or place.exists() or "/" in path:
        return None
    word = path.lower().lstrip(".").split(".")[0]
    meant = next((form for form, others in FORMATS.items() if word in (form, *others)), None)
    if meant is None and data_files is not None:
        meant = next(iter(difflib.get_close_matches(word, FORMATS, 1, 0.8)), None)
    return None if meant is None else f"is {path!r}, no format; did you mean {meant}?"


@dataclass(frozen=True)
class SourceConfig:
    """One source of documents, in the words of datasets.load_dataset."""

    path: str
    """A Hub name, a builder (json, parquet, csv, text), or "sample" for the bundled text. Of what
    is tokens already: megatron (pairs of .idx and .bin) or npy (arrays of ids).
    """
    name: str | None = None
    split: str = "train"
    data_files: str | tuple[str, ...] | None = None
    """A file, by its literal name if there is one, else a pattern of files; a folder, of which the
    files of that format are taken; or a list of these.
    """
    text_column: str = "text"
    """The one column that is read; the others may differ from file to file. Of conversations, the
    one with the messages; a row without it may have them elsewhere (docs/how_to/fine_tune.md).
    """
    sample_by: Literal["line", "paragraph", "document"] = "document"
    """For path=text: what one document is."""
    weight: float = 1.0
    """Share of training samples, relative to the other sources."""
    max_epochs: float | None = None
    """Most passes over the source; what it would give beyond them the other sources give. null:
    it repeats without end.
    """
    max_documents: int | None = None
    label: str | None = None
    """What metrics, tables and printed lines call it; null: after its path and files."""

    def problems(self, path: str) -> list[str]:
        """
        Args:
            path: of the source among the settings.
        """
        found = []
        if problem := problem_of_path(self.path, self.data_files):
            found.append(f"{path}.path {problem}")
        if self.weight <= 0:
            found.append(f"{path}.weight is {self.weight}; it must be positive")
        if self.path in FORMATS and not self.data_files:
            found.append(f"{path}.path={self.path} needs data_files=FILE, a folder or a pattern")
        if self.max_epochs is not None and self.max_epochs <= 0:
            found.append(f"{path}.max_epochs is {self.max_epochs}; it must be positive, or null")
        if self.max_documents is not None and self.max_documents < 2:
            found.append(
                f"{path}.max_documents is {self.max_documents}; it must be at least 2, or null"
            )
        if self.holds_tokens:
            found += [
                f"{path}.{name} is {value!r}, which acts on text only; {path}.path={self.path} "
                "holds tokens, so drop it"
                for name, usual in (
                    ("name", None),
                    ("split", "train"),
                    ("text_column", "text"),
                    ("sample_by", "document"),
                )
                if (value := getattr(self, name)) != usual
            ]
        if self.label is not None and (not self.label or NOT_IN_LABELS.search(self.label)):
            found.append(f"{path}.label is {self.label!r}; use letters, digits, '.', '_' and '-'")
        return found

    @property
    def holds_tokens(self) -> bool:
        """Whether it is tokenised already."""
        return self.path in TOKEN_FORMATS

    @property
    def named_files(self) -> tuple[str, ...]:
        """What data_files names, one or several."""
        if self.data_files is None:
            return ()
        return (self.data_files,) if isinstance(self.data_files, str) else self.data_files

    @property
    def told(self) -> str:
        """What messages call it; where several sources are told apart, `labels` does."""
        return self.label or self.default_label

    @property
    def default_label(self) -> str:
        """Hub name, part and split, or the file's or folder's name, in characters of a label."""
        name = self.path.rstrip("/").rpartition("/")[2] + (f"-{self.name}" if self.name else "")
        if self.named_files:
            folder, _, file = self.named_files[0].rstrip("/").rpartition("/")
            stem = file.split(".")[0]
            name = stem if NOT_IN_LABELS.sub("", stem) == stem else folder.rpartition("/")[2]
        if self.split != "train":
            name += f"-{self.split}"
        return NOT_IN_LABELS.sub("-", name).strip("-") or self.path


def labels(sources: tuple[SourceConfig, ...]) -> list[str]:
    """Of every source another one: equal ones get a number."""
    found: list[str] = []
    for source in sources:
        label = name = source.told
        number = 1
        while label in found:
            number += 1
            label = f"{name}-{number}"
        found.append(label)
    return found


@dataclass(frozen=True)
class ValidationConfig:
    """Held-out text of its own."""

    sources: tuple[SourceConfig, ...] = ()
    """All of their documents are held out, and left out of training where they stand there too."""

    def problems(self) -> list[str]:
        return [
            f"data.validation.sources[{i}].{name} is {value}; held-out text is read once, so leave "
            "it out"
            for i, source in enumerate(self.sources)
            for name, value, usual in (
                ("weight", source.weight, 1.0),
                ("max_epochs", source.max_epochs, None),
            )
            if value != usual
        ]


@dataclass(frozen=True)
class PhaseConfig:
    """A part of the training with weights of its own."""

    start_tokens: int
    """Training tokens after which it begins; it lasts until the next one."""
    weights: tuple[float, ...]
    """One for each of data.sources, in their order; 0 leaves a source out."""


@dataclass(frozen=True)
class MixtureConfig:
    """How sources are mixed, beyond their weights."""

    temperature: float | None = None
    """Weights are multiplied by tokens**(1/temperature) of their source: 1 takes every source in
    proportion to its size, more evens them out. null: weights are shares.
    """
    schedule: tuple[PhaseConfig, ...] = ()
    """Other weights from some token on, for example more of the best source at the end; empty:
    the same mixture throughout.
    """

    def problems(self, num_sources: int) -> list[str]:
        found = []
        if self.temperature is not None and self.temperature <= 0:
            found.append(
                f"data.mixture.temperature is {self.temperature}; it must be positive, or null"
            )
        if self.temperature is not None and num_sources == 1:
            found.append(
                f"data.mixture.temperature is {self.temperature}, but there is one source; set it "
                "to null, or name more of data.sources"
            )
        before = -1
        for i, phase in enumerate(self.schedule):
            name = f"data.mixture.schedule[{i}]"
            if phase.start_tokens <= before or phase.start_tokens < 0:
                found.append(
                    f"{name}.start_tokens is {phase.start_tokens}; it must be 0 at least, and more "
                    "than that of the phase before"
                )
            before = phase.start_tokens
            if len(phase.weights) != num_sources:
                found.append(
                    f"{name}.weights has {len(phase.weights)} weights; give one for each of the "
                    f"{num_sources} data.sources"
                )
            if any(weight < 0 for weight in phase.weights) or not any(phase.weights):
                found.append(
                    f"{name}.weights is {list(phase.weights)}; no weight is below 0, and one is "
                    "above"
                )
        return found


@dataclass(frozen=True)
class TokenizerConfig:
    path: str | None = None
    """A tokenizer.json or a folder holding one; None: train a byte-level BPE on the sources."""
    vocab_size: int = 32768
    """Size of the BPE to train; of tokens without a tokenizer, how many ids there may be."""
    end_of_document: str = "<|endoftext|>"
    end_of_document_id: int | None = None
    """Id of the token that ends documents, where all sources are tokens already and no tokenizer is
    given; null: the tokenizer's own.
    """
    max_documents: int | None = None
    """Most documents that a BPE is trained on: a sample by a hash of their text, none of it held
    out. null: all, held-out ones among them.
    """

    def problems(self) -> list[str]:
        if self.max_documents is None:
            return []
        if self.path is not None:
            return [
                f"data.tokenizer.max_documents is {self.max_documents}, but data.tokenizer.path "
                "gives a tokenizer, so none is trained; drop one of them"
            ]
        if self.max_documents < 1:
            return [
                f"data.tokenizer.max_documents is {self.max_documents}; it must be at least 1, or "
                "null"
            ]
        return []


@dataclass(frozen=True)
class StreamConfig:
    """How data are tokenised while a run trains, with data.streaming=true."""

    window_mib: int = 64
    """MiB of text whose documents are shuffled with each other, source by source."""
    head_documents: int = 10_000
    """Documents at the beginning of every source that are read before the training: held-out text
    is among them, and a BPE is trained on them.
    """
    workers: int | None = None
    """Processes that tokenise, beside rank 0; null: one for every second core that it may use. No
    token depends on it.
    """

    def problems(self, streaming: bool) -> list[str]:
        if not streaming:
            return [
                f"data.stream.{f.name} is {getattr(self, f.name)}, which acts with "
                "data.streaming=true only; add that, or drop it"
                for f in fields(self)
                if getattr(self, f.name) != f.default
            ]
        found = [
            f"data.stream.{name} is {value}; it must be at least {least}"
            for name, value, least in (
                ("window_mib", self.window_mib, 1),
                ("head_documents", self.head_documents, 2),
            )
            if value < least
        ]
        if self.workers is not None and not 1 <= self.workers <= 1024:
            found.append(
                f"data.stream.workers is {self.workers}; it must be between 1 and 1024, or null"
            )
        return found


@dataclass(frozen=True)
class DataConfig:
    sources: tuple[SourceConfig, ...]
    tokenizer: TokenizerConfig
    validation_fraction: float = 0.01
    """Share of each source's documents held out, chosen by a hash of their text; at least one
    document in all. May be 0 where validation.sources has others.
    """
    cache_dir: str = ".cache/data"
    """Where tokenised stores live, one folder per content of this config."""
    max_bad_rows: float = MAX_BAD_ROWS
    """Share of a source's rows that may be left out: null, missing, not text, broken; of
    conversations also those with nothing to learn, and those whose answers cannot be told apart.
    """
    on_bad_row: Literal["skip", "fail"] = "skip"
    """Whether such rows are left out and counted, or the first of them ends the preparation."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """Held-out text of its own, besides that share."""
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    """How sources are mixed, beyond their weights."""
    format: Literal["text", "chat"] = "text"
    """What a document is: text, or a conversation that a chat template makes text of."""
    chat_template: str | None = None
    """A file with a chat template; None: the one beside the tokenizer, else a plain one."""
    thinking: bool | None = None
    """What a chat template is told whose answers can be reasoned (enable_thinking); None: nothing.
    With False an empty block of thoughts is the template's to write, and is not learnt.
    """
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Which tokens of a conversation are learnt: every answer, the last answer, or all of them."""
    too_long: Literal["refuse", "cut"] = "refuse"
    """What becomes of conversations that are longer than train.seq_len."""
    streaming: bool = False
    """Tokenise while the run trains instead of before: for sets that are larger than the disk."""
    stream: StreamConfig = field(default_factory=StreamConfig)
    """How that is done."""

    def problems(self) -> list[str]:
        found = []
        if not self.sources:
            found.append("data.sources is empty; name at least one source")
        for group, sources in (
            ("data.sources", self.sources),
            ("data.validation.sources", self.validation.sources),
        ):
            for i, source in enumerate(sources):
                found += source.problems(f"{group}[{i}]")
        found += self.mixture.problems(len(self.sources))
        found += self._chat_problems()
        found += self._token_problems()
        found += self.stream.problems(self.streaming)
        found += self._streaming_problems() if self.streaming else []
        found += self.tokenizer.problems()
        if not self.tokenizer.end_of_document:
            found.append(
                "data.tokenizer.end_of_document is empty; name the tokenizer's end-of-text token"
            )
        if self.validation_fraction == 0 and not self.validation.sources:
            found.append(
                "data.validation_fraction is 0.0, so nothing is held out; raise it, or name "
                "data.validation.sources"
            )
        elif not 0 <= self.validation_fraction < 1:
            found.append(
                f"data.validation_fraction is {self.validation_fraction}; it must be between 0 and "
                "1"
            )
        found += self.validation.problems()
        if not 0 <= self.max_bad_rows <= 1:
            found.append(
                f"data.max_bad_rows is {self.max_bad_rows}; it is a share of the rows, between 0 "
                "and 1"
            )
        trains_one = self.has_tokenizer and self.tokenizer.path is None
        if trains_one and self.tokenizer.vocab_size < 257:
            found.append(
                f"data.tokenizer.vocab_size is {self.tokenizer.vocab_size}; a byte-level BPE needs "
                "at least 257"
            )
        return found

    @property
    def head(self) -> DataConfig:
        """What of the data is prepared: all, or of a stream the first documents of its sources."""
        if not self.streaming:
            return self
        most = self.stream.head_documents
        sources = tuple(
            replace(source, max_documents=min(most, source.max_documents or most))
            for source in self.sources
        )
        return replace(self, sources=sources, streaming=False, stream=StreamConfig())

    def _streaming_problems(self) -> list[str]:
        """What needs to know a source whole, or is there already."""
        found = []
        if self.format == "chat":
            found.append(
                "data.streaming is true, but conversations are packed over a whole set "
                "(data.format=chat); prepare them, data.streaming=false"
            )
        if self.mixture.temperature is not None:
            found.append(
                f"data.mixture.temperature is {self.mixture.temperature}, which needs the sizes of "
                "the sources, and nobody knows those of a stream; give data.sources.*.weight"
            )
        for i, source in enumerate(self.sources):
            if source.max_epochs is not None:
                found.append(
                    f"data.sources[{i}].max_epochs is {source.max_epochs}, which needs the size of "
                    "the source, and nobody knows that of a stream; drop it, or set "
                    "data.streaming=false"
                )
            if source.holds_tokens:
                found.append(
                    f"data.sources[{i}].path={source.path} holds tokens, which are trained on in "
                    "place; set data.streaming=false"
                )
        return found

    @property
    def has_tokenizer(self) -> bool:
        """Whether there is one, given or to be trained: without it no text goes in or out."""
        sources = (*self.sources, *self.validation.sources)
        return self.tokenizer.path is not None or not all(s.holds_tokens for s in sources)

    def _token_problems(self) -> list[str]:
        """What contradicts sources of tokens, or their absence."""
        sources = (*self.sources, *self.validation.sources)
        tokenizer = self.tokenizer
        end = tokenizer.end_of_document_id
        found = []
        if self.has_tokenizer and end is not None:
            found.append(
                f"data.tokenizer.end_of_document_id is {end}, but there is a tokenizer, which "
                f"says the id of {tokenizer.end_of_document!r}; drop it"
            )
        if not any(source.holds_tokens for source in sources):
            return found

        if self.has_tokenizer and tokenizer.path is None:
            found.append(
                "data.tokenizer.path is null, but some of the sources are text and some are tokens "
                "already: a tokenizer that is trained here would give other ids; name the one that "
                "made the tokens"
            )
        if not self.has_tokenizer and end is None:
            found.append(
                "data.tokenizer.end_of_document_id is null, and there is no tokenizer to say it; "
                "give the id that ends documents, or data.tokenizer.path"
            )
        if end is not None and not 0 <= end < tokenizer.vocab_size:
            found.append(
                f"data.tokenizer.end_of_document_id is {end}; it must be between 0 and "
                f"{tokenizer.vocab_size - 1}, below data.tokenizer.vocab_size"
            )
        if not self.has_tokenizer and tokenizer.max_documents is not None:
            found.append(
                f"data.tokenizer.max_documents is {tokenizer.max_documents}, but all sources are "
                "tokens, so no tokenizer is trained; drop it"
            )
        return found

    def _chat_problems(self) -> list[str]:
        """What contradicts data.format, either way: a setting of the other format does nothing."""
        if self.format == "text":
            usual = {
                "chat_template": None,
                "thinking": None,
                "train_on": "assistant",
                "too_long": "refuse",
            }
            return [
                f"data.{name} is {value!r}, which acts on conversations only; add "
                "data.format=chat (data=chat), or drop it"
                for name, default in usual.items()
                if (value := getattr(self, name)) != default
            ]

        found = [
            f"{group}[{i}].path is {source.path!r}, which holds no conversations; with "
            "data.format=chat give json, parquet, or a data set of the Hub"
            for group, sources in (
                ("data.sources", self.sources),
                ("data.validation.sources", self.validation.sources),
            )
            for i, source in enumerate(sources)
            if source.path in ("sample", "text", "csv", *TOKEN_FORMATS)
        ]
        if self.chat_template is not None and not Path(self.chat_template).expanduser().is_file():
            found.append(
                f"data.chat_template: {self.chat_template} does not exist; give a file with a "
                "jinja chat template, or null for the one beside the tokenizer"
            )
        return found


def no_tokenizer(place: str) -> str:
    """What is said where text is needed and a run was trained on tokens alone."""
    return (
        f"{place} has no tokenizer: the run was trained on tokens alone, so no text can be read or "
        "written; train with data.tokenizer.path, the tokenizer that made them"
    )
