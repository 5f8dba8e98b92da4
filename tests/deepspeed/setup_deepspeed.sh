#!/bin/sh
# Makes .venv-deepspeed, the environment of the scripts run under real DeepSpeed: DeepSpeed and what it
# imports, on top of the packages that .venv already has. It runs in a minute and always starts afresh.
set -eu
cd "$(dirname "$0")/../.."
base=$(.venv/bin/python -c 'import sysconfig, torch; print(sysconfig.get_path("purelib"))')
rm -rf .venv-deepspeed
.venv/bin/python -m venv --without-pip .venv-deepspeed
echo "$base" > "$(.venv-deepspeed/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
.venv/bin/python -m pip --python .venv-deepspeed/bin/python install --quiet \
    einops hjson msgpack py-cpuinfo pydantic psutil tqdm
# its setup.py imports torch, which an isolated build would not see
DS_BUILD_OPS=0 DS_ACCELERATOR=cpu .venv/bin/python -m pip --python .venv-deepspeed/bin/python install --quiet \
    --no-build-isolation --no-deps deepspeed==0.19.8
DS_ACCELERATOR=cpu .venv-deepspeed/bin/python -c 'import deepspeed'
