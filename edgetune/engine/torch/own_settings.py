"""What a checkpoint says of itself beside its weights: where its texts begin and end, how long they get."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgetune.engine.beam import BeamSettings
from edgetune.engine.constraints import Constraints, not_honoured
from edgetune.errors import UnsupportedError

_SIZES = ("max_position_embeddings", "n_positions", "max_source_positions")


class OwnSettings:
    """config.json and generation_config.json of one model."""

    def __init__(self, path: Path, model: Any) -> None:
        """Read them off transformers' `model`, loaded from `path`."""
        self._path = path
        self.config: dict[str, Any] = model.config.to_dict()
        """config.json."""
        self._generation: Mapping[str, Any] = model.generation_config.to_dict()
        self.is_encoder_decoder = bool(model.config.is_encoder_decoder)
        """Whether it answers a source, and does not continue a prompt."""
        self.eog_ids = frozenset(_ids(self._generation.get("eos_token_id")) or _ids(self.config.get("eos_token_id")))
        """Tokens that end a text."""
        self.positions = _positions(model.config)
        """The longest text it was made for, in tokens; 0 where it does not say."""
        self.is_bounded = "relative_attention_num_buckets" not in self.config
        """Whether longer texts are impossible and not just unusual."""
        pad_id = self.config.get("pad_token_id")
        self.pad_id = pad_id if isinstance(pad_id, int) else 0
        """What fills rows."""

    @property
    def model_type(self) -> str:
        """The family, e.g. "bart"."""
        return str(self.config.get("model_type", ""))

    @property
    def start_id(self) -> int:
        """With which token the decoder starts. Raises `UnsupportedError` when that is not said."""
        for values in (self._generation, self.config):
            for name in ("decoder_start_token_id", "bos_token_id"):
                if isinstance(found := values.get(name), int):
                    return found
        raise UnsupportedError(
            f"{self._path} does not say with which token its decoder starts.",
            hint="Set decoder_start_token_id in its generation_config.json.",
        )

    @property
    def limit(self) -> int:
        """How many new tokens are allowed; -1 where nothing is said."""
        if isinstance(new := self._generation.get("max_new_tokens"), int):
            return new
        whole = self._generation.get("max_length")
        # 20 is what transformers writes where nobody chose a length.
        return whole - 1 if isinstance(whole, int) and whole > 1 and whole != 20 and self.is_encoder_decoder else -1

    @property
    def beams(self) -> BeamSettings:
        """The beam search that it asks for by itself."""
        asked = self._generation
        return BeamSettings(
            num_beams=int(asked.get("num_beams") or 1),
            length_penalty=1.0 if asked.get("length_penalty") is None else float(asked["length_penalty"]),
            early_stopping=asked.get("early_stopping") or False,
        )

    @property
    def constraints(self) -> Constraints:
        """What it demands of its texts."""
        return Constraints.from_config(self._generation)

    @property
    def ignored(self) -> list[str]:
        """Names of settings that it asks for and that are not followed here."""
        return not_honoured(self._generation)


def _ids(value: Any) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,)
    return tuple(int(token) for token in value) if isinstance(value, list | tuple) else ()


def _positions(config: Any) -> int:
    """Of an encoder and a decoder with vocabularies of their own, the fewer."""
    parts = [part for part in (getattr(config, "encoder", None), getattr(config, "decoder", None)) if part] or [config]
    found = [next((int(size) for key in _SIZES if (size := getattr(part, key, None))), 0) for part in parts]
    return min((size for size in found if size), default=0)
