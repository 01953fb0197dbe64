#!/usr/bin/env python3
"""How busy a GPU was within steps, by the lines that trace.c left: trace.py FILE [FILE to write JSON to].

Steps are what lies between pauses of more than PAUSE; of those that have the most kernels, all but the first two count,
which may make plans. Idle is what no kernel, copy within the card or memset covers."""
import json
import re
import statistics
import sys
from collections import defaultdict

PAUSE = 150_000  # ns


def short(name):
    """A kernel's name without its template's arguments, as far as that tells it apart."""
    if found := re.match(r"_ZN\d*cutlass", name):
        return "cutlass" + (" w8a8" if "mmgp" in name or "RowsByColumns" in name else "")
    return re.sub(r"<.*|\(.*", "", name)[:70]


def steps(activities):
    step, end = [], None
    for start, stop, name in activities:
        if end is not None and start - end > PAUSE:
            yield step
            step = []
        step.append((start, stop, name))
        end = stop if end is None else max(end, stop)
    if step:
        yield step


def idle(step):
    gaps, end = [], step[0][1]
    for start, stop, _ in step[1:]:
        if start > end:
            gaps.append(start - end)
        end = max(end, stop)
    return gaps, end - step[0][0]


def main():
    activities = []
    for line in open(sys.argv[1], errors="replace"):
        kind, start, stop, *name = line.rstrip("\n").split(" ", 3)
        if kind == "kernel" or kind in ("memset", "copy8"):
            activities.append((int(start), int(stop), short(name[0]) if name else kind))
    activities.sort()
    found = list(steps(activities))
    most = max(len(step) for step in found)
    whole = [step for step in found if len(step) > 0.9 * most]
    whole = whole[2:] or whole
    told = []
    for step in whole:
        gaps, length = idle(step)
        told.append((sum(gaps) / length, length, len(step), max(gaps, default=0)))
    share, length, kernels, longest = (statistics.median(column) for column in zip(*told))
    kinds = defaultdict(lambda: [0, 0])
    for step in whole:
        for start, stop, name in step:
            kinds[name][0] += 1
            kinds[name][1] += stop - start
    table = [
        {"kernel": name, "per_step": n / len(whole), "ms_per_step": ns / len(whole) / 1e6}
        for name, (n, ns) in sorted(kinds.items(), key=lambda kind: -kind[1][1])
    ]
    result = {
        "steps": len(whole),
        "step_ms": length / 1e6,
        "kernels_per_step": kernels,
        "idle_share": share,
        "longest_gap_us": longest / 1e3,
        "kernels": table,
    }
    if len(sys.argv) > 2:
        json.dump(result, open(sys.argv[2], "w"), indent=1)
    print(
        f"{len(whole)} steps of {length / 1e6:.2f} ms and {kernels:.0f} activities, idle for {100 * share:.2f} % "
        f"(longest gap {longest / 1e3:.0f} us)"
    )
    for row in table[:24]:
        print(f"{row['ms_per_step']:9.3f} ms {row['per_step']:7.1f} x  {row['kernel']}")


main()
