"""Pretrained encoders by name, of packages that are optional:

sentence-transformers:MODEL    texts. MODEL: a folder, or a name in the Hugging Face cache
open_clip:MODEL/PRETRAINED     texts or pictures, to vectors that can be compared. PRETRAINED: a file of weights, or a
                               tag whose weights are in the cache
open_clip:MODEL                MODEL: a folder with open_clip_config.json, or a name in the Hugging Face cache
torchvision:MODEL              pictures, to what the network's last layer sees. MODEL: a name whose weights are in
                               torch's cache, or a file of weights whose name begins with it, such as resnet50-mine.pth

Nothing is downloaded. Models are trusted: a folder of sentence-transformers may name code that is run.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gtc_dist.data import storage
from gtc_dist.errors import InputError
from gtc_dist.launch.job_paths import refuse_relative_paths

# prefix -> module, package, extra of this project, kinds of content
FAMILIES = {
    "sentence-transformers": ("sentence_transformers", "sentence-transformers", "text", ("text",)),
    "open_clip": ("open_clip", "open-clip-torch", "vision", ("text", "picture")),
    "torchvision": ("torchvision", "torchvision", "vision", ("picture",)),
}


@dataclass(frozen=True)
class ModelFiles:
    """Where a model is: a file of weights or a folder, and what its package calls it."""

    path: Path
    model: str = ""
    options: dict[str, Any] = field(default_factory=dict)  # of open_clip, that belong to the weights


def is_pretrained(name: str) -> bool:
    return name.partition(":")[0] in FAMILIES


def check_pretrained(name: str, kind: str) -> str:
    """The name, with an absolute path if it names a file or folder.

    Raises:
        InputError: it does not take this kind of content; the package or the weights are missing.
    """
    family, _, model = name.partition(":")
    _, _, _, kinds = FAMILIES[family]
    if kind not in kinds:
        fitting = " or ".join(f"{other}:MODEL" for other, entry in FAMILIES.items() if kind in entry[3])
        raise InputError(f"the encoder {name} does not take {kind}s; use {fitting}")
    head, _, tail = model.partition("/") if family == "open_clip" else ("", "", "")
    for prefix, path in (("", model), (f"{head}/", tail)):
        if path and os.path.exists(path):
            refuse_relative_paths({"--encoder": path})
            name = f"{family}:{prefix}{os.path.abspath(path)}"
            break
    find_model(name)
    return name


def find_model(name: str) -> ModelFiles:
    """The files of a model on this machine. Raises InputError: its package or its weights are missing."""
    family, _, model = name.partition(":")
    module, package, extra, _ = FAMILIES[family]
    if importlib.util.find_spec(module) is None:
        raise InputError(
            f"the encoder {name} needs the package {package}, which is not installed; pip install gtc-dist[{extra}]"
        )
    if not model:
        raise InputError(f"the encoder {name} names no model; write {family}:MODEL, a folder, a file or a name")
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    try:
        importlib.import_module(module)
    except Exception as error:  # a build for another torch raises errors of many types
        line = next(iter(str(error).splitlines()), "")
        raise InputError(
            f"the encoder {name}: the package {package} cannot be imported ({type(error).__name__}: {line}); install "
            "the build that fits this torch"
        ) from error
    find = {"sentence-transformers": _find_sentences, "open_clip": _find_clip, "torchvision": _find_vision}[family]
    return find(name, model)


def pretrained_digest(name: str) -> str:
    """SHA-256 of the package's version and the sizes and times of the model's files."""
    path = find_model(name).path
    files = sorted(map(str, path.rglob("*") if path.is_dir() else [path]))
    version = importlib.metadata.version(FAMILIES[name.partition(":")[0]][1])
    parts = [version, storage.file_signatures(file for file in files if os.path.isfile(file))]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def load_pretrained(name: str, gpu: bool) -> Callable[[list], np.ndarray]:
    """The encoder. Raises InputError: its files are missing on this machine, or cannot be loaded."""
    files = find_model(name)
    family = name.partition(":")[0]
    load = {"sentence-transformers": _load_sentences, "open_clip": _load_clip, "torchvision": _load_vision}[family]
    try:
        return load(files, "cuda" if gpu else "cpu")
    except Exception as error:  # damaged files raise errors of many types
        line = next(iter(str(error).splitlines()), "")
        raise InputError(f"the encoder {name} cannot be loaded: {type(error).__name__}: {line}") from error


def _find_sentences(name: str, model: str) -> ModelFiles:
    if os.path.isdir(model):
        return ModelFiles(Path(model))
    return ModelFiles(_cached_folder(name, model if "/" in model else f"sentence-transformers/{model}"))


def _find_clip(name: str, model: str) -> ModelFiles:
    import open_clip

    if os.path.isdir(model):
        return ModelFiles(Path(model), f"local-dir:{model}")
    architecture, _, weights = model.partition("/")
    if architecture not in open_clip.list_models():
        folder = _cached_folder(name, model)
        return ModelFiles(folder, f"local-dir:{folder}")
    if os.path.isfile(weights):
        return ModelFiles(Path(weights), architecture)
    found = open_clip.get_pretrained_cfg(architecture, weights)
    if not found:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture))
        raise InputError(
            f"the encoder {name} has no such weights; use open_clip:{architecture}/ and a file or one of {tags}"
        )
    keys = {"mean": "image_mean", "std": "image_std", "interpolation": "image_interpolation"}
    keys |= {"resize_mode": "image_resize_mode", "quick_gelu": "force_quick_gelu"}
    options = {keys[key]: value for key, value in found.items() if key in keys}
    return ModelFiles(_cached_weights(name, found), architecture, options)


def _find_vision(name: str, model: str) -> ModelFiles:
    import torch
    from torchvision import models

    networks = models.list_models(module=models, exclude="squeezenet*")  # those end in a convolution
    known = sorted(networks, key=len)
    if os.path.isfile(model):
        fitting = [other for other in known if os.path.basename(model).startswith(other)]
        if not fitting:
            raise InputError(f"the encoder {name}: the file's name must begin with its network's, such as {known[0]}-")
        return ModelFiles(Path(model), fitting[-1])
    if model not in known:
        raise InputError(f"the encoder {name}: there is no such file, and no such network in torchvision")
    folder, weights = Path(torch.hub.get_dir()) / "checkpoints", models.get_model_weights(model)
    for each in (weights.DEFAULT, *weights):
        if (folder / os.path.basename(each.url)).exists():
            return ModelFiles(folder / os.path.basename(each.url), model)
    raise InputError(f"the encoder {name} has no weights on this machine; copy {weights.DEFAULT.url} to {folder}")


def _cached_folder(name: str, repository: str) -> Path:
    """The folder of a repository in the Hugging Face cache. Raises InputError."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, local_files_only=True))
    except (OSError, ValueError) as error:
        raise InputError(
            f"the encoder {name} is neither a folder nor in the Hugging Face cache of this machine; name a folder, or "
            f"download it there first: hf download {repository}"
        ) from error


def _cached_weights(name: str, weights: dict) -> Path:
    """The file of a tag of open_clip in its caches. Raises InputError."""
    from huggingface_hub import try_to_load_from_cache

    repository, file = os.path.split(weights.get("hf_hub") or "")
    names = [file.rpartition(".")[0] + ".safetensors", file] if file else []
    for each in names or ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]:
        found = try_to_load_from_cache(repository, each) if repository else None
        if isinstance(found, str):
            return Path(found)
    url = weights.get("url") or ""
    file = Path("~/.cache/clip").expanduser() / os.path.basename(url)
    if url and file.is_file():
        return file
    raise InputError(
        f"the encoder {name} has no weights on this machine; "
        + (f"hf download {repository}" if repository else f"copy {url} to {file.parent}")
    )


def _load_sentences(files: ModelFiles, device: str) -> Callable[[list], np.ndarray]:
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    logging.disable_progress_bar()  # of the weights, in every process that loads them
    model = SentenceTransformer(str(files.path), device=device, local_files_only=True)
    return lambda texts: model.encode(texts, show_progress_bar=False)


def _load_clip(files: ModelFiles, device: str) -> Callable[[list], np.ndarray]:
    import open_clip
    import torch

    weights = None if files.path.is_dir() else str(files.path)
    model, prepare = open_clip.create_model_from_pretrained(files.model, weights, device=device, **files.options)
    tokenize = open_clip.get_tokenizer(files.model)
    model.eval()

    @torch.inference_mode()
    def encode(content: list) -> np.ndarray:
        if isinstance(content[0], str):
            return model.encode_text(tokenize(content).to(device)).float().cpu().numpy()
        pictures = torch.stack([prepare(picture) for picture in content])
        return model.encode_image(pictures.to(device)).float().cpu().numpy()

    return encode


def _load_vision(files: ModelFiles, device: str) -> Callable[[list], np.ndarray]:
    import torch
    from torchvision import models

    kinds = models.get_model_weights(files.model)
    weights = next((each for each in kinds if os.path.basename(each.url) == files.path.name), kinds.DEFAULT)
    prepare, model = weights.transforms(), models.get_model(files.model, weights=None)
    last = [name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)][-1]
    model.set_submodule(last, torch.nn.Identity())  # the classes; weights of a finetuned network may have others
    state = torch.load(files.path, map_location="cpu", weights_only=True)
    state = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))\.", r"\1", key): value for key, value in state.items()
    }  # old names
    model.load_state_dict({key: value for key, value in state.items() if not key.startswith(f"{last}.")})
    if hasattr(model, "transform_input"):
        model.transform_input = True  # as torchvision does for weights of Inception and GoogLeNet
    model.to(device).eval()

    @torch.inference_mode()
    def encode(pictures: list) -> np.ndarray:
        return model(torch.stack([prepare(picture) for picture in pictures]).to(device)).cpu().numpy()

    return encode
