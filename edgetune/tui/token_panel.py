"""What a token was chosen from, below the conversation: its alternatives, with a cursor over them."""

from __future__ import annotations

from collections.abc import Sequence

from textual.app import ComposeResult
from textual.containers import Vertical
from textual.message import Message
from textual.widgets import Static

from edgetune.engine.protocol import Candidate, TokenChoice
from edgetune.tui.bars import CandidateBars, percent
from edgetune.tui.transcript import Transcript
from edgetune.tui.visible import one_line, token_text


class TokenPanel(Vertical):
    """Open while the cursor of a conversation is on a token."""

    DEFAULT_CSS = """
    TokenPanel {
        height: 10; background: $surface; border-top: tall $panel; padding: 0 1; display: none;
        &.open { display: block; }
        .token-title { height: 1; color: $text-muted; }
        CandidateBars { background: $surface; }
    }
    """

    class Taken(Message):
        """The alternative under the cursor was clicked once more."""

    def __init__(self, *, keys: str, id: str | None = None) -> None:
        """`keys`: what the keys do, in the title."""
        super().__init__(id=id)
        self._keys = keys
        self._transcript: Transcript | None = None
        self._at = 0

    def compose(self) -> ComposeResult:
        """A title over the bars."""
        yield Static("", classes="token-title", markup=False)
        bars = CandidateBars(rows=8)
        bars.empty = "This token was given, not chosen: nothing stood beside it."
        yield bars

    def look_at(self, transcript: Transcript | None) -> None:
        """Show the token under the cursor of `transcript`; close when that is None."""
        self.set_class(transcript is not None, "open")
        self._transcript, self._at = transcript, 0
        self._show()

    def move(self, step: int) -> None:
        """Another alternative."""
        if alternatives := self.alternatives:
            self._at = min(max(self._at + step, 0), len(alternatives) - 1)
            self._show()

    @property
    def alternative(self) -> Candidate | None:
        """The alternative under the cursor."""
        alternatives = self.alternatives
        return alternatives[self._at] if self._at < len(alternatives) else None

    @property
    def alternatives(self) -> Sequence[Candidate]:
        """What stood beside the token."""
        choice = self.choice
        return choice.alternatives if choice is not None else ()

    @property
    def choice(self) -> TokenChoice | None:
        """The token that is looked at."""
        view = self._transcript
        if view is None or view.selected is None or view.token is None:
            return None
        choices = view.choices_of(view.selected)
        return choices[view.token] if view.token < len(choices) else None

    def on_candidate_bars_clicked(self, event: CandidateBars.Clicked) -> None:
        """A click chooses an alternative, another one takes it."""
        event.stop()
        if event.index >= len(self.alternatives):
            return
        if self._at == event.index:
            self.post_message(self.Taken())
        self._at = event.index
        self._show()

    def _show(self) -> None:
        view, choice = self._transcript, self.choice
        if view is None or choice is None or view.selected is None or view.token is None:
            return
        cursor = self._at if choice.alternatives else None
        self.query_one(CandidateBars).show(choice.alternatives, chosen=choice.id, cursor=cursor)
        text = token_text(view.generated_of(view.selected)[choice.start : choice.end])
        count = len(view.choices_of(view.selected))
        self.query_one(Static).update(
            f"{view.token + 1}/{count} {one_line(text, length=16)} {percent(choice.probability).strip()} → "
            f"{percent(choice.sampled).strip()}   {self._keys}"
        )
