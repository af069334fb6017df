"""Opens a source whose labels nobody needs: every picture of a folder or archive, and a table of paths."""

from __future__ import annotations

from tltrain.core.recipe import Data
from tltrain.data.containers.archives import ArchiveTree, look_through_tar, look_through_zip
from tltrain.data.containers.contents import cached_contents, container
from tltrain.data.containers.packed import Packed, from_packed
from tltrain.data.dataset import Source
from tltrain.data.sources.csv_file import open_csv
from tltrain.data.sources.folder import open_loose, without_classes
from tltrain.data.splits import foreign, open_source

ARCHIVES = {"zip": (look_through_zip, "a zip archive"), "tar": (look_through_tar, "a tar archive")}


def open_unlabelled(named: str, data: Data, outline: bool = False) -> Source:
    """The source that distill.unlabelled names. data: of the recipe; what it says of labels, and of other kinds of sources, does not count.

    folder, zip and tar: every picture, however deep, and all of train. csv: the column path is enough. Others: as data.source has them.
    Raises UserError. outline: as in `open_source`.
    """
    kind, colon, argument = named.partition(":")
    own = data.source.partition(":")[0]
    columns = {} if kind == own else {"image_column": None, "label_column": None, "depth": None}
    plain = {"exclude": None, "relabel": None, "label_separator": None, "label_columns": None}
    spec = data.model_copy(update={"source": named, **foreign(named), **columns, **plain})
    if not colon or kind not in ("folder", "csv", *ARCHIVES):
        return open_source(spec, outline=outline)
    if kind in ARCHIVES:
        return _open_archive(kind, argument, spec)
    return open_loose(argument, spec) if kind == "folder" else open_csv(argument, spec, labelled=False)


def _open_archive(kind: str, argument: str, spec: Data) -> Source:
    look, what = ARCHIVES[kind]
    file = container(argument, kind, what)
    contents = cached_contents(file, kind, look)
    tree = ArchiveTree(file, [extent.name for extent in contents.images])
    listed = without_classes(tree, f"data.source is {kind}:{argument}")
    images = [Packed(sample, contents.file, contents.images[tree.number[sample.path]], contents.stamp) for sample in listed]
    return from_packed(images, f"{kind}:{file}", spec, (*contents.notes, *tree.notes()), labelled=False)
