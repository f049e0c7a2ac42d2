"""Instances of bags: largest scores against a sort, DSMIL and CLAM against their formulas, poolings side by side."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import setenc
from setenc.tasks import clam_instance_loss


def bags(batch=3, n=11):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(batch, n, 4, generator=g, dtype=torch.float64)
    return x, torch.rand(batch, n, generator=g) < 0.7


def streamed(pooling, x, sizes, mask=None):
    state = pooling.init_state(len(x))
    for again in range(pooling.num_passes):
        state = pooling.next_pass(state) if again else state
        masks = [None] * len(sizes) if mask is None else mask.split(sizes, 1)
        for part, own in zip(x.split(sizes, 1), masks, strict=True):
            state = pooling.update(state, part, own)
    return state


# --- the largest scores --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 20])
@pytest.mark.parametrize("masked", [False, True])
def test_instances_are_those_with_the_largest_scores(count, masked):
    pooling = setenc.InstancePooling(4, 6, count).double()
    x, mask = bags()
    mask = mask if masked else torch.ones_like(mask)
    scores = pooling.scores(x).masked_fill(~mask, -torch.inf)
    out = torch.zeros(3, count, 6, dtype=torch.float64)
    for b in range(3):
        order = [i for i in scores[b].argsort(descending=True).tolist() if mask[b, i]][:count]
        out[b, : len(order)] = torch.cat((scores[b, order, None], pooling.value(x[b, order])), 1)
    for found in (pooling(x, mask), pooling.readout(streamed(pooling, x, [4, 1, 6], mask))):
        torch.testing.assert_close(found, out, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 3, 10])
def test_equal_scores_go_to_the_first(chunk):
    enc = setenc.UMBC(None, setenc.InstancePooling(4, 6, 2), None).double()
    x = torch.randn(1, 2, 4, dtype=torch.float64).repeat(1, 5, 1).requires_grad_()
    for mode in ("full", "exact"):
        out = setenc.encode(enc, x, chunk_size=chunk, gradient=mode)
        (gradient,) = torch.autograd.grad(out.sum(), x)
        best = int(enc.pooling.scores(x)[0, :2].argmax())
        rows = gradient[0].abs().sum(1).nonzero().flatten().tolist()
        assert rows == [best, best + 2]


def test_scores_that_are_not_numbers_are_found():
    pooling = setenc.InstancePooling(4, 6, 2).double()
    x, _ = bags()
    for bad in (torch.nan, torch.inf, -torch.inf):
        poisoned = x.clone()
        poisoned[1, 7, 2] = bad
        with pytest.raises(ValueError, match="must be finite"):
            pooling(poisoned)


# --- DSMIL ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_dsmil_is_its_formula(masked):
    pooling = setenc.DSMILPooling(4, 6).double()
    x, mask = bags()
    mask = mask if masked else torch.ones_like(mask)
    rows = []
    for b in range(3):
        h = x[b][mask[b]]
        scores = pooling.critical.scores(h[None])[0]
        worst = int(scores.argmax())
        shares = (pooling.query(h) @ pooling.query(h[worst]) / 6**0.5).softmax(0)
        critical = torch.cat((scores[worst : worst + 1], pooling.critical.value(h[worst])))
        rows.append(torch.stack((shares @ pooling.value(h), critical)))
    expected = torch.stack(rows)
    found = pooling(x, mask), pooling.readout(streamed(pooling, x, [4, 1, 6], mask))
    for out in found:
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    leaves = list(pooling.parameters())
    expected = torch.autograd.grad(expected.sin().sum(), leaves)
    for out in found:
        for ours, theirs in zip(torch.autograd.grad(out.sin().sum(), leaves), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_passes_are_counted():
    pooling = setenc.DSMILPooling(4, 6).double()
    enc = setenc.UMBC(None, pooling, None)
    x, _ = bags()
    first = enc.update(enc.init_state(3), x)
    with pytest.raises(ValueError, match=r"a bag is seen twice: take state = pooling\.next_pass"):
        enc.readout(first)
    second = enc.next_pass(first)
    with pytest.raises(ValueError, match="there is no third one"):
        enc.next_pass(second)
    with pytest.raises(TypeError, match="merges with"):
        first.merge(second)
    torch.testing.assert_close(enc.readout(enc.update(second, x)), enc(x), rtol=1e-12, atol=1e-12)
    other = enc.next_pass(enc.update(enc.init_state(3), 2 * x))
    with pytest.raises(ValueError, match="same slots"):
        second.merge(other)
    passes = []

    def chunks():
        passes.append(None)
        return iter(x.split(4, 1))

    for mode, count in (("none", 2), ("full", 2), ("sampled", 2), ("exact", 4)):
        passes.clear()
        out = setenc.encode(enc, chunks, gradient=mode)
        torch.testing.assert_close(out, enc(x), rtol=1e-12, atol=1e-12)
        if mode != "none":
            out.sum().backward()
        assert len(passes) == count


def test_attention_of_the_second_pass():
    pooling = setenc.DSMILPooling(4, 6).double()
    x, mask = bags()
    shares = pooling.attention(streamed(pooling, x, [11], mask), x, mask)
    torch.testing.assert_close(shares.sum(-1), torch.ones(3, 1, 1, dtype=torch.float64))
    means = (shares[:, 0] @ x)[:, 0]
    torch.testing.assert_close(pooling.value(means), pooling(x, mask)[:, 0])


# --- side by side --------------------------------------------------------------------------------------------------


def test_joined_poolings_are_each_by_itself():
    parts = [setenc.SlotPooling(4, 6, 3, num_heads=2, slots="learned"), setenc.InstancePooling(4, 6, 2)]
    joint = setenc.JointPooling(*parts).double()
    x, mask = bags()
    expected = torch.cat([p(x, mask) for p in parts], 1)
    torch.testing.assert_close(joint(x, mask), expected, rtol=1e-12, atol=1e-12)
    state = streamed(joint, x, [4, 7], mask)
    torch.testing.assert_close(joint.readout(state), expected, rtol=1e-12, atol=1e-12)
    shares = joint.poolings[0].attention(state.parts[0], x, mask)
    torch.testing.assert_close(shares.sum(-1), torch.ones(3, 2, 3, dtype=torch.float64))
    for text in ("SlotPooling", "InstancePooling"):
        assert text in repr(joint)
    assert "SelectedState" in repr(state)
    with pytest.raises(AttributeError, match="a JointState has several totals"):
        _ = state.total
    assert not hasattr(state, "nothing")
    same = copy.deepcopy(state).to("cpu").detach()
    torch.testing.assert_close(joint.readout(same), expected)


def test_joint_poolings_of_joint_poolings_are_one():
    inner = setenc.JointPooling(setenc.SlotPooling(4, 6, 2, num_heads=2), setenc.InstancePooling(4, 6))
    pooling = setenc.JointPooling(inner, setenc.DeepSetsPooling(4, 6)).double().eval()
    assert [type(p).__name__ for p in pooling.poolings] == ["SlotPooling", "InstancePooling", "DeepSetsPooling"]
    enc, (x, mask) = setenc.UMBC(None, pooling, None), bags()
    expected = torch.cat((inner(x, mask), pooling.poolings[2](x, mask)), 1)
    for out in (
        enc(x, mask),
        setenc.encode(enc, x, chunk_size=4, gradient="exact", mask=mask),
        enc([row[own] for row, own in zip(x, mask, strict=True)]),
    ):
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["none", "full", "exact", "sampled"])
@pytest.mark.parametrize("given", ["spent", "shorter", "other weights"])
def test_both_passes_over_a_stream_see_the_same_elements(mode, given):
    """The second pass over an iterator that is used up sees none, and would read an empty bag."""
    enc, (x, _) = setenc.UMBC(None, setenc.DSMILPooling(4, 6).double(), None), bags()
    calls, once = [], iter(x.split(4, 1))

    def chunks():
        calls.append(None)
        if given == "spent":
            return once
        weights = torch.full((3, 4), float(len(calls)))
        parts = x.split(4, 1)
        if given == "shorter":
            return iter(parts[len(calls) - 1 :])
        return iter([(c, None, weights[:, : c.shape[1]]) for c in parts])

    with pytest.raises(ValueError, match="every pass over the chunks must see the same elements"):
        setenc.encode(enc, chunks, gradient=mode)


def test_what_cannot_be_joined():
    slots, instance = setenc.SlotPooling(4, 8, 3), setenc.InstancePooling(4, 8)
    for bad in ((), (slots,), (slots, setenc.InstancePooling(4, 6)), (slots, setenc.InstancePooling(3, 8))):
        with pytest.raises(ValueError, match="two or more of one in_dim and dim"):
            setenc.JointPooling(*bad)
    with pytest.raises(ValueError, match="several passes"):
        setenc.JointPooling(slots, setenc.DSMILPooling(4, 8))
    with pytest.raises(TypeError, match="setenc Pooling; got Linear"):
        setenc.JointPooling(slots, nn.Linear(4, 8))
    joint = setenc.JointPooling(slots, instance)
    with pytest.raises(TypeError, match="JointState merges"):
        joint.init_state(2).merge(slots.init_state(2))
    with pytest.raises(ValueError, match="equal parts"):
        joint.init_state(2).merge(setenc.JointState(joint.init_state(2).parts[:1]))
    with pytest.raises(NotImplementedError, match=r"use joint\.poolings"):
        joint.attention(joint.init_state(2), torch.randn(2, 3, 4))
    for pooling in (instance, joint, setenc.DSMILPooling(4, 8)):
        with pytest.raises(ValueError, match="mass_feature needs slots that weigh elements"):
            setenc.UMBC(None, pooling, None, mass_feature=True)
    with pytest.raises(ValueError, match="dim must be at least 2"):
        setenc.InstancePooling(4, 1)


# --- CLAM ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_clam_s_loss_is_the_cross_entropy_of_its_examples(others, per_class, masked):
    x, mask = bags(4, 30)
    attention = torch.randn((4, 30, 3) if per_class else (4, 30), dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 2, 1, 2])
    classifiers = nn.ModuleList(nn.Linear(4, 2) for _ in range(3)).double()
    mask = mask if masked else torch.ones_like(mask)
    mask[3, 5:] = not masked  # a bag of few instances
    losses = []
    for b in range(4):
        rows = mask[b].nonzero().flatten().tolist()
        for c in range(3):
            weight = attention[b, :, c] if per_class else attention[b]
            order = sorted(rows, key=lambda i: -float(weight[i].detach()))
            k = min(8, len(rows) // 2)
            examples = [(i, int(c == labels[b])) for i in order[:k]] if c == labels[b] or others else []
            examples += [(i, 0) for i in order[-k:]] if c == labels[b] and k else []
            losses += [F.cross_entropy(classifiers[c](x[b, i]), torch.tensor(target)) for i, target in examples]
    loss = clam_instance_loss(x, attention, labels, classifiers, mask=mask if masked else None, others=others)
    torch.testing.assert_close(loss, torch.stack(losses).mean(), rtol=1e-12, atol=1e-12)
    loss.backward()
    assert attention.grad is None, "attention only chooses"
    assert classifiers[0].weight.grad is not None
    # Of a stream: the instances with the most and the least attention of every chunk are enough.
    if not per_class and not masked:
        kept = []
        for part in torch.arange(30).split(16):
            order = attention.detach()[:, part].argsort(1, descending=True)
            kept.append(part[torch.cat((order[:, :8], order[:, -8:]), 1)])
        kept = torch.cat(kept, 1)
        ends = attention.detach().gather(1, kept)
        some = x.gather(1, kept[..., None].expand(-1, -1, 4))
        unique = torch.stack([torch.tensor([i not in row[:j] for j, i in enumerate(row)]) for row in kept.tolist()])
        again = clam_instance_loss(some, ends, labels, classifiers, mask=unique, others=others)
        torch.testing.assert_close(again, loss.detach(), rtol=1e-12, atol=1e-12, check_dtype=False)


def test_clam_s_loss_of_odd_bags():
    classifiers = [nn.Linear(4, 2) for _ in range(2)]
    x, attention, labels = torch.randn(2, 9, 4), torch.randn(2, 9), torch.tensor([0, 1])
    assert float(clam_instance_loss(x[:, :1], attention[:, :1], labels, classifiers)) == 0
    assert float(clam_instance_loss(x[:0], attention[:0], labels[:0], classifiers)) == 0
    for bad, words in (
        ((x, attention[:, :3], labels, classifiers), "attention must have shape"),
        ((x, attention, labels[:1], classifiers), "labels must be an int64 tensor"),
        ((x, attention, labels.float(), classifiers), "labels must be an int64 tensor"),
        ((x, attention, labels + 1, classifiers), r"labels must lie in \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=words):
            clam_instance_loss(*bad)
