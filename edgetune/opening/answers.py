"""Texts → replies, whatever kind of model answers: a prompt in its chat template, or a source with its task.

What was not asked for is the model's own: an encoder-decoder takes the likeliest token each time, or searches with the
beams that its generation_config.json names, and ends at the length that one names.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from edgetune.engine.beam import BeamSettings
from edgetune.engine.protocol import Generation
from edgetune.engine.sampling import Sampling
from edgetune.errors import UsageError
from edgetune.opening.prompting import Prompting, trained_prompting
from edgetune.opening.writers import Writer

AT_ONCE = 256
"""Texts that an encoder-decoder's engine is given together, to put into batches."""

Messages = Sequence[Mapping[str, Any]]
_SAMPLING = frozenset(field.name for field in fields(Sampling))


class Answers:
    """What is done with every text, settled once."""

    def __init__(
        self,
        model: Writer,
        sampling: Sampling,
        *,
        asked: Collection[str] = (),
        beams: Mapping[str, Any] | None = None,
        max_tokens: int = -1,
        stop: Sequence[str] = (),
        prompting: Prompting | None = None,
        raw: bool = False,
        system: str = "",
    ) -> None:
        """`asked` are the fields of `sampling` that somebody set, `beams` the fields of `BeamSettings`.

        Raises `UsageError` for what this kind of model has no use for.
        """
        self.model = model
        self.notices: list[str] = []
        """What is done that nobody asked for, or was not asked for and matters."""
        self._prompting, self._raw, self._system = prompting or Prompting(), raw, system
        self._settings: dict[str, Any] = {"max_tokens": max_tokens, "stop": tuple(stop)}
        if search := _beams(model, beams or {}, _SAMPLING.intersection(asked) - {"seed"}):
            self._settings["beams"] = search
        if model.is_encoder_decoder:
            if not _SAMPLING.intersection(asked):
                sampling = replace(sampling, temp=0.0)
            if max_tokens < 0:
                self._settings["max_tokens"] = model.limit
            if raw or system:
                what = "--raw" if raw else "--system"
                raise UsageError(f"{what} is for models that chat; this one answers a text.", hint="Leave it out.")
            if self._prompting == Prompting():
                self._prompting = self._as_trained()
            self._prompting.check(model.family, self._languages)
        elif self._prompting != Prompting():
            raise UsageError(
                "--task, --context and languages are for encoder-decoders.", hint="Write the task into the prompt."
            )
        self._sampling = sampling

    def begin(self, text: str | tuple[str, str] | Messages) -> Generation:
        """The reply to `text`, not begun yet: a prompt or a conversation; a source, or a question with its context."""
        if self.model.is_encoder_decoder:
            return self._answer(text)
        ids = self._prompt_ids(text)
        generation: Generation = self.model.engine.generate(ids, self._sampling, **self._settings)
        return generation

    def _answer(self, text: Any) -> Generation:
        if not isinstance(text, (str, tuple)):
            raise UsageError("An encoder-decoder answers a text, not a conversation.", hint="Give it a text.")
        engine, settings = self.model.engine, dict(self._settings)
        source = self._prompting.source(text, family=self.model.family)
        reads, writes = self._prompting.source_language, self._prompting.target_language
        if getattr(engine.tokenizer, "reads_target_language", False):
            reads, writes = writes, ""
        if self._languages and writes:
            settings["language"] = writes
        if self._languages and reads:
            ids = engine.tokenizer.encode_source(source, language=reads)
        else:
            ids = engine.tokenizer.encode(source)
        generation: Generation = engine.generate(ids, self._sampling, **settings)
        return generation

    def _as_trained(self) -> Prompting:
        """What stood around the texts that the adapter, or the merged model, was trained on."""
        engine = self.model.engine
        found = trained_prompting([*(one.path for one in engine.adapters if one.scale), engine.path]) or Prompting()
        if found.prefix:
            self.notices.append(f"As in training, every text begins with {found.prefix!r}.")
        if found.target_language:
            reads = f"from {found.source_language} " if found.source_language else ""
            self.notices.append(f"As in training, {reads}to {found.target_language}.")
        elif self._languages and not self._has_own_language():
            self.notices.append("This model writes in several languages; --tgt-lang says in which.")
        return found

    def _has_own_language(self) -> bool:
        """Whether the model's settings name the language it writes in."""
        config, codes = getattr(self.model.engine, "generation_config", {}), self._languages.values()
        return any(config.get(name) in codes for name in ("forced_bos_token_id", "decoder_start_token_id"))

    @property
    def _languages(self) -> Mapping[str, int]:
        languages: Mapping[str, int] = getattr(self.model.engine.tokenizer, "languages", {})
        return languages

    def _prompt_ids(self, prompt: Any) -> list[int]:
        template, tokenizer = None if self._raw else self.model.template, self.model.engine.tokenizer
        if template is None:
            if self._system:
                raise UsageError("Without a chat template there is no system prompt.", hint="Leave out --system.")
            if not isinstance(prompt, str):
                raise UsageError("Without a chat template there are no turns.", hint="Give the text to continue.")
            return list(tokenizer.encode(prompt))
        turns: list[Mapping[str, Any]] = [{"role": "system", "content": self._system}] if self._system else []
        turns += [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return list(tokenizer.encode_rendered(template.render(turns, add_generation_prompt=True)))


def _beams(model: Writer, asked: Mapping[str, Any], samples: Collection[str]) -> BeamSettings | None:
    """The beam search to make, by what was asked for or by the model's own settings; None for none."""
    if model.name == "llama.cpp" and not model.is_encoder_decoder:
        if asked.get("num_beams", 1) > 1:
            raise UsageError(
                "Beam search runs on encoder-decoders, and on decoders in torch.", hint="Leave out --num-beams."
            )
        return None
    own = model.beams
    if samples and "num_beams" not in asked:
        own = replace(own, num_beams=1)
    found = replace(own, **asked)
    if samples and found.num_beams > 1:
        raise UsageError(
            f"A beam search does not sample, so --{min(samples).replace('_', '-')} means nothing to it.",
            hint="Leave it out, or --num-beams.",
        )
    if found.num_beams == 1 and asked.keys() - {"num_beams"}:
        raise UsageError("--length-penalty and --early-stopping are for a beam search.", hint="Add --num-beams 4.")
    return found if found.num_beams > 1 else None
