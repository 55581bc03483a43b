"""The circuit breaker against a clock of its own."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from polymath.proxy import CircuitBreaker
from polymath.proxy.circuit_breaker import COOLDOWN, FAILURES

MOMENT = 0.001


class Clock:
    """Stands for the monotonic clock; a test moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def after(failures: int) -> tuple[CircuitBreaker, Clock]:
    """A breaker after so many failures in a row."""
    clock = Clock()
    breaker = CircuitBreaker(clock)
    for _ in range(failures):
        breaker.start()
        breaker.fail()
    return breaker, clock


def half_open() -> tuple[CircuitBreaker, Clock]:
    breaker, clock = after(FAILURES)
    clock.now += COOLDOWN
    return breaker, clock


def test_a_new_breaker_is_closed() -> None:
    breaker, _ = after(0)
    assert (breaker.state, breaker.lets_pass, breaker.seconds_left) == ("closed", True, 0)


def test_it_opens_at_the_last_failure_and_not_before() -> None:
    assert after(FAILURES - 1)[0].state == "closed"
    breaker, _ = after(FAILURES)
    assert (breaker.state, breaker.lets_pass, breaker.seconds_left) == ("open", False, COOLDOWN)


def test_a_success_between_failures_starts_the_count_again() -> None:
    breaker, _ = after(FAILURES - 1)
    breaker.succeed()
    for _ in range(FAILURES - 1):
        breaker.fail()
    assert breaker.state == "closed"


def test_a_call_that_says_nothing_does_not_start_the_count_again() -> None:
    breaker, _ = after(FAILURES - 1)
    breaker.forget()
    breaker.fail()
    assert breaker.state == "open"


def test_it_is_half_open_when_the_time_is_over_and_not_before() -> None:
    breaker, clock = after(FAILURES)
    clock.now += COOLDOWN - MOMENT
    assert (breaker.state, breaker.lets_pass) == ("open", False)
    clock.now += MOMENT
    assert (breaker.state, breaker.lets_pass, breaker.seconds_left) == ("half_open", True, 0)


def test_half_open_lets_one_call_pass_at_a_time() -> None:
    breaker, _ = half_open()
    breaker.start()
    assert not breaker.lets_pass


def test_a_trial_that_succeeds_closes_it() -> None:
    breaker, _ = half_open()
    breaker.start()
    breaker.succeed()
    assert breaker.state == "closed"
    breaker.fail()
    assert breaker.state == "closed"


def test_one_failure_of_the_trial_opens_it_for_the_whole_time_again() -> None:
    breaker, clock = half_open()
    clock.now += 5
    breaker.start()
    breaker.fail()
    assert (breaker.state, breaker.seconds_left) == ("open", COOLDOWN)


def test_a_trial_that_says_nothing_makes_room_for_another() -> None:
    breaker, _ = half_open()
    breaker.start()
    breaker.forget()
    assert (breaker.state, breaker.lets_pass) == ("half_open", True)


@given(st.lists(st.sampled_from(["succeed", "fail", "forget", "wait"])))
def test_a_breaker_never_stays_shut(steps: list[str]) -> None:
    """Whatever happened: after the time a call passes, and if it succeeds all others do."""
    breaker, clock = after(0)
    for step in steps:
        if step == "wait":
            clock.now += COOLDOWN / 2
        elif breaker.lets_pass:
            breaker.start()
            getattr(breaker, step)()
    clock.now += COOLDOWN
    assert breaker.lets_pass
    breaker.start()
    breaker.succeed()
    assert breaker.state == "closed"
