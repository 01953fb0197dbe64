#!/usr/bin/env python3
"""The Python systems and this one in turn on one GPU: steps of a FLUX.1-dev transformer, 4096 + 512 tokens.

Every row is a process of its own. Ours come first with all weights on the card, which makes the model's files that all
systems read; then each of the others, and right after it ours at no more VRAM than it was seen to take. At the end the
others run once more. Rows are lines of OUT/peers.jsonl as they end; out of them `mmgp-gpu-bench --peers` makes
peers.json, peers.md and peers.svg. With --resume a second call goes on where the first one stopped.

Needs Python with torch, diffusers, transformers, accelerate, mmgp and optimum-quanto (`fetch_wheels.sh`), a card of
40 GB, 50 GB in --dir, which are removed at the end, and 45 GB of RAM beside them.
"""
import argparse
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROWS = (
    "pytorch pytorch_compiled diffusers_block diffusers_leaf mmgp_int8_1200 mmgp_int8_1200_repaired mmgp_int8_4000 "
    "mmgp_int8_4000_repaired mmgp_int8_8000 mmgp_int8_8000_repaired mmgp_bf16_4000 mmgp_bf16_4000_repaired "
    "mmgp_bf16_12000 mmgp_bf16_12000_repaired"
).split()
# What a group of two blocks in bf16 needs more than the smallest of leaves.
LEAST = {"diffusers_leaf": 2_700_000_000}
# What the bench calls the form of ours: beside int8 weights it makes the rows of their input int8 too.
PRODUCTS = {"int8": "w8a8"}
# Ours may take so much less than a row that it is held against, as a part and in bytes: blocks are whole.
SLACK = (0.03, 250_000_000)
MARGIN = 32 << 20
TRIES = 3
# The most seconds that what is no row may take.
CHORE = 300
FILES = 50_000_000_000
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TQDM_DISABLE": "1",
    "PYTHONWARNINGS": "ignore",
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class TimeOver(Exception):
    pass


def options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", required=True, type=Path, metavar="PATH", help="mmgp-gpu-bench")
    parser.add_argument("--out", type=Path, default=Path("target/bench"), help="folder of results (%(default)s)")
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm"), help="the files go to mmgp-peers in it (%(default)s)")
    parser.add_argument("--rows", default=",".join(ROWS), help="of other systems, in this order (%(default)s)")
    parser.add_argument("--runs", type=int, default=2, help="processes of each, whose median counts (%(default)s)")
    parser.add_argument("--resume", action="store_true", help="keep the rows that OUT has, measure what is missing")
    parser.add_argument("--keep", action="store_true", help="leave the model's files for another call")
    parser.add_argument("--minutes", type=float, help="begin no row after so many")
    parser.add_argument("--row-seconds", type=float, default=150, help="end a row after so many (%(default)s)")
    parser.add_argument("--touch", type=float, default=0, metavar="GB", help="touch so much RAM first, where it grows with use")
    parser.add_argument("--libraries", metavar="PATHS", help="LD_LIBRARY_PATH of the bench alone: PyTorch has its own")
    parser.add_argument("--commit", help="that the bench was built from")
    parser.add_argument("--tiny", action="store_true", help="a toy of the shape, without a GPU too: tests the scripts")
    args = parser.parse_args()
    args.rows = args.rows.split(",")
    if unknown := [name for name in args.rows if name not in known()]:
        parser.error(f"no such row: {', '.join(unknown)}; there are {', '.join(known())}")
    if args.runs < 1:
        parser.error("--runs is at least 1")
    if not args.bench.is_file():
        parser.error(f"{args.bench} is not there: build it with `cargo xtask bench --peers`, or unpack the bundle")
    return args


def known():
    sys.path.insert(0, str(HERE))
    from flux import rows

    return rows()


def smi(what):
    try:
        told = subprocess.run(
            ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"], capture_output=True, text=True, check=True
        )
        return told.stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


class Comparison:
    def __init__(self, args):
        self.args, self.begun = args, time.monotonic()
        self.dir, self.path, self.log = args.dir / "mmgp-peers", args.out / "peers.jsonl", args.out / "peers.log"
        self.shape = ["--image", "4096", "--text", "512"]
        if args.tiny:
            self.shape = ["--image", "64", "--text", "16", "--depth", "2+2", "--heads", "2"]
        boot = Path("/proc/sys/kernel/random/boot_id")
        self.where = {
            "card": smi("name"),
            "driver": smi("driver_version"),
            "machine": boot.read_text()[:8] if boot.exists() else None,
            "commit": args.commit,
            "workload": "toy of FLUX.1-dev, 64 + 16 tokens" if args.tiny else "FLUX.1-dev, 4096 + 512 tokens",
        }
        self.rows, self.child = [], None
        self.quantized = any((self.dir / "flux-int8").glob("*_int8.safetensors"))
        if args.resume and self.path.exists():
            self.rows = [json.loads(line) for line in self.path.read_text().splitlines()]
            for what in ("commit", "workload"):
                if other := {row[what] for row in self.rows} - {self.where[what]}:
                    sys.exit(f"{self.path} holds rows of another {what} ({', '.join(map(str, other))})")
        else:
            for path in (self.path, self.log):
                path.unlink(missing_ok=True)

    # -------------------------------------------------------------------------------------------------- processes
    def left(self):
        over = self.args.minutes * 60 if self.args.minutes else float("inf")
        return over - (time.monotonic() - self.begun)

    def call(self, name, command, seconds, libraries=None):
        """Runs a process; what went wrong, or nothing."""
        environment = {**os.environ, **QUIET}
        if libraries:
            environment["LD_LIBRARY_PATH"] = libraries
        print(f"[{time.monotonic() - self.begun:>4.0f} s] {name}", flush=True)
        with open(self.log, "ab+") as log:
            log.write(f"=== {name}: {' '.join(map(str, command))}\n".encode())
            log.flush()
            start = log.seek(0, os.SEEK_END)
            # A session of its own, so that what it starts ends with it.
            self.child = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
            try:
                status = self.child.wait(seconds)
                wrong = f"exit status {status}" if status else None
            except subprocess.TimeoutExpired:
                wrong = f"ended after {seconds:.0f} s"
            finally:
                self.end_child()
            if not wrong:
                return None
            log.seek(start)
            lines = log.read().decode(errors="replace").strip().splitlines()
        said = [line for line in lines if "error" in line.lower()] or lines
        return f"{said[-1][:300]} ({wrong})" if said else wrong

    def end_child(self):
        if self.child is None:
            return
        try:
            os.killpg(self.child.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.child.wait()
        self.child = None

    def row(self, name, known, command, libraries=None):
        """Measures a row in a process, which leaves it in a file; adds it to the others."""
        if self.left() <= 0:
            raise TimeOver
        part = self.args.out / "peers.part"
        part.unlink(missing_ok=True)
        wrong = self.call(name, [*command, part], self.args.row_seconds, libraries)
        try:
            row = {**known, **json.loads(part.read_text()), "form": known["form"]}
        except (OSError, ValueError):
            row = {**known, "error": wrong or "left no row"}
        part.unlink(missing_ok=True)
        row.update(self.where, at=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"))
        self.rows.append(row)
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")
        if "error" in row:
            print(f"         failed: {row['error']}", flush=True)
        else:
            vram = row.get("peak_vram_bytes")
            vram = f", {vram / 1e9:.2f} GB of VRAM" if vram else ""
            print(f"         step {row['step_s']:.4f} s{vram}", flush=True)
        return row

    def script(self, *arguments):
        shape = self.shape if arguments[0] == "run" else self.shape[4:]
        return [sys.executable, HERE / "flux.py", *arguments, "--model", self.dir, *shape]

    # ------------------------------------------------------------------------------------------------------- rows
    def good(self, name):
        return [row for row in self.rows if row["row"] == name and "error" not in row]

    def resident_here(self, form):
        rows = [row for row in self.good(f"ours_{form}") if row["asked"] == "unlimited"]
        return any(row["machine"] == self.where["machine"] for row in rows)

    def ours(self, form, budget, again=False):
        """A row of ours, unless it is there already."""
        name = f"ours_{form}"
        same = [row for row in self.good(name) if row["asked"] == str(budget)]
        if same and not again:
            return same[0]
        known = {"row": name, "system": "ours", "form": form, "asked": str(budget)}
        # On the CPU, where toys are, int8 weights are expanded.
        product = form if self.args.tiny else PRODUCTS.get(form, form)
        shape = [*self.shape, "--forms", product, "--budgets", str(budget), "--dir", self.dir]
        return self.row(f"{name} at {budget}", known, [self.args.bench, *shape, "--alone"], self.args.libraries)

    def match(self, form, most):
        """Ours within so many bytes of VRAM: by what else an earlier row took, then by what this took."""
        slack = max(SLACK[0] * most, SLACK[1])
        for _ in range(TRIES):
            rows = [row for row in self.good(f"ours_{form}") if row.get("peak_vram_bytes")]
            fit = [row for row in rows if row["peak_vram_bytes"] <= most]
            if any(row["asked"] == "unlimited" or most - row["peak_vram_bytes"] <= slack for row in fit):
                return
            weights, peak = min(
                ((row["budget_bytes"] or row["held_bytes"], row["peak_vram_bytes"]) for row in rows),
                key=lambda row: (abs(row[1] - most), row[0]),
            )
            budget = weights + most - peak - MARGIN
            if budget <= 0 or "error" in self.ours(form, budget):
                # Too little for two blocks, most likely; what the least takes is told.
                self.ours(form, "min")
                return

    def theirs(self, name):
        row = known()[name]
        form = row.get("form", "bf16")
        if form == "int8" and not self.quantized:
            if self.left() <= 0:
                raise TimeOver
            # Once: where it fails, the rows that want its file tell so.
            self.quantized = True
            if wrong := self.call("mmgp makes its int8 file", self.script("quantize"), CHORE):
                print(f"         failed: {wrong}", flush=True)
        told = {"row": name, "system": row["system"], "form": form}
        return self.row(name, told, [*self.script("run", name), "--out"])

    def run(self):
        """Whether all rows are there."""
        self.dir.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.dir).free
        if not self.args.tiny and not any(self.dir.iterdir()) and free < FILES:
            sys.exit(f"{self.dir} has {free / 1e9:.1f} GB free and {FILES / 1e9:.0f} are needed: choose another --dir")
        if self.args.touch:
            touch(self.args.touch)
        for form in ("bf16", "int8"):
            # On every machine, since it makes the files too.
            if not list(self.dir.glob(f"flux-*-{form}.safetensors")) or not self.resident_here(form):
                row = self.ours(form, "unlimited", again=True)
                if "error" in row:
                    sys.exit(f"without ours there are no files: {row['error']}; {self.log} says more")
        if wrong := self.call("config", self.script("prepare"), CHORE):
            sys.exit(f"the others cannot be prepared: {wrong}; {self.log} says more")
        for run in range(self.args.runs):
            for name in self.args.rows:
                if len(self.good(name)) <= run:
                    self.theirs(name)
                peaks = [row["peak_vram_bytes"] for row in self.good(name) if row.get("peak_vram_bytes")]
                if not peaks or name.startswith("pytorch"):
                    continue
                most = max(min(peaks), LEAST.get(name, 0))
                form = known()[name].get("form", "bf16")
                for form in ("bf16", "int8") if name == "diffusers_block" else (form,):
                    self.match(form, most)
        return all(len(self.good(name)) >= self.args.runs for name in self.args.rows)


def touch(gb):
    """Uses so much RAM once, by eight processes."""
    import mmap

    pids = []
    for _ in range(8):
        pids.append(os.fork())
        if pids[-1] == 0:
            piece = b"\1" * (4 << 20)
            with mmap.mmap(-1, int(gb * 1e9 / 8)) as memory:
                for at in range(0, len(memory) - len(piece), len(piece)):
                    memory[at : at + len(piece)] = piece
            os._exit(0)
    for pid in pids:
        os.waitpid(pid, 0)


def table(args, lines):
    libraries = {"LD_LIBRARY_PATH": args.libraries} if args.libraries else {}
    command = [args.bench, "--peers", lines, "--out", args.out]
    return subprocess.run(command, env={**os.environ, **libraries}).returncode


def main():
    args = options()
    args.out.mkdir(parents=True, exist_ok=True)
    comparison = Comparison(args)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    complete = False
    try:
        complete = comparison.run()
        if not complete:
            print("some rows failed: --resume tries them again", flush=True)
    except TimeOver:
        print("time was over: --resume goes on", flush=True)
    finally:
        comparison.end_child()
        if not args.keep:
            shutil.rmtree(comparison.dir, ignore_errors=True)
        wrong = table(args, comparison.path) if comparison.rows else 1
    sys.exit(wrong or (0 if complete else 1))


if __name__ == "__main__":
    main()
