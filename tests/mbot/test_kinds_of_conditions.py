"""What a condition may be: every container and dtype by position, and classes that are equal only where values are."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flows
import mbot
from mbot import ConditionalOTCoupling, conditions
from mbot.compat import OTPlanSampler

INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


class Frame:
    """The part of a pandas Series or DataFrame that matters: ``[]`` looks up the index, ``.iloc`` counts."""

    def __init__(self, values, index):
        self.values, self.index = np.asarray(values), list(index)

    @property
    def iloc(self):
        outer = self

        class ByPosition:
            def __getitem__(self, rows):
                return Frame(outer.values[rows], np.asarray(outer.index)[rows])

        return ByPosition()

    def __getitem__(self, key):
        raise KeyError(key)

    def __len__(self):
        return len(self.values)

    def to_numpy(self):
        return self.values


def containers(values):
    """The same labels in every container; the index of the frames would mix them up."""
    n = len(values)
    yield list(values)
    yield tuple(values)
    yield np.array(values, dtype=object)
    yield Frame(np.array(values, dtype=object), range(n - 1, -1, -1))
    yield Frame(np.array(values, dtype=object), range(1000, 1000 + n))


def partition(codes):
    return [np.flatnonzero(np.asarray(codes) == c).tolist() for c in dict.fromkeys(codes)]


def same(a, b):
    """Equality of labels: by value within numbers, within strings, never between them; None and NaN are missing."""

    def missing(v):
        return v is None or v != v

    if missing(a) or missing(b):
        return missing(a) and missing(b)
    return isinstance(a, str) == isinstance(b, str) and a == b


value = st.one_of(
    st.integers(-2, 2), st.integers(2**53 - 1, 2**53 + 2), st.integers(2**63 - 2, 2**64), st.booleans(),
    st.sampled_from([0.5, 1.0, -1.0, float(2**53), float(2**63), float("nan"), None, "1", "None", "nan", "a", ""]),
)  # fmt: skip


@settings(deadline=None, max_examples=200)
@given(st.lists(value, min_size=1, max_size=8), st.integers(0, 4))
def test_classes_are_equal_where_their_values_are(values, which):
    labels = list(containers(values))[which]
    codes, again, names = conditions.class_codes(labels, values, allow_missing=True)
    assert codes.tolist() == again.tolist()
    wanted = [next(i for i, other in enumerate(values) if same(v, other)) for v in values]
    assert partition(codes) == partition(wanted)
    gone = [v is None or v != v for v in values]
    assert (codes == len(names) - 1).tolist() == gone
    assert all(g or same(names[c], v) for c, v, g in zip(codes, values, gone, strict=True))
    if any(gone):
        with pytest.raises(ValueError, match=r"None or NaN, the first at index .* \(allow_dropped=True"):
            conditions.class_codes(values, values, allow_missing=False)


@pytest.mark.parametrize("left", [*INTEGERS, *FLOATS, torch.bool])
@pytest.mark.parametrize("right", [*INTEGERS, *FLOATS, torch.bool])
def test_labels_of_two_dtypes_meet_by_value(left, right):
    y0, y1 = torch.tensor([0, 1, 1, 0]).to(left), torch.tensor([1, 0, 1, 1]).to(right)
    for a in (y0, y0[:, None]):
        code0, code1, names = conditions.class_codes(a, y1)
        assert code1.tolist() == [0, 1, 0, 0]
        assert code0.tolist() == [1, 0, 0, 1]
        assert [float(name) for name in names[:-1]] == [1, 0]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.tensor([2**53 + 1]), torch.tensor([2**53 + 2]).to(torch.uint64)),
        (torch.tensor([2**53 + 1]), torch.tensor([2.0**53], dtype=torch.float64)),
        (torch.tensor([2**24 + 1]), torch.tensor([2.0**24])),
        (np.array([2**63 + 1], np.uint64), np.array([2**63 - 1])),
        (["1"], [1]),
        (["None"], [None]),
        (["nan"], [float("nan")]),
        (np.array(["a"]), np.array(["A"])),
        (torch.tensor([[1, 2]]), torch.tensor([[2, 1]])),
        ([(1, "a")], [(1, "b")]),
        ([[1, 2]], np.array([[1, 3]])),
    ],
)
def test_what_differs_is_never_merged(one, other):
    plain = [list(side.tolist() if hasattr(side, "tolist") else side) for side in (one, other)]
    code, _, _ = conditions.class_codes(plain[0] + plain[1], plain[0] + plain[1], allow_missing=True)
    assert len(set(code)) == 2
    if plain == [["1"], [1]]:
        with pytest.raises(ValueError, match="one kind"):
            conditions.class_codes(one, other)
    else:
        code0, code1, _ = conditions.class_codes(one, other, allow_missing=True)
        assert code0 != code1


def test_one_missing_string_among_others_is_one_dropped():
    x = torch.randn(3, 2)
    for labels in (["a", float("nan"), "a"], ["a", None, "a"]):
        for held in containers(labels):
            assert ConditionalOTCoupling(allow_dropped=True)(x, x, y1=held).info["dropped"] == 1
            with pytest.raises(ValueError, match="y1 must hold a label for each sample; 1 are None or NaN"):
                ConditionalOTCoupling()(x, x, y1=held)
    for bad in ([(1, None), (1, 2), (1, 2)], torch.tensor([[1, torch.nan]] * 3)):
        with pytest.raises(ValueError, match="row 0 of y1 is missing in part"):
            ConditionalOTCoupling(allow_dropped=True)(x, x, y1=bad)


def test_a_coupling_reads_labels_by_position():
    g = torch.Generator().manual_seed(0)
    x0, x1 = torch.randn(20, 2, generator=g), torch.randn(20, 2, generator=g)
    y = torch.randint(0, 3, (20,), generator=g)
    expected = ConditionalOTCoupling()(x0, x1, y1=y)
    for names in (y.tolist(), [f"class {c}" for c in y.tolist()]):
        for held in containers(names):
            assert torch.equal(ConditionalOTCoupling()(x0, x1, y1=held).source, expected.source)
    rows = Frame(np.stack((y % 2, y // 2), 1), range(19, -1, -1))
    assert torch.equal(ConditionalOTCoupling()(x0, x1, y1=rows).source, expected.source)
    vectors = torch.randn(20, 3, generator=g)
    by_vector = ConditionalOTCoupling("continuous", weight=1.0)
    wanted = by_vector(x0, x1, y1=vectors).source
    table = vectors.numpy()
    kinds = [table, table.tolist(), list(vectors), tuple(map(tuple, table.tolist())), list(table), vectors.double()]
    kinds += [Frame(table, range(19, -1, -1)), Frame(table.astype(object), range(20))]
    for held in kinds:
        assert torch.equal(by_vector(x0, x1, y1=held).source, wanted)


def test_samples_keep_their_own_labels():
    """A Series with a shuffled index, or one that begins at 1000, once gave other samples' labels or a KeyError."""
    x0, x1 = torch.randn(6, 1), torch.arange(6.0)[:, None]
    fm = flows.FlowMatching(mbot.OTCoupling(mbot.EntropicOT(1.0), replacement=True))
    for held in containers([0, 1, 2, 3, 4, 5]):
        batch = fm.sample(x0, x1, {"a": held, "none": None}, generator=torch.Generator().manual_seed(1))
        end = (batch.xt + (1 - batch.t[:, None]) * batch.ut)[:, 0].round().long().tolist()
        served = batch.y["a"]
        assert type(served) is type(held)
        plain = served.to_numpy().tolist() if isinstance(served, Frame) else list(served)
        assert plain == end
        assert len(batch[2:4].y["a"]) == 2
        assert batch.y["none"] is None


@pytest.mark.parametrize("method", ["exact", "sinkhorn"])
def test_the_sampler_takes_labels_of_any_kind(method):
    x0, x1 = torch.randn(5, 2), torch.arange(10.0).reshape(5, 2)
    for held in containers([10, 11, 12, 13, 14]):
        _, b, y0, y1 = OTPlanSampler(method).sample_plan_with_labels(x0, x1, {"a": held}, held)
        plain = y1.to_numpy().tolist() if isinstance(y1, Frame) else list(y1)
        assert plain == [10 + int(row[0]) // 2 for row in b]
        assert type(y0["a"]) is type(held)
    with pytest.raises(ValueError, match="y1 must hold one condition for each of the 5 samples of x1; got 6"):
        OTPlanSampler(method).sample_plan_with_labels(x0, x1, None, list("abcdef"))


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("y", "error", "says"),
    [
        ("abcd", TypeError, "y1 must be a tensor, array, sequence, Series or dict; got str"),
        (3, TypeError, "got int"),
        ({1, 2, 3, 4}, TypeError, "got set"),
        (iter([1]), TypeError, "got list_iterator"),
        (torch.tensor(1), TypeError, "got Tensor"),
        (np.array(1), TypeError, "got ndarray"),
        ({"a": "abcd"}, TypeError, r"y1\['a'\] must be a tensor"),
        ([1, 2, 3], ValueError, "one condition for each of the 4 samples of x1; got 3"),
        ([[1, 2], [1], [1, 2], [1, 2]], ValueError, r"rows of y1 and y0 must hold equally many values; got \[1, 2\]"),
        ([{"a": 1}] * 4, TypeError, "must hold numbers or strings"),
        (torch.zeros(4, dtype=torch.complex64), TypeError, "must hold numbers or strings; got complex64"),
        (np.zeros(4, "datetime64[s]"), TypeError, "must hold numbers or strings"),
    ],
)
def test_what_a_discrete_condition_may_not_be(y, error, says):
    x = torch.randn(4, 2)
    with pytest.raises(error, match=says):
        ConditionalOTCoupling()(x, x, y1=y)


@pytest.mark.parametrize(
    ("y", "error", "says"),
    [
        ([[1.0, 2.0], [1.0], [1.0, 2.0], [1.0, 2.0]], ValueError, "y0 must hold numbers, or rows of equally many"),
        ([torch.ones(2), torch.ones(3), torch.ones(2), torch.ones(2)], ValueError, "rows of equally many"),
        (np.array(["1", "2", "3", "4"]), TypeError, "y0 must be numeric; it holds '1'"),
        ([[1, "a"]] * 4, TypeError, "it holds 'a'"),
        (Frame(np.array([["a", 1.0]] * 4, dtype=object), range(4)), TypeError, "it holds 'a'"),
        (torch.ones(4, 2, dtype=torch.complex64), TypeError, "real"),
        ([None, [1.0, 2.0], [2.0, 1.0], [0.0, 1.0]], ValueError, "finite"),
    ],
)
def test_what_a_continuous_condition_may_not_be(y, error, says):
    x = torch.randn(4, 2)
    with pytest.raises(error, match=says):
        ConditionalOTCoupling("continuous")(x, x, y1=y)


def test_rows_of_two_widths_and_an_empty_name_are_told():
    x = torch.randn(4, 2)
    with pytest.raises(ValueError, match=r"rows of y1 and y0 must hold equally many values; got \[2, 3\]"):
        ConditionalOTCoupling()(x, x, torch.zeros(4, 3), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="y0 and y1 must have equal features"):
        ConditionalOTCoupling("continuous", condition_cost="sqeuclidean")(x, x, torch.ones(4, 3), torch.ones(4, 2))
    with pytest.raises(ValueError, match="'a' is missing"):
        ConditionalOTCoupling({"a": "discrete"})(x, x, y1={"a": None})


# --- numbers for models ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*INTEGERS, torch.bool])
def test_labels_of_every_integer_dtype_are_dropped_and_embedded(dtype):
    y = (torch.arange(20) % 2).to(dtype)
    nothing = flows.null_condition(y)
    assert nothing.dtype == torch.int64
    assert nothing.tolist() == [-1] * 20
    dropped = flows.drop_conditions(y, 0.5, torch.Generator().manual_seed(1))
    assert set(dropped.tolist()) == {-1, 0, 1}
    model = flows.models.ConditionEmbedding(3, num_classes=2)
    assert torch.equal(model(y), model(y.long()))
    assert torch.equal(model(dropped)[dropped == -1], torch.zeros(int((dropped == -1).sum()), 3))
    guided = flows.GuidedModel(lambda t, x, y: model(y), 2.0)
    torch.testing.assert_close(guided(torch.zeros(20), torch.zeros(20, 3), y), 2 * model(y))


@pytest.mark.parametrize("dtype", FLOATS)
def test_vectors_of_every_dtype_are_dropped_and_embedded(dtype):
    y = torch.randn(6, 2).to(dtype)
    dropped = flows.drop_conditions(y, 0.5, torch.Generator().manual_seed(1))
    assert dropped.dtype == dtype
    gone = dropped.isnan().all(1)
    assert 0 < int(gone.sum()) < 6
    model = flows.models.ConditionEmbedding(3, condition_dim=2)
    assert torch.equal(model(dropped)[gone], torch.zeros(int(gone.sum()), 3))
    assert torch.equal(model(dropped)[~gone], model(y.float())[~gone])


def test_models_take_numbers_in_any_container():
    labels = flows.models.ConditionEmbedding(3, num_classes=4)
    wanted = labels(torch.tensor([3, 0, -1]))
    for held in ([3, 0, None], (3, 0, -1), np.array([3, 0, -1], np.int16), Frame([3, 0, -1], [2, 1, 0])):
        assert torch.equal(labels(held), wanted)
    vectors = flows.models.ConditionEmbedding(3, condition_dim=2)
    rows = [[1.0, 2.0], [3.0, 4.0], None]
    wanted = vectors(torch.tensor([[1.0, 2.0], [3.0, 4.0], [torch.nan] * 2]))
    for held in (rows, tuple(rows), [np.ones(2) * [1, 2], torch.tensor([3.0, 4.0]), None]):
        assert torch.equal(vectors(held), wanted)
    assert torch.equal(vectors(Frame(np.array(rows[:2]), [1, 0])), wanted[:2])


def test_strings_are_dropped_to_none_and_guided():
    names = ["a dog", "a cat", "a fish"] * 4
    dropped = flows.drop_conditions({"text": names, "label": list(range(12))}, 0.5, torch.Generator().manual_seed(0))
    gone = [v is None for v in dropped["text"]]
    assert 0 < sum(gone) < 12
    assert (dropped["label"] == -1).tolist() == gone
    assert [v for v in dropped["text"] if v is not None] == [n for n, g in zip(names, gone, strict=True) if not g]

    def model(t, x, y):
        return torch.tensor([0.0 if v is None else float(len(v)) for v in y])[:, None]

    guided = flows.GuidedModel(model, 2.0)(torch.zeros(12), torch.zeros(12, 1), names)
    assert guided[:, 0].tolist() == [2.0 * len(n) for n in names]


@pytest.mark.parametrize(("y", "got"), [([1, 2, 3], "1 … 3"), ([0, -2], "-2 … 0"), ([255], "255 … 255")])
@pytest.mark.parametrize("make", [lambda: flows.models.ResidualMLP(2, num_classes=3),
                                  lambda: flows.models.UNet.preset("digits", num_classes=3)])  # fmt: skip
def test_labels_out_of_range_are_a_clear_error(make, y, got):
    model = make()
    x = torch.zeros(len(y), 2) if isinstance(model, flows.models.ResidualMLP) else torch.zeros(len(y), 1, 8, 8)
    with pytest.raises(ValueError, match=rf"0 … 2 for num_classes=3, or be -1 for no condition; got {got}"):
        model(torch.zeros(len(y)), x, torch.tensor(y))


def test_large_integers_are_vectors_without_loss():
    cpu = torch.device("cpu")
    values, _ = conditions.vectors(torch.tensor([2**24, 2**24 + 1]), "y", cpu)
    assert values.dtype == torch.float64
    assert values[0] != values[1]
    assert conditions.vectors(torch.tensor([1, 2], dtype=torch.uint16), "y", cpu)[0].dtype == torch.float32


def test_findings_do_not_depend_on_the_container():
    g = torch.Generator().manual_seed(0)
    x0, x1 = torch.randn(64, 2, generator=g), torch.randn(64, 2, generator=g)
    y = (x1[:, 0] > 0).long()

    def find(y):
        return flows.metrics.prior_skew(x0, y, generator=torch.Generator().manual_seed(1), folds=2)

    wanted = find(y)
    *_, frame = containers(y.tolist())
    *_, words, _ = containers(["up" if v else "down" for v in y.tolist()])
    for held in (frame, words, y.to(torch.uint8)):
        assert find(held).chance == wanted.chance
        assert find(held).score == pytest.approx(wanted.score, abs=0.1)
    real = find(Frame(x1[:, 0].numpy(), range(63, -1, -1)))
    assert real == find(x1[:, 0])
    assert real.kind == "r2"
    some = torch.where(y > 0, x1[:, 0], torch.nan)
    assert find(some).kind == "r2"
    with pytest.raises(ValueError, match="y must hold one condition for each of the 64 samples of x1; got 63"):
        flows.diagnose(mbot.OTCoupling(), x0, x1, y[:63])
