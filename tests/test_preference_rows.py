"""Rows of preferences: the layouts they come in, what is wrong with some, and which ids they become."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetune.chat import Node, Tree
from edgetune.chat.exports import export
from edgetune.data.messages import RowError
from edgetune.data.preferences import Judged, Preference, judged_rows, paired_rows, preference_task, reply_text
from edgetune.errors import DataError
from edgetune.events import Event, Notice
from edgetune.training import TrainSettings, prepare
from tests.checkpoints import write_checkpoint
from tests.task_models import write_rows

pytestmark = pytest.mark.filterwarnings("ignore")

USER = {"role": "user", "content": "Hi"}
HUMAN = {"from": "human", "value": "Hi"}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


PAIRED: list[dict[str, Any]] = [
    {"prompt": "Hi", "chosen": "good", "rejected": "bad"},
    {"Prompt": "Hi", "Chosen": "good", "Rejected": "bad"},
    {"prompt": [USER], "chosen": [assistant("good")], "rejected": [assistant("bad")]},
    {"prompt": [USER], "chosen": assistant("good"), "rejected": assistant("bad")},
    {"prompt": [USER], "chosen": "good", "rejected": "bad"},
    {"messages": [USER], "chosen": assistant("good"), "rejected": assistant("bad")},
    {"conversations": [HUMAN], "chosen": {"from": "gpt", "value": "good"}, "rejected": {"from": "gpt", "value": "bad"}},
    {"prompt": [USER], "chosen": "good", "rejected": [assistant("bad")]},
    {"instruction": "Hi", "input": "", "chosen": "good", "rejected": "bad"},
    {"question": "Hi", "chosen": "good", "rejected": "bad"},
    {"chosen": [USER, assistant("good")], "rejected": [USER, assistant("bad")]},
    {"prompt": "Hi", "chosen": [USER, assistant("good")], "rejected": [USER, assistant("bad")]},
    {"prompt": [USER], "chosen": [USER, assistant("good")], "rejected": [USER, assistant("bad")]},
    {
        "input": {"messages": [USER], "tools": [], "parallel_tool_calls": True},
        "preferred_output": [assistant("good")],
        "non_preferred_output": [assistant("bad")],
    },
]

JUDGED: list[dict[str, Any]] = [
    {"prompt": "Hi", "completion": "good", "label": True},
    {"prompt": [USER], "completion": [assistant("good")], "label": True},
    {"prompt": "Hi", "response": "good", "label": "True"},
    {"instruction": "Hi", "output": "good", "kto_tag": True},
    {"messages": [USER, assistant("good")], "label": True},
    {"conversations": [HUMAN, {"from": "gpt", "value": "good"}], "label": True},
]


@pytest.mark.parametrize("row", PAIRED, ids=lambda row: "-".join(map(str, row)))
def test_pairs_mean_the_same_in_every_layout(row: dict[str, Any]) -> None:
    assert preference_task(row) == "dpo"
    found = paired_rows(chat=True).read(row)
    assert isinstance(found, Preference)
    assert found.prompt.content == (USER,)
    assert (found.chosen, found.rejected) == ((assistant("good"),), (assistant("bad"),))
    conversation = found.prompt.answered(found.chosen)
    assert conversation.learned == (False, True)  # type: ignore[union-attr]


@pytest.mark.parametrize("row", JUDGED, ids=lambda row: "-".join(map(str, row)))
def test_verdicts_mean_the_same_in_every_layout(row: dict[str, Any]) -> None:
    assert preference_task(row) == "kto"
    found = judged_rows(chat=True).read(row)
    assert found == Judged(found.prompt, (assistant("good"),), True)
    assert found.prompt.content == (USER,)


def test_rows_that_only_look_like_preferences_are_left_to_other_tasks() -> None:
    assert preference_task({"prompt": "a", "completion": "b"}) == ""
    assert preference_task({"prompt": "a", "completion": "b", "label": "spam"}) == ""
    assert preference_task({"text": "a", "label": True}) == ""
    assert preference_task({"chosen": "a"}) == ""


def test_texts_stay_texts_without_a_template() -> None:
    found = paired_rows(chat=False).read({"prompt": "Once ", "chosen": "upon", "rejected": "twice"})
    assert (found.prompt.content, found.chosen, found.rejected) == ("Once ", "upon", "twice")
    with pytest.raises(RowError, match=r"no chat template .*, found messages"):
        paired_rows(chat=False).read(PAIRED[2])


def test_systems_tools_histories_and_longer_replies() -> None:
    row = {"system": "S", "history": [["a", "b"]], "instruction": "c", "input": "d", "chosen": "e", "rejected": "f"}
    found = paired_rows(chat=True).read(row)
    assert [message["content"] for message in found.prompt.content] == ["S", "a", "b", "c\n\nd"]
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    chosen = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_call_id": "1"},
        assistant("three"),
    ]
    tools = [{"name": "look", "parameters": {}}]
    found = paired_rows(chat=True).read({"prompt": [USER], "tools": tools, "chosen": chosen, "rejected": "no"})
    assert found.prompt.answered(found.chosen).learned == (False, True, False, True)
    assert found.prompt.tools[0]["function"]["name"] == "look"
    assert reply_text(found.chosen).split() == ["3", "three"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Hi", "chosen": "same", "rejected": "same"}, "'chosen' and 'rejected' to differ, found the same"),
        ({"prompt": [USER], "chosen": [assistant("a")], "rejected": [assistant("a")]}, "found the same reply in both"),
        ({"chosen": [USER, assistant("a")], "rejected": [USER, assistant("a")]}, "found the same reply in both"),
        ({"chosen": "a", "rejected": "b"}, "expected a prompt .*, found none"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "text in 'prompt', found only white space"),
        ({"prompt": "Hi", "chosen": "a", "rejected": ""}, "text in 'rejected', found nothing"),
        ({"prompt": "Hi", "chosen": "a", "rejected": None}, "found the columns prompt, chosen, rejected"),
        (
            {"chosen": [USER, assistant("a")], "rejected": [{"role": "user", "content": "Ho"}, assistant("b")]},
            "same prompt, found prompts that differ",
        ),
        (
            {"prompt": "Ho", "chosen": [USER, assistant("a")], "rejected": [USER, assistant("b")]},
            "begin with, found another one, 'Ho'",
        ),
        ({"prompt": [USER], "chosen": [USER], "rejected": [assistant("b")]}, "prompts that differ"),
        ({"prompt": [USER, assistant("x")], "chosen": "a", "rejected": "b"}, "ends with assistant"),
        ({"prompt": "Hi", "chosen": 1, "rejected": "b"}, "text or messages in 'chosen', found a number"),
    ],
)
def test_bad_pairs_are_named_by_file_and_line(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    from edgetune.data.dataset import read_columns

    data = write_rows(tmp_path, {"train": [PAIRED[2], row]})
    with pytest.raises(DataError, match=rf"train\.jsonl, line 2: .*{message}"):
        read_columns([data], [paired_rows(chat=True)], task="dpo")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Hi", "completion": "a", "label": "maybe"}, "true or false in 'label', found 'maybe'"),
        ({"prompt": "Hi", "completion": "a", "label": 0.5}, "true or false in 'label', found a number"),
        ({"messages": [USER], "label": True}, "and then an assistant message in 'messages'"),
        ({"messages": [assistant("a")], "label": True}, "and then an assistant message in 'messages'"),
    ],
)
def test_bad_verdicts_are_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        judged_rows(chat=True).read(row)


def settings(base: Path, data: Path, **options: Any) -> TrainSettings:
    return TrainSettings(model=str(base), data=(str(data),), dtype="f32", lr=1e-5, **options)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1}
    return write_checkpoint(tmp_path_factory.mktemp("base"), "llama", overrides=sizes)


def voted_tree() -> Tree:
    tree = Tree()
    asked = tree.add(Node("user", "What is 2 + 2?"))
    wrong = tree.add(Node("assistant", "5", parent=asked.id, meta={"vote": "down", "reasoning": "hm"}))
    right = tree.add(Node("assistant", "4", parent=asked.id, meta={"edited_from": wrong.id}))
    more = tree.add(Node("user", "And 3 + 3?", parent=right.id))
    tree.add(Node("assistant", "6", parent=more.id, meta={"vote": "up"}))
    tree.add(Node("assistant", "33", parent=more.id, meta={"vote": "down"}))
    return tree


def test_what_chat_exports_is_taken_as_it_is_with_the_ids_that_chat_training_has(tmp_path: Path, base: Path) -> None:
    assert export(tmp_path / "pairs.jsonl", voted_tree(), kind="pairs", system="Be right.") == 2
    pairs = prepare(settings(base, tmp_path / "pairs.jsonl"))
    assert pairs.task.name == "dpo"
    assert export(tmp_path / "rows.jsonl", voted_tree(), kind="rows", system="Be right.") == 2
    rows = prepare(settings(base, tmp_path / "rows.jsonl"))
    assert rows.task.name == "chat"
    for pair, row in zip(pairs.train, rows.train, strict=True):
        chosen, rejected = pair.chosen, pair.rejected  # type: ignore[attr-defined]
        np.testing.assert_array_equal(chosen.ids, row.ids)
        np.testing.assert_array_equal(chosen.learned, row.learned)
        start = int(chosen.learned.argmax())
        np.testing.assert_array_equal(rejected.ids[:start], row.ids[:start])
        assert int(rejected.learned.argmax()) == start
    learned = [pairs.tokenizer.decode_text(pair.ids[pair.learned].tolist()) for pair in pairs.train]
    assert learned == ["45", "633"]


def test_a_table_of_verdicts(tmp_path: Path, base: Path) -> None:
    path = tmp_path / "judged.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("prompt", "completion", "label"), ("a", "b", "true"), ("c", "d", "false")])
    said: list[Event] = []
    prepared = prepare(settings(base, path), sink=said.append)
    assert prepared.task.name == "kto"
    assert any("1 replies found good, 1 found bad" in event.text for event in said if isinstance(event, Notice))
    first, second = prepared.train
    own, other = (prepared.tokenizer.decode(row.mismatched.ids.tolist()) for row in (first, second))  # type: ignore[attr-defined]
    assert "a" in own
    assert "d" in own
    assert "c" in other
    assert "b" in other


def test_pairs_are_a_good_and_a_bad_reply_for_kto_and_mismatches_come_from_other_prompts(
    tmp_path: Path, base: Path
) -> None:
    rows = [{"prompt": f"ask {n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(3)]
    prepared = prepare(settings(base, write_rows(tmp_path, {"train": rows}), task="kto"))
    assert [row.example.good for row in prepared.train] == [True, False] * 3  # type: ignore[attr-defined]
    texts = [prepared.tokenizer.decode(row.mismatched.ids.tolist()) for row in prepared.train]  # type: ignore[attr-defined]
    for at, text in enumerate(texts):
        assert f"ask {at // 2}" in text
        assert f"good {(at // 2 + 1) % 3}" in text


def test_replies_that_only_differ_behind_the_cut_are_left_out(tmp_path: Path, base: Path) -> None:
    same = "word " * 60
    rows = [
        {"prompt": "a", "chosen": f"{same}x", "rejected": f"{same}y"},
        {"prompt": "a", "chosen": f"x {same}", "rejected": f"y {same}"},
    ]
    said: list[Event] = []
    data = write_rows(tmp_path / "some", {"train": rows})
    prepared = prepare(settings(base, data, max_length=32), sink=said.append)
    assert len(prepared.train) == 1
    assert any("2 of 2 sequences cut at 32 tokens, 1 left out" in e.text for e in said if isinstance(e, Notice))
    with pytest.raises(DataError, match="cut before its replies differ"):
        prepare(settings(base, write_rows(tmp_path / "none", {"train": rows[:1]}), max_length=32))


def test_tasks_say_which_rows_they_want(tmp_path: Path, base: Path) -> None:
    judged = write_rows(tmp_path / "judged", {"train": JUDGED[:1]})
    with pytest.raises(DataError, match=r"expected preference pairs .* found the columns prompt, completion, label"):
        prepare(settings(base, judged, task="dpo"))
    paired = write_rows(tmp_path / "paired", {"train": PAIRED[:1]})
    with pytest.raises(DataError, match=r"preference pairs .* --task dpo"):
        prepare(settings(base, paired, task="chat"))


def test_real_pairs(shared_data: Path, base: Path) -> None:
    path = shared_data / "datasets" / "llama-factory-demos" / "dpo_en_demo.json"
    if not path.is_file():
        pytest.skip("no shared data")
    rows = [paired_rows(chat=True).read(row) for row in json.loads(path.read_text(encoding="utf-8"))]
    assert len(rows) == 300
    assert all(row.prompt.content[-1]["role"] == "user" for row in rows)
