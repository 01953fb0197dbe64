#!/usr/bin/env bash
# Runs what `cargo xtask bundle` packed, on a machine with a GPU and without Rust. Called from the root of a
# checkout: vectors and the demo are read from there. Logs go to $OUT (default: out); the exit code is 1 if
# anything failed. With NAME, or NAME:FILTER for a part of it, as arguments, only those tests run; with none, the command
# draws too.
#
#   run.sh --bench [quick|full|all] [options of mmgp-gpu-bench]
#
# runs the bench instead: it makes the weights of a FLUX.1-dev transformer, 24 GB dense and 12 GB int8, in $DIR (by
# default /dev/shm if it has room, else $TMPDIR), keeps them there for the next run, and leaves gpu.json, gpu.md and
# gpu.svg in $OUT.
#
#   run.sh --memory
#
# shows what the command takes beside others: a pipeline of FLUX.1-dev's and T5-XXL's size, int8, 1024x1024, first
# with all of the card, then under --vram-limit $LIMIT_GB (6) GB on a card that another process filled but for that
# and the margin, while a third takes 2.5 GB for a while. Needs Python, 51 GB in $DIR and $STEPS (64) steps of about
# a third of a second. Leaves memory.json in $OUT, and the samples that it was made of.
#
#   run.sh --video cogvideox-5b|hunyuanvideo
#
# draws a video with a pipeline of that size, int8, under --vram-limit $LIMIT_GB (8) GB: $STEPS (6) steps and the
# decode, at 720x480 and 49 frames or 960x544 and 61. Then a step of diffusers' with group offloading, where Python has
# diffusers. Needs 34 or 66 GB in $DIR, which are removed after. Leaves video.json in $OUT, and what it was made of.
#
#   run.sh --vae
#
# decodes pictures of $PIXELS (1024) a side with FLUX' autoencoder here, then in PyTorch where Python has diffusers.
# Leaves vae.json, an object for each, in $OUT.
#
#   run.sh --trace [forms]
#
# writes down what the GPU does in steps of that FLUX.1-dev with all weights on the card, 4096 + 512 tokens, in each of the
# forms (bf16): how long it is idle, and which kernels take how long. Needs a C compiler, and CUPTI, of the CUDA toolkit or of
# Python's packages. Leaves trace-FORM.json in $OUT.
#
#   run.sh --sanitize [NAME[:FILTER] ...]
#
# has compute-sanitizer look on while each kernel is tested (by the self-tests, or the tests that are named): bounds and
# alignment of what is read and written, then races in shared memory, of which those within cublasLt's own kernels are told, but are no failure.
# Calls that the driver refuses are not errors: a test asks for a card that there is not.
#
#   run.sh --peers [options of benches/peers/compare.py]
#
# takes steps of that FLUX.1-dev in PyTorch, diffusers, Python mmgp and here, in turn, ours at no more VRAM than each of
# the others took. Needs a Python with them (those that are missing are read from wheels in $WHEELS, which
# benches/peers/fetch_wheels.sh fetches) and 50 GB in $DIR, which are removed after. Leaves peers.json, peers.md and
# peers.svg in $OUT; what is missing when --minutes are over, a second call with --resume measures.
set -uo pipefail
if [[ "${1:-}" = -h || "${1:-}" = --help ]]; then
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
    exit 0
fi

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
before=${LD_LIBRARY_PATH:-}
export LD_LIBRARY_PATH="$lib/targets/x86_64-linux/lib:$lib/lib64:${LD_LIBRARY_PATH:-}"
# cuDNN is the system's, or else the one that Python's packages brought.
if [ -z "${MMGP_CUDNN:-}" ] && ! ldconfig -p | grep -q 'libcudnn\.so\.9'; then
    found=$(python3 -c 'import nvidia.cudnn as c; print(c.__path__[0])' 2>/dev/null)/lib/libcudnn.so.9
    [ -e "$found" ] && export MMGP_CUDNN=$found
fi

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

if [ "${1:-}" = --memory ]; then
    dir=${DIR:-/dev/shm}/mmgp-memory
    steps=${STEPS:-64}
    limit=$((${LIMIT_GB:-6} * 1000000000))
    now() { date +%s.%N; }
    [ -e "$dir/flux/model_index.json" ] ||
        "$here/mmgp-synth" flux-dev --depth 19+38 --text-depth 24 --dir "$dir/flux" || exit 1
    draw=("$here/mmgp-cuda" generate "a red heart" --device cuda --model "$dir/flux" --store "$dir/store"
        --quantize transformer,text_encoder_2 --width 1024 --height 1024 --steps "$steps")
    echo "resident"
    "${draw[@]}" --out "$out/resident.png" >"$out/resident.log" 2>&1 || { tail -n 20 "$out/resident.log"; exit 1; }
    # A group of its own for the run, where one can be made.
    group=/sys/fs/cgroup/mmgp-memory
    if mkdir -p "$group" 2>/dev/null && echo 16000000000 2>/dev/null >"$group/memory.max"; then
        echo "in a cgroup of 16 GB"
    else
        echo "no cgroup can be made here"
        group=
    fi
    python3 "$here/vram.py" leave $((limit + 512000000)) >"$out/ballast.log" 2>&1 &
    ballast=$!
    until grep -q left "$out/ballast.log"; do
        kill -0 $ballast 2>/dev/null || { echo "no ballast"; cat "$out/ballast.log"; exit 1; }
        sleep 0.1
    done
    nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits -lms 20 \
        > >(while read -r mib; do echo "$(now) $mib"; done >"$out/card.txt") &
    sampler=$!
    sleep 1
    echo "beside others, within $limit bytes"
    now >"$out/run.txt"
    (
        [ -n "$group" ] && echo $BASHPID >"$group/cgroup.procs"
        exec "${draw[@]}" --vram-limit "$limit" --out "$out/limited.png"
    ) > >(while IFS= read -r line; do echo "$(now) $line"; done >"$out/limited.log") 2>&1 &
    run=$!
    while kill -0 $run 2>/dev/null; do
        kib=$(awk '/^VmRSS/ {print $2}' "/proc/$run/status" 2>/dev/null)
        [ -n "$kib" ] && echo "$(now) $kib"
        sleep 0.02
    done >"$out/host.txt" &
    # The third comes once steps are steady.
    until grep -q " step 5 of" "$out/limited.log" || ! kill -0 $run 2>/dev/null; do sleep 0.05; done
    python3 "$here/vram.py" take 2500000000 3 >"$out/taker.json"
    wait $run
    failed=$?
    now >>"$out/run.txt"
    sleep 0.5 # for what writes the log
    kill $sampler $ballast
    [ $failed = 0 ] || { echo "the run failed"; tail -n 20 "$out/limited.log"; exit 1; }
    python3 "$here/memory.py" "$out" "$limit"
    exit $?
fi

if [ "${1:-}" = --video ]; then
    family=${2:?a family: cogvideox-5b or hunyuanvideo}
    dir=${DIR:-/dev/shm}/mmgp-video
    limit=$((${LIMIT_GB:-8} * 1000000000))
    case $family in
        cogvideox-5b) size=(--width 720 --height 480 --frames 49) ;;
        hunyuanvideo) size=(--width 960 --height 544 --frames 61) ;;
        *) echo "$family: expected cogvideox-5b or hunyuanvideo"; exit 1 ;;
    esac
    now() { date +%s.%N; }
    trap 'rm -rf "$dir"' EXIT
    "$here/mmgp-synth" "$family" --dir "$dir/model" || exit 1
    nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits -lms 20 \
        > >(while read -r mib; do echo "$(now) $mib"; done >"$out/card.txt") &
    sampler=$!
    sleep 1
    now >"$out/run.txt"
    TMPDIR=${DIR:-/dev/shm} "$here/mmgp-cuda" generate "a dog runs through the snow" --device cuda \
        --model "$dir/model" --quantize transformer,text_encoder --store "$dir/store" --store-spare 1GB \
        --vram-limit "$limit" --steps "${STEPS:-6}" "${size[@]}" --out "$out/video.mp4" >"$out/video.log" 2>&1 &
    run=$!
    while kill -0 $run 2>/dev/null; do
        awk '/^VmRSS/ {print "rss", $2} /^RssAnon/ {print "anonymous", $2} /^VmLck/ {print "locked", $2}' \
            "/proc/$run/status" 2>/dev/null
        sleep 0.1
    done >"$out/host.txt" &
    wait $run
    failed=$?
    now >>"$out/run.txt"
    kill $sampler
    [ $failed = 0 ] || { echo "the run failed"; tail -n 20 "$out/video.log"; exit 1; }
    if python3 -c 'import diffusers' 2>/dev/null; then
        python3 "$PWD/benches/peers/video.py" "$family" "${size[@]}" >"$out/peer.json" || rm "$out/peer.json"
    fi
    python3 "$here/video.py" "$out" "$family" "$limit"
    exit $?
fi

if [ "${1:-}" = --vae ]; then
    dir=${DIR:-/dev/shm}/mmgp-vae
    mkdir -p "$dir" || exit 1
    trap 'rm -rf "$dir"' EXIT
    pixels=${PIXELS:-1024}
    "$here/mmgp-gpu-bench" --vae "$out/vae.json" --pixels "$pixels" --dir "$dir" || exit 1
    echo >>"$out/vae.json"
    if python3 -c 'import diffusers' 2>/dev/null; then
        python3 "$PWD/benches/peers/vae.py" --pixels "$pixels" | tee -a "$out/vae.json"
    fi
    exit $?
fi

if [ "${1:-}" = --trace ]; then
    shift
    cupti=$lib/extras/CUPTI
    if [ ! -e "$cupti/include/cupti.h" ]; then
        cupti=$(python3 -c 'import nvidia.cu13 as c; print(list(c.__path__)[0])' 2>/dev/null)
    fi
    [ -e "$cupti/include/cupti.h" ] || { echo "CUPTI's headers are neither in $lib nor in Python's packages"; exit 1; }
    trace=$(mktemp -d) || exit 1
    trap 'rm -rf "$trace"' EXIT
    cc -shared -fPIC -O2 -I"$cupti/include" -I"$lib/targets/x86_64-linux/include" -I"$lib/include" \
        "$here/trace.c" -o "$trace/trace.so" -L"$cupti/lib64" -L"$cupti/lib" -l:libcupti.so.13 || exit 1
    failed=0
    for form in "${@:-bf16}"; do
        row=(--forms "$form" --budgets unlimited --image 4096 --alone "$out/traced-$form.json")
        [ -n "${DIR:-}" ] && row+=(--dir "$DIR")
        if LD_LIBRARY_PATH="$cupti/lib64:$cupti/lib:$LD_LIBRARY_PATH" MMGP_TRACE=$trace/$form \
            CUDA_INJECTION64_PATH=$trace/trace.so "$here/mmgp-gpu-bench" "${row[@]}" >"$out/traced-$form.log" 2>&1; then
            echo "$form:"
            python3 "$here/trace.py" "$trace/$form" "$out/trace-$form.json" || failed=1
        else
            echo "$form: the row failed"
            tail -n 20 "$out/traced-$form.log"
            failed=1
        fi
    done
    exit $failed
fi

if [ "${1:-}" = --sanitize ]; then
    shift
    sanitizer=$(command -v compute-sanitizer || echo "$lib/bin/compute-sanitizer")
    [ -x "$sanitizer" ] || { echo "compute-sanitizer, which comes with the CUDA toolkit, is not there"; exit 1; }
    export MMGP_TEST_DEVICE=cuda RUST_BACKTRACE=0
    failed=0
    [ $# -gt 0 ] || set -- cuda_quant:self_test cuda_models:nn::cuda_nn_self_test
    for test in "$@"; do
        name=${test%%:*}
        only=()
        [ "$test" = "$name" ] || only=("${test#*:}")
        for tool in memcheck racecheck; do
            begun=$SECONDS
            log=$out/${test//:/-}-$tool.log
            timeout "${LIMIT:-480}" "$sanitizer" --tool $tool --report-api-errors no --error-exitcode 9 --print-limit 10000 \
                "$here/tests/$name" ${only[@]+"${only[@]}"} --test-threads=1 --nocapture >"$log" 2>&1
            code=$?
            told="$test, $tool"
            theirs=$(grep -ac 'Race reported between .* access at nvjet_' "$log")
            if [ $code = 9 ] && [ "$theirs" -gt 0 ] && grep -aEq "\($theirs errors?, 0 warnings\)" "$log"; then
                code=0
                told="$told, but for $theirs reports within cublasLt's kernels"
            fi
            grep -aq 'test result: ok\. [1-9]' "$log" || code=${code/#0/1}
            if [ $code = 0 ]; then
                echo "$told: clean, $((SECONDS - begun)) s"
            else
                echo "$told: FAILED ($code), $((SECONDS - begun)) s"
                grep -a '=========' "$log" | grep -av nvjet_ | head -n 40
                failed=1
            fi
        done
    done
    exit $failed
fi

if [ "${1:-}" = --peers ]; then
    shift
    options=(--bench "$here/mmgp-gpu-bench" --out "$out" --libraries "$LD_LIBRARY_PATH")
    [ -f "$here/commit" ] && options+=(--commit "$(cat "$here/commit")")
    [ -n "${DIR:-}" ] && options+=(--dir "$DIR")
    # PyTorch brings libraries of its own.
    if [ -n "$before" ]; then LD_LIBRARY_PATH=$before; else unset LD_LIBRARY_PATH; fi
    site=
    if [ -n "${WHEELS:-}" ]; then
        site=$(mktemp -d) || exit 1
        trap 'rm -rf "$site"' EXIT
        python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$WHEELS"/*.whl ||
            { echo "the wheels in $WHEELS cannot be installed"; exit 1; }
        export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
    fi
    python3 "$PWD/benches/peers/compare.py" "${options[@]}" "$@"
    exit $?
fi

# Tests that run on any device run on the GPU.
export MMGP_TEST_DEVICE=cuda RUST_BACKTRACE=0

failed=0
tests=("$@")
[ $# -gt 0 ] || for test in "$here"/tests/*; do tests+=("$(basename "$test")"); done
for test in "${tests[@]}"; do
    name=${test%%:*}
    [ -x "$here/tests/$name" ] || { echo "$test: there is no $name in $here/tests"; failed=1; continue; }
    only=()
    [ "$test" = "$name" ] || only=("${test#*:}")
    log=$out/${test//:/-}.log
    begun=$SECONDS
    if timeout "${LIMIT:-480}" "$here/tests/$name" ${only[@]+"${only[@]}"} --test-threads=1 --nocapture >"$log" 2>&1 &&
        grep -aq 'test result: ok\. [1-9]' "$log"; then
        echo "$test: ok, $((SECONDS - begun)) s"
    else
        echo "$test: FAILED ($?), $((SECONDS - begun)) s"
        tail -n 40 "$log"
        failed=1
    fi
done
if [ $# -eq 0 ]; then
    draw=("$here/mmgp-cuda" generate "red heart" --device cuda --out "$out/red-heart.png")
    if timeout "${LIMIT:-480}" "${draw[@]}" >"$out/mmgp-cuda.log" 2>&1; then
        echo "mmgp-cuda: ok"
    else
        echo "mmgp-cuda: FAILED ($?)"
        tail -n 40 "$out/mmgp-cuda.log"
        failed=1
    fi
fi
exit $failed
