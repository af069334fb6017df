"""Reads a file of weights by what it holds, whatever it is called: safetensors, or torch's own formats, and no pickled code ever.

``torch.load`` runs with ``weights_only=True``, which builds tensors and plain containers and refuses the rest. A file that needs more is
refused here too, with the reason and the way to convert it.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from tltrain.core.errors import UserError, first_sentence

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".pkl", ".th", ".model")
"""Of files that are named in a folder where one is looked for. A file that is given by its path may have any name."""
PROGRAMS = {
    ".onnx": "an ONNX model", ".pt2": "a program of torch.export", ".engine": "a TensorRT engine", ".tflite": "a TensorFlow Lite model",
    ".mlmodel": "a Core ML model",
}  # fmt: skip
MOST_PICKLE_BYTES = 64 * 1024 * 1024
"""Of the part that lists the tensors, without their values. 64 MiB are enough for several 100,000 tensors."""
_CONVERSION = (
    """python -c "import torch; c = torch.load('FILE', map_location='cpu', weights_only=False); """
    """torch.save(getattr(c, 'state_dict', lambda: c.get('state_dict', c.get('model', c)))(), 'weights.pth')" """
).rstrip()
"""Makes weights of a checkpoint that is trusted: a whole module, or a container that holds other things too."""
_STARTS = (  # the first bytes of what people give by mistake
    (b"version https://git-lfs", "a pointer of Git LFS, not the weights: run `git lfs pull`"),
    (b"<", "a web page (HTML or XML), not weights: the download went wrong"),
    (b"\x89HDF", "an HDF5 file, such as Keras writes; load it there, and save the weights for PyTorch"),
    (b"GGUF", "a GGUF file of quantised weights, which cannot be fine-tuned here; take the ones that it was made from"),
    (b"\x1f\x8b", "compressed with gzip; unpack it first (gunzip, or tar xzf)"),
    (b"BZh", "compressed with bzip2; unpack it first"),
    (b"\xfd7zXZ", "compressed with xz; unpack it first"),
)


_MADE_OF_DAMAGE = (
    SafetensorError, zipfile.BadZipFile, RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError,
    EOFError, AssertionError, MemoryError, RecursionError, OverflowError, NotImplementedError, ImportError,
)  # fmt: skip
"""Errors that the readers raise for damaged bytes."""


def read(path: Path) -> tuple[Any, bool]:
    """The content of a file of weights: tensors on the CPU in plain containers, mapped from the file where its format allows.

    Returns (the content, whether the tensors stand in the order of their network). Raises UserError for a file that cannot be read, is
    damaged, is of another kind, or would need code of its own.
    """
    try:
        if is_safetensors(path):
            return load_file(path), False
        if zipped := zipfile.is_zipfile(path):
            _check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own on old formats; what is wrong is said below
            if path.suffix == ".safetensors":  # by that name torch would take it for one
                with path.open("rb") as file:
                    return torch.load(file, map_location="cpu", weights_only=True), True
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped), True
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(_refusal(path, str(error))) from error
    except OSError as error:
        raise UserError(f"weights {path} cannot be read: {error.strerror or error}") from error
    except _MADE_OF_DAMAGE as error:
        raise UserError(_damaged(path, error)) from error


def check_whole(path: Path) -> None:
    """Compare the content with the checksums in the file, which torch does not do. Raises UserError where they differ.

    safetensors and torch's formats before 1.6 have no checksums.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, ValueError) as error:
        raise UserError(_damaged(path, error)) from error
    if broken is not None:
        raise UserError(f"weights {path} are damaged: the checksum of {broken} in it does not match; copy or download the file again")


def is_safetensors(path: Path) -> bool:
    """Whether a file is safetensors, or else one that torch may have written. Raises UserError for one that is neither."""
    try:
        with path.open("rb") as file:
            start = file.read(512)
        if len(start) > 8 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:
            return True
        kind = _other_kind(path, start)
    except OSError as error:
        raise UserError(f"weights {path} cannot be read: {error.strerror or error}") from error
    if kind is not None:
        raise UserError(f"weights {path} cannot be used: it is {kind}")
    return False


def _other_kind(path: Path, start: bytes) -> str | None:
    """Why a file holds no PyTorch weights, and the remedy. None for one that may."""
    if not start:
        return "empty; copy or download it again"
    if path.suffix in PROGRAMS:
        return f"{PROGRAMS[path.suffix]}: a program, not weights by name. Give the run folder it was exported from, or weights for PyTorch"
    head = start.lstrip()
    for first, kind in _STARTS:
        if head.startswith(first):
            return kind
    if start[257:262] == b"ustar" or _is_old_tar(path):
        return (
            "a tar archive. Unpack it if it holds a file of weights. Before 2018 torch wrote whole checkpoints so; "
            f"where you trust it, convert it: {_CONVERSION}"
        )
    if _is_text(start):
        return "a text file; is it the right one?"
    if path.suffix == ".safetensors" and not start.startswith((b"PK\x03\x04", b"\x80")):
        return "named .safetensors, and cannot be read as safetensors: it is damaged or cut off. Copy or download it again"
    return None


def _is_old_tar(path: Path) -> bool:
    """Whether a file is a tar archive of the kind that has no magic number."""
    with path.open("rb") as file:
        block = file.read(512)
    if len(block) < 512 or block.startswith((b"\x80", b"PK")):
        return False
    try:
        total = int(block[148:156].strip(b" \0") or b"x", 8)
    except ValueError:
        return False
    return total == sum(block[:148]) + 8 * ord(" ") + sum(block[156:])


def _check_archive(path: Path) -> None:
    """Check that a zip archive is one of torch's, holds no program and unpacks to no more than it is long. Raises UserError."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    names = [entry.filename for entry in entries]
    inner = {name.partition("/")[2] for name in names}
    if "data.pkl" not in inner or "constants.pkl" in inner or any(name.startswith("code/") for name in inner):
        raise UserError(f"weights {path} cannot be used: it is {_zip_kind(names, inner)}")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise UserError(f"weights {path} are compressed in a way that torch never does; save them with torch.save again")
    if (size := max(entry.file_size for entry in entries if entry.filename.endswith("/data.pkl"))) > MOST_PICKLE_BYTES:
        raise UserError(f"weights {path} list their tensors in {size:,} bytes, and at most {MOST_PICKLE_BYTES:,} are read")


def _zip_kind(names: list[str], inner: set[str]) -> str:
    if "constants.pkl" in inner or any(name.startswith("code/") for name in inner):
        return (
            "a TorchScript program, not weights by name. Where you trust it, `torch.jit.load(FILE).state_dict()` has the weights; "
            "save them with torch.save"
        )
    if {"archive_format", "archive_version"} & (inner | set(names)):
        return "a program of torch.export, not weights by name. Give the run folder it was exported from, or weights for PyTorch"
    if any(name.endswith(".npy") for name in names):
        return "an archive of NumPy arrays, such as JAX models have; load it with its library, and save the weights for PyTorch"
    if any(name.endswith(SUFFIXES) for name in names):
        return (
            f"a zip archive that holds {', '.join(name for name in names if name.endswith(SUFFIXES))[:200]}; unpack it, and give that file"
        )
    return "a zip archive, and none of torch's; unpack it, and give the file of weights in it"


def _refusal(path: Path, reason: str) -> str:
    """The message for a file that weights_only refuses. A file that is no pickle at all ends here too."""
    needed = re.findall(r"(?:GLOBAL|class|Trying to instantiate|function) `?([\w.]+\.[\w.]+)", reason)
    if ".tar" in reason:
        return f"weights {path} cannot be used: they are of torch before 2018; where you trust them, convert them: {_CONVERSION}"
    if needed:
        return (
            f"weights {path} hold more than tensors: to load them, torch would have to call {needed[0]}. A file that may call "
            f"what it names can run any code, so it is not done. If you trust whoever made it, convert it: {_CONVERSION}"
        )
    if "Unsupported" in reason or "persistent" in reason:
        return f"weights {path} cannot be used: it is no file that torch.save wrote, or is damaged; copy or download it again"
    return f"weights {path} cannot be read by torch, which says: {reason.splitlines()[0][:200]}; they may be damaged"


def _is_text(start: bytes) -> bool:
    return not start.strip(bytes((9, 10, 13, *range(32, 127)))) and start[:1] not in b"(c"  # pickles of protocol 0 are text too


def _damaged(path: Path, error: BaseException) -> str:
    return f"weights {path} are damaged or cut off, or no weights at all ({first_sentence(error)}); copy or download the file again"
