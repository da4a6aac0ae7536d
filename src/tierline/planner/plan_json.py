"""Plan -> plain values -> JSON: everything that a plan says, for programs.

Keys are the field names of `finding`'s types, in their order; numbers keep all digits, and an
unknown number is null. What a program can compute from the rest is left out: laws are named
by their source, and an operating point carries its percentiles in place of its distribution.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from tierline.perf.evidence import Value
from tierline.perf.step import StepCost
from tierline.planner.finding import Candidate, Plan
from tierline.planner.load import OperatingPoint
from tierline.workload.profile import Profile
from tierline.workload.slo import ServiceLevel

SCHEMA = 1


def plan_to_json(plan: Plan) -> str:
    """The plan as indented JSON text."""
    return json.dumps(plan_to_dict(plan), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """The plan as dictionaries, lists, text and finite numbers."""
    top: dict[str, Any] = {"schema": SCHEMA}
    values = {f.name: plain(getattr(plan, f.name)) for f in fields(plan)}
    question = values["question"]
    question["model"] = plan.question.model.name
    question["gpus"] = [gpu.name for gpu in plan.question.gpus]
    return top | values | {"deployment_toml": plan.deployment.to_toml()}


def plain(value: Any) -> Any:
    """Any value of a plan in types that JSON has."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, Value):
        return _fields(value) | {"low": plain(value.low), "high": plain(value.high)}
    if isinstance(value, Candidate):
        return {"name": value.name} | _fields(value) | {"gpu": value.gpu.name}
    if isinstance(value, OperatingPoint):
        return _point(value)
    if isinstance(value, StepCost):
        return _step_law(value)
    if isinstance(value, Profile):
        return plain(value.to_dict())
    if isinstance(value, ServiceLevel):
        return _fields(value) | {"text": str(value)}
    if is_dataclass(value):
        return _fields(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value]


def _fields(value: Any) -> dict[str, Any]:
    return {f.name: plain(getattr(value, f.name)) for f in fields(value)}


def _point(point: OperatingPoint) -> dict[str, Any]:
    """The scalars of an operating point, and what its distributions say."""
    scalars = {k: v for k, v in _fields(point).items() if not isinstance(v, (list, dict))}
    percentiles = {
        f"{metric}_p{percent}_s": plain(point.latency_s(metric, percent))
        for metric in ("ttft", "itl")
        for percent in (50, 95, 99)
    }
    return scalars | percentiles | {"saturation": plain(point.saturation), "bound": point.bound}


def _step_law(cost: StepCost) -> dict[str, Any]:
    return {
        "model": cost.model.name,
        "gpu": cost.gpu.name,
        "layout": str(cost.layout),
        "evidence": _fields(cost.rates.evidence),
    }
