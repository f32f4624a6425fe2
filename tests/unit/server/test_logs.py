"""Log lines: one JSON object each, and an exception without the text it quotes."""

import json
import logging

from prism_runtime.server.logs import JsonLines


def line_of(error: Exception | None = None, **extra: object) -> dict[str, object]:
    record = logging.makeLogRecord(
        {"name": "test", "levelname": "ERROR", "msg": "went %s", "args": ("wrong",), **extra}
    )
    if error:
        record.exc_info = (type(error), error, error.__traceback__)
    line = JsonLines().format(record)
    assert "\n" not in line
    return dict(json.loads(line))


def raised(text: str) -> Exception:
    try:
        raise ValueError(text)
    except ValueError as error:
        return error


def test_line_holds_message_level_time_and_extra_fields_and_nothing_of_the_record_itself() -> None:
    line = line_of(status=409)
    assert line.pop("time")
    assert line == {"level": "error", "logger": "test", "message": "went wrong", "status": 409}


def test_exception_is_told_by_type_and_place_and_never_by_its_message() -> None:
    line = line_of(raised("could not parse 'my-secret-prompt'"))
    assert line["error"] == "ValueError"
    assert "test_logs.py" in str(line["at"])
    assert "secret" not in json.dumps(line)
