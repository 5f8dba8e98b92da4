#!/usr/bin/env bash
# Makes an emulated arm64 system with torch and this project in it, and runs a command there.
# Usage, as root on a Debian x86-64 machine:
#   tests/versions/emulated_arm64.sh FOLDER [COMMAND ...]   # by default conformance of the cpu backend
# It takes 2 GB, and half an hour the first time. The project is installed by its own setup.py; only
# the compiler is the host's cross compiler, since an emulated one takes an hour for torch's headers.
# QEMU_CPU=cortex-a76 stands for a Kunpeng 920, QEMU_CPU=max for a chip with SVE, i8mm and bf16.
set -euo pipefail
cd "$(dirname "$0")/../.."
root=$(realpath -m "${1:?folder}")
shift
torch=2.7.1
triple=aarch64-linux-gnu
[ "$(id -u)" = 0 ] || { echo "chroot and mount need root; run it with sudo" >&2; exit 2; }
apt-get install -y -qq g++-$triple qemu-user-static binfmt-support debootstrap >/dev/null

binfmt=/proc/sys/fs/binfmt_misc
mountpoint -q $binfmt || mount -t binfmt_misc none $binfmt
[ -e $binfmt/qemu-aarch64 ] || update-binfmts --enable qemu-aarch64
if [ ! -e "$root/installed" ]; then
  mirror=$(grep -h '^URIs' /etc/apt/sources.list.d/* | head -1 | awk '{print $2}')
  debootstrap --arch=arm64 --variant=minbase --include=python3,python3-venv,python3-dev bookworm "$root" "$mirror"
  touch "$root/installed"
fi

# The host's pip unpacks the wheels: an emulated one takes ten minutes.
packages="$root/env/lib/python3.11/site-packages"
if [ ! -e "$root/env/ready" ]; then
  put() {
    python3 -m pip install -q --target "$packages" --only-binary=:all: --python-version 311 \
      --platform manylinux_2_28_aarch64 --platform manylinux2014_aarch64 \
      --platform manylinux_2_17_aarch64 "$@"
  }
  chroot "$root" python3 -m venv --without-pip /env
  put --no-deps torch==$torch
  put pip 'setuptools>=77' wheel ninja numpy safetensors sentencepiece jinja2 onnx onnxscript onnxruntime \
    sympy networkx fsspec filelock
  touch "$root/env/ready"
fi

# The host's compiler runs inside as it is, once its folders and its loader are visible there.
unmount() {
  for folder in $mounted; do umount "$root$folder"; done
}
mounted=""
trap unmount EXIT
for folder in /usr/lib/x86_64-linux-gnu /usr/lib/gcc-cross /usr/$triple /usr/libexec/gcc-cross /proc; do
  [ -d $folder ] || continue
  mkdir -p "$root$folder"
  mount --bind $folder "$root$folder"
  mounted="$folder $mounted"
done
mkdir -p "$root/lib64"
ln -sf /usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2 "$root/lib64/"
cp --remove-destination -L /usr/bin/$triple-{g++,as,ld} "$root/usr/bin/"

rm -rf "$root/glm_core" && mkdir "$root/glm_core"
git archive HEAD | tar -x -C "$root/glm_core"
sources=$(git rev-parse HEAD:csrc HEAD:setup.py)
inside() { chroot "$root" env PATH=/env/bin:/usr/bin:/bin "$@"; }
if [ "$sources" != "$(cat "$root/built_from" 2>/dev/null)" ]; then
  inside sh -c 'cd /glm_core && CXX=$0 CC=$0 GLM_CORE_BUILD=cpu python -m pip install -q --no-build-isolation --no-deps .' $triple-g++
  echo "$sources" >"$root/built_from"
fi
cp -rLT "$root/glm_core/glm_core" "$packages/glm_core" # Python's files as they are now, beside what was compiled
[ $# -gt 0 ] || set -- python -m glm_core.cli conformance --backend cpu
inside "$@"
