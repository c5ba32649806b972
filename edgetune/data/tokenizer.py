"""A Hugging Face tokenizer as training needs it: text stays text, control tokens come from the template alone.

Wraps transformers' fast tokenizer (local files only, never remote code). Encodes in parts, so that a reply's tokens
start exactly where the tokens of its prompt end. The engine's tokenizer does the same from a GGUF, with equal ids.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgetune.byte_tokenizer import reads_bytes, with_fast_form
from edgetune.errors import CorruptFileError, UnsupportedError
from edgetune.fingerprint import read_chat_template
from edgetune.plain_text import text_only
from edgetune.sentence_modules import lower_cases
from edgetune.template import ChatTemplate, Rendered, split_control
from edgetune.text_pairs import PairLayout


@dataclass(frozen=True)
class Whole:
    """A text, or a pair of texts, as an encoder takes it."""

    ids: NDArray[np.int32]
    type_ids: NDArray[np.int32]
    """Which text each id is of: 0 or 1, where the tokenizer tells them apart."""
    cut: bool
    """Whether something was left out to fit."""


class Text(NamedTuple):
    """A stretch of text to be encoded by itself."""

    text: str
    first: bool = False
    """Whether it stands at the very start."""
    continues: bool = False
    """Whether it goes on from other text: nothing is put in front of it."""


@dataclass(frozen=True)
class TextTokenizer:
    """Text → token ids, equal to what Hugging Face makes of it unless a message spells a control token."""

    backend: Any
    """The `tokenizers.Tokenizer`, as transformers set it up."""
    control_ids: dict[str, int]
    """Control tokens' texts → ids: never made from what a message says."""
    eos_id: int | None
    eog_ids: frozenset[int]
    """Every id that ends a generation: config, generation config and tokenizer together."""
    chat_template: ChatTemplate | None = None
    _strips: dict[str, tuple[bool, bool]] = field(default_factory=dict)
    """Control tokens that swallow white space: text → (on the left, on the right)."""

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Ids of `text`; all of it is text, also where it spells a control token. `add_special` puts BOS in front."""
        (ids,) = self.encode_texts([Text(text, first=True)])
        return [*self.prefix_ids, *ids] if add_special else ids

    def encode_whole(self, first: str, second: str | None = None, *, max_length: int) -> Whole:
        """A text, or a pair, between the tokens that the tokenizer puts around texts, cut to `max_length` ids.

        All of it is text, as in `encode`. The longer text of a pair is cut first.
        """
        if second is not None:
            left, right = (self._starting.encode(text, add_special_tokens=False).ids for text in (first, second))
            pair = self._pair_layout.join(left, right, max_length)
            return Whole(np.asarray(pair.ids, np.int32), np.asarray(pair.types, np.int32), pair.is_cut)
        part = self._starting.encode(first, add_special_tokens=False)
        room = max(0, max_length - self.backend.num_special_tokens_to_add(False))
        cut = len(part.ids) > room
        part.truncate(room)
        whole = self.backend.post_process(part, add_special_tokens=True)
        return Whole(np.asarray(whole.ids, dtype=np.int32), np.asarray(whole.type_ids, dtype=np.int32), cut)

    def encode_target(self, text: str, *, max_length: int) -> Whole:
        """A text to be written: as `encode_whole`."""
        return self.encode_whole(text, max_length=max_length)

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of `text` that directly continues other text: nothing is put in front of it."""
        return self.encode_texts([Text(text, continues=True)])[0]

    def encode_rendered(self, rendered: Rendered) -> list[int]:
        """Ids of a rendered template: its own control tokens are parsed, those that messages spell are not."""
        return self.encode_parts(rendered, ())[0]

    def encode_parts(self, rendered: Rendered, splits: Sequence[int]) -> list[list[int]]:
        """Ids of `rendered`, apart at each of `splits` (ascending positions in its text): one list more than splits.

        No token spans a split: the ids before it are exactly those of the text before it.
        """
        return self.encode_all_parts([(rendered, splits)])[0]

    def encode_all_parts(self, items: Sequence[tuple[Rendered, Sequence[int]]]) -> list[list[list[int]]]:
        """`encode_parts` of each of `items`, on as many cores as there are."""
        found = self._encode_pieces(items)
        uncut = [index for index, (rendered, _) in enumerate(items) if not rendered.cuts]
        wholes = _encode_batch(self.backend, [items[index][0].text for index in uncut])
        odd = []
        for index, ids in zip(uncut, wholes, strict=True):
            if not items[index][1]:
                found[index] = [ids]
            elif [*chain.from_iterable(found[index])] != ids:
                odd.append((index, ids))
        unsplit = self._encode_pieces([(items[index][0], ()) for index, _ in odd])
        for (index, ids), pieces in zip(odd, unsplit, strict=True):
            if pieces[0] != ids:
                found[index] = self._own_parts(*items[index])
        return found

    def _own_parts(self, rendered: Rendered, splits: Sequence[int]) -> list[list[int]]:
        """With a tokenizer whose pieces do not add up (e.g. it normalises across control tokens): its own ids."""
        whole = self.backend.encode(rendered.text, add_special_tokens=False)
        parts: list[list[int]] = [[] for _ in range(len(splits) + 1)]
        for index, (begin, _) in zip(whole.ids, whole.offsets, strict=True):
            parts[bisect_right(splits, begin)].append(index)
        return parts

    def _encode_pieces(self, items: Sequence[tuple[Rendered, Sequence[int]]]) -> list[list[list[int]]]:
        """Each rendering's control tokens and the texts between them, apart at its splits."""
        pieces = [self._pieces(*item) for item in items]
        every = chain.from_iterable(chain.from_iterable(pieces))
        ids = iter(self.encode_texts([piece for piece in every if isinstance(piece, Text)]))

        def flat(part: Sequence[int | Text]) -> list[int]:
            return [*chain.from_iterable((piece,) if isinstance(piece, int) else next(ids) for piece in part)]

        return [[flat(part) for part in parts] for parts in pieces]

    def _pieces(self, rendered: Rendered, splits: Sequence[int]) -> list[list[int | Text]]:
        parts: list[list[int | Text]] = [[]]
        waiting = list(splits)
        position, strip_next = 0, False
        pieces = split_control(rendered, self.control_texts)
        for index, (text, is_control) in enumerate(pieces):
            end = position + len(text)
            if is_control:
                while waiting and waiting[0] <= position:
                    waiting.pop(0)
                    parts.append([])
                parts[-1].append(self.control_ids[text])
                strip_next = self._strips.get(text, (False, False))[1]
            else:
                left = self._strips.get(pieces[index + 1][0], (False, False))[0] if index + 1 < len(pieces) else False
                begin = position + (len(text) - len(text.lstrip()) if strip_next else 0)
                stop = end - (len(text) - len(text.rstrip()) if left else 0)
                _split_text(rendered.text, (begin, max(begin, stop)), waiting, parts, first=position == 0)
                strip_next = False
            position = end
        return parts + [[] for _ in waiting]

    def encode_texts(self, texts: Sequence[Text]) -> list[list[int]]:
        """Ids of each of `texts`, all of them text; those that come again are encoded once."""
        known: dict[Text, list[int]] = {text: [] for text in texts}
        by_variant: dict[str, list[Text]] = {}
        for text in (text for text in known if text.text):
            variant = "_continuing" if text.continues else "_starting" if text.first else "_following"
            by_variant.setdefault(variant, []).append(text)
        for variant, mine in by_variant.items():
            ids = _encode_batch(getattr(self, variant), [text.text for text in mine])
            known.update(zip(mine, ids, strict=True))
        return [known[text] for text in texts]

    @cached_property
    def control_texts(self) -> frozenset[str]:
        """The control tokens' texts."""
        return frozenset(self.control_ids)

    @property
    def unk_id(self) -> int | None:
        """What stands for text that the vocabulary lacks; None where it lacks none."""
        return next((self.control_ids[name] for name in ("<unk>", "[UNK]") if name in self.control_ids), None)

    @property
    def identity(self) -> str:
        """The same for tokenizers that make the same ids of the same texts."""
        return f"tokenizers {version('tokenizers')} {self.backend.to_str()}"

    @cached_property
    def prefix_ids(self) -> tuple[int, ...]:
        """What the tokenizer puts in front of every text, e.g. BOS."""
        bare = self.backend.encode("a", add_special_tokens=False).ids
        full = self.backend.encode("a", add_special_tokens=True).ids
        begin = next((at for at in range(len(full)) if full[at : at + len(bare)] == bare), 0)
        return tuple(full[:begin])

    @cached_property
    def _pair_layout(self) -> PairLayout:
        sample = self.backend.encode("a", "a")
        return PairLayout.of(sample.ids, sample.type_ids, sample.sequence_ids)

    @cached_property
    def _starting(self) -> Any:
        """For text at the very start: control tokens in it are text."""
        return self._variant(prepend="")

    @cached_property
    def _following(self) -> Any:
        """For text after a control token: a prefix space that belongs to the start of the text alone is not added."""
        return self._variant(prepend="first")

    @cached_property
    def _continuing(self) -> Any:
        """For text that continues text: no prefix space at all."""
        return self._variant(prepend="all")

    def _variant(self, *, prepend: str) -> Any:
        from tokenizers import Tokenizer

        values = {**text_only(json.loads(self.backend.to_str()), self.control_ids), "post_processor": None}
        if prepend:
            values["pre_tokenizer"] = _without_prefix(values["pre_tokenizer"], only_first=prepend == "first")
        if prepend == "all":
            values["normalizer"] = _without_prefix(values["normalizer"], only_first=False)
        variant = Tokenizer.from_str(json.dumps(values))
        variant.encode_special_tokens = True
        return variant

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, control tokens written out."""
        return str(self.backend.decode(list(ids), skip_special_tokens=False))

    def decode_text(self, ids: Sequence[int]) -> str:
        """The text of `ids` without control tokens."""
        return str(self.backend.decode(list(ids), skip_special_tokens=True))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Each id's own share of the text. A character spread over several ids is written at its last one."""
        pieces = []
        for end in range(1, len(ids) + 1):
            # A window suffices: no character is spread over more tokens than its UTF-8 has bytes.
            window, before = self.decode(ids[max(0, end - 12) : end]), self.decode(ids[max(0, end - 12) : end - 1])
            settled = before.rstrip("\ufffd")
            pieces.append("" if window.endswith("\ufffd") or not window.startswith(settled) else window[len(settled) :])
        return pieces


def load_tokenizer(model_dir: Path, *, chat_template: str | None = None, now: datetime | None = None) -> TextTokenizer:
    """The tokenizer of a Hugging Face directory; `chat_template` (Jinja source) replaces the model's own.

    `now` is the date that templates write which write one (Llama 3); None: today's.

    Raises `CorruptFileError` when its files are broken, `UnsupportedError` when it has none or needs code of its own.
    """
    tokenizer = _load_fast(model_dir)
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    if lower_cases(model_dir):
        from tokenizers import normalizers

        own = [backend.normalizer] if backend.normalizer else []
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])
    added = list(tokenizer.added_tokens_decoder.items())
    special = set(tokenizer.all_special_tokens)
    control = {
        token.content: index
        for index, token in added
        if token.special or token.content in special or looks_like_control(token.content)
    }
    source = chat_template if chat_template is not None else read_chat_template(model_dir)
    tool_source = "" if chat_template is not None else _tool_template(model_dir)
    names = {name: str(value) for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    return TextTokenizer(
        backend=backend,
        control_ids=control,
        eos_id=tokenizer.eos_token_id,
        eog_ids=frozenset(_eog_ids(model_dir, tokenizer.eos_token_id)),
        chat_template=ChatTemplate(source, names, frozenset(control), now, tool_source) if source else None,
        _strips={token.content: (token.lstrip, token.rstrip) for _, token in added if token.lstrip or token.rstrip},
    )


def _encode_batch(backend: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each of `texts`; `tokenizers` takes all cores for several, unless TOKENIZERS_PARALLELISM says no."""
    if len(texts) <= 1:
        return [backend.encode(text, add_special_tokens=False).ids for text in texts]
    return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def _split_text(
    text: str, span: tuple[int, int], waiting: list[int], parts: list[list[int | Text]], *, first: bool
) -> None:
    """Put `text` within `span` into the last of `parts`, and into new ones from each of the `waiting` splits on."""
    begin, end = span
    continues = False
    while begin < end:
        while waiting and waiting[0] <= begin:
            waiting.pop(0)
            parts.append([])
        stop = min(end, waiting[0]) if waiting else end
        parts[-1].append(Text(text[begin:stop], first, continues))
        begin, continues = stop, True


STOP_TEXTS = frozenset(
    (
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
        *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<eos>"),
        *("<end_of_utterance>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~["),
    )
)
"""Texts of tokens at which llama.cpp stops, and which chat therefore never makes from a message; nor does training."""


def looks_like_control(text: str) -> bool:
    """Whether an added token not marked special is a control token all the same, by llama.cpp's convention of names."""
    return (
        (text.startswith("<|") and text.endswith("|>"))
        or (text.startswith("<｜") and text.endswith("｜>"))
        or (text.startswith("<unused") and text.endswith(">"))
        or text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or text in STOP_TEXTS
    )


_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt")


def has_tokenizer(model_dir: Path) -> bool:
    """Whether a model has files that a tokenizer is loaded from."""
    return reads_bytes(model_dir) or any((model_dir / name).is_file() for name in _FILES)


def _load_fast(model_dir: Path) -> Any:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    hint = (
        "Copy the model's tokenizer.json into the directory; Marian needs source.spm, target.spm and vocab.json. "
        "Families without them (ProphetNet) run in transformers itself."
    )
    if not has_tokenizer(model_dir):
        raise UnsupportedError(f"{model_dir} has no tokenizer.", hint=hint)
    try:
        slow_or_fast = transformers.AutoTokenizer.from_pretrained(
            model_dir, local_files_only=True, trust_remote_code=False
        )
        tokenizer = with_fast_form(slow_or_fast)
    except Exception as error:  # tokenizers raises bare Exception for a broken tokenizer.json
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise CorruptFileError(f"The tokenizer in {model_dir} cannot be loaded: {reason}.", hint=hint) from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise UnsupportedError(
            f"{model_dir} has a tokenizer of type {type(tokenizer).__name__}, which has no fast form.", hint=hint
        )
    return tokenizer


def _tool_template(model_dir: Path) -> str:
    """The template that transformers takes where there are tools: the one named "tool_use", if the model has one."""
    path = model_dir / "additional_chat_templates" / "tool_use.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    if (model_dir / "chat_template.jinja").is_file() or not (model_dir / "tokenizer_config.json").is_file():
        return ""
    listed = json.loads((model_dir / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template")
    entries = listed if isinstance(listed, list) else []
    return next((str(entry["template"]) for entry in entries if entry.get("name") == "tool_use"), "")


def _eog_ids(model_dir: Path, eos_id: int | None) -> set[int]:
    ids = {eos_id} if eos_id is not None else set()
    for name in ("config.json", "generation_config.json"):
        path = model_dir / name
        if not path.is_file():
            continue
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            found = values.get("eos_token_id", (values.get("text_config") or {}).get("eos_token_id"))
        except (ValueError, AttributeError) as error:
            raise CorruptFileError(f"{path} is not valid JSON: {error}.") from error
        ids |= {index for index in (found if isinstance(found, list) else [found]) if isinstance(index, int)}
    return ids


def _without_prefix(component: Any, *, only_first: bool) -> Any:
    """`component` (a normalizer or pre-tokenizer in tokenizer.json's terms) without its prefix space."""
    if not isinstance(component, dict):
        return component
    if component["type"] == "Sequence":
        key = "normalizers" if "normalizers" in component else "pretokenizers"
        kept = [_without_prefix(child, only_first=only_first) for child in component[key]]
        return {**component, key: [child for child in kept if child is not None]}
    if component["type"] == "Metaspace" and (not only_first or component.get("prepend_scheme") == "first"):
        return {**component, "prepend_scheme": "never"}
    if component["type"] == "ByteLevel" and not only_first:
        return {**component, "add_prefix_space": False}
    if component["type"] == "Prepend" and not only_first:
        return None
    return component
