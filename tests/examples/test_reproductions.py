"""The papers' applications run as a user runs them with --quick, and their figures say what they should."""

import argparse
import importlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def quick(tmp_path):
    """Runs ``examples/<name>.py --quick`` and gives its figures, after looking at what it wrote."""

    def run(name, *arguments, picture="png", stem=None):
        command = [sys.executable, ROOT / "examples" / f"{name}.py", "--quick", "--out", tmp_path, *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
        )
        assert done.returncode == 0, done.stderr[-2000:]
        stem = stem or name
        assert (tmp_path / f"{stem}.{picture}").stat().st_size > 3000
        page = (tmp_path / f"{stem}.md").read_text()
        assert page.strip() in done.stdout
        assert "Quick setting" in page
        assert "nan" not in page
        return json.loads((tmp_path / f"{stem}.json").read_text())

    return run


@pytest.fixture
def example(monkeypatch):
    """The module of ``examples/<name>.py``."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module


def test_gradient_flow(quick):
    flows = quick("gradient_flow")["flows"]
    assert list(flows) == ["m-OT", "BoMb-OT", "e-BoMb-OT", "m-UOT", "m-POT", "BoMb-POT"]
    assert all(flow["squared_w2"][-1] < flow["squared_w2"][0] / 5 for flow in flows.values())
    assert flows["BoMb-OT"]["spread"] > flows["m-OT"]["spread"]  # m-OT contracts more


def test_color_transfer(quick):
    methods = quick("color_transfer", picture="jpg")["methods"]
    assert methods["full OT"]["w2"] < 0.01  # a permutation of the target palette
    assert methods["BoMb-OT"]["w2"] < methods["m-OT"]["w2"] < methods["source"]["w2"]
    assert methods["m-OT"]["reached"] == 1


def test_color_transfer_of_all_pixels(quick):
    figures = quick("color_transfer", "--clusters", 0, "--visits", 1, picture="jpg")
    assert "full OT" not in figures["methods"]
    assert figures["methods"]["BoMb-OT"]["w2"] < figures["methods"]["source"]["w2"]


def test_approximate_bayes(quick):
    figures = quick("approximate_bayes")
    cells = {(cell["m"], cell["k"]): cell for cell in figures["cells"]}
    assert set(cells) == {(8, 2), (8, 8), (16, 2), (16, 8)}
    assert cells[8, 8]["BoMb-OT"] < cells[8, 8]["m-OT"]
    assert all(run["populations"] >= 2 for run in figures["runs"])


def test_abc_runs_although_the_standard_library_has_a_module_of_that_name():
    command = [sys.executable, ROOT / "examples" / "abc.py", "--help"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert "--simulations" in done.stdout


def test_outliers(quick):
    figures = quick("outliers")["couplings"]
    assert figures["OT"]["outliers_in_pairs"] > 0.02
    assert figures["partial"]["outliers_in_pairs"] == figures["unbalanced"]["outliers_in_pairs"] == 0
    assert figures["partial"]["far"] < figures["independent"]["far"]


def test_labelled_source(quick):
    runs = {name: found[0] for name, found in quick("labelled_source")["runs"].items()}
    kept = {name: run["kept"] for name, run in runs.items()}
    for name in ("independent within classes", "C²OT", "C²OT, sources matched"):
        assert kept[name] > 0.55 > 0.4 > max(kept["independent"], kept["OT"])
        assert runs[name]["by_class"] < min(runs["independent"]["by_class"], runs["OT"]["by_class"])
    assert len(runs["OT"]["each class"]) == 10


def test_domain_adaptation(quick):
    figures = quick("domain_adaptation")
    assert list(figures["curves"]) == ["m-OT", "m-UOT", "m-POT", "BoMb-OT", "TS-OT", "TS-POT"]
    assert all(curve[-1] > figures["source_only"] for curve in figures["curves"].values())


def test_generative_model(quick):
    runs = {(run["loss"], run["k"]): run["w2"] for run in quick("generative_model")["runs"]}
    assert set(runs) == {(f"{scheme}-{inner}", k) for scheme in ("m", "BoMb") for inner in ("OT", "SW") for k in (1, 2)}
    assert runs["m-OT", 1] == runs["BoMb-OT", 1]  # one pair of batches: the same loss


def test_boss_schedule(quick):
    for run in quick("boss_schedule")["schedules"]:
        assert run["cost"] <= run["uniform_cost"]
        assert len(run["times"]) == run["steps"] + 1


def test_wcfm_toys(quick):
    runs = quick("wcfm_toys")["couplings"]
    assert runs["W-CFM 1"]["tilt"] > runs["W-CFM 10"]["tilt"]
    assert runs["corrected 1"]["tilt"] < runs["W-CFM 1"]["tilt"] / 2
    assert runs["W-CFM 1"]["effective"] < runs["W-CFM 10"]["effective"] < runs["FM"]["effective"] + 1e-6


def test_amortized_clustering(quick):
    figures = quick("amortized_clustering")
    runs = {(run["model"], run["gradient"], run["n"]): run for run in figures["runs"]}
    assert len(runs) == 12
    assert figures["exact_against_full"] < 1e-4
    for (model, _, _), run in runs.items():
        streamed = model != "Set Transformer"
        assert (run["apart"] < 1e-4) == streamed  # the same mixture from every stream
        assert min(run["nll"]["all"]) > figures["oracle_nll"]
        assert run["losses"][-1] < run["losses"][0]
    same = [runs["UMBC+ST", *how]["losses"][0] for how in (("exact", 512), ("sampled", 64), ("sampled", 8))]
    assert max(same) - min(same) < 1e-4  # gradient modes share the value


def test_image_completion(quick):
    figures = quick("image_completion")
    assert len(figures["models"]) == 5
    for (run,) in figures["models"].values():
        assert run["streamed_against_whole"] < 1e-4
        assert run["losses"][-1] < run["losses"][0]
    kernel = figures["kernel"]["unseen"]
    assert kernel[-1] < kernel[0]  # nothing is trained, and more pixels help


def test_unseen_pixels_are_those_not_among_the_first_of_the_stream(example):
    completion = example("image_completion")
    images = torch.rand(3, 1, 4, 5, generator=torch.Generator().manual_seed(0))
    test = completion.Test(images, 3, (2, 7), 0)
    flat = test.images.flatten(1)
    for row in range(3):
        torch.testing.assert_close(flat[row][test.places[row]], test.pixels[row, :, 2])
    right = torch.ones(20, dtype=torch.bool).repeat(3, 1).scatter(1, test.places[:, :2], False)
    guess = test.colours + right[..., None]  # wrong by 1 exactly where nothing was seen
    values = (
        test.score((guess, torch.ones_like(guess)), 2, "unseen"),
        test.score((guess, torch.ones_like(guess)), 2, "all"),
    )
    assert values == pytest.approx((0.5 * math.log(2 * math.pi) + 0.5, 0.5 * math.log(2 * math.pi) + 0.45), abs=1e-5)


def test_cfm_2d(quick):
    problems = ("--problems", "N-moons", "moons-gaussians")
    found = quick("cfm_2d", *problems, "--methods", "I-CFM", "FM", "OT-CFM")["runs"]
    runs = {(run["problem"], run["method"]): run for run in found}
    assert len(runs) == 5  # FM's path starts from noise: not from moons
    assert runs["moons-gaussians", "OT-CFM"]["npe"] < runs["moons-gaussians", "I-CFM"]["npe"]


NOTEBOOKS = sorted(path.stem for path in (ROOT / "examples" / "notebooks").glob("*.ipynb"))


def code_of(name):
    path = ROOT / "examples" / "notebooks" / f"{name}.ipynb"
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_is_kept_executed_and_small(name):
    code = code_of(name)
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert sum(bool(cell["outputs"]) for cell in code) >= 3
    assert not any(output["output_type"] == "error" for cell in code for output in cell["outputs"])
    assert (ROOT / "examples" / "notebooks" / f"{name}.ipynb").stat().st_size < 400_000


@pytest.mark.parametrize("name", ["m_pot", "bomb_ot", "c2ot", "umbc", "slots"])
def test_notebook_code_runs(name, tmp_path):
    """As it is, but for training loops of hundreds of steps, which stop after two."""
    lines = "\n".join("".join(cell["source"]) for cell in code_of(name)).splitlines()
    source = "\n".join(line for line in lines if not line.startswith("%"))
    (tmp_path / "notebook.py").write_text(re.sub(r"(range\((?:1, )?|steps=)\d{3,}", r"\g<1>2", source))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    command = [sys.executable, tmp_path / "notebook.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]


def test_set_conditioned_flow(quick, tmp_path):
    population = quick("set_conditioned_flow", stem="set_conditioned_flow_population")
    assert [(m["encoder"], m["coupling"]) for m in population["methods"]] == [
        ("UMBC", "C²OT"),
        ("UMBC", "independent"),
        ("UMBC", "OT"),
        ("Deep Sets", "C²OT"),
        ("UMBC, mass", "C²OT"),
    ]
    assert population["streamed_gap"] < 1e-4  # a stream gives the condition of the whole set
    reference = population["references"]
    assert reference["fresh true points"]["10"] < reference["the observed points"]["10"]
    digits = json.loads((tmp_path / "set_conditioned_flow_digits.json").read_text())
    assert digits["methods"][-1]["encoder"] == "UMBC, asked by place"
    near = digits["references"]["4 nearest training images"]
    assert near["40"] < near["20"] < near["10"] < near["5"]
    assert all(set(m["runs"][0]) == {"many", "few", "right"} for m in digits["methods"])


def test_multiple_instance_learning(quick):
    figures = quick("mil")
    memory = figures["large"]["memory_mb"]
    assert 0 <= memory["sampled"] <= memory["exact"] <= memory["full"]  # growth of the process's peak: 0 below it
    assert {run["gradient"] for run in figures["large"]["runs"]} == {"exact", "sampled"}
    assert all(set(run["auc"]) == set(run["fresh"]) == set(run["accuracy"]) for run in figures["large"]["runs"])
    runs = figures["digits"]["runs"]
    assert runs["Deep Sets, max"][0]["auc"] > 0.7  # one 9 in ten images: the largest value tells


def test_a_threshold_by_fresh_bags_finds_scores_that_moved(example):
    mil = example("mil")
    labels = torch.tensor([0.0, 1.0, 0.0, 1.0])
    score = torch.tensor([-5.0, -3.0, -5.2, -2.8]).sigmoid()  # told apart, far below 1/2
    assert mil.measures(score, labels) == {"accuracy": 0.5, "auc": 1.0}
    assert mil.middle(score, labels) == pytest.approx(float(torch.tensor(-4.0).sigmoid()), abs=1e-6)
    assert mil.accuracy(score, labels, mil.middle(score, labels)) == 1


def test_benchmark_bags_are_read_and_cross_validated(quick, tmp_path):
    generator = np.random.default_rng(0)
    sizes, labels = generator.integers(1, 5, 24), np.arange(24) % 2
    x = generator.normal(size=(sizes.sum(), 6)) + 4 * np.repeat(labels, sizes)[:, None]
    (tmp_path / "mil").mkdir()
    np.savez(tmp_path / "mil" / "musk1.npz", x=x.astype(np.float32), ptr=np.r_[0, sizes.cumsum()], y=labels)
    kept = tmp_path / "kept.pt"
    figures = quick("mil_benchmark", "--data-root", tmp_path, "--kept", kept)["sets"]
    assert list(figures["UMBC"]) == ["musk1"]
    assert figures["Deep Sets, mean"]["musk1"][0]["accuracy"] > 0.8
    assert figures["Deep Sets, mean"]["musk1"][0]["auc"] > 0.9
    (name, first), *_ = torch.load(kept, weights_only=True).items()
    assert (name, first) == ("musk1, UMBC, 2 folds, 10 steps, seed 0", figures["UMBC"]["musk1"][0])


def test_choices_of_image_completion(quick):
    runs = quick("image_completion_choices", stem="image_completion_digits_choices", picture="json")["runs"]
    assert [run["changed"] for run in runs if run["model"] == "one slot"] == [{}, {"skip": False}]
    scores = [run["score"] for run in runs if run["model"] == "UMBC, local slots"]
    assert len(scores) == len(set(scores)) == 5  # each candidate is another model


def test_end_to_end_bags(quick):
    figures = quick("end_to_end_bags")
    spent = {(cost["gradient"], cost["images"]): cost for cost in figures["costs"]}
    assert spent["exact", 2000]["mb"] < 1.1 * spent["exact", 500]["mb"]
    assert spent["exact", 500]["norm"] == pytest.approx(spent["full", 500]["norm"], rel=1e-4)


def test_bags_hold_nines_as_their_labels_say(example):
    bags = example("end_to_end_bags").Bags(None, True, 7)
    chunks, labels = bags.draw(4, 40, torch.Generator().manual_seed(0))
    images = torch.cat(list(chunks()), 1)
    known = {tuple(image.flatten().tolist()) for image in bags.images[bags.nines].float() / 127.5 - 1}
    nines = [sum(tuple(image.flatten().tolist()) in known for image in bag) for bag in images]
    assert nines == [2 * int(label) for label in labels]
    assert images.shape == (4, 40, 1, 8, 8)


def test_modelnet10(quick):
    figures = quick("modelnet10", stem="modelnet10_solids")["models"]
    for name, (run,) in figures.items():
        assert (run["apart"] < 1e-4) == (name != "Set Transformer")
    assert figures["UMBC, local slots"][0]["100"] > 1.5 / 6  # of six kinds


def test_clouds_of_a_file_are_centred_in_the_unit_ball(example, tmp_path):
    modelnet = example("modelnet10")
    (tmp_path / "modelnet10").mkdir()
    points = np.random.default_rng(0).integers(0, 65536, (4, 50, 3)).astype(np.uint16)
    content = {"lo": np.full((4, 3), 7.0, np.float32), "scale": np.array([1, 10, 100, 5], np.float32)}
    np.savez(
        tmp_path / "modelnet10" / "some.npz", points_u16=points, label=np.arange(4) % 2, is_test=np.arange(4) > 2,
        classes=np.array(["bed", "chair"]), **content,
    )  # fmt: skip
    data, names = modelnet.load(argparse.Namespace(data_root=tmp_path, quick=True))
    assert names == ["bed", "chair"]
    assert len(data["train"][0]) == 3
    torch.testing.assert_close(data["train"][0].norm(dim=-1).amax(1), torch.ones(3))
    torch.testing.assert_close(data["test"][0].mean(1), torch.zeros(1, 3), atol=1e-6, rtol=0)


def test_document_classification(quick):
    figures = quick("document_classification")
    linear = figures["scores"]["TF-IDF + logistic regression"][0]
    assert linear[-1] > linear[0]
    assert len(figures["scores"]["UMBC"][0]) == len(figures["shares"])


def test_newsgroup_posts_lose_what_gives_the_group_away(example):
    body = example("document_classification").body
    post = "From: a@b\tSubject: cars\tLines: 3\t\tIn article <1@x> c@d writes:\t>old words\tmy words"
    assert body(post) == "my words"
    assert body("Newsgroups: sci.med\t\tArchive-name: med/faq\t\tthe text") == "the text"
