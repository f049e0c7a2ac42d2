"""A loader over a coupling that brings its own noise: who gets what, what is exchanged, and where it goes on."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.utils.data import TensorDataset

import flows
import mbot
from tests.flows.toy_run import Net, weights

N = 60


def labelled(n=N):
    g = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(n, 2, generator=g) + 1, torch.arange(n) % 3)


def fitted(shuffle=True, **settings):
    """Noises that fit these data badly, so that there is much to exchange."""
    coupling = mbot.DataCoupling(**settings).fit(*labelled().tensors, generator=torch.Generator().manual_seed(1))
    number = coupling.assignment.number
    if shuffle:
        order = torch.randperm(number.numel(), generator=torch.Generator().manual_seed(2))
        number = number.flatten()[order].reshape(number.shape)
    return replace(coupling, assignment=replace(coupling.assignment, number=number))


def loader(coupling, dataset=None, **settings):
    settings = {"batch_size": 4, "ot_batch_size": 12, "seed": 5, **settings}
    return flows.CoupledLoader(labelled() if dataset is None else dataset, None, coupling, **settings)


def whole(batches):
    """An epoch in the order of the data set."""
    index = torch.cat([b.index for b in batches])
    assert torch.equal(index.sort().values, torch.arange(N))
    return [torch.cat(parts)[index.argsort()] for parts in zip(*((b.x0, b.x1, b.y) for b in batches), strict=True)]


@pytest.mark.parametrize("c", [1, 2])
def test_every_sample_comes_once_an_epoch_with_its_own_noise(c):
    coupling = fitted(num_noises=c, exchange=False)
    one = loader(coupling)
    for epoch in range(2 * c):
        x0, x1, y = whole(list(one))
        assert torch.equal(x0, coupling.noises(torch.arange(N), epoch))
        assert torch.equal(x1, labelled().tensors[0])
        assert torch.equal(y, labelled().tensors[1])


@pytest.mark.parametrize("conditional", [False, True])
def test_exchanges_lower_the_cost_epoch_by_epoch(conditional):
    coupling = fitted(exchange=True)
    one = (
        loader(replace(coupling, conditional=conditional))
        if not conditional
        else loader(fitted(conditional=True, shuffle=False))
    )
    costs, sets = [], []
    for _ in range(5):
        x0, x1, _ = whole(list(one))
        costs.append(float((x0 - x1).double().square().sum()))
        sets.append({tuple(v) for v in x0.tolist()})
    assert all(b <= a for a, b in pairwise(costs))
    assert all(s == sets[0] for s in sets)  # a permutation of the same noises
    if not conditional:
        assert costs[-1] < 0.9 * costs[0]
        batch = one.next_batch()
        assert batch.info.keys() == {"transport_cost"}


SETTINGS = [{}, {"num_noises": 2}, {"refresh": 2}, {"conditional": True, "refresh": 3, "num_noises": 2}]


@pytest.mark.parametrize("settings", SETTINGS, ids=repr)
@pytest.mark.parametrize("stop", [0, 1, 7, 15, 37, 60])
def test_it_goes_on_where_it_stopped_bit_for_bit(settings, stop, tmp_path):
    one, expected = loader(fitted(**settings), prefetch=9), []
    for number in range(80):
        if number == stop:
            torch.save(one.state_dict(), tmp_path / "state.pt")
        expected.append(one.next_batch())
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again = loader(fitted(**settings), prefetch=1)
    again.next_batch()
    again.load_state_dict(state)
    for batch in expected[stop:]:
        other = again.next_batch()
        assert all(torch.equal(a, b) for a, b in zip((batch.x0, batch.x1, batch.index),
                                                     (other.x0, other.x1, other.index), strict=True))  # fmt: skip
    one.close()
    again.set_epoch(0)
    assert torch.equal(again.next_batch().x0, expected[0].x0)
    one.set_epoch(3)
    assert torch.equal(one.next_batch().x0, expected[45].x0)


@pytest.mark.parametrize("settings", [{"num_workers": 1}, {"prefetch": 5}, {"drop_last": False}])
def test_batches_do_not_depend_on_who_prepares_them(settings):
    dataset = labelled(N)
    sizes = {"batch_size": 4, "ot_batch_size": 28} if "drop_last" in settings else {}
    first, second = (
        loader(fitted(), dataset, **sizes, **({} if not sizes else settings)),
        loader(fitted(), dataset, **settings, **sizes),
    )
    for _ in range(35):
        a, b = first.next_batch(), second.next_batch()
        assert torch.equal(a.x0, b.x0)
        assert torch.equal(a.index, b.index)
    for one in (first, second):
        one.close()


def test_a_closed_loader_serves_the_same(tmp_path):
    plain, closed = loader(fitted(refresh=2)), loader(fitted(refresh=2), prefetch=30)
    for number in range(70):
        a, b = plain.next_batch(), closed.next_batch()
        assert torch.equal(a.x0, b.x0)
        if number % 7 == 0:
            closed.close()
            closed.state_dict()


def test_training_resumes_bit_for_bit(tmp_path):
    def run(steps, folder, resume=False):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Net()
        trainer = flows.Trainer(model, loader(fitted(refresh=2)), steps=steps, out=folder, seed=1, checkpoint_every=10)
        trainer.fit(resume=resume)
        return weights(trainer)

    straight = run(70, tmp_path / "a")
    run(37, tmp_path / "b")
    assert torch.equal(straight, run(70, tmp_path / "b", resume=True))


def test_what_does_not_fit_is_refused():
    coupling = fitted()
    x, y = labelled().tensors
    for other in (labelled(59), TensorDataset(x.flip(0), y)):
        with pytest.raises(ValueError, match="must be the data set that the coupling was fitted to, 60 points"):
            loader(coupling, other)
    with pytest.raises(ValueError, match="no noises yet"):
        loader(mbot.DataCoupling())
    with pytest.raises(ValueError, match="brings noises of its own: leave source out"):
        flows.CoupledLoader(labelled(), torch.randn(50, 2), coupling, 4)
    with pytest.raises(ValueError, match="chooses targets"):
        loader(coupling, sources_per_target=2)
    with pytest.raises(ValueError, match="coupling: saved"):
        loader(coupling).load_state_dict(loader(fitted(num_noises=2)).state_dict())


def test_it_is_examined():
    x1, y = labelled().tensors
    found = flows.diagnose(mbot.DataCoupling(), torch.randn(N, 2), x1, y, rounds=2)
    assert found.cost_of_larger is None
    assert found.unique == 1


def test_positions_of_a_batch_are_the_users_own():
    """The order of an epoch is kept for all loaders of a seed; no batch is a view of it."""
    ordinary = [b.index.clone() for b in flows.CoupledLoader(labelled(), batch_size=4, ot_batch_size=12, seed=5)]
    for batch in loader(fitted()):
        batch.index.fill_(0)
    again = [b.index for b in flows.CoupledLoader(labelled(), batch_size=4, ot_batch_size=12, seed=5)]
    assert all(torch.equal(a, b) for a, b in zip(ordinary, again, strict=True))
