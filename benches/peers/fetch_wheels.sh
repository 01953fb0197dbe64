#!/usr/bin/env bash
# Downloads the Python packages that a machine with torch 2.11, transformers 5.17, accelerate 1.15 and safetensors 0.8
# still misses for `compare.py`, for Python 3.12 on Linux x86-64, 6.6 MB:
#
#   fetch_wheels.sh FOLDER
#
# There: pip install --no-index --no-deps --target SITE FOLDER/*.whl, and PYTHONPATH=SITE.
set -euo pipefail
case "${1:---help}" in
    -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
esac
folder=$1
packages=(diffusers==0.42.1 mmgp==3.8.2 optimum-quanto==0.2.7 importlib_metadata==8.7.1)
mkdir -p "$folder"
python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 -d "$folder" "${packages[@]}"
ls -l "$folder"
