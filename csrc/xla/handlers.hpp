#pragma once
#include "xla/common.hpp"

/// The handlers, by platform; module.cpp lists them. A step is three kinds of calls:
///
///   norms   gradients -> their norms, as far as anything asks for them
///   settle  norms, learning rate, counts -> whether the step is taken, and by which numbers
///   update  what was settled, parameters, gradients, states -> parameters, states; in chunks
extern "C" {
XLA_FFI_Error* fusedstep_norms_cpu(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* fusedstep_settle_cpu(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* fusedstep_update_cpu(XLA_FFI_CallFrame* frame);
}
