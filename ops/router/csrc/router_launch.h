// C entry points of an implementation that is loaded at run time: the CUDA library, or the same source run on the CPU.
// They run on `device` and `stream`, and return 0 or the CUDA error code of a launch. On the CPU both mean nothing.
#pragma once
#include "router_args.h"

extern "C" {
int loadstone_router_forward(const loadstone::ForwardArgs<float>* args, int device, void* stream);
int loadstone_router_backward(const loadstone::BackwardArgs<float>* args, int device, void* stream);
int loadstone_router_scores(const loadstone::ScoresArgs<float>* args, int device, void* stream);
}
