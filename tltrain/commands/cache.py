"""`tltrain cache`: lists caches, verifies them against newly computed rows, and deletes them."""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tltrain.cache import disk_store
from tltrain.cache.disk_store import Store, StoreInfo
from tltrain.cache.planner import store_root
from tltrain.commands.cache_verify import CannotRecompute, Maker, RowSource
from tltrain.commands.ls import cut_end
from tltrain.core.errors import UserError, some
from tltrain.core.output import escape, wrapping
from tltrain.core.output.console import size
from tltrain.distributed.runtime import torch_settings_kept
from tltrain.runs.listing.words import ago


def show(as_json: bool) -> int:
    """Print the caches, the least recently used first. Returns the exit code, like `verify` and `clear`."""
    root = store_root()
    rows = [describe(store) for store in disk_store.stores(root)]
    if as_json:
        print(json.dumps({"root": str(root), "bytes": sum(row["bytes"] for row in rows), "caches": rows}, indent=1))
        return 0
    for line in table(rows, wrapping.width_of(sys.stdout), time.time()):
        print(line)
    wrapping.say(f"{_caches(len(rows))}, {size(sum(row['bytes'] for row in rows))}, in {root}")
    return 0


def table(rows: Sequence[dict[str, Any]], width: int | None, now: float) -> list[str]:
    """A line for each of what `describe` says of caches. now: seconds since the epoch.

    width: columns of the terminal. Where whole lines are wider, names keep what tells them apart, which `verify` and `clear` take too, and
    what a cache holds loses its end. None: whole lines, as for a pipe.
    """
    whole = _aligned([_cells(row) for row in rows], right=(2, 3, 4))
    if width is None or all(len(line) <= width for line in whole):
        return whole
    digits = next(n for n in range(8, 65) if len({row["name"].partition("-")[2][:n] for row in rows}) == len(rows) or n == 64)
    short = [("cache", "holds", "rows", "size", "used"), *(_short_cells(row, digits, now) for row in rows)]
    room = max(8, width - sum(max(len(cells[i]) for cells in short) for i in (0, 2, 3, 4)) - 8)
    return _aligned([(name, cut_end(holds, room), *rest) for name, holds, *rest in short], right=(2, 3))


def _aligned(lines: Sequence[Sequence[str]], right: tuple[int, ...]) -> list[str]:
    """Cells below each other, two spaces apart. right: the columns whose ends stand below each other."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(cell.rjust(n) if i in right else cell.ljust(n) for i, (cell, n) in enumerate(zip(cells, widths, strict=True))).rstrip()
        for cells in lines
    ]


def describe(store: StoreInfo) -> dict[str, Any]:
    """A cache as JSON values. rows: rows written so far. used: seconds since the epoch."""
    what, recipe, stage = _what(store)
    shards = disk_store.list_shards(store.path)
    return {
        "name": store.path.name,
        "kind": store.kind,
        "what": what,
        "recipe": recipe,
        "stage": stage,
        "run": store.made_by.get("run"),
        "views": None if stage is None else len({name.partition("-")[0] for name in shards}),
        "rows": sum(_num_rows(file) for file in shards.values()),
        "bytes": store.bytes,
        "used": store.used,
        "in_use": _in_use(store),
        "owner": disk_store.owned_by_other(store.path),
    }


def _what(store: StoreInfo) -> tuple[str, str | None, str | None]:
    """(contents, recipe's name, stage's name) of a cache, as far as its about.json records them."""
    origin = store.made_by
    try:
        split, recipe = origin["split"], str(origin["recipe"]["name"])
        if "stage" not in origin:
            return f"base images of {split}", recipe, None
        stage = origin["recipe"]["stages"][origin["stage"]]
        places = "".join(f" at {side} x {side} places" for side in store.key.get("grid") or [])
        kinds = {"features": f"features before {stage['unfreeze']} of {split}", "teacher": f"the teacher's features of {split}{places}"}
        short = f" (top {store.key['top_k'][0]})" if store.key.get("top_k") else ""
        return kinds.get(store.kind, f"the teacher's logits{short} of {split}"), recipe, str(stage["name"])
    except (KeyError, IndexError, TypeError):
        return f"{store.kind}; its {disk_store.ABOUT} does not say of what", None, None


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    who = ", stage ".join(filter(None, (row["recipe"], row["stage"])))
    views = "" if row["views"] is None else f"{row['views']} view{'' if row['views'] == 1 else 's'}"
    used = "in use" if row["in_use"] else f"used {time.strftime('%Y-%m-%d %H:%M', time.localtime(row['used']))}"
    used += f", of {row['owner']}" if row["owner"] else ""
    what = f"{row['what']} ({who})" if who else row["what"]
    return escape.line(row["name"]), escape.line(what), views, f"{row['rows']:,} rows", size(row["bytes"]), used


def _short_cells(row: dict[str, Any], digits: int, now: float) -> tuple[str, ...]:
    """The same in fewer columns: the name says that they are features, and the number of views stands in --json."""
    kind, dash, digest = row["name"].partition("-")
    holds = ", ".join(filter(None, (row["what"].removeprefix("features "), row["recipe"], row["stage"])))
    used = "in use" if row["in_use"] else ago(row["used"], now)
    used += f", of {row['owner']}" if row["owner"] else ""
    return escape.line(f"{kind}{dash}{digest[:digits]}"), escape.line(holds), f"{row['rows']:,}", size(row["bytes"]), used


def _caches(num: int) -> str:
    return f"{num} cache{'' if num == 1 else 's'}"


def _in_use(store: StoreInfo) -> bool:
    with disk_store._lock_exclusive(store.path) as locked:
        return not locked


def clear(names: Sequence[str]) -> int:
    """Delete the named caches, or all, except those in use. Returns 1 if a named one could not be deleted. Raises UserError."""
    freed_bytes = in_use = foreign = 0
    for store in _named(names):
        text = f"{size(store.bytes)}: {escape.line(store.path.name)}"
        owner = disk_store.owned_by_other(store.path)
        if owner is not None:
            foreign += 1
            print(f"stays   {text}, which only {owner} can delete")
        elif disk_store.remove(store):
            freed_bytes += store.bytes
            print(f"freed   {text}")
        else:
            in_use += 1
            print(f"in use  {text}, which stays: a run has it open")
    print(f"{size(freed_bytes)} freed in {store_root()}, {in_use} in use" + (f", {foreign} of others" if foreign else ""))
    return int(bool(names and in_use + foreign))


@torch_settings_kept()
def verify(names: Sequence[str], num_rows: int, seed: int) -> int:
    """Check every shard's checksum, compute `num_rows` rows of each cache again, and print the results. Returns 1 if one is wrong."""
    maker, chosen, num_wrong = Maker(), _named(names), 0
    for store in chosen:
        wrong, text = _verify(maker, store, num_rows, random.Random(f"{seed} {store.path.name}"))
        num_wrong += bool(wrong)
        for line in (*wrong, text):
            print(escape.line(f"{store.path.name}  {line}"), flush=True)
    print(f"{_caches(len(chosen))} in {store_root()}, {num_wrong} with something wrong")
    return int(num_wrong > 0)


def _named(names: Sequence[str]) -> list[StoreInfo]:
    """The caches of these names, or all. A name may be its beginning, where no other begins so. Raises UserError for an unknown name."""
    present = disk_store.stores(store_root())
    known = [store.path.name for store in present]
    begins = {name: [full for full in known if full.startswith(name)] for name in names if "-" in name}
    names = [begins[name][0] if len(begins.get(name, ())) == 1 else name for name in names]
    for name in names:
        if name not in known and len(begins.get(name, ())) > 1:
            raise UserError(f"{name!r} is the beginning of {some(begins[name])}; give more of the name")
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "see `tltrain cache ls`"
            raise UserError(f"no cache in {store_root()} is called {name!r}; {hint}")
    return [store for store in present if not names or store.path.name in names]


def _num_rows(file: Path) -> int:
    """Rows of a shard, read from its header; 0 if the header cannot be read, which `verify` reports."""
    with suppress(OSError, SafetensorError), safe_open(file, "pt") as opened:
        names = opened.keys()
        return int(opened.get_slice("rows" if "rows" in names else "size").get_shape()[0])
    return 0


def _verify(maker: Maker, info: StoreInfo, num_rows: int, draw: random.Random) -> tuple[list[str], str]:
    """(problems, summary) of one cache."""
    name = info.path.name
    remedy = f"remove it: tltrain cache clear {name}"
    if name != f"{info.kind}-{disk_store.digest(info.key)}":
        return [f"{disk_store.ABOUT} does not say what this is; {remedy}"], "nothing was computed again"
    with Store(info.path.parent, info.kind, info.key, info.made_by) as store:
        shards = store.list_shards()
        valid = {shard: file for shard, file in sorted(shards.items()) if store.verify_shard(file)}
        damaged = sorted(shards.keys() - valid)
        wrong = [f"shard {shard} was damaged, and is removed: the next run that needs it computes it again" for shard in damaged]
        text = f"{len(valid)} shard{'' if len(valid) == 1 else 's'} sound"
        places = [(shard, place) for shard, file in valid.items() for place in range(_num_rows(file))]
        picks = draw.sample(places, min(num_rows, len(places)))
        if not picks:
            return wrong, text
        try:
            source = maker.source(info, disk_store.read(next(iter(valid.values()))))
        except (CannotRecompute, UserError, OSError, SafetensorError) as why:
            return wrong, f"{text}; no row can be computed again here: {why}"
        except (KeyError, IndexError, TypeError):
            return wrong, f"{text}; no row can be computed again here: {disk_store.ABOUT} does not say how they were made"
        differ = _compare(source, picks, valid)
    if differ:
        more = f", and {len(differ) - 1} more" if len(differ) > 1 else ""
        wrong.append(f"{differ[0]}{more}: not what is computed now; {remedy}")
    return wrong, f"{text}; {len(picks):,} of {len(places):,} rows computed again, {len(picks) - len(differ):,} equal bit for bit"


def _compare(source: RowSource, picks: list[tuple[str, int]], shards: dict[str, Path]) -> list[str]:
    """Names of the rows that differ from newly computed ones. picks: (shard, row within it)."""
    differ = []
    picks, mapped = sorted(picks), dict[str, dict[str, Tensor]]()
    wanted = [source.where(*pick) for pick in picks]
    for (shard, place), (index, view), computed in zip(picks, wanted, source.compute(wanted), strict=True):
        if shard not in mapped:
            mapped = {shard: disk_store.read(shards[shard])}
        stored = source.stored(mapped[shard], place)
        if stored.dtype != computed.dtype or stored.shape != computed.shape or not torch.equal(_bytes(stored), _bytes(computed)):
            differ.append(f"{source.split.ids[index]}, view {view}, shard {shard}")
    return differ


def _bytes(row: Tensor) -> Tensor:
    return row.contiguous().view(-1).view(torch.uint8)
