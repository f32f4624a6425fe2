import argparse
from decimal import Decimal

import pytest

from prism_operator.settings import SettingsError, add_arguments, from_arguments, parse


def settings(*argv, **environ):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return from_arguments(parser.parse_args(argv), environ)


def test_defaults_serve_all_namespaces_with_a_loop_of_a_second():
    found = settings()
    assert (found.watch_namespaces, found.fast_loop_s, found.slow_loop_s) == ((), 1.0, 30.0)
    assert (found.metrics_port, found.health_port, found.control_port) == (9090, 8080, 8081)


def test_the_environment_of_the_chart_is_understood_and_a_flag_wins():
    environ = {
        "POD_NAME": "prism-operator-0",
        "POD_NAMESPACE": "prism",
        "POD_IP": "10.1.2.3",
        "PRISM_OPERATOR_WATCH_NAMESPACES": "team-a, team-b",
        "PRISM_OPERATOR_SLOW_LOOP_SECONDS": "5",
        "PRISM_OPERATOR_LOG_LEVEL": "debug",
    }
    found = settings("--slow-loop-seconds", "7", **environ)
    assert found.watch_namespaces == ("team-a", "team-b")
    assert (found.namespace, found.listen, found.slow_loop_s, found.log_level) == ("prism", "10.1.2.3", 7.0, "DEBUG")
    assert found.identity.startswith("prism-operator-0_")


def test_caps_of_the_fleet_are_optional_and_exact():
    assert (settings().fleet_max_per_hour, settings().fleet_max_accelerators) == (None, None)
    found = settings("--fleet-max-per-hour", "99.50", PRISM_OPERATOR_FLEET_MAX_ACCELERATORS="64")
    assert (found.fleet_max_per_hour, found.fleet_max_accelerators) == (Decimal("99.50"), 64)
    with pytest.raises(SettingsError, match="must be an amount like 250 or"):
        settings("--fleet-max-per-hour", "much")


def test_an_empty_variable_counts_as_not_set():
    assert settings(PRISM_OPERATOR_METRICS_PORT="").metrics_port == 9090


def test_two_processes_of_one_pod_have_different_identities():
    assert settings(POD_NAME="a").identity != settings(POD_NAME="a").identity


@pytest.mark.parametrize(
    ("argv", "environ", "words"),
    [
        (["--metrics-port", "70000"], {}, "--metrics-port must be an integer from 0 to 65535; found '70000'"),
        (["--fast-loop-seconds", "fast"], {}, "must be a number from 0.2 to 10; found 'fast'"),
        ([], {"PRISM_OPERATOR_WATCH_NAMESPACES": "Team_A"}, "variable PRISM_OPERATOR_WATCH_NAMESPACES must be a DNS"),
        ([], {"PRISM_OPERATOR_LOG_LEVEL": "loud"}, "must be one of DEBUG, INFO, WARNING, ERROR; found 'loud'"),
    ],
)
def test_a_wrong_value_is_refused_with_its_source_and_what_would_work(argv, environ, words):
    with pytest.raises(SettingsError) as refused:
        settings(*argv, **environ)
    assert words in str(refused.value)


def test_help_names_every_variable(capsys):
    with pytest.raises(SystemExit):
        parse(["run", "--help"])
    text = capsys.readouterr().out
    assert "PRISM_OPERATOR_WATCH_NAMESPACES" in text
    assert "POD_NAMESPACE" in text
