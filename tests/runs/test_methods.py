"""The words to copy into a paper, the works to cite, and the table of images."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from fake_run import fake_run
from page_reader import Page

from tltrain.core.recipe import validate
from tltrain.runs.pages import methods
from tltrain.runs.pages.write import write_report
from tltrain.runs.record import read_run


def run_with(tmp_path: Path, **changes: object) -> Path:
    run = fake_run(tmp_path / "run", ["cat", "dog"], n=100)
    recipe = read_run(run).recipe
    stages = [{"name": "head", "unfreeze": "head", "steps": 1, "lr": 0.01, **changes}]
    whole = {**recipe.model_dump(mode="json"), "stages": stages}
    (run / "recipe.yaml").write_text(validate(whole, "test").to_yaml())
    return run


@pytest.mark.parametrize(
    ("changes", "says", "cites"),
    [
        ({}, "the head trained for 1 step with AdamW (peak learning rate 0.01, cosine schedule).", "loshchilov2019decoupled"),
        ({"optimizer": "sgd", "momentum": 0.8, "schedule": "constant"}, "SGD (momentum 0.8) (peak learning rate 0.01, constant", None),
        ({"steps": None, "epochs": 1.5, "unfreeze": "layer4"}, "everything from layer4 on trained for 1.5 epochs", None),
        ({"unfreeze": "all", "layer_decay": 0.7}, "the whole network trained", "bao2022beit"),
        ({"mixup": 0.2, "label_smoothing": 0.1}, "with label smoothing 0.1, mixup (alpha 0.2)", "zhang2018mixup"),
        ({"trains": "lora"}, "by low-rank updates (LoRA)", "hu2022lora"),
        ({"steps": None, "lr": None, "solve": "ridge"}, "worked out from the frozen features by ridge regression", None),
    ],
)
def test_the_methods_say_what_the_recipe_does(changes: dict[str, object], says: str, cites: str | None, tmp_path: Path) -> None:
    run = read_run(run_with(tmp_path, **changes))
    assert says in methods.paragraph(run)
    assert "On 100 test images accuracy was" in methods.paragraph(run)
    assert cites is None or f"{{{cites}," in methods.bibtex(run)


def test_the_libraries_of_the_network_alone_are_named(tmp_path: Path) -> None:
    run = run_with(tmp_path)
    env = json.loads((run / "env.json").read_text())
    env["versions"] |= {"transformers": "5.24.0", "timm": "1.0.31"}
    (run / "env.json").write_text(json.dumps(env))
    assert not {"timm", "transformers"} & set(re.findall(r"\w+", methods.paragraph(read_run(run))))
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace("name: resnet-tiny", "name: timm:resnet18").replace("shipped:resnet-tiny", "null"))
    said = methods.paragraph(read_run(run))
    assert "timm 1.0.31" in said
    assert "transformers" not in said


def test_only_what_was_used_is_cited(tmp_path: Path) -> None:
    cited = re.findall(r"^@\w+\{(\w+),", methods.bibtex(read_run(run_with(tmp_path))), re.M)
    assert {"paszke2019pytorch", "he2016deep", "torchvision2016", "loshchilov2017sgdr"} <= set(cited)
    assert not {"zhang2018mixup", "hu2022lora", "hinton2015distilling", "dosovitskiy2021image", "bao2022beit"} & set(cited)
    assert len(cited) == len(set(cited))


def test_a_run_that_used_everything_cites_all_of_the_table(tmp_path: Path) -> None:
    """No name of the table is without an entry, and none cannot be parsed as an entry: braces close where it ends."""
    run = read_run(run_with(tmp_path))
    for name in methods.USED:
        methods.USED[name](run)
    entries = methods.entries()
    assert list(entries) == list(methods.USED)
    for entry in entries.values():
        assert re.match(r"@(software|inproceedings|article|misc)\{\w+,\n", entry)
        assert entry.count("{") == entry.count("}")
        assert "title" in entry


def test_the_page_counts_the_images_of_each_class(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", ["cat", "dog"])
    assert "What it learned from" not in Page(write_report(run)).text, "runs of tltrain 0.1 did not count them"
    env = json.loads((run / "env.json").read_text())
    env["data"] = {"classes": 2, "train": 40, "names": ["cat", "<b>dog"], "by_class": {"train": [10, 30], "val": [1, 3], "test": [5, 7]}}
    (run / "env.json").write_text(json.dumps(env))
    text = Page(write_report(run)).text
    assert "40 training images of 2 classes, beside 4 val and 12 test images. There are 3.0 times as many of <b>dog as of cat." in text
    assert "Methods, to copy into a paper" in text
    assert "by_class" not in text.partition("Environment")[2].partition("Recipe")[0]
