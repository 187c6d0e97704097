"""A recorded step replays as the step would run again; what no CUDA graph could hold is refused."""

import numpy as np
import pytest
import torch

from kvtools.ops.attention import plan_from_block_table, tree_attention
from kvtools.ops.quant import KVPages, append_kv
from kvtools.testing import Recorder

ROWS, VOCAB, WIDTH = 3, 50, 8


class Model:
    """Greedy decoding over buffers of fixed address."""

    def __init__(self):
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(VOCAB, WIDTH)
        self.head = torch.nn.Linear(WIDTH, VOCAB)
        self.token_b = torch.arange(ROWS)
        self.past_bm = torch.zeros(ROWS, WIDTH)
        self.length = torch.zeros(1, dtype=torch.int32)
        self.logits_bv = None

    @torch.no_grad()
    def step(self):
        self.past_bm += torch.tanh(self.embedding(self.token_b)) + 0.1 * self.length
        self.logits_bv = self.head(self.past_bm).contiguous()
        best_b = self.logits_bv.max(-1).indices
        self.token_b.copy_(torch.where(best_b == self.token_b, (best_b + 1) % VOCAB, best_b))
        self.length[0] += 1
        self.past_bm[0, 0] = 0.5  # a number, which a graph holds

    def state(self):
        return self.token_b.tolist(), self.past_bm.clone(), self.logits_bv.clone()


@pytest.mark.parametrize("inference", [False, True])
def test_replays_as_the_step_itself(inference):
    eager, model = Model(), Model()
    with torch.inference_mode(inference), Recorder() as recorder:
        model.step()
    eager.step()
    seen = set()
    for _ in range(6):
        torch.testing.assert_close(model.state(), eager.state(), rtol=0, atol=0)
        seen.add(tuple(model.token_b.tolist()))
        recorder.replay()
        eager.step()
    assert len(seen) == 6
    model.token_b.zero_()  # what others write between replays is read
    eager.token_b.zero_()
    recorder.replay()
    eager.step()
    torch.testing.assert_close(model.state(), eager.state(), rtol=0, atol=0)


@pytest.mark.parametrize("while_replayed", [False, True])
def test_autocast_is_that_of_the_step(while_replayed):
    """A product where the step turns it off, as rotary embeddings do, and one where it is on."""
    torch.manual_seed(0)
    x, inner, outer = torch.randn(8, 8), torch.zeros(8, 8), torch.zeros(8, 8)

    def step():
        outer.copy_(x @ x)
        with torch.autocast("cpu", enabled=False):
            inner.copy_(x @ x)

    with torch.autocast("cpu", torch.bfloat16), Recorder() as recorder:
        step()
    x.copy_(torch.randn(8, 8))
    with torch.autocast("cpu", torch.bfloat16, enabled=while_replayed):
        recorder.replay()
    found = inner.clone(), outer.clone()
    with torch.autocast("cpu", torch.bfloat16):
        step()
    assert torch.equal(found[0], inner) and torch.equal(found[1], outer)
    assert not torch.equal(inner, outer)


def test_operators_write_to_the_same_pages():
    """A kvtools operator is one call; what it writes is where it was, and so is what it reads."""

    def made():
        torch.manual_seed(0)
        pages = KVPages.empty(4, 2, 4, 16, k_format="int8", v_format="int8", position=True,
                              dtype=torch.float32)  # fmt: skip
        for x in (x for x in pages.tensors() if x is not None):
            x.zero_()
        table = torch.arange(4).view(2, 2)
        plan = plan_from_block_table(table, torch.tensor([1, 1]), 4)
        return pages, plan, torch.randn(2, 2, 16), torch.tensor([0, 8]), torch.zeros(2, 2, 16)

    def step(pages, plan, k_thd, slot_t, out_thd):
        position_t = (slot_t % 8).int()
        append_kv(k_thd, -k_thd, slot_t, pages, position_t, impl="reference")
        out_thd.copy_(tree_attention(k_thd, position_t, pages, plan, impl="reference")[0])
        k_thd.add_(out_thd.roll(1, 0))
        slot_t += 1
        plan.length.add_(1)

    eager, replayed = made(), made()
    with Recorder() as recorder:
        step(*replayed)
    step(*eager)
    for _ in range(4):
        torch.testing.assert_close(replayed[2:], eager[2:], rtol=0, atol=0)
        assert torch.equal(replayed[0].k, eager[0].k) and replayed[0].k.any()
        recorder.replay()
        step(*eager)


class Faults:
    """A step for each thing that a graph cannot hold, over x of 6 floats."""

    def item(x):
        x.add_(x.max().item())

    def branch(x):
        if x[0] > 0:
            x.add_(1)

    def number(x):
        x.add_(float(x[1]))

    def tolist(x):
        x.add_(x.tolist()[1])

    def numpy(x):
        x.add_(x.numpy()[0].item())

    def array(x):
        x.add_(np.asarray(x).sum().item())

    def cpu(x):
        x.add_(x.cpu())

    def equal(x):
        x.add_(torch.equal(x, x))

    def allclose(x):
        x.add_(torch.allclose(x, x))

    def nonzero(x):
        x[x.nonzero()[:, 0]] += 1

    def mask(x):
        x.add_(x[x > 0].sum())

    def write_to_mask(x):
        x[x > 0] = 1

    def masked_select(x):
        x.add_(x.masked_select(x > 0).sum())

    def unique(x):
        x.add_(len(x.unique()))

    def repeats(x):
        x.add_(x.repeat_interleave(x.long()).sum())

    def tensor(x):
        x.copy_(torch.tensor([1.0, 2, 3, 4, 5, 6]))

    def new_tensor(x):
        x.add_(x.new_tensor(2.0))

    def from_numpy(x):
        x.copy_(torch.from_numpy(np.ones(6, np.float32)))

    def as_tensor(x):
        x.copy_(torch.as_tensor(np.ones(6, np.float32)))

    def buffer(x):
        x.copy_(torch.frombuffer(bytearray(24), dtype=torch.float32))

    def listed(x):
        x.add_(x[[0, 0, 1, 1, 2, 2]])

    def resize(x):
        x.resize_(1000)


FAULTS = {
    "item": "_local_scalar_dense", "branch": "_local_scalar_dense",
    "number": "_local_scalar_dense", "tolist": "Tensor.tolist", "numpy": "Tensor.numpy",
    "array": "Tensor.__array__", "cpu": "Tensor.cpu", "equal": "aten.equal",
    "allclose": "aten.allclose", "nonzero": "aten.nonzero", "mask": "aten.index.Tensor",
    "write_to_mask": "aten.index_put_", "masked_select": "aten.masked_select",
    "unique": "unique", "repeats": "aten.repeat_interleave", "tensor": "aten.lift_fresh",
    "new_tensor": "aten.lift_fresh", "from_numpy": "aten.lift_fresh",
    "as_tensor": "aten.lift_fresh", "buffer": "aten.copy_", "listed": "aten.lift_fresh",
    "resize": "aten.resize_",
}  # fmt: skip


def test_all_faults_have_a_call():
    assert FAULTS.keys() == {name for name in vars(Faults) if name[0] != "_"}


@pytest.mark.parametrize("name", FAULTS)
def test_refused(name):
    """By the name of the call, and the line here that makes it."""
    x = torch.arange(6.0)
    why = "from host data" if "lift" in FAULTS[name] else ""
    with pytest.raises(RuntimeError, match=f"{FAULTS[name]}.*{why}") as error, Recorder():
        getattr(Faults, name)(x)
    assert f"test_recorder.py:{getattr(Faults, name).__code__.co_firstlineno + 1} in {name} " in (
        str(error.value)
    )
    assert torch.tensor([1]).tolist() == [1]  # no longer watched


@pytest.mark.parametrize("how", ["another", "moved"])
def test_a_tensor_that_is_elsewhere_since(how):
    """Before anything runs."""
    model = Model()
    with Recorder() as recorder:
        model.step()
    token_b, length = model.token_b.clone(), model.length.clone()
    if how == "another":
        model.past_bm = model.past_bm.clone()
    else:
        model.past_bm.resize_(1000, WIDTH)
    with pytest.raises(RuntimeError, match="freed or moved") as error:
        recorder.replay()
    assert "aten.add_.Tensor at" in str(error.value) and "self.past_bm +=" in str(error.value)
    assert torch.equal(model.token_b, token_b) and torch.equal(model.length, length)


def test_what_a_step_makes_anew_each_time_cannot_be_replayed():
    """It reads what it has replaced."""
    model = Model()

    def step():
        model.past_bm = model.past_bm + 1

    with Recorder() as recorder:
        step()
    with pytest.raises(RuntimeError, match="aten.add.Tensor at .* in step .*freed or moved"):
        recorder.replay()
