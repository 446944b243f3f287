"""The README's numbers, written from benchmarks/results: `python benchmarks/table.py`."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
MARKS = re.compile(r"(<!-- numbers: [^\n]* -->\n).*?(<!-- /numbers -->)", re.DOTALL)


def table() -> str:
    """One table per results file, fastest first."""
    parts: list[str] = []
    for path in sorted((ROOT / "benchmarks/results").glob("train_throughput_*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        contenders = sorted(result["contenders"].values(), key=lambda told: -told["rows_per_s"])
        ours = result["contenders"]["banjoray"]["rows_per_s"]
        lines = [
            f"Fine-tuning, {result['data']}; median of counted runs: {result['repeats']}, on {result['machine']}:",
            "",
        ]
        lines += ["| contender | rows/s | banjoray is | validation accuracy |", "| --- | ---: | ---: | ---: |"]
        for told in contenders:
            speed, accuracy = told["rows_per_s"], told["accuracy"]
            lines.append(f"| {told['settings']} | {speed:.0f} | {ours / speed:.2f}x | {accuracy:.3f} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Put the tables between the README's marks."""
    readme = ROOT / "README.md"
    text = MARKS.sub(lambda found: found[1] + table() + found[2], readme.read_text(encoding="utf-8"))
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
