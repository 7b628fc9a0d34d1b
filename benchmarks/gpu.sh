#!/usr/bin/env bash
# All GPU tests and GPU measurements in one call: benchmarks/gpu.sh OUTPUT_FOLDER
# Needs a Python with torch, torchvision and this package's dependencies importable; those that it lacks may lie as
# wheels of pure Python in .wheels/ (benchmarks/gpu_wheels.sh). Without a git repository, COMMIT says what is measured.
# Commit what lands in the folder under benchmarks/results/ with the date, the hardware and the commit. What fails is
# named at the end and does not keep the rest from running; all of it is made to fit into ten minutes.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out="${1:?usage: benchmarks/gpu.sh OUTPUT_FOLDER}"
python="${PYTHON:-python3}"
mkdir -p "$out"
out="$(cd "$out" && pwd)"
site="$(mktemp -d)"
trap 'rm -rf "$site"' EXIT
for wheel in .wheels/*.whl; do
    [[ -e $wheel ]] && "$python" -m zipfile -e "$wheel" "$site"
done
export PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
failed=()

attempt() { # NAME SECONDS COMMAND...
    timeout --kill-after=5 "$2" "${@:3}" 2>&1 | tee "$out/$1.log" || failed+=("$1")
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv >"$out/gpu.csv"
# eight processes: most of the time goes into starting ranks; warnings of other versions than ours are shown, not errors
attempt tests 220 "$python" -m pytest tests/gpu -v -n 8 --timeout 150 -W default -p no:cacheprovider -p no:benchmark
attempt step 70 "$python" benchmarks/step.py --device cuda --steps 50
attempt ceilings 120 "$python" benchmarks/ceilings.py --device cuda --seconds 0.3
for graphs in true false; do
    attempt "run-graphs-$graphs" 70 "$python" -m distill device=cuda distill.amp=bf16 teacher.amp=bf16 \
        distill.cuda_graphs="$graphs" distill.steps=500 data.image_size=32 data.batch_size=128 teacher.fit.epochs=2 \
        finetune.epochs=0 stage=distill run.dir="$out/run-graphs-$graphs"
done
cp benchmarks/results/step_cuda.json benchmarks/results/ceilings_cuda.json "$out" 2>/dev/null
if ((${#failed[@]})); then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
