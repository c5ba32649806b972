"""Attribute docstrings of a dataclass, so that a flag's help and the field's documentation are one text."""

from __future__ import annotations

import ast
import inspect
from textwrap import dedent


def attribute_docs(owner: type) -> dict[str, str]:
    """Field name → the string literal written under it in the source of `owner`, on one line."""
    body = ast.parse(dedent(inspect.getsource(owner))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs: dict[str, str] = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
            and isinstance(text.value.value, str)
        ):
            docs[field.target.id] = " ".join(text.value.value.split())
    return docs
