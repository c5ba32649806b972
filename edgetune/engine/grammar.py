"""JSON schema → grammar, through the converter that comes with the llama.cpp bindings."""

from __future__ import annotations

import json

from edgetune.errors import UsageError


def grammar_from_json_schema(schema: str) -> str:
    """The grammar (GBNF) of the JSON that `schema` allows. Raises `UsageError` when it is no usable JSON schema."""
    from llama_cpp.llama_grammar import json_schema_to_gbnf

    try:
        if not isinstance(json.loads(schema), dict):
            raise UsageError("The JSON schema is not an object.", hint='For example: {"type": "object"}')
        return str(json_schema_to_gbnf(schema))
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError) as error:
        raise UsageError(f"The JSON schema cannot be turned into a grammar: {error}.") from error
