// What the CPU can run, decided once per process.
#pragma once

#include "problem.h"

namespace otdd::cpu {

// Instruction set the kernels run with: "baseline", "avx2" or "avx512". The environment variable
// OTDD_CPU_ISA may lower it, never raise it above what the processor offers.
const char* isa();

// The kernels for that instruction set.
template <class T>
Kernels<T> kernels();

}  // namespace otdd::cpu
