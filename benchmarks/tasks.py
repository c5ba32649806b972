"""What each task learns on real data in a minute: small models made here, the metric before and after, as a table.

`python -m benchmarks.tasks [NAME…] [--write]` trains and prints; `--write` puts the table of all tasks into
docs/results.md. The models are random and tiny (the phoneme model excepted), so the numbers show that a task learns
from real text, not how well a real model does.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgetune.training import TrainSettings, train

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
RESULTS = ROOT / "docs" / "results.md"

Rows = list[dict[str, Any]]
_OPERATOR = re.compile(r"<<[^<>]*?\d\s*([-+*/])[^<>]*>>")
_OPERATION = {"+": "add", "-": "subtract", "*": "multiply", "/": "divide"}


@dataclass(frozen=True)
class Case:
    """One task on one data set."""

    task: str
    model: str
    """The base, for people."""
    data: str
    metric: str
    rows: Callable[[], tuple[Rows, Rows]]
    base: Callable[[Path, Iterable[str]], Path]
    """Directory and texts → a base there, or a base elsewhere."""
    options: Mapping[str, Any] = field(default_factory=dict)


def gsm8k(split: str, count: int) -> list[dict[str, str]]:
    """The first problems of a split."""
    with (DATA / "datasets" / "gsm8k" / f"{split}.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line, _ in zip(file, range(count), strict=False)]


def _split(
    make: Callable[[dict[str, str]], Mapping[str, Any] | None], *, count: int
) -> Callable[[], tuple[Rows, Rows]]:
    def rows() -> tuple[Rows, Rows]:
        made = ([dict(row) for item in gsm8k(split, most) if (row := make(item))] for split, most in _sizes(count))
        train_rows, valid_rows = made
        return train_rows, valid_rows

    return rows


def _sizes(count: int) -> tuple[tuple[str, int], tuple[str, int]]:
    return ("train", count), ("test", 200)


def operation(item: dict[str, str]) -> dict[str, Any] | None:
    """The question, and which operation its answer ends with."""
    found = _OPERATOR.findall(item["answer"])
    return {"text": item["question"], "label": _OPERATION[found[-1]]} if found else None


def answer_length(item: dict[str, str]) -> dict[str, Any]:
    """The question, and how many characters its worked answer has."""
    return {"text": item["question"], "score": float(len(item["answer"]))}


def first_step(item: dict[str, str]) -> dict[str, Any]:
    """The question, and the calculation its answer begins with."""
    found = re.search(r"<<([^<>=]*)=", item["answer"])
    return {"question": item["question"], "answer": found[1] if found else "none"}


def answered(item: dict[str, str]) -> dict[str, Any]:
    """The question, and its worked answer without the calculations."""
    return {"anchor": item["question"], "positive": re.sub(r"<<.*?>>", "", item["answer"].split("####")[0])}


def en_de() -> tuple[Rows, Rows]:
    """Short pairs of sentences."""
    folder = DATA / "datasets" / "en-de"

    def rows(name: str, count: int) -> Rows:
        lines = [(folder / f"{side}-{name}.txt").read_text(encoding="utf-8").splitlines() for side in ("src", "tgt")]
        pairs = [{"en": en, "de": de} for en, de in zip(*lines, strict=True) if en.strip() and de.strip()]
        return [pair for pair in pairs if len(pair["en"]) < 60 and len(pair["de"]) < 80][:count]

    short = rows("train", 800)
    return short[:700], short[700:]


def respelled() -> tuple[Rows, Rows]:
    """Words as the phoneme model says them, in another notation, which it is to learn."""
    import torch
    import transformers

    from edgetune.char_tokenizer import CharTokenizer

    folder = DATA / "models" / "g2p-bart-us"
    chars = CharTokenizer.from_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    assert chars is not None
    model = transformers.BartForConditionalGeneration.from_pretrained(folder).eval()
    words = re.findall(r"[a-z]{3,8}", " ".join(item["question"] for item in gsm8k("train", 1000)).lower())
    rows: Rows = []
    for word in sorted(set(words))[::3][:500]:
        out = model.generate(torch.tensor([chars.encode(word)]), max_new_tokens=24, num_beams=1, do_sample=False)
        said = chars.decode(out[0].tolist()).decode()
        rows.append({"source": word, "target": said.replace("ˈ", "").translate(str.maketrans("ɹθð", "rsz"))})
    return rows[::5] + rows[1::5] + rows[2::5] + rows[3::5], rows[4::5]


def small_model(config_class: str, **sizes: Any) -> Callable[[Path, Iterable[str]], Path]:
    """A random model with a WordPiece vocabulary of the data's words."""

    def make(directory: Path, texts: Iterable[str]) -> Path:
        import torch
        import transformers

        tokenizer = _wordpiece(texts, is_t5=config_class == "T5Config")
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "eos")}
        torch.manual_seed(0)
        config = getattr(transformers, config_class)(
            vocab_size=len(tokenizer), **sizes, **{name: value for name, value in ids.items() if value is not None}
        )
        auto = "AutoModelForSeq2SeqLM" if config_class == "T5Config" else "AutoModel"
        getattr(transformers, auto).from_config(config).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        return directory

    return make


def _wordpiece(texts: Iterable[str], *, is_t5: bool) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    names = {"unk": "[UNK]", "pad": "[PAD]", "eos": "</s>"} if is_t5 else {"unk": "[UNK]", "pad": "[PAD]"}
    names |= {} if is_t5 else {"cls": "[CLS]", "sep": "[SEP]"}
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=not is_t5)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=2000, special_tokens=list(names.values()), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    around = "$A </s>" if is_t5 else "[CLS] $A [SEP]"
    ids = [(text, tokenizer.token_to_id(text)) for text in names.values() if text in around]
    tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{f"{name}_token": text for name, text in names.items()}
    )


def _phonemes(directory: Path, texts: Iterable[str]) -> Path:
    return DATA / "models" / "g2p-bart-us"


_SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
_BERT = small_model("BertConfig", **_SMALL)
_LLAMA = small_model("LlamaConfig", **_SMALL)
_T5 = small_model("T5Config", d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
_WORDS = {"modules_to_save": ("word_embeddings",)}
_TOKENS = {"modules_to_save": ("embed_tokens",)}

CASES = {
    "classification": Case(
        *("classification", "BERT, 2 layers", "gsm8k: last operation of the answer", "macro_f1"),
        *(_split(operation, count=3000), _BERT),
        {**_WORDS, "lr": 2e-3, "epochs": 4},
    ),
    "decoder": Case(
        *("classification", "Llama, 2 layers", "gsm8k: last operation of the answer", "macro_f1"),
        *(_split(operation, count=3000), _LLAMA),
        {**_TOKENS, "lr": 1e-3, "epochs": 4, "task": "classification"},
    ),
    "regression": Case(
        *("regression", "BERT, 2 layers", "gsm8k: length of the answer", "spearman"),
        *(_split(answer_length, count=1000), _BERT),
        {**_WORDS, "lr": 1e-3, "epochs": 4},
    ),
    "embedding": Case(
        *("embedding", "BERT, 2 layers", "gsm8k: question → answer among 200", "recall@1"),
        *(_split(answered, count=800), _BERT),
        {**_WORDS, "lr": 2e-3, "epochs": 3, "batch_size": 32},
    ),
    "translation": Case(
        *("seq2seq (translation)", "T5, 2 + 2 layers", "en-de, short sentences", "chrf"),
        *(en_de, _T5),
        {"modules_to_save": ("shared",), "lr": 5e-3, "epochs": 6, "src_lang": "en", "tgt_lang": "de"},
    ),
    "qa": Case(
        *("seq2seq (question answering)", "T5, 2 + 2 layers", "gsm8k: first calculation of the answer", "chrf"),
        *(_split(first_step, count=800), _T5),
        {"modules_to_save": ("shared",), "lr": 5e-3, "epochs": 4},
    ),
    "phonemes": Case(
        *("seq2seq", "BART g2p-bart-us", "words → phonemes in another notation", "exact_match"),
        *(respelled, _phonemes),
        {"lr": 5e-3, "epochs": 4, "eval_texts": 100},
    ),
}


def run(case: Case) -> tuple[float, float, float]:
    """Train; the metric before and after, and the seconds it took."""
    train_rows, valid_rows = case.rows()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "data").mkdir()
        for split, rows in (("train", train_rows), ("valid", valid_rows)):
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / "data" / f"{split}.jsonl").write_text(text, encoding="utf-8")
        texts = [text for row in train_rows for text in row.values() if isinstance(text, str)]
        base = case.base(folder / "base", texts)
        options = {"batch_size": 16, "max_length": 96, "dtype": "f32", "metric": case.metric, **case.options}
        started = time.perf_counter()
        done = train(TrainSettings(model=str(base), data=(str(folder / "data"),), out=str(folder / "run"), **options))
        seconds = time.perf_counter() - started
    return done.metrics["valid_before"][case.metric], done.metrics["valid"][case.metric], seconds


def main() -> None:
    """Run the named cases, or all of them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--write", action="store_true", help="put the table into docs/results.md")
    given = parser.parse_args()
    lines = ["| task | model | data | metric | before | after |", "|---|---|---|---|---|---|"]
    for name in given.names or CASES:
        case = CASES[name]
        before, after, seconds = run(case)
        cells = (case.task, case.model, case.data, case.metric, f"{before:.3f}", f"{after:.3f}")
        lines.append(f"| {' | '.join(cells)} |")
        print(f"{lines[-1]}  ({seconds:.0f} s)", flush=True)
    if given.write:
        head = "# What the tasks learn\n\nWritten by `python -m benchmarks.tasks --write`. " + _ABOUT
        RESULTS.write_text(head + "\n\n" + "\n".join(lines) + "\n", encoding="utf-8")


_ABOUT = (
    "Small models on validation rows of real data, before and after\na minute of training. All but the phoneme model "
    "are random to begin with: the table shows that each task learns from real text,\nnot how well a real model does."
)

if __name__ == "__main__":
    main()
