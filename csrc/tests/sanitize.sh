#!/bin/sh
# Builds the kernels, fast and exact, once per instruction set, with AddressSanitizer and UBSan, and runs their
# test. Then does so for other machines, emulated: with AddressSanitizer every instruction set of
# 64-bit Arm, on a CPU that has no better one; without sanitizers the portable one on RISC-V, POWER
# and big-endian s390x (AddressSanitizer finds no room there, and UBSan has seen the same sources
# above). UBSan doubles the time to compile.
# Usage: csrc/tests/sanitize.sh [build folder]
set -eu
cd "$(dirname "$0")/.."
build="${1:-../build/sanitize}"
common="-std=c++17 -O1 -g1 -Iinclude -Wall -Wextra -Werror -Wno-psabi -ffp-contract=off"
common="$common -fno-sanitize-recover=undefined"
# checks of addresses are calls: compiling takes a quarter less time, and the test is short
common="$common --param asan-instrumentation-with-call-threshold=0"

isas_of() { # machine
  case $1 in
    x86_64) echo scalar avx2 avx512 ;;
    aarch64) echo scalar neon dotprod i8mm ;;
    *) echo scalar ;;
  esac
}

flags_of() { # instruction set
  case $1 in
    avx2) echo -mavx2 -mfma -mf16c ;;
    avx512) echo -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq ;;
    neon) echo -march=armv8-a ;;
    dotprod) echo -march=armv8.2-a+dotprod ;;
    i8mm) echo -march=armv8.2-a+dotprod+i8mm+bf16 ;;
  esac
}

unit() { # sources: the arguments that compile them as one file, since headers take long to read
  while [ $# -gt 1 ]; do
    echo "-include $1"
    shift
  done
  echo "-c $1"
}

build_test() { # machine, compiler, flags, instruction sets that are run: the others do without these flags
  at="$build/$1"
  mkdir -p "$at"
  # these use names that others use too
  alone="cpu/quant.cpp cpu/attention_decode.cpp cpu/loss.cpp cpu/exact.cpp cpu/isa.cpp"
  shared=$(ls cpu/*.cpp | grep -vxF "$(echo "$alone" | tr ' ' '\n')")
  for isa in $(isas_of "$1"); do
    case " $4 " in *" $isa "*) checks=$3 ;; *) checks= ;; esac
    fast="$common $checks $(flags_of "$isa") -DGLM_ISA=$isa"
    exact="$common $checks $(flags_of "$isa") -DGLM_EXACT -DGLM_FAST=$isa -DGLM_ISA=${isa}_exact"
    # shellcheck disable=SC2046,SC2086 # the sources are words of their own
    {
      echo "$fast -c cpu/quant.cpp -o $at/quant_$isa.o"
      echo "$fast $(unit $shared) -o $at/shared_$isa.o"
      echo "$fast -c cpu/attention_decode.cpp -o $at/decode_$isa.o"
      echo "$fast -c cpu/loss.cpp -o $at/loss_$isa.o"
      # UBSan sees these sources above; exact.cpp only here
      echo "$exact -fno-sanitize=undefined $(unit $(echo "$shared" | grep -v quant)) -o $at/shared_${isa}_exact.o"
      echo "$exact $(unit cpu/attention_decode.cpp cpu/exact.cpp) -o $at/decode_${isa}_exact.o"
      echo "$exact -fno-sanitize=undefined -c cpu/loss.cpp -o $at/loss_${isa}_exact.o"
      # AVX-512's fast product with codes is exact
      [ "$isa" = avx512 ] || echo "$exact -fno-sanitize=undefined -c cpu/quant.cpp -o $at/quant_${isa}_exact.o"
    } | tr '\n' ' ' | sed 's/\.o /.o\n/g'
  done | xargs -P "$(getconf _NPROCESSORS_ONLN)" -L 1 "$2"
  # unchecked, the test's own sums in double take half the time; AddressSanitizer guards its buffers all the same
  # shellcheck disable=SC2086 # flags
  $2 $common -c tests/kernels_test.cpp -o "$at/test.o"
  # shellcheck disable=SC2086 # flags
  $2 $common $3 cpu/isa.cpp "$at/test.o" "$at"/*_*.o -o "$at/kernels_test"
}

run() { # command of a test: keeps what it prints, for the comparison at the end
  "$@" >"$build/printed" || { cat "$build/printed"; exit 1; }
  tee -a "$build/all_printed" <"$build/printed"
}

emulated() { # machine, its name in qemu, flags, runs: "CPU instruction-sets", ...
  machine=$1 qemu="qemu-$2-static" compiler="$1-linux-gnu-g++" flags=$3
  shift 3
  if ! command -v "$compiler" >/dev/null || ! command -v "$qemu" >/dev/null; then
    echo "$machine: skipped, no $compiler or no $qemu (Debian: g++-$machine-linux-gnu, qemu-user-static)"
    return
  fi
  build_test "$machine" "$compiler" "$flags" "$*"
  for run in "$@"; do
    echo "$machine, emulated ${run%% *}:"
    # shellcheck disable=SC2086 # the instruction sets are words of their own
    run "$qemu" -L "/usr/$machine-linux-gnu" -cpu "${run%% *}" "$build/$machine/kernels_test" ${run#* }
  done
}

here=$(isas_of "$(uname -m)")
for isa in avx2 avx512; do
  grep -qsw "${isa}f\?" /proc/cpuinfo || here=$(echo "$here" | sed "s/$isa//")
done
# what these two would see AddressSanitizer sees too; they take a third of the time to compile
build_test "$(uname -m)" "${CXX:-c++}" "-fsanitize=address,undefined -fno-sanitize=object-size,pointer-overflow" "$here"
rm -f "$build/all_printed"
run "$build/$(uname -m)/kernels_test"
export ASAN_OPTIONS=detect_leaks=0 # leaks are looked for with ptrace, which is not emulated
[ "$(uname -m)" = aarch64 ] || emulated aarch64 aarch64 "-fsanitize=address -static-libasan" \
  "cortex-a53 neon" "cortex-a76 dotprod" "max i8mm"
emulated riscv64 riscv64 -static "rv64 scalar"
emulated powerpc64le ppc64le -static "power9 scalar"
emulated s390x s390x -static "max scalar"
if [ "$(sed -n 's/.*exact results //p' "$build/all_printed" | sort -u | wc -l)" != 1 ]; then
  echo "FAILED: exact results differ between machines"
  exit 1
fi
