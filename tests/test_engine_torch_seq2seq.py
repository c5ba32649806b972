"""Encoder-decoders in torch: the same texts as transformers' generate, greedily and in beams, with and without LoRA."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgetune.engine.beam import BeamSettings
from edgetune.engine.protocol import LoraSpec
from edgetune.engine.sampling import Sampling
from edgetune.engine.torch.engine import TorchEngine
from edgetune.engine.torch.group import Group
from tests.seq2seq_checkpoints import TEXTS, write_seq2seq

FAMILIES = ("t5", "flan-t5", "bart", "mbart", "mbart50", "bert2bert")
_GREEDY = Sampling(temp=0)


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_seq2seq(tmp_path_factory.mktemp(request.param) / request.param, request.param)


@pytest.fixture(scope="module")
def mbart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_seq2seq(tmp_path_factory.mktemp("one") / "mbart", "mbart")


def write_lora(directory: Path, base: Path, *, seed: int = 0, **settings: Any) -> Path:
    """A LoRA of every attention matrix, saved by PEFT, nothing in it zero."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSeq2SeqLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForSeq2SeqLM.from_pretrained(base)
        target = r".*\.(q|v|q_proj|v_proj|query|value)"
        config = LoraConfig(
            **{"task_type": "SEQ_2_SEQ_LM", "r": 4, "lora_alpha": 8, "target_modules": target, **settings}
        )
        peft_model = get_peft_model(model, config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in peft_model.named_parameters():
                if "lora_" in name:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(noise * parameter.shape[-1] ** -0.5 * (0.5 if "lora_B" in name else 1.0))
        peft_model.save_pretrained(directory)
    return directory


def reference(base: Path, adapter: Path | None, texts: list[str], **settings: Any) -> list[list[int]]:
    """What transformers' generate says, control tokens at the beginning and the end left out."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = AutoTokenizer.from_pretrained(base)
        model = AutoModelForSeq2SeqLM.from_pretrained(base)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, str(adapter))
        ends = model.generation_config.eos_token_id
        found = []
        for text in texts:
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            with torch.inference_mode():
                said = model.eval().generate(input_ids=ids, do_sample=False, **settings)[0].tolist()[1:]
            found.append(said[: said.index(ends)] if ends in said else said)
    return found


def said(engine: TorchEngine, texts: list[str], max_tokens: int, beams: BeamSettings | None = None) -> list[list[int]]:
    found = []
    for text in texts:
        generation = engine.generate(engine.tokenizer.encode(text), _GREEDY, max_tokens=max_tokens, beams=beams)
        assert "".join(generation) == generation.text
        found.append(generation.ids)
    return found


def test_greedy_texts_are_those_of_transformers(checkpoint: Path) -> None:
    with TorchEngine.open(checkpoint) as engine:
        found = said(engine, TEXTS, 12)
    assert found == reference(checkpoint, None, TEXTS, max_new_tokens=12, num_beams=1)
    # Neither the same for every source nor always cut at the limit, where the family lets chance do that.
    assert len({tuple(ids) for ids in found}) > 1
    assert checkpoint.name not in ("flan-t5", "mbart") or len({len(ids) for ids in found}) > 1


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 4},
        {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True},
        {"num_beams": 3, "length_penalty": 0.5, "early_stopping": "never"},
    ],
)
def test_beam_search_finds_what_transformers_finds(checkpoint: Path, settings: dict[str, Any]) -> None:
    texts = TEXTS[:20]
    with TorchEngine.open(checkpoint) as engine:
        found = said(engine, texts, 10, BeamSettings(**settings))
    assert found == reference(checkpoint, None, texts, max_new_tokens=10, **settings)


def test_with_an_adapter_as_with_peft(checkpoint: Path, tmp_path: Path) -> None:
    adapter = write_lora(tmp_path / "lora", checkpoint)
    texts = TEXTS[:20]
    with TorchEngine.open(checkpoint, lora=[LoraSpec(adapter)]) as engine:
        found = said(engine, texts, 10)
        beams = said(engine, texts[:8], 10, BeamSettings(4))
        engine.set_adapters([LoraSpec(adapter, 0.0)])
        off = said(engine, texts, 10)
    assert found == reference(checkpoint, adapter, texts, max_new_tokens=10, num_beams=1)
    assert beams == reference(checkpoint, adapter, texts[:8], max_new_tokens=10, num_beams=4)
    assert off == reference(checkpoint, None, texts, max_new_tokens=10, num_beams=1) != found


UNEVEN = [" ".join([text] * (1 + number % 3)) for number, text in enumerate(TEXTS[:12])]
"""Sources of very different lengths."""


def assert_same_together(
    engine: Any, sampling: Sampling, beams: BeamSettings | None, *, begin: Callable[[], None]
) -> None:
    """Replies that are run together are what each is alone; `begin` is called in between."""
    sources = [engine.tokenizer.encode(text) for text in UNEVEN]
    alone = [engine.generate(ids, sampling, max_tokens=8, beams=beams) for ids in sources]
    for one in alone:
        list(one)
    begin()
    together = [engine.generate(ids, sampling, max_tokens=8, beams=beams) for ids in sources]
    heard: dict[int, str] = {}
    for number, text in engine.run_together(together):
        heard[number] = heard.get(number, "") + text
    assert [(one.ids, one.text, one.finish_reason) for one in together] == [
        (one.ids, one.text, one.finish_reason) for one in alone
    ]
    assert heard == {number: one.text for number, one in enumerate(alone) if one.text}


@pytest.mark.parametrize(
    ("sampling", "beams"), [(_GREEDY, None), (_GREEDY, BeamSettings(3)), (Sampling(temp=1.2, seed=7), None)]
)
def test_replies_in_one_batch_are_what_they_are_alone(
    checkpoint: Path, sampling: Sampling, beams: BeamSettings | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    forward = Group.forward

    def counting(group: Group, ids: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        batches.append(len(ids))
        return forward(group, ids)

    monkeypatch.setattr(Group, "forward", counting)
    with TorchEngine.open(checkpoint) as engine:
        assert_same_together(engine, sampling, beams, begin=batches.clear)
    assert max(batches) == len(UNEVEN) * (beams.num_beams if beams else 1)


def test_a_reply_goes_on_by_itself_after_a_batch(mbart: Path) -> None:
    with TorchEngine.open(mbart) as engine:
        sources = [engine.tokenizer.encode(text) for text in UNEVEN[:3]]
        alone = ["".join(engine.generate(ids, _GREEDY, max_tokens=8)) for ids in sources]
        replies = [engine.generate(ids, _GREEDY, max_tokens=8) for ids in sources]
        next(iter(engine.run_together(replies)))
        for one in reversed(replies):
            list(one)
        assert [one.text for one in replies] == alone


def test_int8_texts_are_answered_one_by_one(mbart: Path) -> None:
    with TorchEngine.open(mbart, dtype="int8") as engine:
        sources = [engine.tokenizer.encode(text) for text in UNEVEN[:6]]
        alone = ["".join(engine.generate(ids, _GREEDY, max_tokens=8)) for ids in sources]
        replies = [engine.generate(ids, _GREEDY, max_tokens=8) for ids in sources]
        list(engine.run_together(replies))
        assert [one.text for one in replies] == alone
