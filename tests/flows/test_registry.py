"""Whatever the packages export is known to the command line, with its settings."""

import inspect
from dataclasses import dataclass

import pytest
import torch

import flows
import mbot
from flows import build, registry
from flows import settings as files
from flows.__main__ import main
from flows.commands.common import parse
from flows.config import DiagnoseConfig, TrainConfig
from flows.settings import ConfigError

TINY = ["--data", "moons", "--model", "mlp", "--batch-size", "16", "--ot-batch-size", "32", "--steps", "2",
        "--evaluate", "0", "--no-progress", "--device", "cpu"]  # fmt: skip

# What has no default, by name.
NEEDED = {
    "bomb": ["coupling.num_batches=4"],
    "sinkhorn": ["coupling.reg=0.5"],
    "semidiscrete": ["coupling.steps=5", "coupling.batch_size=32", "coupling.tol=1e9"],
}


def concrete(module, base):
    found = [getattr(module, name) for name in module.__all__]
    return {k for k in found if inspect.isclass(k) and issubclass(k, base) and not inspect.isabstract(k)}


def test_names_cover_everything_exported():
    assert set(registry.couplings().values()) == concrete(mbot, mbot.Coupling)
    assert set(registry.path_classes().values()) == concrete(flows, flows.Path)
    helpers = {"CellSeries", "ImageData", "save_grid"}  # they need samples, not a place
    assert set(registry.data_sets().values()) == {
        getattr(flows.datasets, name) for name in flows.datasets.__all__ if name not in helpers
    }
    assert {"fm", "ot", "c2ot", "wcfm", "bomb", "sinkhorn", "semidiscrete", "whole-data"} <= set(registry.couplings())
    assert {"linear", "schrodinger-bridge", "target", "variance-preserving"} <= set(registry.path_classes())
    assert {"digits", "mnist", "fashion-mnist", "cifar10", "folder", "arrays", "eight-gaussians", "moons",
            "checkerboard"} <= set(registry.data_sets())  # fmt: skip


@pytest.mark.parametrize("name", registry.couplings())
def test_every_coupling_trains_and_is_diagnosed(name, tmp_path, capsys):
    more = ["--settings", *NEEDED[name]] if name in NEEDED else []
    run = tmp_path / "run"
    command = ["train", *TINY, "--data", "digits", "--coupling", name, *more, "--out", str(run)]
    assert main(command) == 0, capsys.readouterr().err
    saved = TrainConfig(**files.typed(TrainConfig, files.read_file(run / "config.toml"), "file"))
    task = build.load_task(saved)
    assert isinstance(build.build_coupling(saved, task), registry.couplings()[name])
    assert list(saved.settings) == NEEDED.get(name, [])
    assert main([*command, "--steps", "3", "--resume"]) == 0, capsys.readouterr().err
    assert main(["diagnose", "--coupling", name, *more, "--num", "64"]) == 0
    assert registry.couplings()[name].__name__ in capsys.readouterr().out


def test_every_model_is_built_for_images_with_labels():
    task = build.Task(None, (3, 16, 8), num_classes=5)
    for name in registry.model_names():
        if name not in ("mlp", "cifar10-c2ot", "imagenet32-c2ot"):  # large, and built like the others
            with torch.device("meta"):
                model = build.build_model(TrainConfig(model=name), task)
                out = model(torch.rand(2), torch.rand(2, 3, 16, 8), torch.zeros(2, dtype=torch.long))
            assert out.shape == (2, 3, 16, 8)
    with pytest.raises(
        ConfigError, match=r"--model dit has patches of 2 pixels, which do not divide images \(1, 9, 8\)"
    ):
        build.build_model(TrainConfig(model="dit"), build.Task(None, (1, 9, 8)))
    for name in ("dit", "mlp"):
        with pytest.raises(ConfigError, match=f"--dropout is of the U-Nets; --model {name} has none"):
            build.build_model(TrainConfig(model=name, dropout=0.1), task)
    with pytest.raises(ConfigError, match="--model dit is for images"):
        build.build_model(TrainConfig(model="dit"), build.Task(None, (2,)))


@pytest.mark.parametrize("name", registry.path_classes())
def test_every_path_trains(name, tmp_path, capsys):
    command = ["train", *TINY, "--path", name, "--settings", "path.sigma=0.2", "--out", str(tmp_path / "run")]
    assert main(command) == 0, capsys.readouterr().err
    built = build.build_path(parse(TrainConfig, command[1:], "train"))
    assert built == registry.path_classes()[name](sigma=0.2)


def test_what_is_exported_is_there(monkeypatch):
    """A third party's coupling, path and data set: exported, and nothing else."""

    @dataclass(frozen=True)
    class RollCoupling(mbot.Coupling):
        shift: int
        note: str = "none"

        def _pair(self, x0, x1, y0, y1, generator):
            rows = torch.arange(len(x1))
            return mbot.Pairs(rows.roll(self.shift), rows)

    @dataclass(frozen=True)
    class TwoStagePath(flows.LinearPath):
        pass

    def two_points(n, *, generator=None):
        return torch.randint(0, 2, (n, 1), generator=generator).float()

    for module, name, thing in (
        (mbot, "RollCoupling", RollCoupling),
        (flows, "TwoStagePath", TwoStagePath),
        (flows.datasets, "two_points", two_points),
    ):
        monkeypatch.setattr(module, name, thing, raising=False)
        monkeypatch.setattr(module, "__all__", [*module.__all__, name])
    settings = TrainConfig(
        coupling="roll", path="two-stage", data="two-points", settings=("coupling.shift=3", "coupling.note=by hand")
    )
    task = build.load_task(settings)
    assert task.shape == (1,)
    assert build.build_coupling(settings, task) == RollCoupling(3, "by hand")
    assert build.build_path(settings) == TwoStagePath()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--coupling", "bomb"], "--coupling bomb needs num_batches: give --settings coupling.num_batches=…"),
        (["--coupling", "sinkhorn"], "--coupling sinkhorn needs reg: give --settings coupling.reg=…"),
        (["--coupling", "ot", "--reg", "3"], "--coupling ot has no setting reg; it has transport, cost"),
        (["--coupling", "fm", "--settings", "coupling.mass=3"], "--coupling fm has no setting mass; it has none"),
        (["--path", "linear", "--settings", "path.width=3"], "--path linear has no setting width; it has sigma"),
        (["--settings", "num_batches=4"], "written group.name=value, such as coupling.num_batches=4; got"),
        (["--settings", "pairs.mass=4"], "settings belong to coupling, path, times, objective; got 'pairs.mass=4'"),
        (["--coupling", "ot", "--settings", "coupling.transport=PartialOT(mass=-1)"], "mass must"),
        (["--coupling", "ot", "--settings", "coupling.transport=system('true')"], "transport must be"),
        (["--coupling", "bomb", "--settings", "coupling.num_batches=four"], "num_batches must be an int; got 'four'"),
    ],
)
def test_settings_that_do_not_fit(arguments, says, tmp_path, capsys):
    assert main(["train", *TINY, *arguments, "--out", str(tmp_path / "run")]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_settings_in_files_are_lists(tmp_path):
    (tmp_path / "a.toml").write_text('coupling = "bomb"\nsettings = ["coupling.num_batches=4", "coupling.reg=0.5"]\n')
    got = parse(TrainConfig, ["--config", str(tmp_path / "a.toml")], "train")
    assert got.settings == ("coupling.num_batches=4", "coupling.reg=0.5")
    (tmp_path / "a.toml").write_text('settings = "coupling.num_batches=4"\n')
    with pytest.raises(ConfigError, match=r"settings in .* must be a list"):
        parse(TrainConfig, ["--config", str(tmp_path / "a.toml")], "train")
    assert parse(DiagnoseConfig, ["--settings", "coupling.reg=1"], "diagnose").settings == ("coupling.reg=1",)
