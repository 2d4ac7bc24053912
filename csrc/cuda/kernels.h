// The CUDA kernels, as the bindings call them. Each returns a Status and leaves its work in the stream.
#pragma once

#include "problem.h"

namespace otdd::cuda {

// What the last call of this thread that failed was told by CUDA.
const char* last_error();

// Bytes of device memory that a solve needs beside its arguments, of any value; -2 if something failed.
template <class T>
i64 sinkhorn_workspace(int device, i64 B, i64 N, i64 M);

template <class T>
int sinkhorn(const SinkhornArgs<T>& args, int device, void* workspace, void* stream);
template <class T>
int plan(const PlanArgs<T>& args, int device, void* stream);

// The same for the derivatives.
template <class T>
i64 backward_workspace(int device, bool unrolled, i64 B, i64 N, i64 M, i64 steps);
template <class T>
int backward(const BackwardArgs<T>& args, bool unrolled, int device, void* workspace, void* stream);

// L1 and squared costs, and the gradients of L1. Bytes of device memory needed beside the arguments, of any value; -2 if
// something failed.
template <class T>
i64 cost_workspace(int device, i64 B, i64 N, i64 M, i64 D);
template <class T>
i64 cost_backward_workspace(int device, i64 B, i64 N, i64 M, i64 D);

template <class T>
int cost(const CostArgs<T>& args, int device, void* workspace, void* stream);
template <class T>
int cost_backward(const CostBackwardArgs<T>& args, int device, void* workspace, void* stream);

// Logits to transport cost, and back.
template <class T>
i64 logits_workspace(int device, i64 B, i64 N, i64 D);
template <class T>
i64 logits_backward_workspace(int device, i64 B, i64 N, i64 D);
template <class T>
int logits(const LogitArgs<T>& args, int device, void* workspace, void* stream);
template <class T>
int logits_backward(const LogitBackwardArgs<T>& args, int device, void* workspace, void* stream);

// Points to the plan, or to the gradient, of their transport.
template <class T>
i64 moves_workspace(int device, i64 B, i64 N, i64 L, i64 M, i64 D);
template <class T>
int moves(const MoveArgs<T>& args, int device, void* workspace, void* stream);

}  // namespace otdd::cuda
