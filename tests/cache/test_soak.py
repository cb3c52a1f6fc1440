"""Random generation calls; a failure prints the call, which its number and seed reproduce."""

from __future__ import annotations

import oracles
import pytest
import soak

# It draws what the newest transformers offers.
pytestmark = oracles.needs_newest


@pytest.mark.slow
def test_two_hundred_random_calls():
    report = soak.run_soak(200, seed=0)
    print(report)
    assert report.ran == 200
    assert not report.failures, "\n".join(report.failures)
    # Refusals are the exception, and every law was looked at often.
    assert sum(report.refused.values()) < 40
    assert min(report.checks.values()) >= 10


def test_some_random_calls():
    report = soak.run_soak(12, seed=1)
    assert report.ran == 12
    assert not report.failures, "\n".join(report.failures)
