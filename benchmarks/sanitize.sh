#!/usr/bin/env bash
# Do the kernels read and write what is theirs, and nothing else? Run from the root of a checkout, in its environment:
#
#     bash benchmarks/sanitize.sh core       the kernels without torch, all shapes: AddressSanitizer and
#                                            UndefinedBehaviorSanitizer, ThreadSanitizer, and of the CPU's (tests/core.cpp) also
#                                            valgrind on optimised code; those of CUDA run on a CPU (tests/cuda_core.cpp)
#     bash benchmarks/sanitize.sh library    the library as torch calls it: tests of its ops under both of the first
#     bash benchmarks/sanitize.sh cuda       compute-sanitizer on the tests of the CUDA kernels: memory, races
#
# Each stage also makes something wrong on purpose, where it can, and fails if that is not seen. CXX is the compiler, PYTHON the
# python (default: python3); what is missing is said and skipped.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

say() { printf '\n== %s\n' "$*"; }

has() { command -v "$1" > /dev/null || { echo "no $1: skipped"; return 1; }; }

compile() {  # OUTPUT FLAGS...
    ${CXX:-c++} -std=c++20 -DKNIFE_WITHOUT_TORCH -pthread -Icsrc "tests/${source:-core}.cpp" -o "$scratch/$1" "${@:2}"
}

seen() {  # COMMAND... WRONG: which must fail
    if "$@" > "$scratch/log" 2>&1; then echo "not seen: $*"; exit 1; fi
    local sign='AddressSanitizer: [a-z-]+|runtime error: [a-z ]+|data race|Invalid (read|write)|uninitialised|instead of'
    echo "seen: ${*: -1} ($(grep -aoEm1 "$sign" "$scratch/log"))"
}

sanitize_core() {
    say "AddressSanitizer, UndefinedBehaviorSanitizer"
    compile address -g -O1 -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all
    "$scratch/address"
    for wrong in read write overflow sum; do seen "$scratch/address" all "$wrong"; done
    say "ThreadSanitizer"
    compile thread -g -O1 -fsanitize=thread
    "$scratch/thread" all threads
    seen "$scratch/thread" all race
    say "valgrind, as the library is compiled for AVX2"
    if has valgrind; then
        compile optimised -g -O3 -ffp-contract=off -fno-math-errno -fno-trapping-math -mavx2 -mfma -mf16c
        valgrind -q --error-exitcode=1 --leak-check=full "$scratch/optimised"
        for wrong in read write unset; do seen valgrind -q --error-exitcode=1 "$scratch/optimised" all "$wrong"; done
    fi
    sanitize_twin
}

sanitize_twin() {
    local source=cuda_core few=(-DKNIFE_NORM_THREADS=24 -DKNIFE_STEP_THREADS=24)
    say "the CUDA kernels on a CPU: AddressSanitizer, UndefinedBehaviorSanitizer"
    compile twin -g -O1 "${few[@]}" -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all
    "$scratch/twin"
    for wrong in read write sum; do seen "$scratch/twin" all "$wrong"; done
    seen "$scratch/twin" norms room
    say "the CUDA kernels on a CPU: ThreadSanitizer"
    compile twin-thread -g -O1 "${few[@]}" -fsanitize=thread
    "$scratch/twin-thread"
    for kernels in steps norms; do seen "$scratch/twin-thread" "$kernels" barrier; done
    say "the CUDA kernels on a CPU: blocks of as many threads as on a GPU"
    compile twin-whole -g -O1 -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all
    "$scratch/twin-whole" all few
}

sanitize_library() {
    say "the library under AddressSanitizer and UndefinedBehaviorSanitizer"
    local cxx=${CXX:-g++} tests="kernel_equals or norm_equals or norm_has or winograd_convolves or thread"
    if ! "$cxx" --version | grep -qi 'gcc\|g++'; then echo "$cxx is not GCC, whose runtime is loaded ahead: skipped"; return; fi
    local ahead
    ahead="$("$cxx" -print-file-name=libasan.so) $("$cxx" -print-file-name=libubsan.so)"
    export KNIFE_OPS=native XDG_CACHE_HOME="$scratch/cache"
    export CXX="env -u LD_PRELOAD $cxx -g1 -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all"
    "$python" -c 'from knife import ops; print(ops.native._cached_library("cpu")[1])'
    LD_PRELOAD="$ahead" ASAN_OPTIONS=detect_leaks=0 \
        "$python" -m pytest -q -x -p no:cacheprovider tests/test_ops.py -k "($tests) and not cuda"
}

sanitize_cuda() {
    say "compute-sanitizer"
    if ! has compute-sanitizer || ! has nvidia-smi; then return; fi
    local compared="kernel_equals_reference or norm_equals_reference or norm_has_the_gradients"
    local small="($compared) and cuda and float32 and (contiguous or slice)"
    for tool in memcheck racecheck; do
        say "compute-sanitizer $tool"
        KNIFE_OPS=native PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 100 compute-sanitizer --tool "$tool" --error-exitcode 1 \
            "$python" -m pytest -q -p no:cacheprovider tests/test_ops.py -k "$small"
    done
}

case "${1:-}" in
    core | library | cuda) "sanitize_$1" ;;
    "") for stage in core library cuda; do "sanitize_$stage"; done ;;
    *) sed -n '2,12s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
