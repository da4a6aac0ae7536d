"""Derive src/tierline/workload/data/archetypes.toml from the published traces.

    python tools/derive_archetypes.py FOLDER_OF_TRACES

Only quantiles, means and curves go into the file; no request of a trace does.
"""

import sys
from pathlib import Path

import tomli_w

from tierline.workload.profile import Lengths, Profile, profile_trace

OUT = Path(__file__).resolve().parents[1] / "src/tierline/workload/data/archetypes.toml"
AZURE = "Azure/AzurePublicDataset @ b469a11, AzureLLMInferenceTrace_{}.csv (Splitwise, ISCA 2024)"
SERVEGEN = {"workload": "deepseek-r1", "duration_s": "7200", "seed": "0"}
KINDS = {
    "chat": ("azure2023_conv.csv.gz", AZURE.format("conv"), "CC-BY-4.0", {}),
    "rag": (
        "arxiv_summarization_lengths.csv.gz",
        "arXiv summarisation lengths, microsoft/vidur @ 7d47513",
        "MIT",
        {},
    ),
    "code": ("azure2023_code.csv.gz", AZURE.format("code"), "CC-BY-4.0", {}),
    "reasoning": (
        "servegen_client_rates.csv.gz",
        "alibaba/ServeGen @ f891d11, deepseek-r1 (arXiv 2505.09999)",
        "Apache-2.0",
        SERVEGEN,
    ),
    "agent": (
        "mooncake_conversation.jsonl.gz",
        "kvcache-ai/Mooncake @ 3b5a594, FAST25 conversation trace (Mooncake, FAST 2025)",
        "Apache-2.0",
        {},
    ),
}


def main(folder: Path) -> None:
    kinds = {}
    for kind, (name, source, licence, mapping) in KINDS.items():
        profile = profile_trace(folder / name, mapping=mapping)
        kinds[kind] = {"source": source, "licence": licence} | facts(profile)
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(
        "# Derived by tools/derive_archetypes.py; quantiles at 0, 1 ... 100 %.\n"
        + tomli_w.dumps(kinds)
    )


def facts(profile: Profile) -> dict[str, object]:
    found: dict[str, object] = {
        "requests": profile.requests,
        "length_correlation": round(profile.length_correlation, 4),
        "input": lengths(profile.input),
        "output": lengths(profile.output),
        "total": lengths(profile.total),
    }
    if profile.reuse:
        curve = profile.reuse.to_dict()
        points = [[size, round(b, 5), round(t, 5)] for size, b, t in curve["points"]]
        found["reuse"] = curve | {"points": points}
    return found


def lengths(given: Lengths) -> dict[str, object]:
    return {
        "mean": round(given.mean, 2),
        "std": round(given.std, 2),
        "quantiles": [round(q, 1) for q in given.quantiles],
        "p99_9": round(given.p99_9, 1),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
