#!/usr/bin/env bash
# On a CUDA device: the GPU-marked tests, then every bench, within ten minutes; all results in one dated JSON under
# bench/results. PYTHON chooses the interpreter; COMMIT names the commit where there is no git directory.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3}
LIMIT=570  # seconds for everything
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "bench/gpu.sh: $PYTHON sees no CUDA device (or has no torch); run this on a machine that has one" >&2
    exit 1
fi
parts=$(mktemp -d) && trap 'rm -rf "$parts"' EXIT
export COMMIT=${COMMIT:-$("$PYTHON" -c 'from bench.common import find_commit; print(find_commit())')}
failed=0

# Only files with GPU tests: the others may import packages that a borrowed machine lacks.
mapfile -t tests < <(grep -rl --include='test_*.py' 'mark\.gpu' tests)
# Side by side, since compiling takes most of the time; one line a test, so that a run that is cut off still says what passed.
workers=$(nproc) && [ "$workers" -gt 12 ] && workers=12
timeout $((LIMIT / 3)) "$PYTHON" -m pytest -m gpu -n "$workers" --dist load -v "${tests[@]}" 2>&1 | tee "$parts/pytest.log"
status=${PIPESTATUS[0]}
[ "$status" -eq 0 ] || failed=1

benches=()  # bench.moe_layer, reliability and checkpoint_scale are for CPUs, bench.tune is for whoever changes tiles
for file in bench/*.py; do
    name=$(basename "$file" .py)
    case $name in __init__ | common | collect | peers | moe_layer | reliability | checkpoint_scale | tune) ;; *) benches+=("$name") ;; esac
done
left=${#benches[@]}
for name in "${benches[@]}"; do
    timeout $(((LIMIT - SECONDS) / left)) "$PYTHON" -m "bench.$name" --device cuda --json "$parts/$name.json" || {
        echo "bench/gpu.sh: bench.$name failed or ran out of time" >&2
        failed=1
    }
    left=$((left - 1))
done

"$PYTHON" -m bench.collect "$parts" "$status" || failed=1
exit $failed
