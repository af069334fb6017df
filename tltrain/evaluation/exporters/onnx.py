"""Exports to ONNX: one file with a dynamic batch size and the class names in its metadata, verified with ONNX Runtime."""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tltrain.core.errors import UserError
from tltrain.evaluation.exporters.base import Exporter
from tltrain.evaluation.exporters.torch_export import traced
from tltrain.evaluation.trained import TrainedModel

FILE = "model.onnx"
USAGE = f"""```python
import json, onnxruntime

session = onnxruntime.InferenceSession("{FILE}")
classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
(logits,) = session.run(None, {{"images": images}})  # (B, 3, size, size), float32 in [0, 1], any B
```"""


def check(trained: TrainedModel) -> None:
    """Check that the packages of the extra `onnx` are installed. Raises UserError."""
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]
    if missing:
        raise UserError(f"--to onnx needs {', '.join(missing)}; install with: pip install 'tltrain[onnx]'")


def write(trained: TrainedModel, folder: Path, example_BCHW: Tensor) -> None:
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():  # torch.onnx prints its progress
        warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated", FutureWarning)  # raised by torch 2.11's own code
        program = torch.onnx.export(
            traced(trained, example_BCHW), input_names=["images"], output_names=["logits"], dynamo=True, verbose=False, external_data=False
        )
    assert program is not None
    program.model.metadata_props["classes"] = json.dumps(trained.classes)
    program.save(folder / FILE, external_data=False)


def read(folder: Path) -> Callable[[Tensor], Tensor]:
    """Load with ONNX Runtime on the CPU: images (B, 3, H, W) in [0, 1] to logits (B, classes)."""
    session = _session(folder)
    return lambda x_BCHW: torch.from_numpy(session.run(None, {"images": x_BCHW.numpy()})[0])


def classes(folder: Path) -> list[str]:
    return list(json.loads(_session(folder).get_modelmeta().custom_metadata_map["classes"]))


def _session(folder: Path) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(folder / FILE, providers=["CPUExecutionProvider"])


EXPORTER = Exporter(USAGE, write, read, classes, check)
