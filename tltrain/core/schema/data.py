"""What a recipe says of its images. Every part of a recipe is one `Model`."""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MOST_PIXELS = 8192
"""The largest side of images; one of that size takes 200 MB before the network has seen it."""


SECRET = re.compile(r"(?i)sig|token|key|secret|passw|pwd|auth|credential|expires|access")
"""Names in the query of a URL whose values let others in, or belong to such a signature."""


def is_url(text: str) -> bool:
    """Whether a text is a URL, such as https://host/x.zip or s3://bucket/x.zip, and no path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def secret_in(text: str) -> str:
    """What of a URL is a secret: a user or password before the host, or a value of its query. Empty: nothing is. Raises ValueError."""
    try:
        parts = urllib.parse.urlsplit(text)
    except ValueError:  # its message may repeat a password
        raise ValueError("the URL has a host that cannot be read; write it as https://host/x.zip") from None
    if "@" in parts.netloc:
        return "what stands before @"
    return next((f"{name}=…" for name, _ in urllib.parse.parse_qsl(parts.query, keep_blank_values=True) if SECRET.search(name)), "")


def set_beside(model: Any, usual: Mapping[str, Any]) -> list[str]:
    """`name: value` of each setting that is not as usual. usual: name to value."""
    return [f"{name}: {getattr(model, name)}" for name, value in usual.items() if getattr(model, name) != value]


def refuse_secrets(source: str) -> None:
    """Raise ValueError for a source whose URL holds a secret."""
    _, _, argument = source.partition(":")
    url = source if is_url(source) else argument
    if is_url(url) and (what := secret_in(url)):
        told = f"the URL holds a secret ({what}), and a recipe is written into the run folder"
        raise ValueError(f"{told}; docs/data.md says where secrets belong")


def without_secrets(text: str) -> str:
    """A source for messages: a URL without what stands before @, and without its query."""
    return re.sub(r"(//[^?]*)[?].*", r"\1?…", re.sub(r"//[^/]*@", "//…@", text))


class Model(BaseModel):
    """Values that do not change. A key that it does not have is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class Data(Model):
    """Where images come from, how they are split, and the size the network sees."""

    source: str
    """folder:PATH, csv:, zip:, tar:FILE, parquet:GLOB, hf:NAME, webdataset:GLOB, lmdb:PATH, torchvision:NAME, cifar10, digits, printed."""
    seed: int = 0
    """Seeds the splits and every augmented view; runs that differ only in the recipe's seed see the same views."""
    size: int | None = Field(None, ge=8, le=MOST_PIXELS)
    """Side of the square the network sees, pixels; null takes the weights' own size."""
    resize: int | None = Field(None, ge=8, le=MOST_PIXELS)
    """Shorter side before the crop, pixels; null keeps the weights' own ratio of resize to size."""
    val_fraction: float = Field(0.1, ge=0, lt=1)
    """Part of train that becomes val, stratified, where the source has no val split; 0 trains on all, without val."""
    test_fraction: float = Field(0.2, ge=0, lt=1)
    """Part that becomes test, stratified, where the source has no test split; 0 goes without."""
    folds: int | None = Field(None, ge=2)
    """For cross-validation: the images that the source does not declare as val or test are parted into this many folds; null does not."""
    fold: int | None = Field(None, ge=0)
    """The fold that plays test, from 0; val is cut from the others by val_fraction. `tltrain folds` trains them all."""
    repeat: int = Field(0, ge=0)
    """Which of the many ways of parting the images into folds, drawn by data.seed."""
    per_class: int | None = Field(None, ge=1)
    """Labelled training images kept per class, drawn by data.seed; null keeps all."""
    balance: Literal["none", "weights", "sampler"] = "none"
    """For uneven classes: weigh the loss by inverse class frequency, or draw classes equally often."""
    flip: bool = True
    """Whether a mirrored image still has its label: false for digits and text."""
    max_unreadable: float = Field(0.01, ge=0, le=1)
    """Part of the images that may be unreadable. They are listed and left out; the run is refused if there are more."""
    check: Literal["full", "sample", "headers"] = "full"
    """What is read of each file at first: all; or its ends, with 2 % (1,000 or more) or 64 decoded. Only full sees damage in the middle."""
    white: int | None = Field(None, ge=1, le=65535)
    """For grey images of 16 bits: the stored value that is white, such as 4095 for 12 bits stored in 16; null is 65535."""
    image_column: str | None = None
    """For parquet and hf: the column of images; null finds it by its type and name."""
    label_column: str | None = None
    """For parquet and hf: the column of classes; null finds it by what the table says of it, else by its name."""
    depth: int | None = Field(None, ge=1)
    """For a tree of folders: this many levels are classes, named by their path, and deeper folders belong to them; null is one level."""
    label_separator: str | None = Field(None, min_length=1)
    """For csv: what parts the classes of an image in the column label, such as |; an empty cell is none of them. null: one class each."""
    label_columns: tuple[str, ...] | None = Field(None, min_length=2)
    """For csv: columns of 1 and 0, one for each class, in place of the column label; an image may have several classes. null: none."""
    exclude: str | None = None
    """A CSV file of images to leave out: a column path, or the table of `tltrain doctor SOURCE`, where its suggestion is exclude."""
    relabel: str | None = None
    """A CSV file of images and their right class: columns path and label, or the doctor's table, where a suggestion is relabel:CLASS."""
    eval_limit: int | None = Field(None, ge=1)
    """Evaluate at most this many samples of val and of test; null evaluates all."""

    @property
    def multilabel(self) -> bool:
        """Whether an image may have several labels, or none."""
        return self.label_separator is not None or self.label_columns is not None

    def check_learned(self, solved: Sequence[tuple[str, str]], taught: Sequence[str]) -> None:
        """Raise ValueError where images of several labels meet what learns one class an image.

        solved: names of stages, and what they are solved by. taught: what `distill` says of one class an image.
        """
        if self.multilabel and solved and self.balance == "weights":
            raise ValueError(
                f"stage {solved[0][0]}'s solve weighs images, and balance: weights gives an image a weight for each of its labels; with "
                "label_separator or label_columns set balance: none"
            )
        given = [f"stage {name}'s solve: {kind}" for name, kind in solved if kind == "nearest_mean"]
        given += taught
        if self.multilabel and given:
            told = f"{', '.join(given)} learns one class an image"
            raise ValueError(f"{told}; with label_separator or label_columns train the stages instead")

    @model_validator(mode="after")
    def _labelled(self) -> Self:
        if not self.multilabel:
            return self
        if self.label_separator is not None and self.label_columns is not None:
            raise ValueError("label_separator and label_columns are two ways to write several labels; leave one out")
        columns = [name.lower() for name in self.label_columns or ()]
        if len(set(columns)) < len(columns) or {"path", "split", "group"} & set(columns) or any("|" in name for name in columns):
            raise ValueError(
                f"label_columns is {', '.join(self.label_columns or ())}; name each class once, and neither path, split, group nor a name "
                "with | in it"
            )
        if self.balance == "sampler":
            raise ValueError(
                "balance: sampler draws classes equally often, of images with one class each; with label_separator or label_columns set "
                "balance: weights, which weighs each label"
            )
        return self

    @field_validator("source")
    @classmethod
    def _without_secrets(cls, source: str) -> str:
        refuse_secrets(source)
        return source

    @model_validator(mode="after")
    def _folded(self) -> Self:
        if (self.folds is None) != (self.fold is None):
            raise ValueError("folds and fold stand together: how many folds, and which of them plays test; `tltrain folds` sets both")
        if self.folds is None and self.repeat:
            raise ValueError(f"repeat is {self.repeat}, and there are no folds to draw anew; set folds and fold, or leave repeat out")
        if self.folds is not None and self.fold is not None and self.fold >= self.folds:
            raise ValueError(f"fold is {self.fold}, and the {self.folds} folds are counted from 0; the last one is {self.folds - 1}")
        return self
