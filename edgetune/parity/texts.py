"""What the proof feeds to both sides: texts that break tokenizers, conversations that break templates, text to predict.

Values only; the same on every run and every machine.
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Iterable, Sequence

Conversation = Sequence[dict[str, str]]

_STRESS = (
    "",
    " ",
    "  ",
    "\n",
    "\t",
    "\r\n",
    "\n\n\n",
    "   \n \t  \n",
    "a",
    " a",
    "a ",
    "  leading and trailing  ",
    "Hello, world!",
    "Hello World, hello WORLD, hELLO wORLD",
    "I'm you're they'd we'll it's I've DON'T can't'",
    "tabs\tand\t\ttabs\t\t\tand   three   spaces",
    "windows\r\nline\r\nends\r\n\r\nand\rold ones",
    "trailing space \nnext line\n\n\n  indented\n\t\tdeeper",
    "1 12 123 1234 12345 1234567890 3.14159 1,000,000.50 1e-9 0x1F 2024-02-29T12:34:56Z",
    "１２３ ٣٤٥ ४५६ ²³ ½ Ⅷ",
    "def f(x):\n    return {'a': [x ** 2, None], \"b\": x != 0}  # done\n\n\nclass A(B): pass\n",
    "for (int i=0;i<n;++i){a[i]+=b[i]<<2;}//\t*/ /* <html><br/></html> &amp; $VAR `ls` C:\\path\\n",
    "https://example.org/a?b=c&d=%20#e user.name+tag@example.co.uk @handle #tag",
    "…—–‘’“”«»„‚•·×÷±≤≥≠≈∞∑√∫€£¥©®™",
    "café naïve façade Ångström Zoë ñandú straße Œuvre ŁÓDŹ İstanbul ıı ß ﬁ ﬂ",
    "cafe\u0301 nai\u0308ve A\u030angstro\u0308m q\u0307\u0323 q\u0323\u0307 \u0301start",
    "東京は日本の首都です。人口は約1,400万人。",
    "中文分词测试：我喜欢吃苹果，你呢？繁體字",
    "안녕하세요 세계 한국어 \u1112\u1161\u11ab",
    "مرحبا بالعالم، هذا نص عربي ١٢٣ لا إله",
    "שלום עולם נִקּוּד",
    "नमस्ते दुनिया हिन्दी क्षत्रिय",
    "สวัสดีชาวโลก ภาษาไทยไม่มีช่องว่าง",
    "Привет, мир! Ёлка. Χαίρετε κόσμε. გამარჯობა. Բարեւ",
    "🙂🙃 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇫🇷 1️⃣ ❤️ ☎︎",
    "zero\u200bwidth \u200djoiner \u00a0nbsp\u2003em space\u3000ideographic \ufeffbom \u00adsoft",
    "\u2028line\u2029paragraph\u0085next",
    "𝕳𝖊𝖑𝖑𝖔 𝒲𝑜𝓇𝓁𝒹 𐍈 𓀀 \U0010ffff",
    "control \x01\x02\x07\x08\x0b\x0c\x1b[31mred\x1b[0m \x7f end",
    "nul \x00 inside",
    "\ufffd replacement \ue000 private",
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "a" * 200,
    " " * 100 + "x",
    "ab" * 150,
    "=" * 70 + "\n" + "-" * 33 + "\n" + "." * 17,
    "!!!???...,,,;;;:::'''\"\"\"((([[[{{{~~~```^^^___|||",
    "▁ already ▁ a meta ▁▁ space",
    "Ġ Ċ ĉ byte-level look-alikes Ā",
    "<0x0A> <0x41> byte tokens as text",
    "< | im_start | > <|im_start <s </s <bos > [INST [/INST]",
    "The end",
)

_CONTROL_PATTERNS = ("{0}", "text {0} text", "text{0}text", "{0}{0}", "{0} \n", "\n{0}\nuser: {0}")
_CONTROL_LIMIT = 24
"""Vocabularies with thousands of reserved tokens have their first and last ones tried."""


def stress_texts(control_tokens: Iterable[str], *, added_tokens: Iterable[str] = (), seed: int = 20240229) -> list[str]:
    """Texts that tokenizers are known to disagree on; the vocabulary's own tokens are spelled in some.

    `added_tokens` are those that a tokenizer finds in any text although they are no control tokens.
    """
    spelled = [*_spelled(control_tokens), *_spelled(added_tokens)]
    return [*_STRESS, *spelled, *random_texts(100, seed=seed)]


def _spelled(tokens: Iterable[str]) -> Iterable[str]:
    ordered = sorted(tokens, key=lambda token: (len(token), token))
    half = _CONTROL_LIMIT // 2
    chosen = ordered if len(ordered) <= _CONTROL_LIMIT else [*ordered[:half], *ordered[-half:]]
    return (pattern.format(token) for token in chosen for pattern in _CONTROL_PATTERNS)


def random_texts(count: int, *, seed: int) -> list[str]:
    """`count` random mixtures of characters from all over Unicode, without surrogates and unassigned ones."""
    generator = random.Random(seed)
    ranges = [
        (0x20, 0x7E), (0x20, 0x7E), (0x20, 0x7E), (0x09, 0x0D), (0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x52F),
        (0x590, 0x6FF), (0x900, 0xDFF), (0x2000, 0x206F), (0x2190, 0x2BFF), (0x3040, 0x30FF), (0x4E00, 0x9FFF),
        (0xAC00, 0xD7A3), (0xFB00, 0xFFEF), (0x1F300, 0x1FAFF),
    ]  # fmt: skip

    def character() -> str:
        while True:
            found = chr(generator.randint(*generator.choice(ranges)))
            if unicodedata.category(found) not in ("Cn", "Cs", "Co"):
                return found

    def word() -> str:
        if generator.random() < 0.5:
            low, high = generator.choice(ranges[:3])
            return "".join(chr(generator.randint(low, high)) for _ in range(generator.randint(1, 8)))
        return "".join(character() for _ in range(generator.randint(1, 6)))

    spaces = ("", " ", " ", " ", "  ", "\n", "\t", "\r\n")
    return ["".join(word() + generator.choice(spaces) for _ in range(generator.randint(1, 12))) for _ in range(count)]


def user(text: str) -> dict[str, str]:
    """A user's turn."""
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    """An assistant's turn."""
    return {"role": "assistant", "content": text}


def conversations(control_tokens: Iterable[str]) -> list[tuple[Conversation, bool]]:
    """Conversations, each with whether the assistant's next turn is opened; some users type `control_tokens`."""
    plain = [user("What is 2 + 2?"), assistant("4"), user(" And 3 + 3?\n"), assistant("  6\n\nThat was easy. ")]
    found: list[tuple[Conversation, bool]] = [
        ([user("Hello")], True),
        ([user("Hello")], False),
        ([{"role": "system", "content": "Be brief."}, user("Hello")], True),
        (plain, False),
        (plain[:3], True),
        ([{"role": "system", "content": "Du bist hilfreich. 🙂"}, *plain], False),
        ([user("code:\n```py\nx = {'a': 1}\n```"), assistant("東京 café {% raw %} {{ x }}")], False),
    ]
    tokens = sorted(control_tokens, key=lambda token: (-len(token), token))
    for token in [*tokens[:4], *tokens[-4:]] if len(tokens) > 8 else tokens:
        injected = [user(f"Ignore that.{token}\n{token}system"), assistant(f"No {token}"), user(f"{token[:-1]}")]
        found.append((injected, True))
    return found


PROBES = (
    """The lighthouse keeper climbed the stairs every evening at six. In 1894 a storm broke two of the windows, and the
repair took eleven days because glass had to come by boat. She wrote it all down: the wind, the ships, the price of oil.
When her granddaughter found the notebooks, she read them aloud, one winter after another.""",
    """Once upon a time, there was a little dog named Max. He liked to run in the park and play with a red ball. One day
the ball was gone. Max looked under the tree and behind the big rock, and then he saw a bird sitting on it.""",
    """def mean(values):
    total = 0.0
    for value in values:
        total += value
    return total / len(values)

Q: What is 17 * 23?
A: 17 * 20 = 340, 17 * 3 = 51, so 391.
""",
    """Der Zug fährt um 8.15 Uhr ab. Le café coûte 2,50 €. El niño juega con el perro.
今日は天気がいいです。Привет, мир! 🙂""",
)
"""Text whose next tokens are predicted when the user gives no data."""
