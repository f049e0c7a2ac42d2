"""Weights as a safetensors file: written by the command line, read by plain torch and built again without data."""

import json
import sys
from pathlib import Path

import pytest
import torch

import flows
from flows import build, checkpoint
from flows.__main__ import main
from flows.models import ResidualMLP

RUN = ["train", "--data", "moons", "--model", "mlp", "--mlp-width", "16", "--mlp-depth", "1", "--batch-size", "32",
       "--ot-batch-size", "64", "--no-progress", "--device", "cpu", "--evaluate", "0"]  # fmt: skip


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A run, and the file of its model."""
    pytest.importorskip("safetensors", reason="the extra safetensors is not installed")
    folder = tmp_path_factory.mktemp("export")
    assert main([*RUN, "--steps", "6", "--checkpoint-every", "3", "--out", str(folder / "run")]) == 0
    assert main(["export", "--run", str(folder / "run"), "--out", str(folder / "new" / "model.safetensors")]) == 0
    return folder / "run", folder / "new" / "model.safetensors"


def test_the_file_holds_the_averaged_weights_under_the_plain_models_names(exported):
    import safetensors.torch

    run, file = exported
    weights = safetensors.torch.load_file(file)
    saved = checkpoint.load(checkpoint.latest(run / "checkpoints"))
    assert weights.keys() == saved["model"].keys()
    assert all(torch.equal(value, saved["ema"][f"module.{name}"]) for name, value in weights.items())
    assert not all(torch.equal(value, saved["model"][name]) for name, value in weights.items())
    ResidualMLP(2, num_classes=2, width=16, depth=1).load_state_dict(weights)


def test_it_is_built_again_without_data(exported, monkeypatch):
    run, file = exported
    _, _, expected = build.load_run(run, None, torch.device("cpu"))
    monkeypatch.setattr(build, "load_task", None)
    model = flows.load_model(file)
    assert not model.training
    t, x, y = torch.rand(5), torch.randn(5, 2), torch.tensor([0, 1, -1, 0, 1])
    assert torch.equal(model(t, x, y), expected(t, x, y))
    earlier = file.with_name("earlier.safetensors")
    chosen = ["--checkpoint", str(checkpoint.path_of(run / "checkpoints", 3))]
    monkeypatch.undo()
    assert main(["export", "--run", str(run), "--out", str(earlier), *chosen]) == 0
    assert not torch.equal(flows.load_model(earlier)(t, x, y), expected(t, x, y))


def test_the_metadata_are_the_settings_and_no_path(exported):
    from safetensors import safe_open

    run, file = exported
    with safe_open(file, "pt") as opened:
        about = opened.metadata()
    config = json.loads(about["config"])
    assert config["mlp_width"] == 16
    assert config["coupling"] == "auto"
    assert json.loads(about["model"]) == {"shape": [2], "num_classes": 2, "condition_dim": 0}
    assert str(run) not in json.dumps(about)


def test_what_cannot_be_read(exported, tmp_path, capsys):
    import safetensors.torch

    _, file = exported
    with pytest.raises(FileNotFoundError, match="there is no file"):
        flows.load_model(tmp_path / "none.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match="truncated, damaged or no safetensors file"):
        flows.load_model(cut)
    safetensors.torch.save_file({"weight": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match=r"was not written by .* load its tensors with safetensors.torch.load_file"):
        flows.load_model(tmp_path / "foreign.safetensors")
    assert main(["export", "--run", str(tmp_path), "--out", str(tmp_path / "m.safetensors")]) == 2
    assert "is not the folder of a run" in capsys.readouterr().err


def test_without_the_package_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert main(["export", "--run", str(tmp_path), "--out", str(tmp_path / "model.safetensors")]) == 2
    assert "pip install safetensors" in capsys.readouterr().err
    with pytest.raises(ImportError, match="pip install safetensors"):
        flows.load_model(Path("model.safetensors"))
