#!/usr/bin/env bash
# The step of the action that installs: this checkout of backdoorscan, with PyTorch for CPUs, apart from the job's own
# packages. Python's -I keeps modules that lie in the repository under test out of the way.
set -euo pipefail

home=$RUNNER_TEMP/backdoorscan
python=$home/venv/bin/python
constraints=$GITHUB_ACTION_PATH/constraints.txt
mkdir -p "$home/cache"

"$INPUT_PYTHON" -I -m venv "$home/venv"
# Elsewhere the same versions come with gigabytes of CUDA.
"$python" -I -m pip install --quiet --disable-pip-version-check \
  --index-url https://download.pytorch.org/whl/cpu --requirement "$constraints"
printf '%s\n' "$INPUT_PACKAGES" > "$home/packages.txt"
"$python" -I -m pip install --quiet --disable-pip-version-check \
  --constraint "$constraints" --requirement "$home/packages.txt" "$GITHUB_ACTION_PATH"

# A run takes up what the last one of the same models left, and leaves more: every cache has a name of its own.
models=$(printf '%s\n' "$INPUT_MODELS" "$INPUT_MANIFEST" | cksum | cut -d ' ' -f 1)
keys=backdoorscan-$RUNNER_OS-$models-
{
  echo "python=$python"
  echo "cache=$home/cache"
  echo "keys=$keys"
  echo "key=$keys$GITHUB_RUN_ID-$GITHUB_RUN_ATTEMPT-$RANDOM"
} >> "$GITHUB_OUTPUT"
