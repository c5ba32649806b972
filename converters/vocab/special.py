"""Special token ids, what is added around a text, where generation stops, and the chat template."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from converters.errors import CorruptCheckpoint, UnsupportedModel
from converters.vocab.files import TokenizerFiles, token_text
from converters.vocab.tokens import STOP_TEXTS
from converters.writer import Value

_KEYS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",  # llama.cpp's spelling
    "pad": "padding_token_id",
    "cls": "cls_token_id",
    "mask": "mask_token_id",
}
_STOP_KEYS = ("eot_token_id", "eom_token_id", "fim_pad_token_id", "fim_rep_token_id", "fim_sep_token_id")
"""Besides the EOS, llama.cpp stops at the tokens named by these."""
_PRES_WITH_BOS = ("llama-bpe", "tekken")
"""Pre-tokenizers under which llama.cpp adds a BOS unless told not to."""


def read_special(files: TokenizerFiles, vocabulary: Mapping[str, Value], tokens: Mapping[str, int]) -> dict[str, Value]:
    """The `tokenizer.*` keys beside the `vocabulary` itself; `tokens` maps texts to ids."""
    ids = _special_ids(files, tokens)
    before, after = _added_around(files, ids, tokens)
    ids = {**ids, **{kind: number for kind, number in (("bos", before), ("eos", after)) if number is not None}}
    stops = [number for number in _stop_ids(files) if number < len(tokens)]
    if "eos" not in ids and stops:
        ids["eos"] = stops[0]
    if "eos" not in ids and vocabulary["tokenizer.ggml.model"] == "gpt2":
        # llama.cpp would take token 11 for the end of the text.
        ids["eos"] = ids.get("pad", ids.get("bos", _unused(tokens)))
    keys: dict[str, Value] = {f"tokenizer.ggml.{_KEYS[kind]}": number for kind, number in ids.items()}
    keys |= _stop_keys(stops, ids, tokens)
    keys |= _flags(files, vocabulary, before is not None, after is not None)
    for side in ("rstrip", "lstrip"):
        stripping = [
            token.id for token in files.added_tokens.values() if getattr(token, side) and token.id < len(tokens)
        ]
        if stripping:
            keys[f"edgetune.tokenizer.{side}_tokens"] = stripping
    if template := read_template(files):
        keys["tokenizer.chat_template"] = template
    if tool_template := _read_tool_template(files):
        keys["tokenizer.chat_templates"] = ["tool_use"]
        keys["tokenizer.chat_template.tool_use"] = tool_template
    return keys


def read_template(files: TokenizerFiles) -> str | None:
    """The default chat template, wherever the directory keeps it."""
    path = files.model_dir / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    for values in (files.read_json("chat_template.json"), files.config):
        template = values.get("chat_template")
        if isinstance(template, list):
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, Mapping)}
            template = named.get("default") or next(iter(named.values()), None)
        if isinstance(template, str) and template:
            return template
    return None


def _read_tool_template(files: TokenizerFiles) -> str | None:
    """The template named "tool_use", which takes the place of the default one where there are tools."""
    path = files.model_dir / "additional_chat_templates" / "tool_use.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    listed = files.config.get("chat_template")
    if not isinstance(listed, list) or (files.model_dir / "chat_template.jinja").is_file():
        return None
    return next((entry["template"] for entry in listed if entry.get("name") == "tool_use"), None)


def _special_ids(files: TokenizerFiles, tokens: Mapping[str, int]) -> dict[str, int]:
    config = files.read_json("config.json")
    config = {**config, **(config.get("text_config") or {})}
    ids = {}
    for kind in _KEYS:
        text = token_text(files.config.get(f"{kind}_token"))
        number = tokens.get(text) if text is not None else None
        if number is None:
            number = next(_numbers(config.get(f"{kind}_token_id")), None)
        if number is not None and number < len(tokens):
            ids[kind] = number
    return ids


def _added_around(
    files: TokenizerFiles, ids: Mapping[str, int], tokens: Mapping[str, int]
) -> tuple[int | None, int | None]:
    """The ids put before and after a text, as transformers does; None for nothing."""
    if not files.has("tokenizer.json") and "post_processor" not in files.tokenizer:
        # Beside a tokenizer.json, transformers does not read these flags; its post-processor says it all.
        named = {kind: token_text(files.config.get(f"{kind}_token")) is not None for kind in ("bos", "eos")}
        wanted = {kind: bool(files.config.get(f"add_{kind}_token")) and named[kind] for kind in ("bos", "eos")}
        return (ids.get("bos") if wanted["bos"] else None), (ids.get("eos") if wanted["eos"] else None)
    before, after = _template_tokens(files.tokenizer.get("post_processor"))
    if len(before) > 1 or len(after) > 1:
        raise UnsupportedModel(
            f"The tokenizer adds {[*before, *after]} around a text; llama.cpp adds one token on a side."
        )
    unknown = next((text for text in (*before, *after) if text not in tokens), None)
    if unknown is not None:
        raise CorruptCheckpoint(f"The tokenizer adds {unknown!r} to every text, which is not in its vocabulary.")
    return (tokens[before[0]] if before else None), (tokens[after[0]] if after else None)


def _template_tokens(processor: Any) -> tuple[list[str], list[str]]:
    """The special tokens a post-processor of tokenizer.json puts before and after a text."""
    before: list[str] = []
    after: list[str] = []
    if not isinstance(processor, Mapping):
        return before, after
    for step in processor.get("processors") or [processor]:
        kind = step.get("type")
        if kind in ("RobertaProcessing", "BertProcessing"):
            before, after = [str(step["cls"][0])], [str(step["sep"][0])]
        elif kind == "TemplateProcessing":
            before, after = [], []
            side = before
            for part in step.get("single") or []:
                if "Sequence" in part:
                    side = after
                else:
                    side.append(str(part["SpecialToken"]["id"]))
        elif kind != "ByteLevel":
            raise UnsupportedModel(f"The tokenizer's post-processor {kind} is not one that llama.cpp has.")
    return before, after


def _stop_ids(files: TokenizerFiles) -> list[int]:
    """Where generation stops, by generation_config.json and config.json."""
    config = files.read_json("config.json")
    generation = files.read_json("generation_config.json").get("eos_token_id")
    wanted = generation if generation is not None else config.get("eos_token_id")
    return list(dict.fromkeys(_numbers(wanted)))


def _stop_keys(stops: Iterable[int], ids: Mapping[str, int], tokens: Mapping[str, int]) -> dict[str, Value]:
    known = {tokens[text] for text in STOP_TEXTS if text in tokens} | {ids.get("eos", -1)}
    more = [number for number in stops if number not in known]
    if len(more) > len(_STOP_KEYS):
        raise UnsupportedModel(
            f"The model stops at {len(more) + 1} tokens; llama.cpp has room for {len(_STOP_KEYS) + 1}."
        )
    return {f"tokenizer.ggml.{key}": number for key, number in zip(_STOP_KEYS, more, strict=False)}


def _flags(files: TokenizerFiles, vocabulary: Mapping[str, Value], before: bool, after: bool) -> dict[str, Value]:
    """Whether BOS and EOS are added, said where the files say it or llama.cpp would suppose otherwise."""
    said = {kind: isinstance(files.config.get(f"add_{kind}_token"), bool) for kind in ("bos", "eos")}
    processed = "ByteLevel" in repr(files.tokenizer.get("post_processor"))
    supposed = vocabulary["tokenizer.ggml.model"] == "llama" or vocabulary["tokenizer.ggml.pre"] in _PRES_WITH_BOS
    keys: dict[str, Value] = {}
    if before or said["bos"] or processed or supposed:
        keys["tokenizer.ggml.add_bos_token"] = before
    if after or said["eos"] or processed:
        keys["tokenizer.ggml.add_eos_token"] = after
    return keys


def _unused(tokens: Mapping[str, int]) -> int:
    padding = [number for text, number in tokens.items() if text == f"[PAD{number}]"]
    if not padding:
        raise UnsupportedModel(
            "The tokenizer and config.json name no token that ends a text, which llama.cpp needs.",
            hint='Add "eos_token" to tokenizer_config.json.',
        )
    return padding[0]


def _numbers(value: object) -> Iterator[int]:
    values = value if isinstance(value, list) else [value]
    return (number for number in values if isinstance(number, int) and not isinstance(number, bool) and number >= 0)
