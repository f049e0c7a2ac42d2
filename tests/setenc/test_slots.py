"""Slots that are placed by data, asked by targets, and looked at."""

import copy
import math

import pytest
import torch
from torch import nn

import setenc


def pooling(num_slots=4, num_heads=2, in_dim=3, **options):
    torch.manual_seed(1)
    return setenc.SlotPooling(in_dim, 16, num_slots, num_heads=num_heads, residual=False, **options)


def keys_of(pool, features):
    keys = features.flatten(0, 1) @ pool.key_value.weight[: pool.out_dim].T
    return keys - keys.mean(0)


# --- placement -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_heads", [1, 2, 4])
@pytest.mark.parametrize("slots", ["random", "learned"])
@pytest.mark.parametrize("sharpness", [1.0, 3.0])
@torch.no_grad()
def test_slots_sit_at_farthest_elements_with_logits_of_the_given_spread(num_heads, slots, sharpness):
    pool = pooling(5, num_heads, slots=slots).double()
    x = torch.randn(3, 20, 3, dtype=torch.float64)
    pool.init_slots(x, sharpness, torch.Generator().manual_seed(0))
    keys = keys_of(pool, x)
    queries = pool.queries()
    logits = queries @ keys.unflatten(-1, (num_heads, -1)).transpose(0, 1).mT / math.sqrt(16 / num_heads)
    torch.testing.assert_close(logits.std(-1, correction=0), torch.full_like(logits[..., 0], sharpness))
    # Each slot, in each head, points to one element; together they are a greedy choice of far ones.
    cosine = (
        nn.functional.normalize(queries, dim=-1)
        @ nn.functional.normalize(keys.unflatten(-1, (num_heads, -1)).transpose(0, 1), dim=-1).mT
    )
    chosen = cosine.mean(0).argmax(-1)
    torch.testing.assert_close(cosine[:, range(5), chosen], torch.ones(num_heads, 5, dtype=torch.float64))
    for k in range(1, 5):
        distance = torch.cdist(keys, keys[chosen[:k]]).amin(1)
        assert float(distance[chosen[k]]) == pytest.approx(float(distance.max()))


@torch.no_grad()
def test_placement_from_streams_masks_and_columns():
    x = torch.randn(3, 20, 3)
    mask = torch.rand(3, 20) < 0.7
    dirty = torch.where(mask[..., None], x, torch.nan)
    found = []
    for data, options in (
        (dirty, {"mask": mask}),
        (iter([(dirty[:, :7], mask[:, :7]), (dirty[:, 7:], mask[:, 7:])]), {}),
    ):
        pool = pooling()
        pool.init_slots(data, generator=torch.Generator().manual_seed(0), **options)
        found.append(pool.slot_mean.clone())
    # A sample has no order: the first slot is another one, but all sit at real elements.
    for slots in found:
        pool.slot_mean.copy_(slots)
        assert bool(slots.isfinite().all())
    pool = pooling().eval()
    pool.init_slots(x, columns=slice(0, 2))
    assert not bool(pool.key_value.weight[:16, 2].any())
    assert bool(pool.key_value.weight[16:, 2].any()), "values see everything"
    other = x.clone()
    other[..., 2] = 7
    a, b = (pool.attention(pool.state_of(data), data) for data in (x, other))
    torch.testing.assert_close(a, b)


def test_a_long_stream_is_sampled_uniformly(monkeypatch):
    from setenc.pooling import init

    monkeypatch.setattr(init, "_CANDIDATES", 50)
    x = torch.arange(1000.0).view(1, 1000, 1)
    for chunks in (x, x.split(30, 1), x.split(1000, 1)):
        means = []
        for seed in range(40):
            g = torch.Generator().manual_seed(seed)
            sampled = init.sample(chunks if isinstance(chunks, torch.Tensor) else iter(chunks), 1, None, g)
            assert len(sampled.unique()) == 50
            means.append(float(sampled.mean()))
        # 40 means of 50 numbers of a uniform on 0..999: standard error 289 / sqrt(2000) = 6.5
        assert sum(means) / 40 == pytest.approx(499.5, abs=26)


def test_placement_is_refused_where_it_makes_no_sense():
    x = torch.randn(2, 10, 3)
    for pool in (pooling(slot_norm=True), pooling(slot_dim=5)):
        with pytest.raises(ValueError, match="without slot_norm and with slot_dim=None"):
            pool.init_slots(x)
    with pytest.raises(ValueError, match="4 slots need 4 different keys among the elements; got 2"):
        pooling().init_slots(x[:1, :2].repeat(3, 4, 1))
    for bad in (x[..., :2], x[0]):
        with pytest.raises(ValueError, match="shape"):
            pooling().init_slots(bad)
    with pytest.raises(ValueError, match="at least one element"):
        pooling().init_slots(x[:, :0])
    with pytest.raises(ValueError, match="at least one element"):
        pooling().init_slots(iter([]))
    with pytest.raises(ValueError, match="must be finite"):
        pooling().init_slots(x * torch.nan)
    with pytest.raises(ValueError, match="sharpness must be a finite number > 0"):
        pooling().init_slots(x, 0)


# --- targets -------------------------------------------------------------------------------------------------------


def reference(query, slots, targets):
    """The formula, head by head and target by target."""
    pool, heads = query.pooling, query.pooling.num_heads
    d, width = pool.out_dim // heads, query.dim // heads
    key = pool.key_value.weight[: pool.out_dim, query.columns]
    queries = pool.query(pool.slot_mean)
    values = query.value(slots)
    out = []
    for h in range(heads):
        part = slice(h * d, (h + 1) * d)
        logits = (targets @ key[part].T) @ queries[:, part].T * query.log_sharpness.exp() / math.sqrt(d)
        out.append(logits.softmax(-1) @ values[..., h * width : (h + 1) * width])
    return torch.cat(out, -1)


@pytest.mark.parametrize("num_heads", [1, 2])
@pytest.mark.parametrize("dim", [None, 6])
@pytest.mark.parametrize("columns", [None, slice(0, 2), [2, 0]])
def test_targets_read_the_slots_by_the_keys_of_the_pooling(num_heads, dim, columns):
    pool = pooling(num_heads=num_heads)
    query = setenc.SlotQuery(pool, dim, columns=columns).double()
    with torch.no_grad():
        query.log_sharpness.fill_(0.7)
    count = 3 if columns is None else 2
    slots = torch.randn(2, 4, query.dim, dtype=torch.float64, requires_grad=True)
    targets = torch.randn(2, 9, count, dtype=torch.float64, requires_grad=True)
    out = query(slots, targets)
    torch.testing.assert_close(out, reference(query, slots, targets), rtol=1e-12, atol=1e-12)
    parts = torch.cat([query(slots, part) for part in targets.split([1, 0, 5, 3], 1)], 1)
    torch.testing.assert_close(parts, out, rtol=1e-12, atol=1e-12)
    leaves = [slots, targets, *query.parameters()]
    ours = torch.autograd.grad(out.sin().sum(), leaves, allow_unused=True)
    theirs = torch.autograd.grad(reference(query, slots, targets).sin().sum(), leaves, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_tied_keys_learn_with_the_pooling_and_may_be_freed():
    pool = pooling()
    query = setenc.SlotQuery(pool)
    slots, targets = torch.randn(2, 4, 16), torch.randn(2, 5, 3)
    before = query(slots, targets)
    assert {id(p) for p in pool.parameters()} <= {id(p) for p in query.parameters()}
    tied = copy.deepcopy(query)
    query.free()
    torch.testing.assert_close(query(slots, targets), before)
    with torch.no_grad():
        pool.key_value.weight.mul_(2)
        tied.pooling.key_value.weight.mul_(2)
    torch.testing.assert_close(query(slots, targets), before)
    assert not torch.allclose(tied(slots, targets), before)
    query(slots, targets).sum().backward()
    assert query.key.grad is not None
    assert query.queries.grad is not None
    assert "tied=False" in repr(query)
    again = setenc.SlotQuery(pooling())
    again.free()
    again.load_state_dict(query.state_dict())
    torch.testing.assert_close(again(slots, targets), before)


@pytest.mark.parametrize("mode", ["full", "exact"])
def test_gradients_through_targets_and_slots(mode):
    """The same parameters fill the slots and ask them: gradients of both uses add up."""
    pool = pooling(slots="learned")
    enc = setenc.UMBC(None, pool, setenc.SAB(16), mass_feature=True).double().eval()
    query = setenc.SlotQuery(pool, columns=slice(0, 2)).double()
    x, targets = torch.randn(2, 11, 3, dtype=torch.float64), torch.randn(2, 5, 2, dtype=torch.float64)
    parameters = list(nn.ModuleList([enc, query]).parameters())

    def gradients(slots):
        out = query(slots, targets).sin().sum()
        return torch.autograd.grad(out, parameters, allow_unused=True, materialize_grads=True)

    for a, b in zip(gradients(setenc.encode(enc, x, chunk_size=4, gradient=mode)), gradients(enc(x)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_bad_targets_are_refused():
    query = setenc.SlotQuery(pooling(), columns=slice(0, 2))
    slots, targets = torch.randn(2, 4, 16), torch.randn(2, 5, 2)
    for bad in (targets[0], targets[:1], targets[..., :1]):
        with pytest.raises(ValueError, match=r"targets must have shape \(B, M, c\) = \(2, M, 2\)"):
            query(slots, bad)
    for bad in (slots[:, :3], slots[..., :8], slots[0]):
        with pytest.raises(ValueError, match=r"slots must have shape \(B, K, dim\) = \(B, 4, 16\)"):
            query(bad, targets)
    with pytest.raises(ValueError, match="multiple of num_heads"):
        setenc.SlotQuery(pooling(), 7)
    with pytest.raises(TypeError, match=r"setenc\.SlotPooling; got GatedAttentionPooling"):
        setenc.SlotQuery(setenc.GatedAttentionPooling(3, 8))


# --- diagnosis -----------------------------------------------------------------------------------------------------


class Embedded(nn.Module):
    """Sines and cosines of the coordinates."""

    def forward(self, x):
        angles = torch.cat([x * math.pi * 2**j for j in range(3)], -1)
        return torch.cat((angles.sin(), angles.cos()), -1)


def test_new_slots_are_one_and_placed_ones_are_not():
    """The figures that the documentation gives for the start."""
    torch.manual_seed(0)
    x = torch.rand(8, 100, 2)
    pool = setenc.SlotPooling(12, 64, 32, num_heads=1, residual=False)
    enc = setenc.UMBC(Embedded(), pool, None)
    before = setenc.diagnose_slots(enc, x)
    assert before.slot_cosine > 0.999
    assert before.effective_rank < 1.05
    assert before.entropy > 0.99
    assert before.overlap > 0.99
    assert "are one slot" in before.advice
    pool.init_slots(enc.extractor(x))
    after = setenc.diagnose_slots(enc, x)
    assert after.overlap < 0.3
    assert after.entropy < 0.8
    assert after.slot_cosine < 0.9
    assert after.effective_rank > 2
    assert "one slot" not in after.advice
    assert "effective rank" in str(after)
    assert after.advice in str(after)


@torch.no_grad()
def test_the_figures_are_those_of_their_definitions():
    pool = pooling(3, 1, slots="learned", output_norm=False).double()
    x = torch.randn(2, 6, 3, dtype=torch.float64)
    pool.init_slots(x)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6]).bool()
    found = setenc.diagnose_slots(pool, x, mask)
    state = pool.state_of(x, mask)
    shares, slots = pool.attention(state, x, mask)[:, 0], pool.readout(state)
    pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
    cosine = nn.functional.cosine_similarity
    assert found.slot_cosine == pytest.approx(
        float(torch.stack([cosine(slots[:, i], slots[:, j], -1) for i, j in pairs]).mean()), rel=1e-4
    )
    assert found.overlap == pytest.approx(
        float(torch.stack([cosine(shares[:, i], shares[:, j], -1) for i, j in pairs]).mean()), rel=1e-4
    )
    entropy = [-(s[s > 0] * s[s > 0].log()).sum() / math.log(n) for b, n in ((0, 4), (1, 6)) for s in shares[b]]
    assert found.entropy == pytest.approx(float(sum(entropy) / 6), rel=1e-4)
    torch.testing.assert_close(found.mass.sum(), torch.ones((), dtype=torch.float64))
    assert 1 <= found.effective_rank <= 3


def test_slots_of_a_stream_and_odd_cases():
    pool = pooling(num_slots=1)
    x = torch.randn(2, 6, 3)
    one = setenc.diagnose_slots(pool, x)
    assert one.slot_cosine == one.overlap == 1
    assert "one slot" in one.advice
    enc = setenc.UMBC(None, pooling(), None).eval()
    state = enc.update(enc.update(enc.init_state(2), x), 2 * x)
    whole = setenc.diagnose_slots(enc, torch.cat((x, 2 * x), 1))
    part = setenc.diagnose_slots(enc, x, state=state)
    assert part.slot_cosine == pytest.approx(whole.slot_cosine, rel=1e-5)
    torch.testing.assert_close(part.mass, whole.mass)
    for empty in (x[:, :0], x[:0]):
        found = setenc.diagnose_slots(enc, empty)
        assert math.isfinite(found.entropy)
    with pytest.raises(NotImplementedError, match="gives its elements no attention"):
        setenc.diagnose_slots(setenc.DeepSetsPooling(3, 8), x)
    with pytest.raises(TypeError, match=r"setenc\.UMBC or a setenc\.Pooling; got Linear"):
        setenc.diagnose_slots(nn.Linear(3, 3), x)
