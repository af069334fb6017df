"""The recipe: YAML in and out without loss, mistakes explained, what is shipped."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from tltrain.core import recipe as recipes
from tltrain.core import registry
from tltrain.core.errors import UserError
from tltrain.core.recipe import VERSION, Backbone, Data, Distill, Recipe, Stage

SMALL = """
name: small
batch: 8
data: {source: digits}
backbone: {name: resnet-tiny}
stages:
  - {name: head, unfreeze: head, epochs: 2, lr: 1e-3}
  - {name: all, unfreeze: all, steps: 30, lr: 5e-4, layer_decay: 0.7}
"""
MODELS: tuple[type[BaseModel], ...] = (Recipe, Data, Backbone, Distill, Stage)

names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,12}", fullmatch=True)
text = st.text(max_size=20)
share = st.floats(0, 1, exclude_max=True)
above_zero = st.floats(0, 1e6, exclude_min=True)
triple = st.tuples(*[st.floats(0.01, 1)] * 3)


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


named = text.filter(lambda name: name.lower() not in ("none", "null"))  # which mean no name
backbones = st.builds(Backbone, name=named, weights=maybe(text), mean=maybe(triple), std=maybe(triple), dropout=share)
data = st.builds(
    Data,
    source=text,
    seed=st.integers(),
    size=maybe(st.integers(8, 4096)),
    val_fraction=share,
    balance=st.sampled_from(["none", "weights", "sampler"]),
    flip=st.booleans(),
)
lengths = st.builds(lambda n, steps: {"steps": n} if steps else {"epochs": n / 8}, st.integers(1, 10**9), st.booleans())


@st.composite
def stages(draw: st.DrawFn) -> tuple[Stage, ...]:
    called = draw(st.lists(names, min_size=1, max_size=3, unique=True))
    more = {
        "unfreeze": text,
        "lr": above_zero,
        "layer_decay": st.floats(0.01, 1),
        "optimizer": st.sampled_from(["sgd", "adamw"]),
        "schedule": st.sampled_from(["cosine", "step", "constant"]),
        "augment": st.sampled_from(["none", "light", "strong", "trivial", "rand"]),
        "views": maybe(st.integers(2, 9)),
        "clip": maybe(above_zero),
        "patience": maybe(st.integers(1, 99)),
    }
    return tuple(Stage(name=name, **draw(lengths), **draw(st.fixed_dictionaries(more))) for name in called)


whole = st.builds(
    Recipe,
    name=names,
    purpose=text,
    seed=st.integers(),
    deterministic=st.booleans(),
    batch=st.integers(1, 10**6),
    select=st.sampled_from(registry.names("metrics")),
    data=data,
    backbone=backbones,
    distill=maybe(st.builds(Distill, teacher=backbones, temperature=above_zero, weight=st.floats(0, 1))),
    stages=stages(),
)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.dates()
keys = st.sampled_from(sorted({k for model in MODELS for k in model.model_fields})) | st.text(max_size=3) | st.integers()
junk = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=5), max_leaves=12)


def small(**changes: Any) -> Recipe:
    return recipes.validate({**yaml.safe_load(SMALL), **changes}, "small")


def message(raw: str) -> str:
    with pytest.raises(UserError) as caught:
        recipes.parse(raw, "mine.yaml")
    return str(caught.value)


@settings(deadline=None)
@given(whole)
@example(small(backbone={"name": "a\x85b\u2028c", "weights": "Fotos/Bäume"}))  # line breaks to YAML 1.1, which PyYAML may fold to a space
def test_yaml_loses_nothing(recipe: Recipe) -> None:
    assert recipes.parse(recipe.to_yaml(), "again") == recipe


@settings(deadline=None, max_examples=300)
@given(st.dictionaries(keys, junk, max_size=8))
def test_whatever_stands_in_the_file_the_answer_is_a_user_error(raw: dict[Any, Any]) -> None:
    with pytest.raises(UserError, match=r"^mine\.yaml"):
        recipes.parse(yaml.safe_dump(raw), "mine.yaml")


def test_a_recipe_is_overridden_by_path() -> None:
    recipe = small()
    changed = recipe.override({"stages.1.lr": "3e-4", "data": {"size": 16}, "data.seed": 5, "backbone.name": "resnet-tiny"})
    assert set(recipe.differences(changed)) == {
        *recipe.differences(small(data=recipe.data.model_dump() | {"size": 16, "seed": 5}, backbone=changed.backbone.model_dump())),
        "stages.1.lr: 0.0005 -> 0.0003",
    }
    assert changed.data == recipe.data.model_copy(update={"size": 16, "seed": 5})
    assert recipe == small(), "and itself stays as it was"
    assert recipe.override(changed.model_dump()) == changed
    for path, says in (
        ("stages.2.lr", "no 'stages.2.lr'"),
        ("stages.x.lr", "no 'stages.x.lr'"),
        ("batch.size", "no 'batch.size'"),
        ("a", "no 'a'"),
    ):
        with pytest.raises(UserError, match=says):
            recipe.override({path: 1})
    with pytest.raises(UserError, match=r"recipe small with these overrides:\n  stages\.0\.lr: -1: input should be greater than 0"):
        recipe.override({"stages.0.lr": -1})


def test_learning_rates_may_be_written_as_people_write_them() -> None:
    assert [s.lr for s in recipes.parse(SMALL, "small").stages] == [1e-3, 5e-4]  # YAML 1.1 reads 1e-3 as a string


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("batch: 8", "batch: 8\nbacth: 9", "bacth: unknown key; did you mean batch?"),
        ("lr: 5e-4", "lr: 5e-4, layer_decy: 1", "stages.1.layer_decy: unknown key; did you mean layer_decay?"),
        ("batch: 8", "batch: 8\ndistill: {teacher: {weigths: x}}", "distill.teacher.weigths: unknown key; did you mean weights?"),
        ("source: digits", "source: digits, qqqq: 1", "data.qqqq: unknown key; known keys: source, seed, size"),
        ("batch: 8", "batch: many", "batch: 'many': input should be a valid integer"),
        ("batch: 8", "batch: 0", "batch: 0: input should be greater than or equal to 1"),
        ("lr: 5e-4", "lr: .nan", "stages.1.lr: nan: input should be"),
        ("lr: 5e-4", "lr: 5e-4, optimizer: adam", "stages.1.optimizer: 'adam': input should be 'sgd' or 'adamw'"),
        ("batch: 8", "", "batch: required and missing"),
        ("steps: 30", "steps: 30, epochs: 1", "stages.1: a stage needs exactly one of epochs and steps"),
        ("steps: 30,", "", "stages.1: a stage needs exactly one of epochs and steps"),
        ("steps: 30", "steps: 30, views: 1, augment: light", "stages.1: views: 1 is the evaluation view"),
        ("name: all", "name: head", "each must be different"),
        ("name: all", "name: a/b", "stages.1.name: 'a/b': string should match pattern"),
        ("{name: resnet-tiny}", "{}", "backbone: name and weights are both null"),
        ("{name: resnet-tiny}", "{name: a, std: [1, 0, 1]}", "backbone: std is (1.0, 0.0, 1.0); each value must be above 0"),
        ("batch: 8", "batch: 8\nselect: f1_macr", "  select: 'f1_macr' is unknown; did you mean f1_macro?"),
        ("lr: 5e-4", "lr: 5e-4, loss: cross_entrpy", "stages.1.loss: 'cross_entrpy' is unknown; did you mean cross_entropy?"),
        ("batch: 8", "batch: 8\ndistill: {teacher: {weights: x}, loss: kds}", "distill.loss: 'kds' is unknown; did you mean kd?"),
        ("batch: 8", "batch: [8", "mine.yaml is not YAML"),
        ("batch: 8", f"batch: 8\nversion: {VERSION + 1}", f"version {VERSION + 1}; this tltrain reads versions up to {VERSION}; upgrade"),
    ],
)
def test_a_mistake_is_named_with_its_rule(old: str, new: str, expected: str) -> None:
    assert old in SMALL
    assert expected in message(SMALL.replace(old, new))


def test_every_mistake_is_told_at_once() -> None:
    told = message(SMALL.replace("batch: 8", "batch: 0\nsede: 1").replace("5e-4", "-1"))
    assert [line.split(":")[0].strip() for line in told.splitlines()[1:]] == ["batch", "stages.1.lr", "sede"]


@pytest.mark.parametrize("raw", ["", "3", "- name: a", "just words"])
def test_a_file_that_is_no_mapping_is_refused(raw: str) -> None:
    assert "not a mapping of recipe keys" in message(raw)


def test_a_newer_recipe_is_told_apart_from_a_typo() -> None:
    told = message(f"version: {VERSION + 1}\nnew_key: 1")
    assert "upgrade tltrain" in told
    assert "new_key" not in told


def test_load_takes_names_and_files_and_suggests(tmp_path: Any) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(SMALL, encoding="utf-8")
    assert recipes.load(str(path)) == small()
    assert recipes.load("digits-resnet").name == "digits-resnet"
    for given_name, expected in [
        ("digits-resnt", "did you mean digits-resnet?"),
        ("zzz", "a recipe is a .yaml file or a shipped name"),
        (str(tmp_path / "no.yaml"), "cannot be read"),
        (str(tmp_path), "tltrain recipes"),
    ]:
        with pytest.raises(UserError) as caught:
            recipes.load(given_name)
        assert expected in str(caught.value)
    path.write_bytes(b"name: \xff\xfe")
    with pytest.raises(UserError, match="cannot be read"):
        recipes.load(str(path))


def test_every_field_is_described_in_one_line() -> None:
    for model in MODELS:
        for name, field in model.model_fields.items():
            nested = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
            described = field.annotation.__doc__ if nested and field.annotation and not field.description else field.description
            assert described, f"{model.__name__}.{name} has no description"
            assert "\n" not in described.strip(), f"{model.__name__}.{name}: the description is its help text, one line"


def test_a_recipe_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        small().batch = 9  # type: ignore[misc]


def test_importing_the_recipe_is_quick_on_a_login_node() -> None:
    heavy = "{'torch', 'torchvision', 'transformers', 'accelerate', 'numpy', 'sklearn'}"
    code = f"import sys, tltrain.core.recipe as r; r.load('digits-resnet'); print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_differences_name_the_key_and_both_values() -> None:
    mine = small()
    assert mine.differences(mine) == []
    assert mine.differences(small(name="other", purpose="another")) == []
    stages = yaml.safe_load(SMALL)["stages"]
    theirs = small(batch=16, stages=[stages[0], {**stages[1], "lr": 3e-4}])
    assert mine.differences(theirs) == ["batch: 8 -> 16", "stages.1.lr: 0.0005 -> 0.0003"]
    shorter = mine.differences(small(stages=stages[:1]))
    assert "stages.1.name: all -> (absent)" in shorter
    assert all(line.startswith("stages.1.") for line in shorter)
    taught = mine.differences(small(distill={"teacher": {"weights": "runs/t"}}))
    assert "distill.teacher.weights: (absent) -> runs/t" in taught


def test_smoke_is_the_same_run_in_miniature() -> None:
    whole_run = recipes.load("cifar10-vit-b16-to-resnet50")
    smoke = whole_run.smoke()
    assert [s.steps for s in smoke.stages] == [2, 2]
    assert smoke.batch == smoke.data.eval_limit == 16
    assert recipes.validate(smoke.model_dump(), "smoke") == smoke
    kept = {k.split(": ")[0] for k in whole_run.differences(smoke)}
    assert kept == {"batch", "data.eval_limit", *(f"stages.{i}.{k}" for i in range(2) for k in ("steps", "epochs"))}
    assert small().smoke().batch == 8


@pytest.mark.parametrize("name", sorted(recipes.shipped()))
def test_a_shipped_recipe_is_whole(name: str) -> None:
    lines = recipes.shipped()[name].read_text(encoding="utf-8").splitlines()
    header = [line for line in lines if line.startswith("#")]
    assert lines[0] == "# yaml-language-server: $schema=recipe.schema.json"
    assert any(line.startswith("#   ") and f"tltrain train {name}" in line for line in header), "the header gives the command"
    assert any(line.startswith("# Expected: ") for line in header), "the header gives the expected result"
    recipe = recipes.load(name)
    assert recipe.name == name
    assert recipe.purpose
    assert recipes.parse(recipe.to_yaml(), "again") == recipe


@pytest.mark.parametrize("name", sorted(recipes.shipped()))
def test_a_shipped_recipe_says_only_what_differs_from_the_defaults(name: str) -> None:
    raw = yaml.safe_load(recipes.shipped()[name].read_text(encoding="utf-8"))
    assert list(_defaults(raw, Recipe)) == []


def test_the_shipped_recipes_are_those_promised() -> None:
    promised = {f"cifar10-{n}" for n in ("resnet50", "vit-b16", "vit-b16-to-resnet50")}
    promised |= {f"cifar10-tutorial-{n}" for n in ("resnet50", "vit-b16", "stages")}
    promised |= {"folder-resnet50", "folder-vit-b16", "folder-distil", "digits-resnet", "digits-vit", "digits-distill"}
    assert promised <= set(recipes.shipped())


def test_the_schema_for_editors_is_current() -> None:
    path = recipes.shipped()["digits-resnet"].with_name("recipe.schema.json")
    current = json.loads(path.read_text(encoding="utf-8")) == Recipe.model_json_schema()
    assert current, "run: tltrain schema > tltrain/recipes/recipe.schema.json"


def _defaults(raw: dict[str, Any], model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The keys of `raw` that give a field the value it has anyway."""
    nested: dict[str, type[BaseModel]] = {"data": Data, "backbone": Backbone, "distill": Distill, "teacher": Backbone}
    for key, value in raw.items():
        if key in nested:
            yield from _defaults(value, nested[key], f"{prefix}{key}.")
        elif key == "stages":
            for i, stage in enumerate(value):
                yield from _defaults(stage, Stage, f"stages.{i}.")
        elif model.model_fields[key].default == value:
            yield f"{prefix}{key}: {value}"
