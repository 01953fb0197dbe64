#!/usr/bin/env python3
"""What a run took of card and host while others wanted memory: reads what `run.sh --memory` left in a folder and
writes memory.json there; the exit code is 1 if a bar was missed.

    memory.py FOLDER LIMIT_BYTES
"""
import json
import re
import sys
from pathlib import Path

folder, limit = Path(sys.argv[1]), int(sys.argv[2])


def lines(name):
    return [line.split() for line in (folder / name).read_text().splitlines()]


def text(name):
    return (folder / name).read_text(errors="replace")


def latents(name):
    found = re.findall(r"latents ([0-9a-f]{32})", text(name))
    return found[-1] if found else None


# Seconds and MiB of the card that are in use, by all; the first lines are of the ballast alone.
card = [(float(at), int(mib) << 20) for at, mib in lines("card.txt")]
host = [(float(at), int(kib) << 10) for at, kib in lines("host.txt")]
begun, ended = (float(at) for (at,) in lines("run.txt"))
story = json.loads(text("taker.json"))
ballast = max(used for at, used in card if at < begun)
had = sum(piece["bytes"] for piece in story["pieces"])


def most(since, until):
    return max(used for at, used in card if since < at < until) - ballast


# Until the taker comes, and once its memory is gone, which takes a moment: all but the ballast is ours.
during = [used for at, used in card if story["ended"] - 0.5 < at < story["ended"]]
gone = next(at for at, used in card if at > story["ended"] and used < min(during) - 0.9 * had)
before = most(begun, story["started"])
steady = most(story["started"] - 1.5, story["started"])
least = min(during) - ballast - had
back = next((at for at, used in card if at > gone and used - ballast >= 0.95 * steady), None)
after = most(gone, ended)
# What each step took, and when that was told: at its end, or where its steps wait for copies, at that of the next one.
steps = re.findall(r"^([0-9.]+) step \d+ of \d+: ([0-9.]+) s", text("limited.log"), re.M)
ends = [float(at) for at, _ in steps]
times = [float(took) for _, took in steps]
step = sorted(times)[len(times) // 2]


# Memory is looked at every 20 ms, and what it was is read up to so much later.
SAMPLE = 0.02


def within_two_steps(since, until):
    """Whether `until` comes before two steps have ended since."""
    after = [at for at in ends if at > since]
    return until is not None and len(after) >= 2 and until <= after[1] + SAMPLE


result = {
    "limit_bytes": limit,
    "most_bytes_before": before,
    "most_bytes_after": after,
    "steady_bytes": steady,
    "least_bytes_beside_the_taker": least,
    "taker_wanted_bytes": story["wanted"],
    "taker_had_bytes": had,
    "taker_waited_s": story["had"] - story["begun"],
    "back_after_s": back - gone if back else None,
    "steps_ended_after_s": [round(at - gone, 3) for at in ends if at > gone][:3],
    "step_s": step,
    "step_times_s": times,
    "host_rss_bytes": max(rss for _, rss in host),
    "latents_resident": latents("resident.log"),
    "latents_limited": latents("limited.log"),
}
result["within_limit"] = max(before, after) <= limit
result["taken_in_two_steps"] = result["taker_had_bytes"] >= story["wanted"] and (
    within_two_steps(story["begun"], story["had"])
)
result["back_in_two_steps"] = within_two_steps(gone, back)
result["same_latents"] = (
    result["latents_resident"] is not None
    and result["latents_resident"] == result["latents_limited"]
)
result["host_within_16_gb"] = result["host_rss_bytes"] <= 16_000_000_000
(folder / "memory.json").write_text(json.dumps(result, indent=1) + "\n")
print(json.dumps(result, indent=1))
sys.exit(not all(value for value in result.values() if isinstance(value, bool)))
