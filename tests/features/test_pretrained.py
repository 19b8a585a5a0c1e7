"""Pretrained encoders by name. The packages are optional: what needs one is left out where it is not installed, and the
message about a missing one is tested where it is."""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from encoded_items import encode, nearest_is_alike, picture, picture_bytes, titles, vectors, write_titles
from small import ROOT

from gtc_dist.errors import InputError
from gtc_dist.features import pretrained
from gtc_dist.features.encoders import check_encoder, make_encoder

PACKAGES = {family: entry[:3] for family, entry in pretrained.FAMILIES.items()}
INSTALLED = {family for family, (module, _, _) in PACKAGES.items() if importlib.util.find_spec(module)}


def needs(family: str) -> pytest.MarkDecorator:
    reason = f"the optional extra gtc-dist[{PACKAGES[family][2]}] is not installed"
    return pytest.mark.skipif(family not in INSTALLED, reason=reason)


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """Empty caches; the environment that the command changes is set back."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


@pytest.mark.parametrize("family", [family for family in PACKAGES if family not in INSTALLED])
def test_a_package_that_is_missing(tmp_path, family):
    """Before any work: nothing is read or written."""
    _, package, extra = PACKAGES[family]
    source = ["--texts", "missing.csv", "--columns", "title"] if extra == "text" else ["--pictures", "missing"]
    message = rf"{family}:model needs the package {package}, which is not installed; pip install gtc-dist\[{extra}\]"
    with pytest.raises(InputError, match=message):
        encode(*source, "--encoder", f"{family}:model", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("encoder", "kind", "message"),
    [
        ("sentence-transformers:m", "picture", "does not take pictures; use open_clip:MODEL or torchvision:MODEL"),
        ("torchvision:resnet18", "text", "does not take texts; use sentence-transformers:MODEL or open_clip:MODEL"),
    ],
)
def test_content_that_an_encoder_does_not_take(encoder, kind, message):
    with pytest.raises(InputError, match=message):
        check_encoder(encoder, kind)


NO_WEIGHTS = {
    "sentence-transformers:": "names no model; write sentence-transformers:MODEL",
    "sentence-transformers:nothing": "neither a folder nor in the Hugging Face cache.*sentence-transformers/nothing",
    "open_clip:nobody/nothing": "is neither a folder nor in the Hugging Face cache.*; .*hf download nobody",
    "open_clip:RN50": r"has no such weights; use open_clip:RN50/ and a file or one of openai, yfcc15m, cc12m",
    "open_clip:RN50/openai": r"has no weights on this machine; hf download timm/resnet50_clip.openai",
    "torchvision:resnet18": "has no weights on this machine; copy https://.*/resnet18-.*pth to .*/hub/checkpoints",
    "torchvision:resnet19": "there is no such file, and no such network in torchvision",
}


@pytest.mark.parametrize(
    ("encoder", "message"),
    [pytest.param(*case, marks=needs(case[0].partition(":")[0]), id=case[0]) for case in NO_WEIGHTS.items()],
)
def test_weights_that_are_missing(encoder, message):
    kind = "text" if encoder.startswith("sent") else "picture"
    with pytest.raises(InputError, match=message) as caught:
        check_encoder(encoder, kind)
    assert "\n" not in str(caught.value)


def small_sentence_model(folder) -> None:
    """A network of sentence-transformers with random weights."""
    from sentence_transformers import SentenceTransformer, models
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = sorted({word for _, title, _ in titles() for word in title.split()})
    (folder / "bert").mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(words) + 5, **size)).save_pretrained(folder / "bert")
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder / "bert")
    transformer = models.Transformer(str(folder / "bert"))
    pooling = models.Pooling(transformer.get_word_embedding_dimension())
    SentenceTransformer(modules=[transformer, pooling]).save(str(folder / "model"))


@needs("sentence-transformers")
def test_sentences_of_a_folder(tmp_path, ray_local, monkeypatch, capsys):
    from sentence_transformers import SentenceTransformer

    small_sentence_model(tmp_path)
    monkeypatch.chdir(tmp_path)
    words = ["--texts", write_titles(tmp_path), "--columns", "title", "--encoder", "sentence-transformers:model"]
    encode(*words, "--out", tmp_path / "out")
    found, rows = vectors(tmp_path / "out"), titles()
    expected = SentenceTransformer("model", device="cpu").encode([title for _, title, _ in rows])
    np.testing.assert_allclose(np.stack([found[item] for item, _, _ in rows]), expected, rtol=1e-4, atol=1e-5)
    manifest = json.loads((tmp_path / "out" / "_manifest.json").read_text())
    assert manifest["encoder"] == f"sentence-transformers:{tmp_path}/model"
    encode(*words, "--out", tmp_path / "out")
    assert "is up to date" in capsys.readouterr().out
    encode(*words, "--out", tmp_path / "later", "--like", tmp_path / "out")
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(InputError, match="holds vectors of other content or of another encoder"):
        encode(*words, "--out", tmp_path / "out")
    (tmp_path / "model" / "modules.json").write_text("no model")
    with pytest.raises(InputError, match=r"sentence-transformers:.*/model cannot be loaded: "):
        make_encoder(f"sentence-transformers:{tmp_path}/model", "", None, "", False)


@needs("sentence-transformers")
def test_sentences_by_a_name_in_the_cache(tmp_path):
    """In a process of its own: the cache's place is read when the package is imported."""
    small_sentence_model(tmp_path)
    repository = tmp_path / "cache" / "models--sentence-transformers--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    (tmp_path / "model").rename(repository / "snapshots" / ("0" * 40))
    code = (
        "from gtc_dist.features.encoders import check_encoder, make_encoder; "
        "name = check_encoder('sentence-transformers:tiny', 'text'); "
        "print(make_encoder(name, '', None, '', False)(['red lipstick']).shape)"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "(1, 32)\n", done.stderr


@needs("torchvision")
@pytest.mark.parametrize("network", ["resnet18", "densenet121", "vit_b_32", "convnext_tiny"])
def test_a_file_of_torchvision_gives_what_the_last_layer_sees(tmp_path, network):
    """Weights with another number of classes, too."""
    from torchvision import models

    torch.manual_seed(0)
    whole = models.get_model(network, weights=None, num_classes=7).eval()
    torch.save(whole.state_dict(), tmp_path / f"{network}-mine.pth")
    encoder = make_encoder(check_encoder(f"torchvision:{tmp_path}/{network}-mine.pth", "picture"), "", None, "", False)
    pictures = [picture(group, group) for group in range(2)]
    inputs = []
    last = [layer for layer in whole.modules() if isinstance(layer, torch.nn.Linear)][-1]
    last.register_forward_hook(lambda layer, given, result: inputs.append(given[0]))
    prepare = models.get_model_weights(network).DEFAULT.transforms()
    with torch.inference_mode():
        whole(torch.stack([prepare(each) for each in pictures]))
    np.testing.assert_allclose(encoder(pictures), inputs[0].numpy(), rtol=1e-4, atol=1e-5)


@needs("torchvision")
def test_pictures_by_weights_in_torchs_cache(tmp_path, ray_local, monkeypatch):
    from torchvision import models

    file = models.get_model_weights("resnet18").DEFAULT.url.rpartition("/")[2]
    cache = tmp_path / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(models.resnet18().state_dict(), cache / file)
    (tmp_path / "pictures").mkdir()
    for n in range(16):
        (tmp_path / "pictures" / f"{n}.jpg").write_bytes(picture_bytes(n % 4, n))
    name = check_encoder("torchvision:resnet18", "picture")
    assert pretrained.find_model(name).path == cache / file
    path = tmp_path / "resnet18.pth"  # Ray's processes have another environment: they need the file's name
    path.write_bytes((cache / file).read_bytes())
    encode("--pictures", tmp_path / "pictures", "--encoder", f"torchvision:{path}", "--out", tmp_path / "out")
    found = vectors(tmp_path / "out")
    assert nearest_is_alike(found, lambda item: item % 4) > 0.9
    assert {len(vector) for vector in found.values()} == {512}


@needs("open_clip")
@pytest.mark.parametrize("place", ["folder", "file"])
def test_clip_encodes_texts_and_pictures_alike(tmp_path, place):
    import open_clip

    torch.manual_seed(0)
    if place == "file":
        name = "RN50"
        model, _, prepare = open_clip.create_model_and_transforms(name)
        torch.save(model.state_dict(), tmp_path / "mine.pt")
        encoder = check_encoder(f"open_clip:RN50/{tmp_path}/mine.pt", "text")
    else:
        vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16, "head_width": 32}
        text = {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
        config = {"model_cfg": {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {}}
        (tmp_path / "clip").mkdir()
        (tmp_path / "clip" / "open_clip_config.json").write_text(json.dumps(config))
        model = open_clip.CLIP(24, open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**text))
        torch.save(model.state_dict(), tmp_path / "clip" / "open_clip_pytorch_model.bin")
        name = f"local-dir:{tmp_path}/clip"
        _, _, prepare = open_clip.create_model_and_transforms(name)
        encoder = check_encoder(f"open_clip:{tmp_path}/clip", "picture")
    made, pictures = make_encoder(encoder, "", None, "", False), [picture(group, group) for group in range(2)]
    model.eval()
    with torch.inference_mode():
        words = model.encode_text(open_clip.get_tokenizer(name)(["red shoe", "hat"])).numpy()
        seen = model.encode_image(torch.stack([prepare(each) for each in pictures])).numpy()
    np.testing.assert_allclose(made(["red shoe", "hat"]), words, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(made(pictures), seen, rtol=1e-4, atol=1e-5)
    assert words.shape == seen.shape
