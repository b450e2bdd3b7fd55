"""Formats of an answer that a request may ask for: a JSON schema, a grammar, a regular expression, choices."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Schema = dict[str, Any] | bool
Format = tuple[str, Any]
"""``("json", schema)``, ``("gbnf", text)``, ``("regex", pattern)`` or ``("choice", texts)``."""
_ANY_OBJECT = {"type": "object"}


class StructuredOutputs(BaseModel):
    """vLLM's ``structured_outputs``: one of these."""

    model_config = ConfigDict(strict=True, extra="forbid")

    json_schema: Annotated[Schema | str | None, Field(alias="json")] = None
    regex: str | None = None
    choice: Annotated[list[str] | None, Field(min_length=1, max_length=1024)] = None
    grammar: str | None = None
    json_object: bool | None = None

    @property
    def format(self) -> Format | None:
        """The format.

        Raises:
          ValueError: there are several.
        """
        schema = self.json_schema
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except ValueError as error:
                raise ValueError(f"structured_outputs: json is not JSON: {error}") from None
        given: list[Format] = [
            (kind, value)
            for kind, value in (
                ("json", schema),
                ("regex", self.regex),
                ("choice", self.choice),
                ("gbnf", self.grammar),
                ("json", _ANY_OBJECT if self.json_object else None),
            )
            if value is not None
        ]
        if len(given) > 1:
            raise ValueError("structured_outputs: give one of json, regex, choice, grammar and json_object")
        return given[0] if given else None


def response_format(given: dict[str, Any] | None) -> Format | None:
    """The format of OpenAI's ``response_format``, also in llama-server's shorter form.

    Raises:
      ValueError: it is none.
    """
    if given is None or given.get("type") == "text":
        return None
    kind = given.get("type")
    if kind == "json_object":
        schema = given.get("schema", _ANY_OBJECT)
    elif kind == "json_schema":
        inner = given.get("json_schema", given)
        schema = inner.get("schema") if isinstance(inner, dict) else None
        if schema is None:
            raise ValueError("response_format: json_schema has no schema")
    else:
        raise ValueError(f"response_format: type {str(kind)[:100]!r} is not text, json_object or json_schema")
    if not isinstance(schema, dict | bool):
        raise ValueError("response_format: the schema is not an object")
    return "json", schema


def one_format(**given: Format | None) -> Format | None:
    """The only format of several parameters.

    Raises:
      ValueError: there are several.
    """
    formats = {name: one for name, one in given.items() if one is not None}
    if len(formats) > 1:
        raise ValueError(f"{' and '.join(formats)} exclude each other; give one of them")
    return next(iter(formats.values()), None)
