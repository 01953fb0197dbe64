#!/usr/bin/env bash
# Runs what `cargo xtask bundle` packed, on a machine with a GPU and without Rust. Called from the root of a
# checkout: vectors and the demo are read from there. Logs go to $OUT (default: out); the exit code is 1 if
# anything failed. With names as arguments, only those tests run; with none, the command draws too.
#
#   run.sh --bench [quick|full|all] [options of mmgp-gpu-bench]
#
# runs the bench instead: it makes the weights of a FLUX.1-dev transformer, 24 GB dense and 12 GB int8, in $DIR (by
# default /dev/shm if it has room, else $TMPDIR), keeps them there for the next run, and leaves gpu.json, gpu.md and
# gpu.svg in $OUT.
set -uo pipefail

here=$(cd "$(dirname "$0")" && pwd)
out=${OUT:-out}
mkdir -p "$out"

# Programs look for assets where they were built.
built=$(cat "$here/built-in")
if [ ! -e "$built" ]; then
    mkdir -p "$(dirname "$built")" && ln -s "$PWD" "$built"
fi
if [ -z "${CUDA_HOME:-}" ]; then
    for home in /usr/local/cuda-13.0 /usr/local/cuda; do
        [ -d "$home" ] && CUDA_HOME=$home && break
    done
fi
lib=${CUDA_HOME:-/usr/local/cuda}
export LD_LIBRARY_PATH="$lib/targets/x86_64-linux/lib:$lib/lib64:${LD_LIBRARY_PATH:-}"

if [ "${1:-}" = --bench ]; then
    shift
    rows=()
    case "${1:-}" in
        quick) rows=(--quick); shift ;;
        all) rows=(--all); shift ;;
        full) shift ;;
    esac
    [ -f "$here/commit" ] && rows+=(--commit "$(cat "$here/commit")")
    [ -n "${DIR:-}" ] && rows+=(--dir "$DIR")
    "$here/mmgp-gpu-bench" --out "$out" ${rows[@]+"${rows[@]}"} "$@" 2>&1 | tee "$out/gpu-bench.log"
    exit "${PIPESTATUS[0]}"
fi

# Tests that run on any device run on the GPU.
export MMGP_TEST_DEVICE=cuda RUST_BACKTRACE=0

failed=0
for test in "$here"/tests/*; do
    name=$(basename "$test")
    if [ $# -gt 0 ] && [[ " $* " != *" $name "* ]]; then
        continue
    fi
    begun=$SECONDS
    if timeout "${LIMIT:-240}" "$test" --test-threads=1 --nocapture >"$out/$name.log" 2>&1; then
        echo "$name: ok, $((SECONDS - begun)) s"
    else
        echo "$name: FAILED ($?), $((SECONDS - begun)) s"
        tail -n 40 "$out/$name.log"
        failed=1
    fi
done
if [ $# -eq 0 ]; then
    draw=("$here/mmgp-cuda" generate "red heart" --device cuda --out "$out/red-heart.png")
    if timeout "${LIMIT:-240}" "${draw[@]}" >"$out/mmgp-cuda.log" 2>&1; then
        echo "mmgp-cuda: ok"
    else
        echo "mmgp-cuda: FAILED ($?)"
        tail -n 40 "$out/mmgp-cuda.log"
        failed=1
    fi
fi
exit $failed
