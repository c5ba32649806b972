"""`edgetune tokenize`: a text's token ids and pieces, as the engine sees them."""

from __future__ import annotations

import json

import click

from edgetune.cli.progress import show_progress
from edgetune.cli.terminal import read_stdin, valid_text


@click.command("tokenize", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model")
@click.argument("text")
@click.option("--chat", "as_chat", is_flag=True, help="Wrap TEXT as one user turn with the model's chat template.")
@click.option("--system", default="", help="With --chat: the system prompt.")
@click.option("--no-special", is_flag=True, help="Leave out what the model wants around a text, e.g. BOS.")
@click.option("--json", "as_json", is_flag=True, help='Print {"ids": […], "pieces": […]}.')
def command(model: str, text: str, as_chat: bool, system: str, no_special: bool, as_json: bool) -> None:
    """Show TEXT's token ids and pieces under MODEL's vocabulary.

    TEXT is text: no control token is made from what it spells. `-` reads it from standard input.
    """
    from edgetune.char_tokenizer import CharTokenizer
    from edgetune.cli.last_words import speak_before_aborting
    from edgetune.errors import UsageError
    from edgetune.opening.vocabularies import open_vocabulary, source_pieces
    from edgetune.piece_tokenizer import PieceTokenizer

    text = read_stdin() if text == "-" else valid_text(text)
    speak_before_aborting()
    with show_progress() as sink, open_vocabulary(model, sink=sink) as vocabulary:
        if as_chat:
            template = vocabulary.chat_template
            if isinstance(vocabulary, CharTokenizer | PieceTokenizer) or template is None:
                raise UsageError(f"{model} has no chat template.", hint="Leave out --chat.")
            turns = [{"role": "system", "content": system}] if system else []
            turns.append({"role": "user", "content": text})
            ids = vocabulary.encode_rendered(template.render(turns, add_generation_prompt=True))
        else:
            ids = vocabulary.encode(text, add_special=not no_special)
        pieces = source_pieces(vocabulary, ids)
    if as_json:
        click.echo(json.dumps({"ids": ids, "pieces": pieces}, ensure_ascii=False))
        return
    for token, piece in zip(ids, pieces, strict=True):
        click.echo(f"{token:>7}  {piece!r}")
