"""Field types and base classes shared by every document of the API.

Rules that hold everywhere (Kubernetes API conventions): no floats on the wire, units in names, ratios and money as
decimal strings that are also valid quantities so that CEL can compare them, every field documented and bounded.
"""

from decimal import Decimal
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, WithJsonSchema
from pydantic.alias_generators import to_camel

RATIO_PATTERN = r"^(0(\.[0-9]{1,6})?|1(\.0{1,6})?)$"
DECIMAL_PATTERN = r"^[0-9]{1,9}(\.[0-9]{1,6})?$"
NAME_PATTERN = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
DIGEST_PATTERN = r"^sha256:[0-9a-f]{64}$"


def _decimal_string(value: Any) -> Decimal:
    if isinstance(value, Decimal):
        return value
    if isinstance(value, str):
        return Decimal(value)
    raise ValueError(f"must be a decimal string in quotes, for example '0.98'; found {value!r}")


def _decimal(pattern: str) -> Any:
    return Annotated[
        Decimal,
        BeforeValidator(_decimal_string),
        PlainSerializer(str, return_type=str),
        WithJsonSchema({"type": "string", "pattern": pattern, "maxLength": 16}),
    ]


Ratio = _decimal(RATIO_PATTERN)
"""A share in [0, 1], a decimal string on the wire and a ``decimal.Decimal`` in Python."""

Money = _decimal(DECIMAL_PATTERN)
"""A non-negative amount or factor, a decimal string on the wire and a ``decimal.Decimal`` in Python."""

Name = Annotated[str, Field(pattern=NAME_PATTERN, min_length=1, max_length=32)]
"""A DNS label of at most 32 characters: names of classes, points, pools."""

Digest = Annotated[str, Field(pattern=DIGEST_PATTERN, max_length=71)]


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
    """A nested object that defaults to its own defaults: ``default: {}`` in the schema, else they would not be applied."""
    return Field(default_factory=model, description=doc, json_schema_extra={"default": {}})


def named_list(doc: str, key: str = "name", **bounds: Any) -> Any:
    """A list of named objects: server-side apply merges its entries and keeps names unique."""
    extra = {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [key]}
    return Field(description=doc, json_schema_extra=extra, **bounds)
