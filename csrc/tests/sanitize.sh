#!/bin/sh
# Builds the kernels, once per instruction set, with AddressSanitizer and UBSan, and runs their
# test. Usage: csrc/tests/sanitize.sh [build folder]
set -eu
cd "$(dirname "$0")/.."
build="${1:-../build/sanitize}"
mkdir -p "$build"
flags="-std=c++17 -O1 -g -Iinclude -Wall -Wextra -Werror -Wno-psabi -ffp-contract=off"
flags="$flags -fsanitize=address,undefined -fno-sanitize-recover=undefined"
isas="scalar"
[ "$(uname -m)" = x86_64 ] && isas="scalar avx2 avx512"
for isa in $isas; do
  case $isa in
    scalar) set -- ;;
    avx2) set -- -mavx2 -mfma -mf16c ;;
    avx512) set -- -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq ;;
  esac
  for source in cpu/*.cpp; do
    name=$(basename "$source" .cpp)
    [ "$name" = isa ] && continue
    echo "$flags $* -DGLM_ISA=$isa -c $source -o $build/${name}_$isa.o"
  done
done | xargs -P "$(getconf _NPROCESSORS_ONLN)" -L 1 "${CXX:-c++}"
${CXX:-c++} $flags cpu/isa.cpp tests/kernels_test.cpp "$build"/*_*.o -o "$build/kernels_test"
"$build/kernels_test"
