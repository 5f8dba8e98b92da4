#!/bin/sh
# Makes .venv-openvino, the environment of tests/backends/test_onnxrt_provider.py: onnxruntime-openvino
# replaces onnxruntime, so it lies alone on top of the packages that .venv already has. It always starts
# afresh: about 5 s and 260 MB.
set -eu
cd "$(dirname "$0")/../.."
base=$(.venv/bin/python -c 'import sysconfig, torch; print(sysconfig.get_path("purelib"))')
rm -rf .venv-openvino
.venv/bin/python -m venv --without-pip .venv-openvino
# --no-deps: numpy and protobuf come from .venv, which the .pth file below puts behind this environment
.venv/bin/python -m pip --python .venv-openvino/bin/python install --quiet --no-deps \
    onnxruntime-openvino==1.24.1
echo "$base" > "$(.venv-openvino/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
.venv-openvino/bin/python -c 'import onnxruntime as o; assert "OpenVINOExecutionProvider" in o.get_available_providers()'
