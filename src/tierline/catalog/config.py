"""Reading a `config.json` field by field, so that a wrong file is an error that says what is wrong.

`architectures` asks here for the fields of one model. A missing field answers 1 and is
remembered: `finish` then names all missing fields in one message instead of the first.
Explicit nulls count as absent, as in transformers.
"""

from collections.abc import Collection, Mapping
from typing import Any

from tierline.base.errors import SpecError

COUNT_MAX = 10**9  # no dimension of a model is near; a larger one is a damaged file
LAYERS_MAX = 4096
INT4_GROUPS = {32: "int4-g32", 64: "int4-g64", 128: "int4-g128"}


class Fields:
    """The fields of one config, checked as they are read."""

    def __init__(self, values: Mapping[str, Any], *, where: str) -> None:
        self.where = where
        self.missing: list[str] = []
        self._values = values

    def has(self, key: str) -> bool:
        """Whether the config gives a value for `key`."""
        return self._values.get(key) is not None

    def count(
        self, key: str, default: int | None = None, *, least: int = 1, most: int = COUNT_MAX
    ) -> int:
        """A whole number; without a default the field is required."""
        value: Any = self._values.get(key)
        if value is None:
            if default is None:
                self.missing.append(key)
            return 1 if default is None else default
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.error(f"{key} is {value!r}, not a whole number from {least} to {most}")
        return int(value)

    def count_or_none(self, key: str) -> int | None:
        """A whole number, or None where the field is absent."""
        return self.count(key) if self.has(key) else None

    def number(self, key: str, default: float | None = None) -> float:
        """A number above zero; without a default the field is required."""
        value = self._values.get(key)
        if value is None:
            if default is None:
                self.missing.append(key)
            return 1.0 if default is None else default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise self.error(f"{key} is {value!r}, not a number above zero")
        return float(value)

    def word(self, key: str, default: str, *, known: Collection[str]) -> str:
        """One of the `known` words."""
        value = self._values.get(key)
        if value is None:
            return default
        if not isinstance(value, str) or value not in known:
            raise self.error(f"{key} is {value!r}, not {' or '.join(sorted(known))}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(f"{key} is {value!r}, not true or false")
        return value

    def section(self, key: str) -> Mapping[str, Any] | None:
        """A nested object, or None where the field is absent."""
        value = self._values.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise self.error(f"{key} is not an object")
        return value

    def kinds(self, key: str, *, layers: int, known: Collection[str]) -> list[str] | None:
        """One of the `known` words for each layer, or None where the field is absent."""
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(
            isinstance(kind, str) and kind in known for kind in value
        ):
            raise self.error(f"{key} is not a list of {' or '.join(sorted(known))}")
        self.insist(len(value) == layers, f"{key} has {len(value)} entries for {layers} layers")
        return value

    def whole_numbers(self, key: str) -> list[int] | None:
        """A list of whole numbers, or None where the field is absent."""
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or any(type(item) is not int for item in value):
            raise self.error(f"{key} is not a list of whole numbers")
        return value

    def insist(self, holds: bool, otherwise: str) -> None:
        """Raise `otherwise` unless it holds; judged by `finish` alone when fields are missing."""
        if not holds and not self.missing:
            raise self.error(otherwise)

    def finish(self) -> None:
        """Raise the error that names every required field that was absent."""
        if self.missing:
            names = ", ".join(dict.fromkeys(self.missing))
            raise SpecError(
                f"{self.where} lacks {names}", hint="take the complete config.json of the model"
            )

    def error(self, problem: str) -> SpecError:
        """A `SpecError` that names the file."""
        return SpecError(f"{self.where}: {problem}", hint="compare with the published config.json")


def native_format(fields: Fields) -> str:
    """The weight format of the published checkpoint, by its `quantization_config`.

    Without one, 16 bits: float32 checkpoints of language models are served in bf16 too.
    """
    section = fields.section("quantization_config")
    if section is None:
        return "bf16"
    method = section.get("quant_method")
    algorithm = str(section.get("quant_algo", "")).casefold()
    if method == "mxfp4":
        return "mxfp4"
    if algorithm in ("fp8", "nvfp4"):  # modelopt
        return algorithm
    if method in ("fp8", "fbgemm_fp8"):
        return "fp8-block" if section.get("weight_block_size") else "fp8"
    if method in ("gptq", "awq"):
        weights: Mapping[str, Any] = {
            "type": "int",
            "num_bits": section.get("bits"),
            "group_size": section.get("group_size"),
        }
    else:
        weights = _compressed_weights(section)
    name = _format_of(weights)
    if name is None:
        raise SpecError(
            f"{fields.where}: quantization method {method!r} with these settings is not known",
            hint="remove quantization_config to read the model as bf16",
        )
    return name


def _compressed_weights(section: Mapping[str, Any]) -> Mapping[str, Any]:
    """The weights of the only group of a compressed-tensors config; empty when not so."""
    groups = section.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1:
        return {}
    group = next(iter(groups.values()))
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        return {}
    return weights


def _format_of(weights: Mapping[str, Any]) -> str | None:
    """The name in `formats` of a compressed-tensors weight scheme, or None."""
    kind, bits, group = weights.get("type"), weights.get("num_bits"), weights.get("group_size")
    if (kind, bits) == ("float", 8):
        return "fp8-block" if weights.get("strategy") == "block" else "fp8"
    if (kind, bits) == ("float", 4):
        return {16: "nvfp4", 32: "mxfp4"}.get(group) if isinstance(group, int) else None
    if (kind, bits) == ("int", 8):
        return "int8-g128" if group == 128 else "int8"
    if (kind, bits) == ("int", 4):
        return INT4_GROUPS.get(group) if isinstance(group, int) else None
    return None
