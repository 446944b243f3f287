"""The README's numbers, written from benchmarks/results: `python benchmarks/table.py`."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MARKS = re.compile(r"(<!-- numbers: [^\n]* -->\n).*?(<!-- /numbers -->)", re.DOTALL)
PEER = "trainer_tuned"


def main() -> None:
    """Put the tables between the README's marks."""
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text(encoding="utf-8")), encoding="utf-8")


def filled(text: str) -> str:
    """A README's text with the tables between its marks."""
    return MARKS.sub(lambda found: found[1] + tables() + found[2], text)


def tables() -> str:
    """One table per results file, speeds first."""
    kinds: dict[str, Callable[[dict[str, Any]], str]] = {
        "train_throughput": throughput,
        "ray_share": ray_share,
        "train_accuracy": accuracy,
        "search_cost": search,
        "search_gain": gain,
        "serve_throughput": serving,
        "serve_overload": overload,
        "serve_survival": survival,
    }
    parts = [
        write(json.loads(path.read_text(encoding="utf-8")))
        for kind, write in kinds.items()
        for path in sorted(RESULTS.glob(f"{kind}_*.json"))
    ]
    return "\n\n".join(parts) + "\n"


def throughput(result: dict[str, Any]) -> str:
    """Rows per second, fastest first, and what a run takes beside its training loop.

    Results of before benchmarks/ray_share.py hold a loop outside Ray, with which nobody would train.
    """
    contenders = result["contenders"]
    shown = sorted(
        (told for name, told in contenders.items() if name != "banjoray_loop"), key=lambda told: -told["rows_per_s"]
    )
    ours = contenders.get("banjoray", {}).get("rows_per_s")
    lines = [
        f"Fine-tuning, {result['data']}; median of counted runs: {result['repeats']}, on {result['machine']}:",
        "",
        "| contender | rows/s | banjoray is | validation accuracy |",
        "| --- | ---: | ---: | ---: |",
    ]
    for told in shown:
        ratio = f"{ours / told['rows_per_s']:.2f}x" if ours else ""
        lines += [f"| {told['settings']} | {told['rows_per_s']:.0f} | {ratio} | {spread(told)} |"]
    if "banjoray" in contenders:
        around = contenders["banjoray"]["wall_s"] - contenders["banjoray"]["loop_s"]
        lines += [
            "",
            f"Starting Ray and its worker, scoring afresh and registering take {around:.0f} s of a run, and are not in "
            "rows/s.",
        ]
    return "\n".join(lines)


def ray_share(result: dict[str, Any]) -> str:
    """What Ray costs while a run goes on."""
    return (
        f"Ray's share, {result['data']}, on {result['machine']}: {result['ray_share']:.1%} (standard error "
        f"{result['ray_share_error']:.1%}) of the time that a run takes after start-up. The same "
        f"{result['compared_steps']} steps, with scores and checkpoints, took {result['seconds_inside']:.0f} s in Ray "
        f"and {result['seconds_outside']:.0f} s outside, on the same cores, in {result['turns']} turns each."
    )


def accuracy(result: dict[str, Any]) -> str:
    """Validation accuracy after the last epoch, best first."""
    shown = sorted(result["contenders"].values(), key=lambda told: -told["accuracy"])
    lines = [
        f"Validation accuracy, {result['data']}; mean and range of {result['repeats']} seeds:",
        "",
        "| contender | mean | lowest to highest |",
        "| --- | ---: | ---: |",
    ]
    for told in shown:
        between = f"{told['accuracy_min']:.4f} to {told['accuracy_max']:.4f}"
        lines += [f"| {told['settings']} | {told['accuracy']:.4f} | {between} |"]
    if {"banjoray", PEER} <= result["contenders"].keys():
        ours, peers = (100 * result["contenders"][name]["accuracy"] for name in ("banjoray", PEER))
        place = f"{abs(ours - peers):.2f} points {'above' if ours >= peers else 'below'} the tuned Trainer's"
        lines += ["", f"banjoray's mean is {place}; half a point below would still be called equal."]
    return "\n".join(lines)


def search(result: dict[str, Any]) -> str:
    """A table of whole searches, fastest first, and one of single runs above a frozen bottom."""
    works = result["works"]
    singles = {name: work for name, work in works.items() if name != "study"}
    parts = [study(result, works["study"])] if "study" in works else []
    return "\n\n".join(parts + ([single(result, singles)] if singles else []))


def serving(result: dict[str, Any]) -> str:
    """Requests per second with many clients, fastest first."""
    shown = sorted(result["contenders"].values(), key=lambda told: -told["requests_per_s_at_32"])
    ours = result["contenders"]["banjoray"]["requests_per_s_at_32"]
    lines = [
        f"Serving, {result['data']}, one replica with one thread; median of rounds: {result['rounds']}, on "
        f"{result['machine']}. p99 with long: of the short texts, where every twentieth has 400 words:",
        "",
        "| contender | requests/s, 1 client | p50 ms | requests/s, 32 clients | banjoray is | p99 ms | with long |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for told in shown:
        alone = f"{told['requests_per_s_at_1']:.0f} | {told['p50_ms_at_1']:.1f}"
        many = f"{told['requests_per_s_at_32']:.0f} | {ours / told['requests_per_s_at_32']:.2f}x"
        lines += [
            f"| {told['settings']} | {alone} | {many} | {told['p99_ms_at_32']:.0f} | {told['p99_ms_mixed']:.0f} |"
        ]
    return "\n".join(lines)


def overload(result: dict[str, Any]) -> str:
    """What a replica took of too much, how fast, and how it was afterwards."""
    load, later = result["load"], result["later"]
    return (
        f"Overload, {result['data']}, one replica with one thread, on {result['machine']}: {result['times']:g} times "
        f"the {result['capacity_per_s']:.0f} requests/s of a closed loop for {result['seconds']:.0f} s, at random "
        f"moments. {load['answered']} of {load['sent']} were answered, p50 {load['answered_p50_ms']:.0f} ms and p99 "
        f"{load['answered_p99_ms']:.0f} ms with a target of {result['target_ms']:.0f} ms; all others got 429, p50 "
        f"{load['refused_p50_ms']:.0f} ms. 5 s later a text took {later['p50_ms']:.0f} ms, the slowest of 20 "
        f"{later['slowest_ms']:.0f} ms."
    )


def survival(result: dict[str, Any]) -> str:
    """What was lost, wrong or asked again while replicas died and versions changed."""
    load = result["load"]
    killed = sum("killed" in event for event in result["events"])
    again = ", ".join(f"{count} of {kind}" for kind, count in load["statuses"].items() if kind != "200")
    memory = ", ".join(f"{kind} {first} and {last}" for kind, (first, last) in result["memory_mib"].items())
    return (
        f"Survival, {result['data']}, two replicas with one thread each, on {result['machine']}: "
        f"{result['seconds'] / 60:.0f} minutes at {result['share']:.0%} of {result['capacity_per_s']:.0f} requests/s, "
        f"which is what is left of a closed loop's {result['capacity_of_all_per_s']:.0f} when one is down; "
        f"{killed} times a replica was killed, {len(result['events']) - killed} times the "
        f"version changed. Of {load['sent']} requests {load['lost']} were lost and {load['wrong']} answered wrong; "
        f"{load['retried']} were sent again ({again or 'none'}). MiB at the start and at the end: {memory}."
    )


def gain(result: dict[str, Any]) -> str:
    """What the best trial of a search has, beside a run by the defaults, and the picture of the search."""
    metric, best = result["metric"], result["trials"][0]
    values = ", ".join(
        f"{key.rpartition('.')[2]} {value:.1e}" if isinstance(value, float) else f"{key} {value}"
        for key, value in best["values"].items()
    )
    stopped = sum(trial["status"] == "stopped early" for trial in result["trials"])
    return "\n".join(
        [
            f"What a search finds, {result['data']}: {len(result['trials'])} trials over freezing and learning rate, "
            f"of which {result['search']['scheduler'].upper()} stopped {stopped} early. The best has {metric} "
            f"{best['score']:.3f} on the validation rows ({values}); one run by the defaults has "
            f"{result['default'][metric]:.3f}.",
            "",
            f"![a line per trial: freezing, learning rate, score](docs/search_{result['name']}.svg)",
        ]
    )


def study(result: dict[str, Any], work: dict[str, Any]) -> str:
    """Seconds of the whole command, and where ours go."""
    contenders = work["contenders"]
    trials = len(work["freeze"]) * len(work["learning_rate"])
    lines = [
        f"A search, {trials} trials ({len(work['freeze'])} freezing choices x {len(work['learning_rate'])} learning "
        f"rates, {work['epochs']} epochs), {result['data']}; whole command, median of counted runs: {work['repeats']}, "
        f"on {result['machine']}:",
        "",
        "| contender | seconds | banjoray is | best accuracy |",
        "| --- | ---: | ---: | ---: |",
    ]
    for told in sorted(contenders.values(), key=lambda told: told["wall_s"]):
        lines += [f"| {told['settings']} | {told['wall_s']:.0f} | {ratio_of(told)} | {told['accuracy']:.3f} |"]
    if ours := contenders.get("banjoray"):
        lines += [
            "",
            f"Where banjoray's time goes: {ours['start_s']:.0f} s until the first trial, {ours['search_s']:.0f} s of "
            f"trials, {ours['end_s']:.0f} s to score the best afresh and register it, which the peer does not do.",
        ]
    return "\n".join(lines)


def single(result: dict[str, Any], works: dict[str, dict[str, Any]]) -> str:
    """Rows per second of training above a frozen bottom, what is computed ahead included."""
    repeats = "/".join(str(count) for count in sorted({work["repeats"] for work in works.values()}))
    lines = [
        f"Training above a frozen bottom without Ray, {result['data']}; computing its states is in the time; median of "
        f"counted runs: {repeats}, on {result['machine']}:",
        "",
        "| frozen, epochs | contender | rows/s | banjoray is | validation accuracy |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for work in works.values():
        for told in sorted(work["contenders"].values(), key=lambda told: -told["rows_per_s"]):
            cells = (told["settings"], f"{told['rows_per_s']:.0f}", ratio_of(told), spread(told))
            lines += [f"| {work['freeze'][0]}, {work['epochs']} | {' | '.join(cells)} |"]
    return "\n".join(lines)


def ratio_of(told: dict[str, Any]) -> str:
    """How many times as fast as a contender banjoray is; nothing where it did not run."""
    return f"{told['banjoray_is']:.2f}x" if "banjoray_is" in told else ""


def spread(told: dict[str, Any]) -> str:
    """Mean accuracy, and its range if seeds differ."""
    low, high = (told.get(key, told["accuracy"]) for key in ("accuracy_min", "accuracy_max"))
    return f"{told['accuracy']:.3f} ({low:.3f} to {high:.3f})" if low < high else f"{told['accuracy']:.3f}"


if __name__ == "__main__":
    main()
