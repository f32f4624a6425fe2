"""The governor: fence, envelope, moves inside it. Time is an argument, so nothing here waits."""

from typing import Any

import pytest

from prism_api.control import Directive, EnvelopeState, Held
from prism_api.points import Ladder, OperatingPoint
from prism_runtime.engine.governor import CLASS_SLOTS, ClassSignals, Governor, Refused, SwapCause

NAMES = ("b500", "b625", "b750", "b875", "full")
MODEL = "sha256:" + "a" * 64
CALM = ClassSignals()
BUSY = ClassSignals(queue_wait_s=10.0)


def make_ladder() -> Ladder:
    return Ladder(
        OperatingPoint(
            name=name,
            budget_permille=500 + 125 * i,
            policy="prefix",
            relative_quality=f"0.9{5 + i}" if name != "full" else "1",
            relative_quality_low=f"0.9{4 + i}" if name != "full" else "1",
        )
        for i, name in enumerate(NAMES)
    )


def make_governor(**changes: Any) -> Governor:
    return Governor(make_ladder(), **{"model_digest": MODEL, "boot_point": "full", "now_s": 0.0, **changes})


def make_class(**changes: Any) -> dict[str, Any]:
    ordered = {"name": "gold", "ttftMs": 1000, "tpotMs": 100, "point": "full", "floor": "b500", "ceiling": "full"}
    return ordered | changes


def make_directive(epoch: int = 1, sequence: int = 1, **changes: Any) -> Directive:
    classes = changes.pop("classes", [make_class()])
    document = {
        "service": {"namespace": "team-a", "name": "chat", "uid": "uid-1"},
        "holder": "operator-1",
        "epoch": epoch,
        "sequence": sequence,
        "defaultClass": classes[0]["name"],
        "classes": classes,
        "envelope": {"ttlMs": 30_000, "safePoint": "full"},
        "governor": {"high": 600, "low": 400, "dwellDownMs": 200, "dwellUpMs": 10_000},
        "reason": "Test",
    }
    return Directive.model_validate(document | changes)


def point(governor: Governor, service_class: str = "gold") -> str:
    return NAMES[governor.point_of(service_class)]


def refused(answer: Held | Refused) -> Refused:
    assert isinstance(answer, Refused), answer
    return answer


# -- fence --------------------------------------------------------------------------------------------------------


def test_fresh_process_is_unmanaged_at_its_boot_point_and_accepts_any_first_fence() -> None:
    governor = make_governor(boot_point="b750")
    assert governor.held(5.0) == Held(state=EnvelopeState.UNMANAGED)
    assert governor.plan.class_point == (2,) * CLASS_SLOTS
    held = governor.apply(make_directive(7, 300), 5.0)
    assert held == Held(epoch=7, sequence=300, age_ms=0, ttl_left_ms=30_000, state=EnvelopeState.MANAGED)


@pytest.mark.parametrize(("epoch", "sequence"), [(2, 11), (3, 1)])
def test_greater_fence_is_applied_and_a_new_epoch_may_restart_the_sequence(epoch: int, sequence: int) -> None:
    governor = make_governor()
    governor.apply(make_directive(2, 10), 0.0)
    governor.apply(make_directive(epoch, sequence, classes=[make_class(point="b500")]), 1.0)
    assert (governor.held(1.0).epoch, governor.held(1.0).sequence) == (epoch, sequence)
    assert point(governor) == "b500"


@pytest.mark.parametrize(("epoch", "sequence"), [(2, 9), (1, 999)])
def test_lower_fence_is_refused_with_409_and_state_is_unchanged(epoch: int, sequence: int) -> None:
    governor = make_governor()
    governor.apply(make_directive(2, 10), 0.0)
    before, plan = governor.held(1.0), governor.plan
    answer = refused(governor.apply(make_directive(epoch, sequence, classes=[make_class(point="b500")]), 1.0))
    assert answer.status == 409
    assert f"({epoch}, {sequence})" in answer.error
    assert "(2, 10)" in answer.error
    assert (governor.held(1.0), governor.plan, point(governor)) == (before, plan, "full")
    assert governor.tick({}, 1.0) is None


def test_equal_fence_with_the_same_body_renews_the_envelope_and_changes_nothing_else() -> None:
    governor = make_governor()
    governor.apply(make_directive(), 0.0)
    governor.tick({"gold": BUSY}, 1.0)
    assert point(governor) == "b875"
    held = governor.apply(make_directive(), 20.0)
    assert isinstance(held, Held)
    assert (held.age_ms, held.ttl_left_ms) == (0, 30_000)
    assert point(governor) == "b875"


def test_equal_fence_with_another_body_is_refused_with_409_and_does_not_renew() -> None:
    governor = make_governor()
    governor.apply(make_directive(), 0.0)
    answer = refused(governor.apply(make_directive(classes=[make_class(point="b500")]), 20.0))
    assert answer.status == 409
    assert governor.held(20.0).ttl_left_ms == 10_000
    assert point(governor) == "full"


def test_directive_of_another_service_is_refused_with_403_once_bound() -> None:
    governor = make_governor()
    governor.apply(make_directive(), 0.0)
    other = {"namespace": "team-b", "name": "chat", "uid": "uid-2"}
    assert refused(governor.apply(make_directive(9, 9, service=other), 1.0)).status == 403
    assert governor.held(1.0).epoch == 1


def test_service_uid_given_at_boot_binds_before_the_first_directive() -> None:
    governor = make_governor(service_uid="uid-9")
    assert refused(governor.apply(make_directive(), 0.0)).status == 403
    assert governor.state is EnvelopeState.UNMANAGED


def test_directive_for_another_artifact_is_refused_with_412() -> None:
    governor = make_governor()
    answer = refused(governor.apply(make_directive(modelDigest="sha256:" + "b" * 64), 0.0))
    assert answer.status == 412
    assert isinstance(governor.apply(make_directive(modelDigest=MODEL), 0.0), Held)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"classes": [make_class(point="b350", floor="b350")]}, "'b350'; known points: b500, b625, b750, b875, full"),
        ({"classes": [make_class(floor="b875", ceiling="b625", point="b750")]}, "floor 'b875' is above ceiling"),
        ({"classes": [make_class(floor="b875", point="b500")]}, "point 'b500' is outside ['b875', 'full']"),
        ({"envelope": {"ttlMs": 1000, "safePoint": "b1"}}, "envelope.safePoint is 'b1'"),
    ],
)
def test_unknown_or_misordered_point_is_refused_with_422_and_nothing_is_applied(
    changes: dict[str, Any], says: str
) -> None:
    governor = make_governor()
    answer = refused(governor.apply(make_directive(**changes), 0.0))
    assert answer.status == 422
    assert says in answer.error
    assert governor.state is EnvelopeState.UNMANAGED


# -- plan and swaps -----------------------------------------------------------------------------------------------


def test_directive_becomes_one_swap_with_a_higher_version_and_the_time_of_its_receipt() -> None:
    governor = make_governor()
    governor.apply(make_directive(classes=[make_class(point="b500")]), 3.0)
    assert not governor.settled
    swap = governor.tick({}, 3.5)
    assert swap is not None
    assert (swap.plan.version, swap.cause, swap.due_s) == (2, SwapCause.DIRECTIVE, 3.0)
    assert swap.plan.class_point[governor.classes.live["gold"].slot] == 0
    assert governor.settled
    assert governor.tick({}, 3.6) is None


def test_directive_that_changes_no_point_swaps_nothing() -> None:
    governor = make_governor()
    governor.apply(make_directive(), 0.0)
    assert governor.tick({}, 0.1) is None
    assert governor.plan.version == 1


def test_repeated_order_leaves_the_governors_own_move_standing_and_a_changed_one_does_not() -> None:
    governor = make_governor()
    governor.apply(make_directive(1, 1), 0.0)
    governor.tick({"gold": BUSY}, 1.0)
    assert point(governor) == "b875"
    governor.apply(make_directive(1, 2), 2.0)
    assert point(governor) == "b875"
    governor.apply(make_directive(1, 3, classes=[make_class(point="b500")]), 3.0)
    assert point(governor) == "b500"


def test_repeated_order_with_a_higher_floor_moves_the_class_into_the_new_range_at_once() -> None:
    governor = make_governor()
    governor.apply(make_directive(1, 1, classes=[make_class(point="b750")]), 0.0)
    governor.tick({"gold": BUSY}, 1.0)
    assert point(governor) == "b625"
    governor.apply(make_directive(1, 2, classes=[make_class(point="b750", floor="b750")]), 2.0)
    assert point(governor) == "b750"


# -- moves --------------------------------------------------------------------------------------------------------


def test_saturated_class_steps_down_one_point_per_dwell_and_stops_at_its_floor() -> None:
    governor = make_governor()
    governor.apply(make_directive(classes=[make_class(floor="b750")]), 0.0)
    seen = []
    for now_ms in range(0, 1001, 50):
        governor.tick({"gold": BUSY}, now_ms / 1000)
        seen.append(point(governor))
    assert seen[:4] == ["full"] * 4
    assert seen[4:8] == ["b875"] * 4
    assert set(seen[8:]) == {"b750"}


def test_calm_class_steps_up_one_point_per_long_dwell_and_stops_at_its_ceiling() -> None:
    governor = make_governor()
    governor.apply(make_directive(classes=[make_class(point="b500", ceiling="b750")]), 0.0)
    reached = {}
    for second in range(40):
        swap = governor.tick({"gold": CALM}, float(second))
        if swap and swap.cause is SwapCause.GOVERNOR:
            reached[second] = point(governor)
        governor.apply(make_directive(classes=[make_class(point="b500", ceiling="b750")]), float(second))
    assert reached == {10: "b625", 20: "b750"}


def test_one_busy_tick_starts_the_calm_time_anew() -> None:
    governor = make_governor()
    governor.apply(make_directive(classes=[make_class(point="b500")]), 0.0)
    middling = ClassSignals(queue_wait_s=0.5)  # between low and high: neither down nor calm
    for second in range(20):
        governor.tick({"gold": middling if second == 9 else CALM}, float(second))
        assert point(governor) == "b500", second
    governor.tick({"gold": CALM}, 20.0)
    assert point(governor) == "b625"


def test_saturation_inside_the_band_holds_the_point_for_ever() -> None:
    governor = make_governor()
    governor.apply(make_directive(classes=[make_class(point="b750")]), 0.0)
    for second in range(25):
        governor.tick({"gold": ClassSignals(queue_wait_s=0.5, tpot_s=0.05)}, float(second))
        assert point(governor) == "b750"


def test_time_per_token_alone_can_saturate_a_class() -> None:
    governor = make_governor()
    governor.apply(make_directive(), 0.0)
    governor.tick({"gold": ClassSignals(tpot_s=0.07)}, 1.0)
    assert point(governor) == "b875"


def test_class_without_objectives_never_moves_down_by_itself() -> None:
    governor = make_governor()
    governor.apply(make_directive(classes=[make_class(ttftMs=None, tpotMs=None)]), 0.0)
    governor.tick({"gold": ClassSignals(queue_wait_s=1e6, tpot_s=1e6)}, 1.0)
    assert point(governor) == "full"


def test_classes_move_alone() -> None:
    governor = make_governor()
    governor.apply(make_directive(classes=[make_class(floor="full"), make_class(name="bulk")]), 0.0)
    swap = governor.tick({"gold": BUSY, "bulk": BUSY}, 1.0)
    assert swap is not None
    assert (point(governor, "gold"), point(governor, "bulk")) == ("full", "b875")


# -- envelope -----------------------------------------------------------------------------------------------------


def expire(classes: list[dict[str, Any]], safe_point: str) -> Governor:
    governor = make_governor()
    governor.apply(make_directive(classes=classes, envelope={"ttlMs": 5000, "safePoint": safe_point}), 0.0)
    governor.tick({}, 0.1)
    return governor


def test_expired_envelope_goes_down_to_the_safe_point_at_once() -> None:
    governor = expire([make_class(point="full")], "b500")
    assert governor.tick({}, 4.9) is None
    swap = governor.tick({}, 5.0)
    assert swap is not None
    assert swap.cause is SwapCause.ENVELOPE_EXPIRED
    assert governor.state is EnvelopeState.EXPIRED
    assert governor.held(6.0).ttl_left_ms == 0
    assert point(governor) == "b500"


def test_expired_envelope_goes_up_to_the_safe_point_one_point_per_dwell() -> None:
    governor = expire([make_class(point="b500", ceiling="b500")], "full")
    reached = {}
    for second in range(5, 60):
        if governor.tick({}, float(second)):
            reached[second] = point(governor)
    assert reached == {10: "b625", 20: "b750", 30: "b875", 40: "full"}


def test_expired_envelope_ignores_load() -> None:
    governor = expire([make_class(point="full")], "full")
    governor.tick({"gold": BUSY}, 6.0)
    assert point(governor) == "full"


def test_safe_point_below_a_classs_floor_stops_at_the_floor() -> None:
    governor = expire([make_class(point="full", floor="b875")], "b500")
    governor.tick({}, 5.0)
    assert point(governor) == "b875"


def test_directive_after_expiry_makes_the_pod_managed_again_at_the_ordered_point() -> None:
    governor = expire([make_class(point="full")], "b500")
    governor.tick({}, 5.0)
    governor.apply(make_directive(1, 2), 6.0)
    assert governor.state is EnvelopeState.MANAGED
    assert point(governor) == "full"


def test_same_directive_after_expiry_brings_its_orders_back() -> None:
    governor = expire([make_class(point="full")], "b500")
    governor.tick({}, 5.0)
    assert point(governor) == "b500"
    same = make_directive(envelope={"ttlMs": 5000, "safePoint": "b500"})
    governor.apply(same, 6.0)
    swap = governor.tick({}, 6.1)
    assert swap is not None
    assert swap.cause is SwapCause.DIRECTIVE
    assert (point(governor), governor.state) == ("full", EnvelopeState.MANAGED)


# -- classes ------------------------------------------------------------------------------------------------------


def names_directive(sequence: int, names: list[str]) -> Directive:
    return make_directive(1, sequence, classes=[make_class(name=name) for name in names])


def test_class_keeps_its_row_while_others_come_and_go() -> None:
    governor = make_governor()
    governor.apply(names_directive(1, ["gold", "bulk"]), 0.0)
    rows = {name: c.slot for name, c in governor.classes.live.items()}
    governor.apply(names_directive(2, ["bulk", "silver"]), 1.0)
    assert governor.classes.live["bulk"].slot == rows["bulk"]
    assert governor.classes.live["silver"].slot not in rows.values()
    governor.apply(names_directive(3, ["gold"]), 2.0)
    assert governor.classes.live["gold"].slot == rows["gold"]


def test_eight_renamed_classes_do_not_take_the_rows_of_requests_still_running() -> None:
    governor = make_governor()
    governor.apply(names_directive(1, [f"old-{i}" for i in range(8)]), 0.0)
    old = {c.slot for c in governor.classes.live.values()}
    governor.apply(names_directive(2, [f"new-{i}" for i in range(8)]), 1.0)
    new = {c.slot for c in governor.classes.live.values()}
    assert len(new) == 8
    assert not old & new
    governor.apply(names_directive(3, [f"newest-{i}" for i in range(8)]), 2.0)
    assert not new & {c.slot for c in governor.classes.live.values()}


def test_retired_class_follows_the_default_class() -> None:
    governor = make_governor()
    governor.apply(make_directive(1, 1, classes=[make_class(), make_class(name="bulk")]), 0.0)
    row = governor.classes.live["bulk"].slot
    governor.apply(make_directive(1, 2, classes=[make_class(point="b500")]), 1.0)
    swap = governor.tick({}, 1.1)
    assert swap is not None
    assert swap.plan.class_point[row] == 0


def test_unknown_or_absent_class_is_the_default_class() -> None:
    governor = make_governor()
    governor.apply(names_directive(1, ["gold", "bulk"]), 0.0)
    assert governor.classes.resolve(None).name == "gold"
    assert governor.classes.resolve("nobody").name == "gold"
    assert governor.classes.resolve("bulk").name == "bulk"
