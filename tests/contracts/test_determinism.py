"""``torch.use_deterministic_algorithms(True)`` holds on every path: nothing is refused, a second run has equal bits.

Without a GPU the CUDA paths are taken on the CPU, and operations that torch refuses on CUDA are refused here.

On CUDA the matrix products of cuBLAS repeat only with ``CUBLAS_WORKSPACE_CONFIG=:4096:8`` in the environment; torch
itself says so.
"""

import os

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import flows
import mbot
import setenc
from tests.contracts.cases import COUPLINGS, TRANSPORTS, VALUES_ONLY, flat

# What use_deterministic_algorithms refuses of CUDA tensors (its documentation, torch 2.13), as far as it may occur.
REFUSED = {
    "aten::cumsum", "aten::kthvalue", "aten::histc", "aten::median.dim", "aten::nanmedian.dim", "aten::put_",
    "aten::grid_sampler_2d_backward", "aten::nll_loss_forward", "aten::upsample_bilinear2d_backward",
    "aten::avg_pool3d_backward", "aten::reflection_pad2d_backward", "aten::_embedding_bag_backward",
}  # fmt: skip


class AsOnCuda(TorchDispatchMode):
    """Refuse on the CPU what is refused on CUDA; integers may be summed, and counted without weights."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = f"{func._schema.name}.{func._overloadname}".removesuffix(".default")
        floats = isinstance(args[0], torch.Tensor) and args[0].is_floating_point() if args else False
        if floats and (name in REFUSED or func._schema.name in REFUSED):
            raise RuntimeError(f"{name} is refused on CUDA")
        if func._schema.name == "aten::bincount" and len(args) > 1 and args[1] is not None:
            raise RuntimeError("bincount with weights is refused on CUDA")
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def deterministic(device, monkeypatch):
    if device.type == "cuda" and not os.environ.get("CUBLAS_WORKSPACE_CONFIG"):
        pytest.skip("set CUBLAS_WORKSPACE_CONFIG=:4096:8")
    monkeypatch.setattr(mbot.numerics, "_must_repeat", torch.is_floating_point)
    torch.use_deterministic_algorithms(True)
    with AsOnCuda():
        yield
    torch.use_deterministic_algorithms(False)


def test_what_is_refused_on_cuda_is_refused_here():
    with pytest.raises(RuntimeError, match="cumsum is refused"):
        torch.randn(3).cumsum(0)
    with pytest.raises(RuntimeError, match="kthvalue is refused"):
        torch.randn(3).kthvalue(1)
    assert torch.arange(3).cumsum(0).tolist() == [0, 1, 3]


def twice(run):
    """Two runs from one seed: the same bits."""
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        results.append([t for t in run() if isinstance(t, torch.Tensor)])
    assert results[0]
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def points(device, n=24, d=6):
    return torch.randn(n, d, device=device, requires_grad=True), torch.randn(n, d, device=device) + 1


@pytest.mark.parametrize("transport", flat(TRANSPORTS), ids=repr)
def test_transports(transport, device):
    def run():
        x, y = points(device)
        weights = [torch.rand(len(x), device=device).softmax(0) for _ in range(2)]
        found = []
        for given in ((), weights):
            value = transport(x, y, *given)
            plan = transport.plan(mbot.pairwise_cost(x, y), *given)
            (grad,) = torch.autograd.grad(value, x)
            found += [value, grad, plan.to_dense(), plan.row_mass(), plan.col_mass(), *plan.barycentric_map(y)]
            found += [*plan.sample(5), *plan.sample(50, replacement=True)]
        return found

    twice(run)


@pytest.mark.parametrize("transport", [mbot.ExactOT(), mbot.PartialOT(0.7)], ids=repr)
def test_exact_plans_that_take_more_than_one_attempt(transport, device):
    """Around forbidden pairs and huge costs, and where plans cost next to nothing."""

    def run():
        cost = torch.rand(3, 8, 8, device=device)
        cost[0].fill_diagonal_(torch.inf)
        cost[1] *= torch.where(torch.eye(8, device=device) > 0, 1e-18, 1)
        cost[2, 2:] *= 1e25
        plan = transport.plan(cost)
        return [plan.col, plan.mass, *plan.potentials]

    twice(run)


@pytest.mark.parametrize("transport", flat(VALUES_ONLY), ids=repr)
def test_values_only(transport, device):
    def run():
        x, y = points(device)
        values = transport(x, y), transport(x, y[:7]), transport(x, y, torch.rand(len(x), device=device))
        return [*values, *(torch.autograd.grad(value, x)[0] for value in values)]

    twice(run)


@pytest.mark.parametrize("coupling", flat(COUPLINGS), ids=repr)
def test_couplings(coupling, device):
    def run():
        x0, x1 = points(device, 12)
        y = torch.randint(0, 3, (len(x1),), device=device)
        pairs = coupling(x0, x1, y1=y)
        a, b = pairs.apply(x0, x1)
        (grad,) = torch.autograd.grad((a - b).square().sum(), x0)
        return [pairs.source, pairs.target, pairs.weight, grad]

    twice(run)


INNER = [
    mbot.ExactOT(), mbot.PartialOT(0.7), mbot.EntropicOT(0.5), mbot.UnbalancedOT(0.5, 1.0), mbot.SlicedOT(8),
    lambda x, y: (x.mean(-2) - y.mean(-2)).square().sum(-1),
]  # fmt: skip
SCHEMES = {
    "grid": lambda inner, **given: mbot.MiniBatchOT(inner, **given),
    "aligned": lambda inner, **given: mbot.MiniBatchOT(inner, pairing="aligned", **given),
    "replacement": lambda inner, **given: mbot.MiniBatchOT(inner, replacement=True, **given),
    "debiased": lambda inner, **given: mbot.MiniBatchOT(inner, debiased=True, **given),
    "bomb": lambda inner, **given: mbot.BoMbOT(inner, **given),
    "entropic bomb": lambda inner, **given: mbot.BoMbOT(inner, reg=0.5, **given),
}


@pytest.mark.parametrize(
    ("scheme", "cost"), [*((s, "sqeuclidean") for s in SCHEMES), *(("bomb", c) for c in ("euclidean", "cosine", "dot"))]
)
def test_losses(scheme, cost, device):
    def run():
        x, y = points(device)
        found = []
        for inner in INNER:
            loss = SCHEMES[scheme](inner, num_batches=3, batch_size=5, cost=cost)
            value = loss(x, y, torch.rand(len(x), device=device) if isinstance(inner, mbot.Transport) else None)
            found += [value, *torch.autograd.grad(value, x)]
            if isinstance(inner, mbot.ExactOT) and scheme != "debiased":
                found.append(loss.plan(x, y).to_dense())
        return found

    twice(run)


POOLINGS = {
    **{f"slots, {name}": lambda name=name: setenc.SlotPooling(6, 8, 3, num_heads=2, activation=name)
       for name in ("softmax", "sigmoid", "slot-sigmoid", "slot-softmax", "slot-exp")},
    **{f"sets, {name}": lambda name=name: setenc.DeepSetsPooling(6, 8, name) for name in ("mean", "sum", "max")},
    "gated": lambda: setenc.GatedAttentionPooling(6, 8),
}  # fmt: skip


@pytest.mark.parametrize("pooling", POOLINGS)
def test_encoders(pooling, device):
    def run():
        enc = setenc.UMBC(nn.Linear(5, 6), POOLINGS[pooling](), setenc.MLPDecoder(8, 2)).to(device)
        x = torch.randn(3, 20, 5, device=device)
        mask = torch.rand(3, 20, device=device) < 0.7
        sets = setenc.Ragged.of([x[0, :7], x[1, :13], x[2, :1]])
        found = [enc(x), enc(x, mask=mask)]
        for mode in ("full", "exact", "sampled"):
            for given, options in ((x, {}), (x, {"mask": mask}), (sets, {})):
                enc.zero_grad()
                out = setenc.encode(enc, given, chunk_size=6, gradient=mode, **options)
                out.square().sum().backward()
                found += [out, *(p.grad for p in enc.parameters() if p.grad is not None)]
        return found

    twice(run)


@pytest.mark.parametrize("decoder", [setenc.SetTransformerDecoder, setenc.FSPoolDecoder, setenc.DIEMDecoder])
def test_decoders(decoder, device):
    def run():
        model = decoder(8).to(device)
        out = model(torch.randn(2, 3, 8, device=device))
        out.square().sum().backward()
        return [out, *(p.grad for p in model.parameters() if p.grad is not None)]

    twice(run)


def test_flows(device):
    """A training step through the U-Net, sampling, and a loader's batches."""

    def run():
        x = torch.randn(8, 1, 8, 8)
        y = torch.randint(0, 3, (8,))
        data = torch.utils.data.TensorDataset(x, y)
        loader = flows.CoupledLoader(data, None, mbot.ConditionalOTCoupling(), batch_size=4, device=device)
        model = flows.models.UNet(1, image_size=8, channels=8, multipliers=(1, 2), blocks=1, heads=4, attention=(),
                                  num_classes=3).to(device)  # fmt: skip
        batch = next(iter(loader))
        loss = flows.FlowMatching(mbot.OTCoupling()).loss(model, batch.x0, batch.x1, batch.y)
        loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        loader.close()
        return [loss, *grads, flows.integrate(model, batch.x0, y=batch.y, method="euler", steps=2).final]

    twice(run)
