"""`tltrain cache`: what was computed once and kept here, whether it is what would be computed now, and its removal."""

from __future__ import annotations

import json
import random
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
from tltrain.cli.cache_verify import Again, CannotSay, Maker
from tltrain.core.errors import UserError
from tltrain.core.output import escape
from tltrain.core.output.console import size
from tltrain.distributed.runtime import torch_settings_kept


def show(as_json: bool) -> int:
    """One line for each store, the one that was used longest ago first. Returns the exit code, as `verify` and `clear` do."""
    root = store_root()
    found = [describe(store) for store in disk_store.stores(root)]
    if as_json:
        print(json.dumps({"root": str(root), "bytes": sum(row["bytes"] for row in found), "caches": found}, indent=1))
        return 0
    columns = [_words(row) for row in found]
    widths = [max(len(words[i]) for words in columns) for i in range(6)] if columns else []
    for words in columns:
        aligned = [w.rjust(n) if i in (2, 3, 4) else w.ljust(n) for i, (w, n) in enumerate(zip(words, widths, strict=True))]
        print("  ".join(aligned).rstrip())
    print(f"{_caches(len(found))}, {size(sum(row['bytes'] for row in found))}, in {root}")
    return 0


def describe(store: StoreInfo) -> dict[str, Any]:
    """A store in JSON values. rows: those that stand; used: seconds since the epoch."""
    what, recipe, stage = _what(store)
    standing = disk_store.list_shards(store.path)
    return {
        "name": store.path.name,
        "kind": store.kind,
        "what": what,
        "recipe": recipe,
        "stage": stage,
        "run": store.made_by.get("run"),
        "views": None if stage is None else len({name.partition("-")[0] for name in standing}),
        "rows": sum(_num_rows(file) for file in standing.values()),
        "bytes": store.bytes,
        "used": store.used,
        "in_use": _in_use(store),
        "owner": disk_store.owned_by_other(store.path),
    }


def _what(store: StoreInfo) -> tuple[str, str | None, str | None]:
    """(what a store holds, the recipe that it was made for, its stage), as far as it says so."""
    made = store.made_by
    try:
        split, recipe = made["split"], str(made["recipe"]["name"])
        if "stage" not in made:
            return f"base images of {split}", recipe, None
        stage = made["recipe"]["stages"][made["stage"]]
        what = f"features before {stage['unfreeze']} of {split}" if store.kind == "features" else f"the teacher's logits of {split}"
        return what, recipe, str(stage["name"])
    except (KeyError, IndexError, TypeError):
        return f"{store.kind}; its {disk_store.ABOUT} does not say of what", None, None


def _words(row: dict[str, Any]) -> tuple[str, ...]:
    who = ", stage ".join(filter(None, (row["recipe"], row["stage"])))
    views = "" if row["views"] is None else f"{row['views']} view{'' if row['views'] == 1 else 's'}"
    used = "in use" if row["in_use"] else f"used {time.strftime('%Y-%m-%d %H:%M', time.localtime(row['used']))}"
    used += f", of {row['owner']}" if row["owner"] else ""
    what = f"{row['what']} ({who})" if who else row["what"]
    return escape.line(row["name"]), escape.line(what), views, f"{row['rows']:,} rows", size(row["bytes"]), used


def _caches(num: int) -> str:
    return f"{num} cache{'' if num == 1 else 's'}"


def _in_use(store: StoreInfo) -> bool:
    with disk_store._lock_exclusive(store.path) as locked:
        return not locked


def clear(names: Sequence[str]) -> int:
    """Delete the stores of these names, or all, that nobody uses. 1 where one that was named stays. Raises UserError."""
    freed = kept = foreign = 0
    for store in _named(names):
        said = f"{size(store.bytes)}: {escape.line(store.path.name)}"
        owner = disk_store.owned_by_other(store.path)
        if owner is not None:
            foreign += 1
            print(f"stays   {said}, which {owner} alone can delete")
        elif disk_store.remove(store):
            freed += store.bytes
            print(f"freed   {said}")
        else:
            kept += 1
            print(f"in use  {said}, which stays: a run has it open")
    print(f"{size(freed)} freed in {store_root()}, {kept} in use" + (f", {foreign} of others" if foreign else ""))
    return int(bool(names and kept + foreign))


@torch_settings_kept()
def verify(names: Sequence[str], num_rows: int, seed: int) -> int:
    """Look at every shard's checksum, compute `num_rows` rows of each store again, and print what is found. 1 where one is wrong."""
    maker, chosen, num_wrong = Maker(), _named(names), 0
    for store in chosen:
        wrong, said = _verify(maker, store, num_rows, random.Random(f"{seed} {store.path.name}"))
        num_wrong += bool(wrong)
        for line in (*wrong, said):
            print(escape.line(f"{store.path.name}  {line}"), flush=True)
    print(f"{_caches(len(chosen))} in {store_root()}, {num_wrong} with something wrong")
    return int(num_wrong > 0)


def _named(names: Sequence[str]) -> list[StoreInfo]:
    """The stores of these names, or all. Raises UserError."""
    found = disk_store.stores(store_root())
    known = [store.path.name for store in found]
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "see `tltrain cache ls`"
            raise UserError(f"no cache in {store_root()} is called {name!r}; {hint}")
    return [store for store in found if not names or store.path.name in names]


def _num_rows(file: Path) -> int:
    """Rows of a shard, by its header; 0 where it has none that can be read: `verify` says so."""
    with suppress(OSError, SafetensorError), safe_open(file, "pt") as opened:
        names = opened.keys()
        return int(opened.get_slice("rows" if "rows" in names else "size").get_shape()[0])
    return 0


def _verify(maker: Maker, found: StoreInfo, num_rows: int, draw: random.Random) -> tuple[list[str], str]:
    """(what is wrong, what else there is to say) of one store."""
    name = found.path.name
    remedy = f"remove it: tltrain cache clear {name}"
    if name != f"{found.kind}-{disk_store.digest(found.key)}":
        return [f"{disk_store.ABOUT} does not say what this is; {remedy}"], "nothing was computed again"
    with Store(found.path.parent, found.kind, found.key, found.made_by) as store:
        standing = store.list_shards()
        sound = {shard: file for shard, file in sorted(standing.items()) if store.verify_shard(file)}
        damaged = sorted(standing.keys() - sound)
        wrong = [f"shard {shard} was damaged, and is removed: the next run that asks for it makes it again" for shard in damaged]
        said = f"{len(sound)} shard{'' if len(sound) == 1 else 's'} sound"
        places = [(shard, place) for shard, file in sound.items() for place in range(_num_rows(file))]
        picks = draw.sample(places, min(num_rows, len(places)))
        if not picks:
            return wrong, said
        try:
            again = maker.again(found, disk_store.read(next(iter(sound.values()))))
        except (CannotSay, UserError, OSError, SafetensorError) as why:
            return wrong, f"{said}; no row can be computed again here: {why}"
        except (KeyError, IndexError, TypeError):
            return wrong, f"{said}; no row can be computed again here: {disk_store.ABOUT} does not say how they were made"
        differ = _compare(again, picks, sound)
    if differ:
        more = f", and {len(differ) - 1} more" if len(differ) > 1 else ""
        wrong.append(f"{differ[0]}{more}: not what is computed now; {remedy}")
    return wrong, f"{said}; {len(picks):,} of {len(places):,} rows computed again, {len(picks) - len(differ):,} equal bit for bit"


def _compare(again: Again, picks: list[tuple[str, int]], sound: dict[str, Path]) -> list[str]:
    """The rows that differ, as a person calls them."""
    differ = []
    picks, mapped = sorted(picks), dict[str, dict[str, Tensor]]()
    wanted = [again.where(*pick) for pick in picks]
    for (shard, place), (index, view), made in zip(picks, wanted, again.made(wanted), strict=True):
        if shard not in mapped:
            mapped = {shard: disk_store.read(sound[shard])}
        kept = again.kept(mapped[shard], place)
        if kept.dtype != made.dtype or kept.shape != made.shape or not torch.equal(_bytes(kept), _bytes(made)):
            differ.append(f"{again.split.ids[index]}, view {view}, shard {shard}")
    return differ


def _bytes(row: Tensor) -> Tensor:
    return row.contiguous().view(-1).view(torch.uint8)
