"""Field types and base classes shared by every document of the API.

Rules that hold everywhere (Kubernetes API conventions): no floats on the wire, units in names, ratios and money as
decimal strings that are also valid quantities so that CEL can compare them, every field documented and bounded.
"""

import re
from collections.abc import Callable
from decimal import Decimal
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, WithJsonSchema
from pydantic.alias_generators import to_camel

RATIO_PATTERN = r"^(0(\.[0-9]{1,6})?|1(\.0{1,6})?)$"
DECIMAL_PATTERN = r"^[0-9]{1,9}(\.[0-9]{1,6})?$"
NAME_PATTERN = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
DIGEST_PATTERN = r"^sha256:[0-9a-f]{64}$"


IMMUTABLE = "self == oldSelf"


def rules(*entries: tuple[str, str] | tuple[str, str, str]) -> dict[str, Any]:
    """CEL rules of a schema node: expression, message with the remedy, and the field that the server's answer names."""
    keys = ("rule", "message", "fieldPath")
    return {"x-kubernetes-validations": [dict(zip(keys, entry, strict=False)) for entry in entries]}


def _plain(value: Decimal) -> str:
    """Digits without an exponent, which the patterns (and the API server) refuse."""
    return format(value, "f")


def _decimal_parser(pattern: str, example: str) -> Callable[[Any], Decimal]:
    def parse(value: Any) -> Decimal:
        text = _plain(value) if isinstance(value, Decimal) else value
        if not isinstance(text, str) or not re.fullmatch(pattern, text):
            raise ValueError(f"must be a string like '{example}' that matches {pattern}; found {value!r}")
        return Decimal(text)

    return parse


def _decimal(pattern: str, example: str, *bounds: tuple[str, str]) -> Any:
    """A decimal type; `bounds` are CEL rules on it, for what a pattern cannot say."""
    schema = {"type": "string", "pattern": pattern, "maxLength": 16, **(rules(*bounds) if bounds else {})}
    return Annotated[
        Decimal,
        BeforeValidator(_decimal_parser(pattern, example)),
        PlainSerializer(_plain, return_type=str),
        WithJsonSchema(schema),
    ]


Ratio = _decimal(RATIO_PATTERN, "0.98")
"""A share in [0, 1], a decimal string on the wire and a ``decimal.Decimal`` in Python."""

Money = _decimal(DECIMAL_PATTERN, "2.50")
"""A non-negative amount or factor, a decimal string on the wire and a ``decimal.Decimal`` in Python."""

AttainmentTarget = _decimal(
    RATIO_PATTERN,
    "0.95",
    (
        "quantity(self).isGreaterThan(quantity('0')) && quantity(self).isLessThan(quantity('1'))",
        "attainmentTarget must be greater than 0 and less than 1, for example '0.95'",
    ),
)
"""A ratio in (0, 1): all requests can never be promised, and none is no objective."""

Headroom = _decimal(
    DECIMAL_PATTERN,
    "0.10",
    (
        "quantity(self).compareTo(quantity('2')) <= 0",
        "headroom must be less than or equal to 2, for example '0.10'",
    ),
)
"""A factor in [0, 2]."""

Name = Annotated[str, Field(pattern=NAME_PATTERN, min_length=1, max_length=32)]
"""A DNS label of at most 32 characters: names of classes, points, pools."""

Digest = Annotated[str, Field(pattern=DIGEST_PATTERN, max_length=71)]

Timestamp = Annotated[str, WithJsonSchema({"type": "string", "format": "date-time", "maxLength": 40})]
"""RFC 3339."""

Generation = Annotated[int, Field(ge=0, le=2**53)]
"""A counter that only rises; bounded by what every JSON reader keeps exact."""

ReplicaCount = Annotated[int, Field(ge=0, le=100_000)]
"""Pods seen or wanted. Far above every bound a spec can set: a status must never be refused for being true."""


class Document(BaseModel):
    """An immutable piece of a wire document; camelCase outside, snake_case inside; unknown fields are ignored.

    Unknown fields are ignored because a newer peer may add some; whoever must name them (the control API, the
    artifact loader) compares keys itself.
    """

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, frozen=True, extra="ignore")

    def to_wire(self) -> dict[str, Any]:
        """Plain JSON-ready dict with the wire's names; absent optional fields are left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def block(model: type[Document], doc: str) -> Any:
    """A nested object that may be left out.

    Its default is spelled out instead of `{}`: the API server checks a default against the node's CEL rules before it
    fills in nested defaults, and refuses the CRD if a rule reads a field that is not there.
    """
    return Field(default_factory=model, description=doc, json_schema_extra={"default": model().to_wire()})


def named_list(doc: str, key: str = "name", **bounds: Any) -> Any:
    """A list of named objects: server-side apply merges its entries and keeps names unique."""
    extra: dict[str, Any] = {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [key]}
    return Field(description=doc, json_schema_extra=extra, **bounds)
