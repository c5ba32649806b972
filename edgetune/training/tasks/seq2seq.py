"""Encoder-decoders (T5, BART, mBART, BERT to BERT): read a source, learn to write its target.

Knows what each family puts around texts: T5's task prefixes, mBART's language codes, the token a decoder starts with.
Everything else about the family is the model's own forward.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edgetune.data import Dataset, Split, TextTokenizer
from edgetune.data.columns import REWRITING, Columns, Rewritten, languages, translations
from edgetune.data.dataset import first_row
from edgetune.data.formats import present_columns
from edgetune.errors import DataError, UnsupportedError, UsageError
from edgetune.events import Notice, Sink
from edgetune.languages import find_language, language_codes
from edgetune.piece_tokenizer import load_pieces
from edgetune.training import metrics
from edgetune.training.batches import IGNORED
from edgetune.training.evaluate import chosen_rows
from edgetune.training.tasks.base import Measured
from edgetune.training.tasks.choose import Kind
from edgetune.training.tasks.generate import greedy
from edgetune.training.tasks.rows import Ids, RowBatch, RowTask, pad_rows

if TYPE_CHECKING:
    import torch

    from edgetune.training.settings import TrainSettings

EVAL_TEXTS = 64
"""Validation rows that a text is written for each time, unless told otherwise."""

_TOLD_FIRST = {"translation": ("bleu", "chrf"), "summarization": ("rouge1", "rougeL")}
"""What the quality of a kind of text is usually told in; of others by how many are right."""
_T5 = ("t5", "mt5", "umt5")
_NAMES = {"en": "English", "de": "German", "fr": "French", "ro": "Romanian"}
"""The languages T5 was taught, as its prefixes name them."""


@dataclass(frozen=True)
class RewrittenSequence:
    """A source and its target in ids, with what the family puts around them."""

    ids: Ids
    """Both, one after the other."""
    source: Ids
    target: Ids
    """What the decoder is to write, its end token included."""
    example: Rewritten

    @property
    def learned(self) -> NDArray[np.bool_]:
        """The target."""
        return np.arange(len(self.ids)) >= len(self.ids) - len(self.target)

    @property
    def learned_count(self) -> int:
        """Every token of the target is learned."""
        return len(self.target)


class Seq2SeqTask(RowTask):
    """Source texts and target texts."""

    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    peft_type: ClassVar[str] = "SEQ_2_SEQ_LM"
    most_eval_rows: ClassVar[int] = 256
    kinds: ClassVar[tuple[Kind, ...]] = ("encoder-decoder",)
    way_out: ClassVar[str] = "Give an encoder-decoder such as T5 or BART; a decoder learns such rows with --task chat."

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.row_languages: tuple[str, str] | None = None
        self.prefix = ""
        self.codes: tuple[int, int] | None = None
        """Ids of the source's and the target's language, where the vocabulary marks them."""
        self.mark: int | None = None
        """Id of the target's language where it stands in front of the source (Marian of several languages)."""
        self.code_first = False
        """Whether the code comes before a text (mBART-50, NLLB) or after it (mBART)."""
        self.start_id = 0
        self.end_ids: frozenset[int] = frozenset()
        self.end_id = 0
        self.longest_target = 1

    # --- rows

    def formats(self) -> Sequence[Columns]:
        """Sources and targets, questions, and translations between the two languages of the rows."""
        return (translations(*self.row_languages), *REWRITING) if self.row_languages else REWRITING

    def read(self, settings: TrainSettings, model_dir: Path, *, has_template: bool, sink: Sink) -> Dataset:
        """Rows, and which prefix goes before their sources."""
        pieces = load_pieces(model_dir) if model_dir.is_dir() else None
        self.row_languages = _direction(settings, pieces.marks if pieces else ())
        dataset = super().read(settings, model_dir, has_template=has_template, sink=sink)
        self.prefix = settings.prefix if settings.prefix != "auto" else self._own_prefix(dataset)
        if self.prefix:
            sink(Notice(f"Every source begins with {self.prefix!r}."))
        return dataset

    def _own_prefix(self, dataset: Dataset) -> str:
        """What T5 was taught to see before texts of this kind; questions carry it themselves."""
        if self.raw["model_type"] not in _T5:
            return ""
        kinds = {example.kind for _, example in dataset.examples["train"]}
        given = self.raw.get("task_specific_params") or {}
        if kinds == {"summarization"}:
            return str((given.get("summarization") or {}).get("prefix", "summarize: "))
        if kinds == {"translation"} and self.row_languages:
            source, target = (name.split("_")[0].split("-")[0] for name in self.row_languages)
            if source in _NAMES and target in _NAMES:
                return f"translate {_NAMES[source]} to {_NAMES[target]}: "
        return ""

    # --- base

    def check_config(self, config: Any, architecture: str, model_dir: Path) -> None:
        """Find the token that the decoder starts with."""
        from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

        super().check_config(config, architecture, model_dir)
        if type(config) not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
            raise UnsupportedError(f"{model_dir} is a {architecture or config.model_type}, which writes no text.")
        found = getattr(config, "decoder_start_token_id", None)
        path = model_dir / "generation_config.json"
        if found is None and path.is_file():
            found = json.loads(path.read_text(encoding="utf-8")).get("decoder_start_token_id")
        inner = getattr(config, "decoder", None)
        ends = (getattr(source, "eos_token_id", None) for source in (config, inner))
        end = next((value for value in ends if value is not None), None)
        self.end_ids = frozenset(end if isinstance(end, list) else [] if end is None else [end])
        if found is None and self.raw["model_type"] in _T5:
            found = self.pad_id
        self.start_id = -1 if found is None else int(found)

    def ready(self, tokenizer: TextTokenizer, sink: Sink) -> None:
        """Settle languages, start and end with the tokenizer at hand."""
        self._tokenizer = tokenizer
        around = tokenizer.encode_whole("a", max_length=8).ids.tolist()
        bare = tokenizer.encode("a", add_special=False)
        if self.start_id < 0:
            if not around or around[: len(bare)] == bare:
                raise UnsupportedError(
                    "The model does not say which token its decoder starts with.",
                    hint="Set decoder_start_token_id in its config.json.",
                )
            self.start_id = around[0]
        if self.raw["model_type"] == "encoder-decoder" and around[-len(bare) :] != bare:
            # A BERT has no end of text of its own: what its tokenizer ends texts with ends them.
            self.end_ids = self.end_ids or frozenset([around[-1]])
        if not self.end_ids and tokenizer.eos_id is not None:
            self.end_ids = frozenset([tokenizer.eos_id])
        if not self.end_ids:
            raise UnsupportedError(
                "The model has no token that ends a text.", hint="Set eos_token_id in its config.json."
            )
        self.end_id = min(self.end_ids)
        self._settle_codes(tokenizer)

    def tokenize(
        self, dataset: Dataset, tokenizer: TextTokenizer, *, max_length: int, sink: Sink
    ) -> Mapping[str, Split[Any]]:
        """As for every task; tells of targets that the vocabulary cannot write."""
        splits = super().tokenize(dataset, tokenizer, max_length=max_length, sink=sink)
        rows = splits["train"].sequences
        if tokenizer.unk_id is not None and (lost := sum(tokenizer.unk_id in row.target for row in rows)):
            what = f"{lost} of {len(rows)} targets have characters that the model's vocabulary lacks"
            sink(Notice(f"{what}: it learns to leave them out.", "warning"))
        return splits

    def _settle_codes(self, tokenizer: TextTokenizer) -> None:
        wanted = (self.settings.src_lang, self.settings.tgt_lang)
        if marks := getattr(tokenizer, "marks", {}):
            if not wanted[1]:
                raise UsageError(
                    "This model is told with every text which language to write.",
                    hint=f"Give --tgt-lang, of: {', '.join(sorted(marks))}.",
                )
            self.mark = marks[find_language(wanted[1], marks)]
            return
        known = language_codes(tokenizer.control_ids.items())
        around = tokenizer.encode_whole("", max_length=8).ids.tolist() if known else []
        if not around or not {around[0], around[-1]} & {*known.values()}:
            if any(wanted) and not self.row_languages:
                raise UsageError(
                    f"A {self.raw['model_type']} has no language codes, and the rows have no column of a language.",
                    hint='Say it in front of every source, e.g. --prefix "translate English to German: ".',
                )
            return
        if not all(wanted):
            raise UsageError(
                "This model marks every text with its language.",
                hint=f"Give --src-lang and --tgt-lang, of: {', '.join(sorted(known))}.",
            )
        source, target = (find_language(language, known) for language in wanted)
        self.codes = (known[source], known[target])
        self.code_first = around[0] in known.values()
        # mBART-50 and NLLB ask their decoder for the code first; the first mBART starts its decoder with it.
        if not self.code_first:
            self.start_id = self.codes[1]

    # --- sequences

    def sequence(self, example: Rewritten, tokenizer: TextTokenizer, max_length: int) -> tuple[RewrittenSequence, bool]:
        """Source with its prefix, and target with its end."""
        if self.codes is not None:
            source, source_cut = self._coded(self.prefix + example.source, self.codes[0], tokenizer, max_length)
            target, target_cut = self._coded(example.target, self.codes[1], tokenizer, max_length)
            target = target if self.code_first else target[:-1]
        else:
            before = [] if self.mark is None else [self.mark]
            whole = tokenizer.encode_whole(self.prefix + example.source, max_length=max_length - len(before))
            source, source_cut = np.asarray([*before, *whole.ids], dtype=np.int32), whole.cut
            wanted = tokenizer.encode_target(example.target, max_length=max_length)
            target, target_cut = wanted.ids, wanted.cut
            if not len(target) or int(target[-1]) not in self.end_ids:
                target = np.append(target[: max_length - 1], np.int32(self.end_id))
        self.longest_target = max(self.longest_target, len(target))
        ids = np.concatenate([source, target]) if len(source) else source
        return RewrittenSequence(ids, source, target, example), source_cut or target_cut

    def _coded(self, text: str, code: int, tokenizer: TextTokenizer, max_length: int) -> tuple[Ids, bool]:
        ids = tokenizer.encode(text, add_special=False)
        kept = ids[: max_length - 2]
        around = [code, *kept, self.end_id] if self.code_first else [*kept, self.end_id, code]
        return np.asarray(around, dtype=np.int32), len(kept) < len(ids)

    def collate(self, sequences: Sequence[RewrittenSequence], device: torch.device) -> RowBatch:
        """Padded sources, padded targets, and the targets moved on by one as what the decoder reads."""
        import torch

        inputs = self.padded([sequence.source for sequence in sequences], device)
        targets, mask = pad_rows(
            [sequence.target for sequence in sequences], self.pad_id, device, most=self.most_places
        )
        starts = torch.full_like(targets[:, :1], self.start_id)
        inputs["decoder_input_ids"] = torch.cat([starts, targets[:, :-1]], dim=1)
        learned = sum(len(sequence.target) for sequence in sequences)
        return RowBatch(
            inputs=inputs,
            labels=targets.masked_fill(mask == 0, IGNORED),
            tokens=sum(len(sequence.ids) for sequence in sequences),
            learned_tokens=learned,
            denominator=learned,
            extra={},
        )

    def summed_loss(self, model: Any, batch: RowBatch) -> torch.Tensor:
        """Cross entropy over the targets' tokens, in f32."""
        import torch

        logits = model(**batch.inputs, use_cache=False).logits  # (rows, tokens, vocabulary)
        learned = batch.labels != IGNORED
        return torch.nn.functional.cross_entropy(logits[learned].float(), batch.labels[learned], reduction="sum")

    def predict(self, model: Any, batch: RowBatch) -> tuple[torch.Tensor, Sequence[Any]]:
        """The loss; texts are written in `measure`."""
        return self.summed_loss(model, batch), ()

    # --- measures

    @property
    def _texts(self) -> int:
        wanted = self.settings.eval_texts
        return EVAL_TEXTS if wanted < 0 else wanted

    @property
    def metrics(self) -> Mapping[str, bool]:
        """By the kind of text: translations by BLEU, summaries by ROUGE, answers by match."""
        return metrics.TEXT if self._texts else {}

    def measure(
        self, model: Any, sequences: Sequence[Any], said: Sequence[Any], tick: Callable[[int, int], None]
    ) -> Measured:
        """Write a text for some of the rows, greedily, and compare."""
        rows: list[RewrittenSequence] = chosen_rows(sequences, self._texts)
        if not rows:
            return Measured()
        starts: dict[str, Any] = {"decoder_start_token_id": self.start_id}
        if self.codes is not None and self.code_first:
            starts["forced_bos_token_id"] = self.codes[1]
        starts["bad_words_ids"] = model.generation_config.bad_words_ids
        written = greedy(
            model,
            [row.source for row in rows],
            most_tokens=max(len(row.target) for row in rows) + 8,
            end_ids=self.end_ids,
            pad_id=self.pad_id,
            starts=starts,
            tick=tick,
        )
        found = [self._tokenizer.decode_text(ids).strip() for ids in written]
        predictions = [
            {"source": row.example.source, "target": row.example.target, "predicted": text}
            for row, text in zip(rows, found, strict=True)
        ]
        measured = metrics.texts(found, [row.example.target for row in rows])
        first = _TOLD_FIRST.get(rows[0].example.kind, ())
        return Measured({name: measured[name] for name in (*first, *measured)}, predictions)

    def data_record(self) -> dict[str, Any]:
        """What goes around the texts."""
        record: dict[str, Any] = {"source_prefix": self.prefix}
        if self.codes is not None:
            record |= {"src_lang": self.settings.src_lang, "tgt_lang": self.settings.tgt_lang}
        if self.mark is not None:
            record["tgt_lang"] = self.settings.tgt_lang
        return record


def _direction(settings: TrainSettings, names: Collection[str]) -> tuple[str, str] | None:
    """Which language columns are source and target; None where the rows are not translations.

    `names` are the model's own for target languages ("deu"): one of them means the other column of two.
    """
    row = first_row(settings.data_paths)
    there = [] if row is None else languages(row)
    if row is None or not there or any(known.matches(present_columns(row)) for known in REWRITING):
        return None
    if not (settings.src_lang and settings.tgt_lang):
        raise DataError(
            f"The rows hold texts in {' and '.join(there)}, and do not say which is to be translated into which.",
            hint=f"Say it: --src-lang {there[0]} --tgt-lang {there[-1]}.",
        )
    source = _column(settings.src_lang, there)
    others = [name.lower() for name in there if name.lower() != source]
    if settings.tgt_lang in names and len(others) == 1:
        return source, others[0]
    return source, _column(settings.tgt_lang, there)


def _column(language: str, there: Sequence[str]) -> str:
    """The column of `language`: "de" and "de_DE" mean one another."""
    short = language.lower().split("_")[0].split("-")[0]
    for name in there:
        if name.lower() == language.lower() or name.lower().split("_")[0].split("-")[0] == short:
            return name.lower()
    raise UsageError(f"The rows have no language {language!r}.", hint=f"They have {', '.join(there)}.")
