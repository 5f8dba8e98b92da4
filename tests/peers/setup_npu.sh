#!/bin/sh
# Makes .venv-npu, the environment of tests/peers/npu_dry_run.py: the real torch_npu on top of the
# packages that .venv already has, and stub CANN libraries for it to load. It runs in seconds and
# always starts afresh.
set -eu
cd "$(dirname "$0")/../.."
base=$(.venv/bin/python -c 'import sysconfig, torch; print(sysconfig.get_path("purelib"))')
rm -rf .venv-npu
trap 'rm -rf .venv-npu' EXIT  # half of it would pass for the whole
.venv/bin/python -m venv --without-pip .venv-npu
# --no-deps: torch itself is .venv's
.venv/bin/python -m pip --python .venv-npu/bin/python install --quiet --no-deps torch_npu==2.13.0
site=$(.venv-npu/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "$base" > "$site/base.pth"
.venv-npu/bin/python tests/peers/cann_stubs.py "$site/torch_npu" .venv-npu/cann
TORCH_DEVICE_BACKEND_AUTOLOAD=0 LD_LIBRARY_PATH="$PWD/.venv-npu/cann" \
    .venv-npu/bin/python -c 'import torch_npu; assert torch_npu.npu.is_available()'
trap - EXIT
