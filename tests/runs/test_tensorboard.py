"""What TensorBoard is given, read back from its event files."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tracked_starts import Start, resumed, train_row, values

pytest.importorskip("tensorboard")


def _read(run: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()


def _events(run: Path) -> Counter[tuple[str, int, float]]:
    """All scalars of all files, also those that TensorBoard would pass over."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    events = [event for path in (run / "tensorboard").iterdir() for event in EventFileLoader(str(path)).Load()]
    cells = [
        (v.tag, e.step, round(v.tensor.float_val[0], 5))
        for e in events
        for v in e.summary.value
        if v.metadata.plugin_data.plugin_name == "scalars"
    ]
    return Counter(cell for cell in cells if cell[0].rpartition("/")[2] in ("loss", "top1"))


def test_after_resumes_each_row_stands_once_and_none_is_lost(tmp_path: Path) -> None:
    assert resumed(tmp_path, "tensorboard") == []
    wanted = Counter({(name, step, round(value, 5)): n for (name, step, value), n in values(tmp_path, "loss", "top1").items()})
    assert len(wanted) == 14
    assert _events(tmp_path) == wanted
    shown = _read(tmp_path)
    assert [event.step for event in shown.Scalars("train/loss")] == list(range(1, 9))


def test_rows_keep_their_time_over_a_resume(tmp_path: Path) -> None:
    Start(tmp_path, "tensorboard", 1).rows([train_row(1)]).close()
    (before,) = _read(tmp_path).Scalars("train/loss")
    Start(tmp_path, "tensorboard", 2, [0, 1, False]).close()
    (after,) = _read(tmp_path).Scalars("train/loss")
    assert after.wall_time == pytest.approx(before.wall_time, abs=1)


def test_plan_pictures_and_confusions_stand_beside_the_rows(tmp_path: Path) -> None:
    assert Start(tmp_path, "tensorboard", 1).rows([train_row(3)]).finished() == []
    shown = _read(tmp_path)
    texts = {tag: [event.tensor_proto.string_val[0].decode() for event in shown.Tensors(tag)] for tag in shown.Tags()["tensors"]}
    assert texts["plan/text_summary"] == ["```\nhead  <0.01>\n```"]
    (table,) = texts["test/confusion/text_summary"]
    assert table.splitlines()[4:6] == [r"d\*g | cat | 3", r"\=cow | d\*g | 2"]
    images = {tag: shown.Images(tag)[0] for tag in shown.Tags()["images"]}
    assert set(images) == {"preview", "test/confusion", "test/mistakes/01 cat taken for d*g, 90%"}
    assert (images["preview"].width, images["preview"].height) == (20, 10)
    assert images["test/confusion"].step == 3
