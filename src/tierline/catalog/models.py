"""Models by name, or by the path of a `config.json`.

`load_model` is what the command line and every test call. The bundle is one small file for
each model under `data/models`: the fields of the published `config.json` that counting
needs, where they come from, and the published parameter count that the tests compare with.
A name opens that one file and no other, so a larger bundle does not cost start-up time.
"""

import functools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tierline.base.errors import SpecError
from tierline.base.files import read_text
from tierline.base.names import lookup
from tierline.catalog.architectures import ARCHITECTURES, Architecture, Parts
from tierline.catalog.config import Fields, native_format
from tierline.catalog.model import ModelSpec

BUNDLE = Path(__file__).parent / "data" / "models"
ALIASES = BUNDLE.parent / "model-aliases.json"  # published ids of the same shapes, lower case


class _Bundle(Mapping[str, ModelSpec]):
    """The bundled models; each is read when it is first asked for."""

    def __getitem__(self, name: str) -> ModelSpec:
        if name not in self:
            raise KeyError(name)
        return _read_bundled(name)

    def __contains__(self, name: object) -> bool:
        return name in _bundled_names()

    def __iter__(self) -> Iterator[str]:
        return iter(_bundled_names())

    def __len__(self) -> int:
        return len(_bundled_names())


@functools.cache
def _bundled_names() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in BUNDLE.glob("*.json")))


@functools.cache
def _read_bundled(name: str) -> ModelSpec:
    config = _read_config(BUNDLE / f"{name}.json")
    return model_from_config(config, name=name, source=config["_source"])


@functools.cache
def _aliases() -> Mapping[str, str]:
    aliases: dict[str, str] = json.loads(read_text(ALIASES, what="model aliases"))
    return aliases


def known_models() -> Mapping[str, ModelSpec]:
    """Every bundled model by name; a model's file is read when the model is looked up."""
    return _Bundle()


def load_model(name_or_path: str) -> ModelSpec:
    """The model of that name, published id, `config.json`, or folder that holds one.

    Names and ids are compared without case and come before files: `./name` is always a file.

    >>> load_model("meta-llama/Llama-3.1-70B-Instruct").name
    'llama-3.1-70b'
    """
    folded = name_or_path.strip().casefold()
    name = _aliases().get(folded, folded)
    if name in known_models():
        return known_models()[name]
    path = os.path.expanduser(name_or_path)  # os.path: an impossible path is no path, no error
    if os.path.isdir(path):
        path = os.path.join(path, "config.json")
        if not os.path.exists(path):
            raise SpecError(
                f"folder {name_or_path!r} holds no config.json",
                hint="pass the folder of a model, or the path to its config.json",
            )
    if os.path.exists(path) or path.endswith(".json"):
        return _read_file(Path(path))
    return lookup(
        "model",
        name_or_path,
        known_models(),
        error=SpecError,
        way_out="or pass a path to its config.json",
    )


def _read_file(path: Path) -> ModelSpec:
    """The model of one `config.json`, named after its folder, else after the file."""
    name = path.resolve().parent.name if path.name == "config.json" else path.stem
    return model_from_config(_read_config(path), name=name, source=str(path))


def _read_config(path: Path) -> Mapping[str, Any]:
    """The JSON object in `path`."""
    text = read_text(path, what="model config")
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SpecError(f"model config {str(path)!r} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise SpecError(f"model config {str(path)!r} is not a JSON object")
    return config


def model_from_config(config: Mapping[str, Any], *, name: str, source: str) -> ModelSpec:
    """The counts of the model that a Hugging Face `config.json` describes.

    Raises `SpecError` for an architecture that is not known, and one that names every
    missing field. Of a multimodal model, the text part (`text_config`) is read.
    """
    where = f"config of model {name!r} ({source})"
    outer = Fields(config, where=where)
    text = outer.section("text_config") or {}
    merged = {**config, **{key: value for key, value in text.items() if value is not None}}
    architecture = _architecture(merged, where=where)
    fields = Fields(
        {
            **architecture.defaults,
            **{architecture.renamed.get(key, key): value for key, value in merged.items()},
        },
        where=where,
    )
    parts = architecture.parts(fields)
    tied = fields.flag("tie_word_embeddings", architecture.tied)
    hidden, vocabulary = fields.count("hidden_size"), fields.count("vocab_size")
    positions_max = fields.count("max_position_embeddings")
    fields.finish()
    return ModelSpec(
        name=name,
        architecture=str(config.get("model_type", merged["model_type"])),
        hidden=hidden,
        vocabulary=vocabulary,
        attention=parts.attention,
        ffn=parts.ffn,
        embedding_params=vocabulary * hidden,
        head_params=_head_params(parts, tied=tied, hidden=hidden, vocabulary=vocabulary),
        norm_params=parts.norm_params,
        positions_max=positions_max,
        native_format=native_format(fields),
        source=source,
        hf_id=config.get("_hf_id"),
    )


def _architecture(config: Mapping[str, Any], *, where: str) -> Architecture:
    """How to read this `model_type`; the text part of a model carries the suffix `_text`."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise SpecError(
            f"{where} lacks model_type",
            hint=f"it names the architecture, one of: {', '.join(ARCHITECTURES)}",
        )
    if model_type.removesuffix("_text") not in ARCHITECTURES:
        raise SpecError(
            f"{where}: architecture {model_type!r} is not known",
            hint=f"known: {', '.join(ARCHITECTURES)}; a new one is one function in"
            " catalog/architectures.py (docs/guides/add-a-model.md)",
        )
    return ARCHITECTURES[model_type.removesuffix("_text")]


def _head_params(parts: Parts, *, tied: bool, hidden: int, vocabulary: int) -> int:
    """The output projection; a tied one is the embedding and counts there."""
    weights = 0 if tied else vocabulary * hidden
    return weights + (vocabulary if parts.head_bias else 0)
