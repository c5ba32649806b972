"""The parity gate: Hugging Face + PEFT in torch against GGUF + adapter in llama.cpp.

Token ids, rendered templates, stop tokens, structure, and next-token distributions on the same ids. torch and
transformers are imported inside the functions that need them; without them the rest still runs, and the report says
what was not checked. Prints nothing, writes nothing.
"""

from __future__ import annotations

from edgetune.parity.gate import verify

__all__ = ["verify"]
