#!/usr/bin/env python3
"""What drawing a video took: reads what `run.sh --video` left in a folder and writes video.json there; the exit code is
1 if a bar was missed.

    video.py FOLDER FAMILY LIMIT_BYTES
"""
import json
import re
import sys
from pathlib import Path

folder, family, limit = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])


def text(name):
    path = folder / name
    return path.read_text(errors="replace") if path.exists() else ""


log = text("video.log")
# MiB of the card in use by all, before the run and during it.
card = [(float(at), int(mib) << 20) for at, mib in (line.split() for line in text("card.txt").splitlines())]
begun, ended = (float(line) for line in text("run.txt").splitlines())
idle = max(used for at, used in card if at < begun)
used = max(used for at, used in card if begun < at < ended) - idle
host = {"rss": 0, "anonymous": 0, "locked": 0}
for line in text("host.txt").splitlines():
    name, kib = line.split()
    host[name] = max(host[name], int(kib) << 10)
steps = [float(took) for took in re.findall(r"^step \d+ of \d+: ([0-9.]+) s", log, re.M)]
told = re.search(r"a step took ([0-9.]+) s, ([0-9.]+) of the ([0-9.]+) s of its schedule", log)
frames = re.search(r"^(\d+) frames: ([0-9.]+) s", log, re.M)
peer = json.loads(text("peer.json") or "null")
result = {
    "family": family,
    "limit_bytes": limit,
    "most_vram_bytes": used,
    "host_bytes": host,
    "step_times_s": steps,
    "step_s": float(told[1]) if told else None,
    "schedule_s": float(told[3]) if told else None,
    "schedule_ratio": float(told[2]) if told else None,
    "frames": int(frames[1]) if frames else None,
    "decode_s": float(frames[2]) if frames else None,
    "latents": (re.findall(r"latents ([0-9a-f]{32})", log) or [None])[-1],
    "report": [line for line in log.splitlines() if re.match(r"^(model|text_encoder|transformer|vae|all|\S+ GB streamed)", line)],
    "peer": peer,
    "peer_ratio": peer["step_s"] / float(told[1]) if peer and told else None,
    "within_limit": used <= limit,
    "follows_the_schedule": told is not None and float(told[2]) <= 1.03,
    "complete": frames is not None,
}
(folder / "video.json").write_text(json.dumps(result, indent=1) + "\n")
print(json.dumps(result, indent=1))
sys.exit(not all(value for value in result.values() if isinstance(value, bool)))
