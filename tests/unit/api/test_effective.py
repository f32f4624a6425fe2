"""Settings after built-in values, and the cost formula of a profile."""

import pytest

from prism_api.effective import effective
from prism_api.profile import PointProfile
from prism_api.scaling import Direction, PolicyType, SelectPolicy
from prism_api.service import PrismServiceSpec
from tests.cluster.manifests import prism_service


def spec(**edits: object) -> PrismServiceSpec:
    return PrismServiceSpec.model_validate(prism_service(**edits)["spec"])


def test_an_unset_field_gets_its_built_in_value() -> None:
    settings = effective(spec())
    assert (settings.envelope_ttl_s, settings.dwell_down_ms, settings.dwell_up_ms) == (30, 200, 10_000)
    assert (settings.max_step, settings.headroom, settings.bridge_scale_up) == (4, 0.10, True)
    assert (settings.stabilization_up_s, settings.stabilization_down_s) == (30, 300)


@pytest.mark.parametrize(
    ("path", "value", "setting", "expected"),
    [
        ("budget.envelopeTTLSeconds", 5, "envelope_ttl_s", 5),
        ("budget.dwell.downMilliseconds", 0, "dwell_down_ms", 0),
        ("budget.dwell.upMilliseconds", 0, "dwell_up_ms", 0),
        ("budget.bridgeScaleUp", "Disabled", "bridge_scale_up", False),
        ("scaling.maxStep", 1, "max_step", 1),
        ("scaling.headroom", "0", "headroom", 0.0),
        ("scaling.behavior.scaleUp.stabilizationWindowSeconds", 0, "stabilization_up_s", 0),
        ("scaling.behavior.scaleDown.stabilizationWindowSeconds", 0, "stabilization_down_s", 0),
    ],
)
def test_a_field_of_the_service_wins_even_if_it_is_zero(
    path: str, value: object, setting: str, expected: object
) -> None:
    assert getattr(effective(spec(**{f"spec.{path}": value})), setting) == expected


def test_scaling_policies_are_taken_over() -> None:
    up = "spec.scaling.behavior.scaleUp"
    assert effective(spec()).pace_up == Direction()
    policy = {"type": "Percent", "value": 50, "periodSeconds": 60}
    pace = effective(spec(**{f"{up}.policies": [policy], f"{up}.selectPolicy": "Min"})).pace_up
    assert pace.select_policy is SelectPolicy.MIN
    assert [(one.type, one.value, one.period_seconds) for one in pace.policies] == [(PolicyType.PERCENT, 50, 60)]


@pytest.mark.parametrize(("edits", "learned"), [({}, True), ({"spec.scaling.headroom": "0.10"}, False)])
def test_headroom_is_learned_unless_it_is_set(edits: dict[str, object], learned: bool) -> None:
    assert effective(spec(**edits)).headroom_learned is learned


def test_the_only_class_is_the_default_class() -> None:
    assert spec().default_class_name == "standard"
    gold = {"name": "gold", "objectives": {"ttftMilliseconds": 800}}
    assert spec(**{"spec.classes.1": gold, "spec.defaultClass": "gold"}).default_class_name == "gold"


def test_a_step_costs_what_the_profiles_formula_says() -> None:
    profile = PointProfile(
        step_base_nanoseconds=30_000_000,
        step_per_sequence_nanoseconds=3_000_000,
        step_per_kilotoken_nanoseconds=1_000_000,
        prefill_base_nanoseconds=5_000_000,
        prefill_per_token_nanoseconds=350_000,
    )
    assert profile.step_seconds(0, 0, 0) == pytest.approx(0.030)
    assert profile.step_seconds(4, 2000, 0) == pytest.approx(0.030 + 0.012 + 0.002)
    assert profile.step_seconds(0, 0, 100) == pytest.approx(0.030 + 0.005 + 0.035)
