"""What a user may get wrong, but for poolings (`setenc.testing`): an error that says so, never another result."""

import math
from functools import partial

import numpy as np
import pytest
import torch

import setenc
from setenc import tasks
from setenc.tasks import instances


@pytest.fixture
def x():
    return torch.randn(2, 20, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def enc():
    torch.manual_seed(0)
    return setenc.UMBC(torch.nn.Linear(3, 6), setenc.SlotPooling(6, 8, 4), setenc.MLPDecoder(8, 5)).eval()


CHUNKS = {
    "a longer mask": ({"mask": torch.ones(2, 30).bool()}, ValueError, "20 elements of the stream"),
    "longer weights": ({"weights": torch.ones(2, 30)}, ValueError, "20 elements of the stream"),
    "weights of one set": ({"weights": torch.ones(20)}, ValueError, r"\(B, N\)"),
    "a mask in lists": ({"mask": [[True] * 20] * 2}, ValueError, "got list"),
    "a seed as generator": ({"generator": 3}, TypeError, "torch.Generator"),
}


@pytest.mark.parametrize(("options", "error", "says"), CHUNKS.values(), ids=CHUNKS)
def test_what_belongs_to_a_stream_is_for_all_of_it(enc, x, options, error, says):
    with pytest.raises(error, match=says):
        setenc.encode(enc, lambda: iter(x.split(5, 1)), **options)


@pytest.mark.parametrize("item", [None, [torch.zeros(2, 3)], (), (torch.zeros(2, 5, 3), None, None, None)])
def test_chunks_are_tensors_or_tuples_of_up_to_three(enc, item):
    with pytest.raises((TypeError, ValueError), match="a chunk must be"):
        setenc.encode(enc, lambda: iter([item]))


@pytest.mark.parametrize("other", [setenc.SlotPooling(3, 8, 4), torch.nn.Linear(3, 8)])
def test_encode_says_what_it_drives(x, other):
    with pytest.raises(TypeError, match="UMBC"):
        setenc.encode(other, x)


def test_arrays_are_taken_wherever_tensors_are(enc, x):
    """As whole sets, chunks, masks, weights, lists of sets and packed weights."""
    mask, weights = torch.rand(2, 20) < 0.7, torch.rand(2, 20) + 0.1
    expected = enc(x, mask, weights)
    for data in (x.numpy(), lambda: iter([x.numpy()[:, :7], x.numpy()[:, 7:]])):
        found = setenc.encode(enc, data, mask=mask.numpy(), weights=weights.numpy())
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    sets = [x[0, :4], x[1]]
    packed = torch.rand(24) + 0.1
    arrays = [s.numpy() for s in sets]
    torch.testing.assert_close(enc(arrays, weights=packed.numpy()), enc(sets, weights=packed))
    read_only = x.numpy().copy()
    read_only.flags.writeable = False
    torch.testing.assert_close(setenc.encode(enc, read_only), enc(x), rtol=1e-5, atol=1e-5)


RAGGED = {
    "a tensor without sizes": lambda x: setenc.Ragged.of(x),
    "a strided nested tensor": lambda x: setenc.Ragged.of(torch.nested.nested_tensor([x[0], x[1, :3]])),
    "a single number": lambda x: setenc.Ragged(torch.tensor(1.0), torch.tensor([0, 1])),
    "a mask of numbers": lambda x: setenc.Ragged.from_mask(x, torch.ones(2, 20)),
}


@pytest.mark.parametrize("make", RAGGED.values(), ids=RAGGED)
def test_ragged_batches_of_another_kind(make, x):
    with pytest.raises(TypeError, match=r"nested|values and offsets|bool"):
        make(x)


@pytest.mark.parametrize("columns", [[0, 7], [1, 1], [], "xy", 1, slice(3, 3), [True, False]])
def test_columns_name_features_each_once(columns):
    pool = setenc.SlotPooling(3, 8, 4)
    with pytest.raises(ValueError, match="columns must"):
        setenc.SlotQuery(pool, columns=columns)
    with pytest.raises(ValueError, match="columns must"):
        pool.init_slots(torch.randn(2, 20, 3), columns=columns)


@pytest.mark.parametrize("columns", [[0, -1], torch.tensor([0, 2]), np.array([True, False, True]), slice(0, 3, 2)])
def test_columns_in_every_form(columns):
    assert setenc.SlotQuery(setenc.SlotPooling(3, 8, 4), columns=columns).columns == [0, 2]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_target_that_is_not_finite_is_no_answer_of_zero(x, value):
    pool = setenc.SlotPooling(3, 8, 4).eval()
    targets = x.clone()
    targets[1, 4, 0] = value
    with pytest.raises(ValueError, match="targets must be finite"):
        setenc.SlotQuery(pool)(pool(x), targets)


def test_targets_come_in_the_precision_of_the_query(x):
    pool = setenc.SlotPooling(3, 8, 4).eval()
    query = setenc.SlotQuery(pool)
    torch.testing.assert_close(query(pool(x).half(), x.bfloat16()), query(pool(x), x), rtol=0.05, atol=0.05)
    for wrong in (x.double(), x.long(), None):
        with pytest.raises(TypeError, match="targets"):
            query(pool(x), wrong)


@pytest.mark.parametrize("power", [-30, -10, 0, 10, 25, 30])
def test_slots_are_placed_the_same_at_any_size_of_the_features(x, power):
    """Scaled features place slots whose logits are the same."""

    def logits(scale):
        torch.manual_seed(0)
        pool = setenc.SlotPooling(3, 8, 4)
        pool.init_slots(scale * x, generator=torch.Generator().manual_seed(0))
        keys = torch.nn.functional.linear(x.double(), pool.key_value.weight[:8].double())
        return scale * pool.slot_mean.double() @ keys.flatten(0, 1).T

    torch.testing.assert_close(logits(10.0**power), logits(1.0), rtol=1e-4, atol=1e-4)


def test_a_stream_brings_its_own_masks_to_init_slots(x):
    pool = setenc.SlotPooling(3, 8, 4)
    with pytest.raises(ValueError, match=r"\(chunk, mask\)"):
        pool.init_slots(x.split(5, 1), mask=torch.ones(2, 20).bool())
    with pytest.raises(TypeError, match="iterable"):
        pool.init_slots(lambda: x)
    pool.init_slots(x.numpy())


LABELS = {
    "a column": torch.tensor([[0.0], [1.0]]),
    "one for all": torch.tensor(1.0),
    "minus one": torch.tensor([-1, 1]),
    "two": torch.tensor([2, 1]),
    "NaN": torch.tensor([math.nan, 1.0]),
}


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_labels_of_bags_are_one_each_in_the_unit_interval(labels, x):
    model = tasks.BagClassifier(3, width=8, num_slots=4).eval()
    with pytest.raises(ValueError, match="labels must"):
        model.loss(x, labels)
    expected = model.loss(x, torch.tensor([1.0, 0.0]))
    for same in (torch.tensor([True, False]), np.array([1, 0])):
        torch.testing.assert_close(model.loss(x, same), expected)


@pytest.mark.parametrize(
    ("logits", "labels", "says"),
    [
        (torch.randn(3, 5), torch.ones(5), "shape of the logits"),
        (torch.randn(3, 5), torch.full((3, 5), 2), r"lie in \[0, 1\]"),
        (torch.full((3, 5), torch.nan), torch.ones(3, 5), "must not be NaN"),
    ],
)
def test_scores_of_labels_are_of_labels_one_each(logits, labels, says):
    with pytest.raises(ValueError, match=says):
        setenc.tasks.micro_f1(logits, labels)


def test_labels_and_colours_of_other_tasks_have_the_shape_of_the_predictions():
    documents = tasks.TokenBagClassifier(50, 3, width=8, num_slots=4).eval()
    with pytest.raises(ValueError, match="labels must"):
        documents.loss(torch.randint(1, 50, (3, 6)), torch.full((3, 3), 2.0))
    completion = tasks.ImageCompletion(1, width=16, num_slots=4)
    context, grid, colours = tasks.pixel_sets(torch.rand(4, 1, 2, 2), 2)
    with pytest.raises(ValueError, match="colours must"):
        completion.loss(context, grid, colours[..., 0])  # (4, 4) would be stretched to (4, 4, 4)


CLAM = {
    "NaN attention": ({"attention": torch.full((2, 20), math.nan)}, "NaN has no order"),
    "attention of other classes": ({"attention": torch.rand(2, 20, 3)}, "C = 2"),
    "classifiers of three logits": ({"classifiers": [torch.nn.Linear(3, 3)] * 2}, "two logits"),
}


@pytest.mark.parametrize(("changes", "says"), CLAM.values(), ids=CLAM)
def test_clam_loss(changes, says, x):
    given = {
        "features": x,
        "attention": torch.rand(2, 20),
        "labels": torch.tensor([0, 1]),
        "classifiers": [torch.nn.Linear(3, 2) for _ in range(2)],
    }
    assert instances.clam_instance_loss(**given).isfinite()
    padded = torch.where(torch.arange(20) < 15, given["attention"], math.nan)
    mask = (torch.arange(20) < 15).expand(2, -1)
    assert instances.clam_instance_loss(**{**given, "attention": padded}, mask=mask).isfinite()
    with pytest.raises(ValueError, match=says):
        instances.clam_instance_loss(**{**given, **changes})


DECODERS = {
    "set transformer": lambda: setenc.SetTransformerDecoder(8, 1),
    "SAB": lambda: setenc.SAB(8),
    "ISAB": lambda: setenc.ISAB(8, 2),
    "PMA": lambda: setenc.PMA(8, 2),
    "FSPool": lambda: setenc.FSPoolDecoder(8),
    "DIEM": lambda: setenc.DIEMDecoder(8),
}


@pytest.mark.parametrize("make", DECODERS.values(), ids=DECODERS)
def test_decoders_say_what_they_take(make):
    decoder, slots = make(), torch.randn(2, 4, 8)
    for wrong in (slots[0], slots[..., 1:]):
        with pytest.raises(ValueError, match=r"must have shape \(B, K, dim\)"):
            decoder(wrong)
    for wrong in (slots.double(), slots.long(), None):
        with pytest.raises(TypeError, match="float"):
            decoder(wrong)
    torch.testing.assert_close(decoder(slots.half()), decoder(slots), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("make", [DECODERS[name] for name in ("SAB", "ISAB", "PMA")], ids=["SAB", "ISAB", "PMA"])
@pytest.mark.parametrize("value", [math.nan, 1e30])
def test_padding_of_attention_blocks_may_hold_anything(make, value):
    """And a set whose elements are all masked is finite."""
    block, x = make(), torch.randn(2, 6, 8)
    mask = torch.tensor([[1, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
    found = block(torch.where(mask[..., None], x, value), mask)
    expected = block(x[:1, mask[0]])
    real = found[0] if found.shape[1] == 2 else found[0, mask[0]]
    torch.testing.assert_close(real, expected[0], rtol=1e-5, atol=1e-5)
    if found.shape[1] == 2:
        assert found[1].isfinite().all()
    with pytest.raises(TypeError, match="bool"):
        block(x, mask.float())


def test_slots_that_do_not_weigh_elements_cannot_be_diagnosed(x):
    for pooling in (setenc.DSMILPooling(3, 8), setenc.InstancePooling(3, 8)):
        with pytest.raises(NotImplementedError, match="do not weigh"):
            setenc.diagnose_slots(pooling, x)
    pool = setenc.DSMILPooling(3, 8)
    with pytest.raises(ValueError, match="seen twice"):
        pool.attention(pool.init_state(2), x)


@pytest.mark.parametrize("size", [1e10, 1e19, 1e25, 1e30])
def test_elements_of_any_size_in_every_form(size, x):
    """Whole, streamed, ragged, by `encode`: what float64 gives."""
    torch.manual_seed(0)
    enc = setenc.UMBC(None, setenc.SlotPooling(3, 8, 4), None).eval()
    expected = setenc.UMBC(None, enc.pooling.double(), None)(size * x.double())
    enc.pooling.float()
    forms = (enc, lambda x: enc(list(x)), partial(setenc.encode, enc, chunk_size=6, gradient="exact"))
    for form in forms:
        torch.testing.assert_close(form(size * x).double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda: setenc.DeepSetsPooling(3, 8, "max"),
        lambda: setenc.InstancePooling(3, 8, 2),
        lambda: setenc.DSMILPooling(3, 8),
        lambda: setenc.SlotPooling(3, 8, 4, output_norm=False),
        lambda: setenc.SlotPooling(3, 8, 40, num_heads=8),
    ],
    ids=["max", "instances", "critical instance", "slots", "many slots"],
)
def test_elements_whose_logits_overflow_are_not_taken_for_none(make, masked):
    """Below all numbers is -inf, which stands for no element: as a result of elements it is an error."""
    torch.manual_seed(0)
    pooling = make().eval()
    with torch.no_grad():
        for name, parameter in pooling.named_parameters():
            if name.endswith(("score.weight", "value.weight")):
                parameter.fill_(-1e8 if "key" in name else -1e12)
        if hasattr(pooling, "slot_mean"):
            pooling.query.weight.zero_()
            pooling.query.bias.fill_(1e8)
    x, enc = torch.full((2, 3, 3), 1e28), setenc.UMBC(None, pooling, None).eval()
    mask = torch.tensor([[True, True, False], [True, True, True]]) if masked else None
    for call in (
        lambda: enc(x, mask),
        lambda: setenc.encode(enc, x, chunk_size=2, gradient="exact", mask=mask),
        lambda: enc(list(x)),
    ):
        with pytest.raises(ValueError, match="must be finite"):
            call()
        with torch.no_grad(), pytest.raises(ValueError, match="must be finite"):
            call()


def test_instances_whose_features_have_a_sum_that_overflows():
    pooling = setenc.InstancePooling(3, 8)
    x = torch.tensor([3e38, 3e38, -3e38]).expand(1, 2, 3)
    expected = pooling.double()(x.double())
    torch.testing.assert_close(pooling.float()(x).double(), expected, rtol=1e-3, atol=0)


def test_a_chunk_without_an_axis_of_sets_is_told_so():
    pool = setenc.SlotPooling(8, 8, num_slots=2)
    with pytest.raises(ValueError, match=r"got 10, of shape \(10, 8\). The first axis counts sets"):
        pool.update(pool.init_state(1), torch.randn(10, 8))
