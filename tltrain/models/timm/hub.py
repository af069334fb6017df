"""timm's weights: found by tag or hub id, read from the hub's cache or by download. Only safetensors, or torch.load with weights_only."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor

from tltrain.core import untrusted
from tltrain.core.errors import UserError
from tltrain.core.files import downloading, unresolved
from tltrain.models.timm import networks
from tltrain.models.weight_files import containers, reading
from tltrain.models.weight_files.download import fetch, hub_bar

CONFIG = "config.json"
FILES = ("model.safetensors", "pytorch_model.bin")
HUB = "hf-hub:"


def entry(architecture: str, weights: str) -> dict[str, Any]:
    """timm's configuration of the weights of a tag, or DEFAULT. Raises UserError for a tag that the architecture does not have."""
    known = networks.tags(architecture)
    tag = known[0] if weights == "DEFAULT" and known else weights
    if tag not in known:
        what = f"backbone.weights is {weights!r}"
        if weights == "DEFAULT":
            raise UserError(f"{what}, and timm has no weights for {architecture}; give a file, a run folder, or null for random ones")
        raise UserError(f"{networks.unknown_tag(what, architecture, tag)}. No folder or file of that path exists either")
    config = networks.library().models.get_pretrained_cfg(f"{architecture}.{tag}" if tag else architecture)
    found: dict[str, Any] = config.to_dict()
    return found


def fetch_config(repo: str, *, network: bool) -> dict[str, Any]:
    """timm's configuration in a hub repository, with `architecture` and `model_args` beside the usual keys. Raises UserError."""
    path = _hub_file(repo, (CONFIG,), network=network)
    raw = untrusted.parse_json(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(raw, dict) or not isinstance(raw.get("architecture"), str):
        raise UserError(f"{path} names no architecture of timm; `backbone.weights: ID` without {HUB} reads repositories of transformers")
    inner = raw.get("pretrained_cfg")
    config = {**raw, **(inner if isinstance(inner, dict) else {})}
    architecture = raw["architecture"]
    networks.check(networks.PREFIX + architecture)
    known = networks.library().models.get_pretrained_cfg(architecture)
    return {**({} if known is None else known.to_dict()), **config, "architecture": architecture, "hf_hub_id": repo}


def read_folder(folder: Path) -> tuple[dict[str, Any], Path] | None:
    """timm's configuration in a folder, as of `fetch_config`, and its file of weights. None for a folder of another library.

    It is read from exports of ours, from repositories of timm, and from transformers' `timm_wrapper`. Raises UserError.
    """
    file = folder / CONFIG
    path = next((folder / name for name in FILES if (folder / name).is_file()), None)
    raw = untrusted.read_json(file) if file.is_file() and path is not None else None
    if path is None or not isinstance(raw, dict) or not isinstance(raw.get("architecture"), str):
        return None
    networks.check(networks.PREFIX + raw["architecture"])
    inner, labels = raw.get("pretrained_cfg"), raw.get("id2label")
    config = {**raw, **(inner if isinstance(inner, dict) else {})}
    if isinstance(labels, dict) and not raw.get("label_names"):
        config["label_names"] = [labels.get(str(i)) for i in range(len(labels))]
    known = networks.library().models.get_pretrained_cfg(raw["architecture"])
    return {**({} if known is None else known.to_dict()), **config}, path


def classes_of(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Class names of the head in the weights: those in the configuration, or ImageNet's where the number of classes is one of its sets."""
    labels = config.get("label_names")
    if isinstance(labels, list | tuple) and labels:
        return tuple(map(str, labels))
    networks.library()
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": config.get("num_classes")})
    return None if subset is None else tuple(ImageNetInfo(subset).label_descriptions())


def read(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of weights to the CPU, under the names of their file. Raises UserError where they cannot be fetched or read."""
    repo, name = config.get("hf_hub_id"), config.get("hf_hub_filename")
    if not repo:
        return _loaded(_url_file(str(config["url"])))
    names = FILES if not name else (str(Path(name).with_suffix(".safetensors")), name)
    return _loaded(_hub_file(repo, names, network=True))


def where(config: Mapping[str, Any]) -> str:
    """The origin of weights, for the user."""
    return f"hub {config['hf_hub_id']}" if config.get("hf_hub_id") else str(config["url"])


def _hub_file(repo: str, names: tuple[str, ...], *, network: bool) -> Path:
    """The first of these files of a repository: from the hub's cache, without a request, else by download. Raises UserError."""
    repo_id, _, revision = repo.partition("@")
    for name in names:
        try:
            return Path(hf_hub_download(repo_id, name, revision=revision or None, local_files_only=True))
        except (OSError, HFValidationError):
            continue
    if not network:
        reason = "it is not in the hub's cache, and nothing is downloaded here"
    elif constants.HF_HUB_OFFLINE:
        reason = "it is not in the hub's cache, and HF_HUB_OFFLINE is set: nothing is downloaded"
    elif (why := unresolved(constants.ENDPOINT)) is not None:
        reason = why
    else:
        reason = f"the repository has no {' and no '.join(names)}"
        for name in names:
            try:
                bar = hub_bar(f"{repo_id}/{name}", constants.ENDPOINT)
                return Path(hf_hub_download(repo_id, name, revision=revision or None, tqdm_class=bar))
            except LocalEntryNotFoundError as error:  # no network
                reason = str(error).splitlines()[0]
                break
            except EntryNotFoundError:
                continue
            except (OSError, HfHubHTTPError, HFValidationError) as error:  # a gated or absent repository among others
                reason = str(error).splitlines()[0]
                break
    raise UserError(
        f"weights {repo!r} cannot be read from the hub ({reason}). On a machine with a network, `hf download {repo_id}` puts them into the "
        "hub's cache (HF_HOME); a repository with conditions needs `hf auth login` first. Or give the path of a file"
    )


def _url_file(url: str) -> Path:
    """The file of weights that lie at an address of their own, in torch's hub cache. Raises UserError."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name
    there = f"download {url} elsewhere and put it at {path}"
    if path.exists():
        return path
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        raise UserError(f"{url} is not in torch's cache, and HF_HUB_OFFLINE is set: nothing is downloaded; {there}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with downloading(Path(f"{path}.lock"), f"downloads {path.name}"):  # the others wait, and read its file
            if not path.exists():
                fetch(url, path)
    except OSError as error:
        raise UserError(f"{url} cannot be fetched ({error}); {there}") from error
    return path


def _loaded(path: Path) -> dict[str, Tensor]:
    """The tensors in a file, by the reader that runs no code. Raises UserError."""
    content, _ = reading.read(path)
    return containers.state_dict_in(content, path)[0]
