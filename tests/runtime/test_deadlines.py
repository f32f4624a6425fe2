"""What the engine's deadlines count from."""

from tests.runtime.models import request, tiny_engine


def test_tokens_are_due_from_the_end_of_the_step_that_made_the_first_one_its_pace_included() -> None:
    now_s = 10.0
    engine = tiny_engine(clock=lambda: now_s)
    engine.submit(request("r", (3, 4, 5), max_tokens=3))
    engine.step()
    (sequence,) = engine.scheduler.running.values()
    assert sequence.generated == 1
    now_s += 0.2  # a paced loop rests before it hands the token out
    engine.step()
    assert sequence.first_token_s == now_s
    now_s += 0.2
    engine.step()
    assert sequence.first_token_s == now_s - 0.2
