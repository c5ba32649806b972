"""A package that adds a task to edgetune: what is known of the things a prompt names is put in front of it.

The facts are triples, subject TAB relation TAB object, one a line, in the file that `--option facts=FILE` names. Rows
are those of chat and completion. Registered as "with-facts" in the entry point group "edgetune.tasks".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

from edgetune.data import Dataset
from edgetune.data.formats import Conversation, Pair
from edgetune.errors import DataError, UsageError
from edgetune.events import Notice, Sink
from edgetune.training import TrainSettings
from edgetune.training.tasks.causal import CausalTask

Facts = Mapping[str, list[str]]
"""Subject → what is known of it, in sentences."""


class WithFacts(CausalTask):
    """Next-token prediction behind a prompt with facts."""

    options: ClassVar[Mapping[str, str]] = {"facts": "a file of triples, subject TAB relation TAB object"}

    def __init__(self, name: str) -> None:
        super().__init__("auto")

    def read(self, settings: TrainSettings, model_dir: Path, *, has_template: bool, sink: Sink) -> Dataset:
        """The rows, each with the facts on what it names."""
        if "facts" not in settings.option:
            raise UsageError("--task with-facts takes a file of triples.", hint="Give it with --option facts=FILE.")
        facts, digest = read_facts(Path(settings.option["facts"]))
        dataset = super().read(settings, model_dir, has_template=has_template, sink=sink)
        self.name = "with-facts"
        examples, found = {}, 0
        for split, rows in dataset.examples.items():
            examples[split] = [(place, inform(example, facts)) for place, example in rows]
            found += sum(new is not old for (_, new), (_, old) in zip(examples[split], rows, strict=True))
        sink(Notice(f"{found} examples name something that facts are known of."))
        both = sha256(f"{dataset.sha256} {digest}".encode()).hexdigest()
        return replace(dataset, examples=examples, sha256=both)


def read_facts(path: Path) -> tuple[Facts, str]:
    """The triples of a file as sentences, and the file's SHA-256. Raises `UsageError` or `DataError`."""
    try:
        raw = path.read_bytes()
        lines = raw.decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The facts {path} cannot be read: {error}.") from error
    facts: dict[str, list[str]] = {}
    for number, line in enumerate(lines, 1):
        triple = line.split("\t")
        if len(triple) != 3 or not all(triple):
            raise DataError(f"{path}:{number}: expected subject TAB relation TAB object, found {line!r}.")
        facts.setdefault(triple[0].lower(), []).append(" ".join(triple) + ".")
    return facts, sha256(raw).hexdigest()


def inform(example: Any, facts: Facts) -> Any:
    """`example` with the facts on the words of its prompt in front of that; the very same where none is known."""
    if isinstance(example, Pair):
        known = _known(example.prompt, facts)
        return replace(example, prompt=f"{known}\n{example.prompt}") if known else example
    if isinstance(example, Conversation):
        messages = list(example.messages)
        asked = next((at for at, message in enumerate(messages) if message["role"] == "user"), None)
        known = _known(messages[asked]["content"], facts) if asked is not None else ""
        if asked is not None and known:
            messages[asked] = {**messages[asked], "content": f"{known}\n{messages[asked]['content']}"}
            return replace(example, messages=tuple(messages))
    return example


def _known(text: str, facts: Facts) -> str:
    words = dict.fromkeys(re.findall(r"\w+", text.lower()))
    return " ".join(fact for word in words for fact in facts.get(word, ()))
