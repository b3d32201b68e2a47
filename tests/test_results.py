"""The README's table says what the records say."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
#: Names of networks, in the table and in the records.
NAMES = {
    "GPT, 6 blocks": "gpt 6", "GPT, 12 blocks": "gpt 12", "the same in bfloat16": "gpt-bf16 12",
    "ViT-B": "vit-b 12", "ResNet-50": "resnet50 16", "RevNet, 32 blocks": "revnet 32",
    "1-Lipschitz CNN, 64 blocks": "lipschitz 64",
    "MaxMin CNN, 16 blocks": "maxmin 16",
    "ResNet, 16 blocks": "resnet 16", "RevNet, 16 blocks": "revnet 16", "GPT, 16 blocks": "gpt 16",
    "strided CNN, 16 blocks": "strided 16", "1-Lipschitz CNN, 512 blocks": "lipschitz 512",
}  # fmt: skip
#: Blocks of the networks of `experiments.targets` that do not have 12.
BLOCKS = {"resnet50": 16, "revnet": 32, "lipschitz": 64}
Row = tuple[str, str, str, str, str]


def table() -> list[Row]:
    """Network, device, memory, time, and the ratio to the best alternative ("none fits"), as printed; what a
    row leaves out is the last one's."""
    text = (ROOT / "README.md").read_text()
    rows: list[Row] = []
    for line in text[text.index("| network | where |") :].splitlines()[2:]:
        if not line.startswith("|"):
            break
        name, where, memory, time, over = (cell.strip().replace("*", "") for cell in line.split("|")[1:6])
        last = rows[-1] if rows else ("", "", "", "", "")
        ratio = re.match(r"[\d.]+|none fits", over)
        assert ratio, line
        rows.append(
            (NAMES.get(name, name) or last[0], where or last[1], memory, time, ratio.group().rstrip("."))
        )
    return rows


def compiled() -> Iterator[tuple[str, float, float, float | None]]:
    """Plans compiled for an H200: network, memory and time over those of backpropagation, and time over the
    best alternative's."""
    for path in [*RESULTS.glob("kept/h200_*.json"), *RESULTS.glob("barriers/h200_*.json")]:
        rows = json.loads(path.read_text())["rows"]
        plain = next(row for row in rows if row["program"] == "backpropagation")
        for row in rows:
            if "predicted_bytes" in row:
                memory, time = (row[key] / plain[key] for key in ("temporary_bytes", "modelled_ns"))
                yield f"{row['network']} {row['depth']}", memory, time, row.get("over_best_alternative")
    lines = (RESULTS / "targets/records.jsonl").read_text().splitlines()
    records: list[Any] = [json.loads(line) for line in lines]
    known = [one for one in records if one["target"] == "h200" and "modelled_ns" in one]
    for one in known:
        others = [row for row in known if row["network"] == one["network"] and row["share"] < 0]
        plain = next((row for row in others if row["method"] == "backprop"), None)
        if one["share"] < 0 or plain is None:
            continue
        fit = [row["modelled_ns"] for row in others if row["temporary_bytes"] <= one["temporary_bytes"]]
        memory, time = (one[key] / plain[key] for key in ("temporary_bytes", "modelled_ns"))
        name = f"{one['network']} {BLOCKS.get(one['network'], 12)}"
        yield name, memory, time, one["modelled_ns"] / min(fit) if fit else None


def measured() -> Iterator[tuple[str, float, float, float | None]]:
    """Plans run on a CPU, as `compiled`: bytes of the whole step."""
    for path in RESULTS.glob("budget_sweep/summary_*.json"):
        found = json.loads(path.read_text())
        plain = {(one["model"], one["depth"]): one["backprop_bytes"] for one in found["limits"]}
        for row in found["budgets"]:
            for (model, depth), nbytes in plain.items():
                if model == row["model"] and row["plan_bytes"] and row["plan_over_backprop"]:
                    memory, time = row["plan_bytes"] / nbytes, row["plan_over_backprop"]
                    yield f"{model} {depth}", memory, time, row["plan_over_alternative"]


def digits(value: float, printed: str) -> bool:
    """Whether a value is what is printed, to its digits."""
    return abs(value - float(printed)) <= 0.51 * 10.0 ** -len(printed.partition(".")[2])


@pytest.mark.parametrize("row", table(), ids=lambda row: f"{row[0]} at {row[2]}")
def test_the_readmes_table_is_that_of_the_records(row: Row) -> None:
    name, where, *printed = row
    known = [one for one in (compiled() if where == "H200" else measured()) if one[0] == name]
    assert known, f"no record of {name}"
    for _, memory, time, over in known:
        same = (over is None) if printed[2] == "none fits" else over is not None and digits(over, printed[2])
        if same and digits(memory, printed[0]) and digits(time, printed[1]):
            return
    raise AssertionError(f"{row} is in no record: {known}")
