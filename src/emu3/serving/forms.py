"""Forms of clients: their files, and their fields as those of a JSON body."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from emu3.serving.errors import Refused

Kind = TypeVar("Kind", bound=BaseModel)


async def content_of(file: Any, param: str) -> bytes:
    """The bytes of a file in a form; Refused for a text in its place."""
    if isinstance(file, str):
        raise Refused(400, f"{param} is sent as a file of the form", param)
    content: bytes = await file.read()
    return content


def checked(kind: type[Kind], values: Mapping[str, Any]) -> Kind:
    """Fields as a body of a kind; an empty text means that a field is absent."""
    try:
        return kind.model_validate({name: value for name, value in values.items() if value != ""})
    except ValidationError as error:
        raise RequestValidationError([each | {"loc": ("body", *each["loc"])} for each in error.errors()]) from error
