"""The operators under random calls: see fuzz_ops.py."""

import os
import signal

import fuzz_ops
import pytest
import torch


@pytest.mark.only(when=lambda: hasattr(os, "fork"))  # cases need a process of their own
def test_random_calls():
    counts, failures = fuzz_ops.fuzz(500, seed=0)
    assert not failures, failures[:3]
    assert counts["equal"] > 200 and sum(counts.values()) == 500


def test_a_case_that_dies_or_writes_outside_is_found(monkeypatch):
    def poke(rng, put):
        x = put(torch.zeros(3, 4))

        def write(x, impl):
            x.as_strided((1,), (1,), x.storage_offset() - 1 - 4 * (rng.random() < 0.5)).zero_()

        return fuzz_ops.Case(write, {"x": x}, ("x",))

    def die(rng, put):
        return fuzz_ops.Case(lambda x, impl: os.kill(os.getpid(), signal.SIGKILL), {"x": 1})

    for maker, why in ((poke, "a stray write"), (die, "the process died")):
        monkeypatch.setattr(fuzz_ops, "MAKERS", (maker,))
        monkeypatch.setattr(fuzz_ops, "spoil", lambda *args: None)
        counts, failures = fuzz_ops.fuzz(2, seed=0)
        assert [i for i, _ in failures] == [0, 1] and all(why in w for _, w in failures)
