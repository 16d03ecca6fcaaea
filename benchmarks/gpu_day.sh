#!/usr/bin/env bash
# What has to be measured on a GPU, in steps that can be run one by one, in any order, and again.
#   benchmarks/gpu_day.sh STEP [OUT]     STEP: correctness sanitizer bandwidth roofline train serve page, or all
# Each step takes at most 8 minutes, all together at most 25, and nothing has to be carried but this checkout and a Python with torch,
# triton, transformers and peft (PYTHON=…; default .venv/bin/python). OUT (default: gpu_day) gets STEP.md, and STEP.not where a step could
# not be done, with the reason; `page` puts them together with device and date. On a machine without a GPU the steps are rehearsed: the
# kernel in Triton's interpreter, everything else on small sizes on the CPU.
set -uo pipefail
cd "$(dirname "$0")/.."
step=${1:?which STEP? correctness sanitizer bandwidth roofline train serve page all}
out=$(mkdir -p "${2:-gpu_day}" && cd "${2:-gpu_day}" && pwd)
python=${PYTHON:-.venv/bin/python}
gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")')
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$out/triton} HF_HUB_OFFLINE=1
[ -n "$gpu" ] || export TRITON_INTERPRET=1

# run STEP COMMAND…: its output is STEP.md; a failure, or more than 8 minutes, is STEP.not
run() {
    local name=$1 code
    shift
    rm -f "$out/$name.md" "$out/$name.not"
    timeout 480 "$@" >"$out/$name.tmp" 2>"$out/$name.log"
    code=$?
    if [ $code -eq 0 ]; then
        mv "$out/$name.tmp" "$out/$name.md"
    else
        { echo "\`$*\` ended with $code:"; echo; tail -n 5 "$out/$name.tmp" "$out/$name.log"; } >"$out/$name.not"
        rm -f "$out/$name.tmp"
    fi
    echo "$name: $([ -f "$out/$name.md" ] && echo done || echo "not done, see $out/$name.not")"
}

not() {
    rm -f "$out/$1.md"
    echo "$2" >"$out/$1.not"
    echo "$1: $2"
}

one() {
    case $1 in
    correctness) run correctness "$python" -m sku_vllm.benchmarks.gpu_correctness ;;
    sanitizer)
        if [ -z "$gpu" ]; then
            not sanitizer "no GPU here"
        elif ! command -v compute-sanitizer >/dev/null; then
            not sanitizer "compute-sanitizer is not installed"
        else
            run sanitizer compute-sanitizer --tool memcheck --error-exitcode 9 "$python" -m sku_vllm.benchmarks.gpu_correctness --small
        fi
        ;;
    bandwidth) # the interpreter's speed says nothing, so the rehearsal measures the CPU's kernel
        if [ -n "$gpu" ]; then
            run bandwidth "$python" -m sku_vllm.cli bench kernel --model llama2-7b --rank 8 --rank 32 --rank 64 --rank 128
        else
            run bandwidth env -u TRITON_INTERPRET "$python" -m sku_vllm.cli bench kernel --model opt-2.7b --rank 8 --layers 1 --runs 1
        fi
        ;;
    roofline) run roofline env -u TRITON_INTERPRET "$python" -m sku_vllm.benchmarks.roofline ;;
    train)
        if [ -n "$gpu" ]; then
            run train "$python" -m sku_vllm.benchmarks.gpu_training --width 4096 --layers 32
        else
            run train env -u TRITON_INTERPRET "$python" -m sku_vllm.benchmarks.gpu_training --width 128 --layers 2
        fi
        ;;
    serve)
        if ! "$python" -c 'import vllm' 2>/dev/null; then
            not serve "vLLM is not installed"
        elif [ -z "$gpu" ]; then
            not serve "rehearsed by tests/serving, whose servers run on the CPU"
        else
            run serve "$python" -m sku_vllm.cli bench serve --only model-swap --pairs 3
        fi
        ;;
    page)
        {
            echo "# A day on ${gpu:-a machine without a GPU (a rehearsal)}"
            echo
            echo "$(date -u +%Y-%m-%d), $("$python" -c 'import torch; print("torch", torch.__version__)'). Made by \`benchmarks/gpu_day.sh\`."
            for name in correctness sanitizer bandwidth roofline train serve; do
                echo
                echo "## $name"
                echo
                if [ -f "$out/$name.md" ]; then
                    sed 's/^#/##/' "$out/$name.md"
                elif [ -f "$out/$name.not" ]; then
                    echo "Not done: $(cat "$out/$name.not")"
                else
                    echo "Not run."
                fi
            done
        } >"$out/page.md"
        echo "page: $out/page.md"
        ;;
    *)
        echo "no such step: $1" >&2
        exit 2
        ;;
    esac
}

if [ "$step" = all ]; then
    for each in correctness sanitizer bandwidth roofline train serve page; do one "$each"; done
else
    one "$step"
fi
