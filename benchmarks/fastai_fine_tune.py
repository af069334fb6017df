"""fastai's `fine_tune` as its documentation writes it, on a folder of pictures: what benchmarks.fit_gain starts under another Python.

Presized crops and `aug_transforms` (https://docs.fast.ai/vision.augment.html#presizing), its own head, optimizer and rates.
Batches are of 32 as in folder-small: with fastai's 64, a set of a few hundred pictures has half as many steps.
This file imports nothing of ours.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks/fastai_fine_tune.py", description=__doc__)
    parser.add_argument("images", type=Path, help="a folder with train, val and test, each with a folder for each class")
    parser.add_argument("weights", type=Path, help="a state dict of timm's tf_efficientnet_lite0")
    parser.add_argument("--images-seen", type=int, required=True, help="training images in all epochs together, about")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write: top1 on the test images, 0 to 1")
    arguments = parser.parse_args()
    found = fine_tune(arguments.images, arguments.weights, arguments.images_seen, arguments.seed)
    arguments.out.write_text(json.dumps(found) + "\n", encoding="utf-8")


def fine_tune(images: Path, weights: Path, images_seen: int, seed: int) -> dict[str, float | str]:
    """Test accuracy after one epoch of the new head and as many of the whole network as the number of images allows."""
    import fastai
    import timm
    import torch
    from fastai.vision.all import ImageDataLoaders, Resize, accuracy, aug_transforms, get_image_files, set_seed, vision_learner

    torch.set_num_threads(1)
    set_seed(seed, reproducible=True)
    transforms = {"item_tfms": Resize(460), "batch_tfms": aug_transforms(size=224, min_scale=0.75)}
    loaders = ImageDataLoaders.from_folder(images, train="train", valid="val", bs=BATCH, num_workers=0, **transforms)
    learner = vision_learner(loaders, "tf_efficientnet_lite0", metrics=accuracy, pretrained_cfg_overlay={"file": str(weights)})
    per_epoch = len(loaders.train) * BATCH  # its last, smaller batch is dropped
    epochs = round(images_seen / per_epoch)
    with learner.no_bar():
        learner.fine_tune(epochs - 1)
        files = get_image_files(images / "test")
        answers, _ = learner.get_preds(dl=loaders.test_dl(files))
    names = [loaders.vocab[place] for place in answers.argmax(1).tolist()]
    right = [name == file.parent.name for name, file in zip(names, files, strict=True)]
    versions = {"fastai": fastai.__version__, "timm": timm.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return {"top1": sum(right) / len(right), "epochs": epochs, "versions": ", ".join(f"{k} {v}" for k, v in versions.items())}


if __name__ == "__main__":
    main()
