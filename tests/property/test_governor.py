"""Invariants of the governor under any sequence of directives, loads and silences."""

from hypothesis import given
from hypothesis import strategies as st

from prism_api.control import Directive, EnvelopeState, Held
from prism_runtime.engine.governor import ClassSignals, Governor
from tests.unit.test_governor import MODEL, NAMES, make_class, make_directive, make_ladder


@st.composite
def directives(draw: st.DrawFn) -> Directive:
    classes = []
    for name in draw(st.lists(st.sampled_from(["gold", "silver", "bulk", "batch"]), min_size=1, unique=True)):
        floor, point, ceiling = sorted(draw(st.lists(st.integers(0, 4), min_size=3, max_size=3)))
        classes.append(make_class(name=name, floor=NAMES[floor], point=NAMES[point], ceiling=NAMES[ceiling]))
    envelope = {"ttlMs": draw(st.integers(1, 20_000)), "safePoint": draw(st.sampled_from(NAMES))}
    return make_directive(draw(st.integers(0, 3)), draw(st.integers(0, 3)), classes=classes, envelope=envelope)


signals = st.builds(ClassSignals, queue_wait_s=st.floats(0, 3), tpot_s=st.one_of(st.none(), st.floats(0, 0.3)))
moves = st.tuples(st.floats(0.0, 15.0), st.one_of(directives(), signals))


@given(st.lists(moves, max_size=30))
def test_classes_stay_above_their_floors_versions_rise_and_the_fence_never_falls(steps: list) -> None:
    governor, now_s = Governor(make_ladder(), model_digest=MODEL, boot_point="full", now_s=0.0), 0.0
    fence, version = governor.held(0.0).fence, governor.plan.version
    for elapsed_s, move in steps:
        now_s += elapsed_s
        if isinstance(move, Directive):
            accepted = isinstance(governor.apply(move, now_s), Held)
            assert accepted or governor.held(now_s).fence == fence
            load = {}
        else:
            load = dict.fromkeys(governor.classes.live, move)
        swap = governor.tick(load, now_s)
        held = governor.held(now_s)
        assert not held.fence < fence
        assert (swap is not None) == (governor.plan.version > version)
        assert governor.plan.version in (version, version + 1)
        assert governor.settled
        for c in governor.classes.live.values():
            point = governor.plan.class_point[c.slot]
            assert point >= c.floor or held.state is EnvelopeState.UNMANAGED
            assert point <= c.ceiling or held.state is EnvelopeState.EXPIRED
        assert len({c.slot for c in governor.classes.live.values()}) == len(governor.classes.live)
        fence, version = held.fence, governor.plan.version
