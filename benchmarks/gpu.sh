#!/usr/bin/env bash
# What only a GPU can tell. Run from the root of a checkout, with a python3 that has torch for CUDA:
#
#     bash benchmarks/gpu.sh ops       build and test the CUDA kernels, measure them and the calls of the networks
#     bash benchmarks/gpu.sh ways      quality and seconds in float32 and bfloat16, steps launched and recorded (CUDA graphs)
#     bash benchmarks/gpu.sh paper     the paper's networks: seconds an image beside the floor, launches of a step, training
#     bash benchmarks/gpu.sh peers     the same work by other programs, in float32 and in bfloat16
#     bash benchmarks/gpu.sh sanitize  look for memory errors and races of the kernels
#     bash benchmarks/gpu.sh train     make phantoms and train the four small models on them
#     bash benchmarks/gpu.sh measure   quality figures, seconds per image, images a second of the loader
#
# Several stages can be given, and are installed for once; one that fails leaves the others. Each is made to take less
# than ten minutes on one H100, and what it has printed stays if it is stopped. Results go to $OUT (default: out/).
# Packages that python3 lacks, for peers those of the extra `peers`, can lie as wheels in .whl/; knife and they are
# installed into $KNIFE_SITE (default: /tmp/knife-site).
set -euo pipefail
cd "$(dirname "$0")/.."

out=$(realpath -m "${OUT:-out}")
site=${KNIFE_SITE:-/tmp/knife-site}
data=${KNIFE_DATA:-/tmp/knife-data/phantom}
models=${KNIFE_MODELS:-/tmp/knife-models}

install() {
    mkdir -p "$out"
    local pip=(python3 -m pip install -q --no-deps --no-cache-dir --upgrade --target "$site")
    if compgen -G ".whl/*.whl" > /dev/null; then "${pip[@]}" --no-index .whl/*.whl; fi
    "${pip[@]}" --no-build-isolation .
    export PYTHONPATH="$site" PATH="$site/bin:$PATH" PYTHONUNBUFFERED=1
}

say() { printf '\n== %s\n' "$*"; }

gpu_ops() {
    export KNIFE_OPS=native
    say "which kernels run"
    python3 -c 'from knife import native, ops; [print(ops.status(d), ops.self_test(d)) for d in native.SOURCES]'
    say "tests"
    timeout 240 python3 -m pytest -q -p no:cacheprovider tests/test_ops.py tests/test_graphs.py -rs
    timeout 60 python3 -m pytest -q -p no:cacheprovider tests/test_train.py -m cuda
    say "GB/s"
    for dtype in float32 bfloat16; do
        python3 benchmarks/ops.py --device cuda --dtype "$dtype" | tee "$out/ops-$dtype.txt"
    done
    say "calls of the networks"
    timeout 100 python3 benchmarks/network.py --device cuda --repeats 20 | tee "$out/network.txt"
}

gpu_sanitize() { bash benchmarks/sanitize.sh cuda; }

# Train one network; SIGTERM after so many seconds saves, and the same command goes on from there.
train_one() {
    local network=$1 seconds=$2 steps=$3
    shift 3
    say "train $network"
    timeout --signal=TERM "$seconds" \
        knife train "$network" --data "$data" --models "$models" --preset small-64 --steps "$steps" --device cuda "$@" || [ $? = 124 ]
}

gpu_train() {
    say "phantoms"
    [ -d "$data" ] || knife phantom "$data" --count 6000 --size 64 --seed 1  # as benchmarks/starter.py
    train_one diffusion 300 "${STEPS:-30000}"
    train_one regress 60 "${TASK_STEPS:-4000}" --label "relative size of the mask, pixel by pixel"  # as starter.py
    for network in classify segment; do train_one "$network" 60 "${TASK_STEPS:-4000}"; done
    find "$models" -name '*.safetensors' ! -name '*.resume.*' -exec cp {} "$out/" \;
    ls -l "$out"
}

gpu_measure() {
    say "quality"
    timeout 400 python3 benchmarks/quality.py --device cuda --models "$models" | tee "$out/quality.txt"
    say "seconds per image"
    timeout 100 python3 benchmarks/translate.py --device cuda --models "$models" | tee "$out/translate.txt"
    say "images a second: read, and consumed"
    timeout 90 python3 benchmarks/loader.py --device cuda | tee "$out/loader.txt"
}

gpu_ways() {
    [ -d "$models" ] || models=knife/starter
    local precision graphs
    for precision in float32 bfloat16; do
        for graphs in off on; do
            say "$precision, graphs $graphs: quality, and seconds per image"
            # a step that cannot be recorded is an error here; one way that fails leaves the others
            KNIFE_GRAPHS=$graphs PYTHONWARNINGS=error:KNIFE_GRAPHS timeout 100 python3 benchmarks/quality.py --device cuda \
                --models "$models" --count 16 --precision "$precision" |& tee "$out/quality-$precision-$graphs.txt" || true
            KNIFE_GRAPHS=$graphs PYTHONWARNINGS=error:KNIFE_GRAPHS timeout 75 python3 benchmarks/translate.py --device cuda \
                --models "$models" --precision "$precision" --batch-sizes 1,16 --images 8 --repeats 1 \
                |& tee "$out/translate-$precision-$graphs.txt" || true
        done
    done
}

# Keep what a script prints in a file of results, after what is there; stopped after so many seconds, or failed, it
# leaves what it had printed.
kept() {
    local file=$1 seconds=$2
    shift 2
    timeout "$seconds" python3 "$@" |& tee -a "$out/$file" || true
}

gpu_paper() {
    rm -f "$out/paper.txt"
    local graphs cases=brats-regress,faces-regress,brats-segment
    # a step that cannot be recorded is told in its row
    export PYTHONWARNINGS=error:KNIFE_GRAPHS
    for graphs in off on; do
        say "seconds an image, graphs $graphs"
        KNIFE_GRAPHS=$graphs kept paper.txt 120 benchmarks/paper.py --device cuda --parts walks --cases $cases --most 8
    done
    say "launches of a step"
    kept paper.txt 45 benchmarks/paper.py --device cuda --parts launches --cases $cases
    say "training"
    kept paper.txt 90 benchmarks/paper.py --device cuda --parts training --cases brats-regress,faces-regress
    say "launches of a step, recorded"
    KNIFE_GRAPHS=on kept paper.txt 45 benchmarks/paper.py --device cuda --parts launches --cases $cases
    say "with the algorithms that cuDNN finds fastest"
    KNIFE_GRAPHS=on kept paper.txt 45 benchmarks/paper.py --device cuda --parts walks --cases brats-regress --most 2 --autotune
}

gpu_peers() {
    rm -f "$out/peers.txt"
    local work=brats16,faces16,brats-walk others=guided-diffusion,diffusers,monai
    say "float32"
    kept peers.txt 150 benchmarks/peers.py --device cuda --repeats 3 --only "$work,knife,$others"
    say "bfloat16, knife's steps recorded"
    KNIFE_GRAPHS=on kept peers.txt 300 benchmarks/peers.py --device cuda --precision bfloat16 --repeats 3 \
        --only "$work,knife,$others,diffusers-compile"
}

usage() { sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2; }

[ $# -gt 0 ] || usage
for stage in "$@"; do
    case "$stage" in ops | ways | paper | peers | sanitize | train | measure) ;; *) usage ;; esac
done
install && nvidia-smi -L
failed=0
for stage in "$@"; do
    "gpu_$stage" &  # in a process of its own, which ends where a command fails
    wait $! || { say "$stage failed"; failed=1; }
done
exit $failed
