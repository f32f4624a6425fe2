"""Ratios and money: decimal strings on the wire, exact decimals in Python, refused wherever the API server refuses."""

from decimal import Decimal
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from prism_api.base import Document, Money, Ratio

RATIO: TypeAdapter[Decimal] = TypeAdapter(Ratio)
MONEY: TypeAdapter[Decimal] = TypeAdapter(Money)


@pytest.mark.parametrize("text", ["0", "0.5", "0.000001", "1", "1.0", "1.000000"])
def test_a_ratio_is_read_exactly_and_written_as_it_was_read(text: str) -> None:
    value = RATIO.validate_python(text)
    assert value == Decimal(text)
    assert RATIO.dump_python(value, mode="json") == text


@pytest.mark.parametrize(
    "text", ["", "1.1", "-0.1", "+0.5", ".5", "0.1234567", "5e-1", "50%", "NaN", "Infinity", "0.5\n"]
)
def test_a_string_that_is_no_ratio_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValidationError, match=r"must be a string like '0\.98'"):
        RATIO.validate_python(text)


@pytest.mark.parametrize("value", [0.995, 1, True, None, ["1"]])
def test_a_ratio_without_quotes_is_refused_because_it_is_no_longer_exact(value: Any) -> None:
    with pytest.raises(ValidationError, match="must be a string like"):
        RATIO.validate_python(value)


def test_a_decimal_that_the_wire_cannot_carry_is_refused_when_it_is_made() -> None:
    assert MONEY.validate_python(Decimal("2.50")) == Decimal("2.50")
    for value in (Decimal(1) / Decimal(3), Decimal("-1"), Decimal("NaN"), Decimal("1E+10")):
        with pytest.raises(ValidationError, match="matches"):
            MONEY.validate_python(value)


def test_a_decimal_with_an_exponent_is_written_in_digits() -> None:
    assert MONEY.dump_python(MONEY.validate_python(Decimal("1E+2")), mode="json") == "100"


def test_a_document_ignores_what_a_newer_peer_adds_and_leaves_out_what_is_absent() -> None:
    class Price(Document):
        per_hour: Money
        currency_name: str | None = None

    price = Price.model_validate({"perHour": "2.50", "addedLater": 1})
    assert price.to_wire() == {"perHour": "2.50"}
    with pytest.raises(ValidationError, match="frozen"):
        price.per_hour = Decimal(1)
