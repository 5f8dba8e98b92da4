#!/bin/sh
# Makes .venv-sat, the environment of tests/peers/sat_oracle.py: SwissArmyTransformer alone, on top of
# the packages that .venv already has. It runs in seconds and always starts afresh.
set -eu
cd "$(dirname "$0")/../.."
base=$(.venv/bin/python -c 'import sysconfig, torch; print(sysconfig.get_path("purelib"))')
rm -rf .venv-sat
.venv/bin/python -m venv --without-pip .venv-sat
# --no-deps: its requirements (deepspeed, datasets, boto3, ...) are not called by the two models compared.
.venv/bin/python -m pip --python .venv-sat/bin/python install --quiet --no-deps \
    SwissArmyTransformer==0.4.12
echo "$base" > "$(.venv-sat/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
PYTHONPATH=tests/peers .venv-sat/bin/python -c 'import sat_oracle; sat_oracle.import_sat("GLM130B")'
