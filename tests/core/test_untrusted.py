"""YAML and JSON of others: whatever they hold, the answer is a value or a UserError, soon."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tltrain.core import recipe
from tltrain.core.arguments import parsing
from tltrain.core.errors import UserError
from tltrain.core.untrusted import cut, parse_json, parse_yaml, read_json

NESTED = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGED = "a: &a {k: v}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 10)}]}}\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
HOSTILE = {
    "aliases": (NESTED, "aliases"),
    "merges": (MERGED, "aliases"),
    "depth of lists": ("[" * 100_000, "nested deeper"),
    "depth of mappings": ("{a: " * 50_000, "nested deeper"),
    "depth by indent": ("\n".join("  " * i + "a:" for i in range(40)), "nested deeper"),
    "size": ("a" * 300_000, "bytes"),
    "values": ("[" + "a," * 50_000 + "]", "more than"),
    "itself": ("a: &a [*a]", "holds itself"),
    "digits": ("seed: " + "9" * 5000, "not YAML"),
    "octal": ("seed: 0o" + "9" * 50, None),
    "date": ("a: 2001-99-99", "not YAML"),
    "timestamp": ("a: !!timestamp x", "not YAML"),
    "bool": ("a: !!bool x", "not YAML"),
    "int": ("a: !!int ''", "not YAML"),
    "float": ("a: !!float x", "not YAML"),
    "set": ("a: !!set [x]", "not YAML"),
    "unhashable": ("? [a]\n: b", "not YAML"),
    "code": ("a: !!python/object/apply:os.system [exit]", "not YAML"),
    "control": ("a: \x00", "not YAML"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_yaml_is_one_message(name: str) -> None:
    text, said = HOSTILE[name]
    if said is None:
        parse_yaml(text, "x.yaml")
        return
    with pytest.raises(UserError, match=said) as caught:
        parse_yaml(text, "x.yaml")
    assert str(caught.value).startswith("x.yaml")
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("name", ["aliases", "merges", "depth of lists", "values"])
def test_a_hostile_recipe_costs_neither_time_nor_memory(name: str, tmp_path: Path) -> None:
    """In a process that may take ten seconds and a gigabyte: more, and it is killed."""
    (tmp_path / "r.yaml").write_text(HOSTILE[name][0])

    def bounded() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (10, 10))
        resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))

    words = [sys.executable, "-c", "import sys; from tltrain.core import recipe; recipe.load(sys.argv[1])", str(tmp_path / "r.yaml")]
    done = subprocess.run(words, capture_output=True, text=True, check=False, preexec_fn=bounded)
    assert "UserError" in done.stderr.splitlines()[-1], done.stderr[-500:]


def test_aliases_may_be_used() -> None:
    assert parse_yaml("a: &a {lr: 1}\nb: {<<: *a, x: 2}\nc: [*a, *a]", "x") == {
        "a": {"lr": 1},
        "b": {"lr": 1, "x": 2},
        "c": [{"lr": 1}] * 2,
    }
    assert parse_yaml("", "x") is None


def test_every_shipped_recipe_is_far_from_the_bounds() -> None:
    for path in recipe.shipped().values():
        assert path.stat().st_size < 16 * 1024
        assert isinstance(parse_yaml(path.read_text(encoding="utf-8"), str(path)), dict)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"a":' * 100_000, "9" * 5000])
def test_odd_json_is_one_message(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    for read in (lambda: parse_json(text, "x.json"), lambda: read_json(tmp_path / "x.json")):
        with pytest.raises(UserError, match=r"x\.json is no JSON") as caught:
            read()
        assert len(str(caught.value)) < 600


def test_a_value_in_a_message_has_a_bounded_length() -> None:
    assert cut("a") == "'a'"
    assert len(cut("a" * 1000)) == 80


def test_a_size_of_a_million_on_the_command_line_is_said_as_in_a_file() -> None:
    with pytest.raises(UserError) as refused:
        parsing.parse("plan", ["digits-resnet", "--data.size", "1000000", "--data.val-fraction", "7"])
    said = str(refused.value).partition("; see ")[0]
    assert said == "data.size: 1000000: input should be less than or equal to 8192; data.val_fraction: 7.0: input should be less than 1"
