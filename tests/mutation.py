"""Mutation pass: breaks the sources in known ways, one at a time; each must fail a test.

    .venv/bin/python tests/mutation.py              # all, 20 to 60 minutes on two cores
    .venv/bin/python tests/mutation.py tail bf16    # those with one of the words in their name
    .venv/bin/python tests/mutation.py --list

Run it before a release and after changes to kernels or tests. It works in a copy of the tree under
a temporary directory, builds incrementally, and prints one line per mutation: killed (by which
test) or SURVIVED. The exit status is the number of survivors. A mutation that no longer applies,
because the source has changed, is an error: update the table below. What the C++ checks cover is
given to them first, which are quicker than pytest.

pytest does not collect this file.
"""

# ruff: noqa: E501 (the table quotes the sources)

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# Quick and likely to notice first; the conformance tests of the rules come last.
TESTS = [
    *("conversions", "norm", "clip", "functional", "rejections", "buffers", "schedules"),
    *("recollection", "optimizers", "checkpoints", "threads", "semantics", "properties", "rules"),
]
# Without Python, the quickest first: of what the kernels and the engine are made of.
CHECKS = ["check_scalars", "check_engine", "check_norms", "check_kernels"]
CHECKED = ("csrc/core", "csrc/rules", "csrc/cpu")
HANG = 600  # seconds; a mutation may make a thread wait for ever


class Mutation(NamedTuple):
    """A change of one place of one file."""

    name: str
    file: str
    old: str
    new: str


RULE = "csrc/rules/momentum.hpp"
SGD = "csrc/rules/sgd.hpp"
NADAM = "csrc/rules/nadam.hpp"
ADAM = "csrc/rules/adam.hpp"
RMSPROP = "csrc/rules/rmsprop.hpp"
POWERS = "csrc/core/powers.hpp"
TYPES = "csrc/core/types.hpp"
TERMS = "csrc/core/terms.hpp"
GRADIENT = "csrc/core/gradient.hpp"
TREE = "csrc/core/norm_tree.hpp"
FLOAT16 = "csrc/core/float16.hpp"
KERNELS = "csrc/cpu/kernels.cpp"
STORAGE = "csrc/cpu/storage.hpp"
SQUARES = "csrc/cpu/squares.hpp"
PACK = "csrc/cpu/pack.hpp"
WORK = "csrc/cpu/work.hpp"
STEP = "csrc/cpu/step.cpp"
NORMS = "csrc/core/norms.hpp"
BLOCKS = "csrc/core/blocks.hpp"
STAGING = "csrc/cpu/staging.cpp"
CALL = "csrc/bindings/call.cpp"
BUFFER = "csrc/bindings/buffer.cpp"
ARRAYS = "csrc/bindings/call_arrays.cpp"
PLAN_STEP = "csrc/bindings/plan_step.cpp"
PLAN_SUMS = "csrc/bindings/plan_sums.cpp"
FUNCTIONAL = "csrc/bindings/functional.cpp"
CODEGEN = "python/fusedstep/codegen.py"

MUTATIONS = [
    # the element loop
    Mutation("tail missing", KERNELS, "run<T>(constants, at, done, storage.count);", ";"),
    Mutation("tail starts late", KERNELS, "at, done, storage.count);", "at, done + 1, storage.count);"),
    Mutation("body one register short", KERNELS, "i + width<V> <= count; i", "i + width<V> < count - 1; i"),
    Mutation("parameter not stored", KERNELS, "    store(param, at.param + i);\n", ""),
    Mutation("state not stored", KERNELS, "++s) store(slots[s], at.slots[s] + i);", "++s) (void)at.slots[s];"),
    Mutation("state not encoded", KERNELS, "if (!is_float(u_.slots[s])) encode(", "if (false) encode("),
    Mutation("parameter not encoded", KERNELS, "if (!is_float(u_.param)) encode(", "if (false) encode("),
    Mutation("copy not advanced", KERNELS, "slice(u_.copy, begin_)", "u_.copy"),
    Mutation("block border", KERNELS, "plain_ || left < block_size ? left : block_size", "plain_ || left <= block_size + 1 ? left : block_size"),
    Mutation("last block not written back", KERNELS, "if (count > 0 && !plain_) close();", "if (count == block_size && !plain_) close();"),
    Mutation("value limit unknown", KERNELS, "u.conditioning.limits ? limits | scales :", ""),
    # the formulas
    Mutation("wd sign", RULE, "k[0] = h.decoupled_weight_decay != 0 ? 0.0 : h.weight_decay;", "k[0] = h.decoupled_weight_decay != 0 ? 0.0 : -h.weight_decay;"),
    Mutation("coefficient A on the first step", RULE, "k[1] = at.first ? 0.0 : h.momentum;", "k[1] = h.momentum;"),
    Mutation("coefficient B undamped", RULE, "undamped ? 1.0 : 1.0 - h.dampening", "undamped ? 1.0 : 1.0"),
    Mutation("first step damped", RULE, "at.first && h.dampen_first_step == 0", "at.first && h.dampen_first_step != 0"),
    Mutation("coefficient N1 by this momentum", RULE, "h.nesterov != 0 ? h.next_momentum : 1.0", "h.nesterov != 0 ? h.momentum : 1.0"),
    Mutation("coefficient N2 undamped", RULE, "h.nesterov != 0 ? grad_weight : 0.0", "h.nesterov != 0 ? 1.0 : 0.0"),
    Mutation("coefficient S inside", RULE, "k[5] = h.lr_in_velocity != 0 ? 1.0 : -h.lr;", "k[5] = -h.lr;"),
    Mutation("coefficient D without lr", RULE, "h.decoupled_weight_decay != 0 ? h.lr * h.weight_decay", "h.decoupled_weight_decay != 0 ? h.weight_decay"),
    Mutation("decay after the step", RULE, "p = add_scaled(k.S, d, add_scaled(k.minus_D, p, p));", "p = add_scaled(k.S, d, p); p = add_scaled(k.minus_D, p, p);"),
    Mutation("old velocity in d", RULE, "v = combine(k.B, g, k.A, v);\n    const V d = combine(k.N1, v, k.N2, g);", "const V d = combine(k.N1, v, k.N2, g);\n    v = combine(k.B, g, k.A, v);"),
    Mutation("sgd ascends", SGD, "k[1] = -h.lr;", "k[1] = h.lr;"),
    Mutation("average from the wrong end", TERMS, "fma(V(weight_of_x.value), x - m, m)", "fma(V(weight_of_x.value), m - x, x)"),
    Mutation("average of beta one half", TERMS, "k[0] = beta >= 0.5 ? 1.0 - beta : 0.0;", "k[0] = beta > 0.5 ? 1.0 - beta : 0.0;"),
    Mutation("average without small betas", TERMS, "weight_of_m.used ? fma(V(weight_of_m.value), m - x, x) : x", "x"),
    Mutation("power by the next bit", POWERS, "if (n & 1) result", "if (n & 2) result"),
    Mutation("exp of few terms", POWERS, "degree = 14", "degree = 9"),
    Mutation("exp with one constant", POWERS, "(x + n * ln2_high) + n * ln2_low", "x + n * (ln2_high + ln2_low)"),
    Mutation("product not advanced", TYPES, "at.product * Rule::factor(hyper, at.step)", "at.product"),
    Mutation("product of the coming momentum", TYPES, "Rule::factor(hyper, at.step)", "Rule::factor(hyper, at.step + 1)"),
    Mutation("nadam gradient by the coming momentum", NADAM, "(1.0 - mu_t) / (1.0 - product)", "(1.0 - next_mu) / (1.0 - product)"),
    Mutation("nadam average by this momentum", NADAM, "next_mu / (1.0 - product * next_mu)", "mu_t / (1.0 - product * mu_t)"),
    Mutation("nadam average corrected by this product", NADAM, "next_mu / (1.0 - product * next_mu)", "next_mu / (1.0 - product)"),
    Mutation("nadam uncorrected squares", NADAM, "k[7] = 1.0 / sqrt(one_minus_power(h.beta2, at.step));", "k[7] = 1.0;"),
    Mutation("nadam looks ahead with this beta", NADAM, "mu(h.next_beta1, h, at.step + 1)", "mu(h.beta1, h, at.step + 1)"),
    Mutation("nadam beta2 in the first average", NADAM, "prepare_average(h.beta1, k + 1);", "prepare_average(h.beta2, k + 1);"),
    Mutation("nadam without decay of the momentum", NADAM, "return beta1 * (1.0 - 0.5 * decayed)", "return beta1 * (1.0 - decayed)"),
    Mutation("nadam swaps gradient and average", NADAM, "combine(k.M, m, k.G, g)", "combine(k.G, m, k.M, g)"),
    Mutation("nadam eps inside the root", NADAM, "fma(V(k.R.value), sqrt(s), V(k.eps.value))", "V(k.R.value) * sqrt(s + V(k.eps.value))"),
    Mutation("adam uncorrected average", ADAM, "-h.lr / one_minus_power(h.beta1, at.step)", "-h.lr"),
    Mutation("adam uncorrected squares", ADAM, "k[5] = 1.0 / sqrt(one_minus_power(h.beta2, at.step));", "k[5] = 1.0;"),
    Mutation("adam swaps betas", ADAM, "prepare_average(h.beta2, k + 3);", "prepare_average(h.beta1, k + 3);"),
    Mutation("adam corrects eps", ADAM, "fma(V(k.R.value), sqrt(s), V(k.eps.value))", "V(k.R.value) * (sqrt(s) + V(k.eps.value))"),
    Mutation("adam squares before the decay", ADAM, "  g = add_scaled(k.wd, p, g);\n    slot[0] = average(k.c1, k.b1, g, slot[0]);\n    slot[1] = average(k.c2, k.b2, g * g, slot[1]);", "  slot[1] = average(k.c2, k.b2, g * g, slot[1]);\n    g = add_scaled(k.wd, p, g);\n    slot[0] = average(k.c1, k.b1, g, slot[0]);"),
    Mutation("amsgrad forgets the maximum", ADAM, "x = larger(x, s);", "x = s;"),
    Mutation("amsgrad divides by the average", ADAM, "descend(k, p, slot[0], x);", "descend(k, p, slot[0], s);"),
    Mutation("amsgrad drops NaN (register)", PACK, "at_least(x.reg, y.reg)", "at_least(y.reg, x.reg)"),
    Mutation("rmsprop negative variance", RMSPROP, "larger(V(T(0)), fma(-a, a, s))", "fma(-a, a, s)"),
    Mutation("rmsprop variance about the old average", RMSPROP, "a = average(k.c, k.b, g, a);\n      variance = larger(V(T(0)), fma(-a, a, s));", "variance = larger(V(T(0)), fma(-a, a, s));\n      a = average(k.c, k.b, g, a);"),
    Mutation("rmsprop eps inside the root", RMSPROP, "(sqrt(variance) + V(k.eps.value))", "sqrt(variance + V(k.eps.value))"),
    Mutation("rmsprop no eps under the root", RMSPROP, "    variance = add_scaled(k.E, V(T(1)), variance);\n", ""),
    Mutation("rmsprop this momentum ahead", RMSPROP, "h.nesterov != 0 ? h.next_momentum : 1.0", "h.nesterov != 0 ? h.momentum : 1.0"),
    Mutation("rmsprop old velocity ahead", RMSPROP, "v = add_scaled(k.A, v, u);\n      u = combine(k.N1, v, k.N2, u);", "u = combine(k.N1, v, k.N2, u);\n      v = add_scaled(k.A, v, u);"),
    Mutation("accumulate swaps the weights", "csrc/rules/accumulate.hpp", "combine(k.B, g, k.A, p)", "combine(k.A, g, k.B, p)"),
    Mutation("two roundings", TERMS, "return fma(V(a.value), x, V(b.value) * y);", "return V(a.value) * x + V(b.value) * y;"),
    Mutation("fma on the wrong product", TERMS, "fma(V(a.value), x, V(b.value) * y)", "fma(V(b.value), y, V(a.value) * x)"),
    Mutation("zero times infinity", TERMS, "return a.used ? fma(V(a.value), x, y) : y;", "return fma(V(a.value), x, y);"),
    Mutation("known terms off by one", TERMS, "(terms >> i & 1) != 0", "(terms >> (i + 1) & 1) != 0"),
    # the gradient before the rule
    Mutation("clip value before norm", GRADIENT, "if (k.scales) g = V(k.scale) * g;\n  return k.limits ? clamp(g, V(k.limit)) : g;", "if (k.limits) g = clamp(g, V(k.limit));\n  return k.scales ? V(k.scale) * g : g;"),
    Mutation("clip epsilon", GRADIENT, ": clip_norm / norm;", ": clip_norm / (norm + 1e-6);"),
    Mutation("clip measures only", GRADIENT, " || clip_norm == HUGE_VAL", ""),
    Mutation("sign", GRADIENT, "sign * rescale_grad * clip;", "rescale_grad * clip;"),
    Mutation("clamp swaps NaN (register)", PACK, "at_least(-limit.reg, at_most(limit.reg, x.reg))", "at_least(-limit.reg, at_most(x.reg, limit.reg))"),
    # conversions
    Mutation("bf16 rounding constant (avx512)", STORAGE, "_mm512_set1_epi32(0x7fff)", "_mm512_set1_epi32(0x8000)"),
    Mutation("bf16 rounding constant (avx2)", STORAGE, "_mm256_set1_epi32(0x7fff)", "_mm256_set1_epi32(0x8000)"),
    Mutation("bf16 NaN (avx512)", STORAGE, "_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0))", "rounded"),
    Mutation("bf16 NaN (scalar)", FLOAT16, "nan ? 0x7fc0u : shift_right_rounded(bits, 16)", "shift_right_rounded(bits, 16)"),
    Mutation("rounding constant (scalar)", FLOAT16, "(1u << (shift - 1)) - 1u + odd", "(1u << (shift - 1))"),
    Mutation("f16 truncates (avx512)", STORAGE, "_mm512_cvtps_ph(x.reg, nearest)", "_mm512_cvtps_ph(x.reg, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC)"),
    Mutation("f16 subnormals flushed", FLOAT16, "exponent >= 102", "exponent >= 113"),
    Mutation("block scale", BLOCKS, "largest / 127.0f : NAN", "largest / 128.0f : NAN"),
    Mutation("block code truncated", BLOCKS, "::lrintf(code)", "code"),
    # the norm
    Mutation("norm tree pairs neighbours", TREE, "values[i] += values[i + half];", "values[i] = values[2 * i] + values[2 * i + 1];"),
    Mutation("norm tree lanes of sums", TREE, "lane[child % lanes]", "lane[child / lanes]"),
    Mutation("norm even and odd lanes", SQUARES, "row[2 + k] = _mm512_cvtps_pd(odd_bf16(pairs));", "row[2 + k] = _mm512_cvtps_pd(even_bf16(pairs));"),
    Mutation("norm fuses float64", SQUARES, "sizeof(T) < sizeof(double) && width<D> > 1", "width<D> > 1"),
    Mutation("norm tail dropped", SQUARES, "if (rest > 0) {", "if (rest > 1) {"),
    Mutation("norm without second look", TREE, "sum == sum && !(sum >= 0x1p-900 && sum < HUGE_VAL)", "false"),
    Mutation("norm without rescale", STEP, "plain_nan(call_.scope_scale[k] * norm)", "plain_nan(norm)"),
    Mutation("norm of all leaves the range", NORMS, "scalable ? ::ilogb(largest) : 0", "0"),
    Mutation("norm tree of a scope's last tensor", STEP, "if (tree.first == tree.last) tree.first =", "tree.first ="),
    Mutation("norm of scope 0 clips all rows", STEP, "if (!only_sum_) work_.row_scopes[tensor.row] = tensor.scope;", ""),
    Mutation("norms of tensors from one place", STEP, "    first += chunks;\n", ""),
    Mutation("norms of tensors without rescale", STEP, "plain_nan(call_.scope_scale[tensor.scope] * norm)", "plain_nan(norm)"),
    Mutation("norms of tensors after a second look", STEP, "std::sqrt(sum) / tree.scale", "std::sqrt(sum)"),
    Mutation("small tensors not looked at again", STEP, "const bool safe = !tree.wide || ", "const bool safe = tree.scale != 0 || "),
    Mutation("sums of results in one place", STEP, "    tensor.chunk_sums[chunk.begin / chunk_size] =", "    tensor.chunk_sums[0] ="),
    Mutation("sums of gradients for results", STEP, "kernels_.sum_squares(u.param.data, u.param.dtype, chunk.count", "kernels_.sum_squares(u.grad.data, u.grad.dtype, chunk.count"),
    Mutation("known sums of one place", STEP, "call_.tensors[chunk.tensor].chunk_sums[chunk.begin / chunk_size]", "call_.tensors[chunk.tensor].chunk_sums[0]"),
    Mutation("known sums need no second look", STEP, "  return stage_after(Stage::measure);", "  for (Tree& tree : work_.trees) read_sums(tree);\n  return settle();"),
    Mutation("denormals flushed in workers", STEP, "    const FloatEnvironment environment;\n    static_cast", "    static_cast"),
    Mutation("denormals flushed in the caller", STEP, "double Job::run() {\n  const FloatEnvironment environment;", "double Job::run() {"),
    # chunks and stages
    Mutation("chunk border", WORK, "begin < numel; begin += chunk_size", "begin + 1 < numel; begin += chunk_size"),
    Mutation("chunk of the last share lost", WORK, "last < chunks.size() && before < goal", "last + 1 < chunks.size() && before < goal"),
    Mutation("chunk stolen twice", WORK, "return from_front ? front : back;", "return from_front || left.last - left.first < 2 ? front : ChunkRange{cut - 1, left.last};"),
    Mutation("skip flag", STEP, "refused || (call_.skip_nonfinite && !finite)", "refused"),
    Mutation("skip ignores the given norm", STEP, "finite = finite && std::isfinite(outcome_.norm);", ""),
    Mutation("skip ignores the gradients", STEP, "finite = std::isfinite(outcome_.norm);\n    if (!finite)", "if (!std::isfinite(outcome_.norm))"),
    Mutation("skip_norm ignored", STEP, "outcome_.skipped = refused || (", "outcome_.skipped = ("),
    Mutation("skip_norm refuses the limit itself", NORMS, "!(norm <= skip_norm)", "!(norm < skip_norm)"),
    Mutation("skip_norm lets NaN through", NORMS, "!(norm <= skip_norm)", "norm > skip_norm"),
    Mutation("skip_norm without limit", NORMS, " && skip_norm != HUGE_VAL", ""),
    Mutation("staging of one worker", STEP, "static_cast<std::size_t>(worker) * chunk_size", "0"),
    Mutation("staging border", STAGING, "for (; count > 0; ++i, begin = 0)", "for (; count > 0; ++i)"),
    Mutation("staging rounds twice", STAGING, "default: return copy_run<To, long double>;", "default: break;\n  }\n  return [](const char* from, std::int64_t stride, std::int64_t n, char* to) {\n    for (std::int64_t i = 0; i < n; ++i) {\n      long double x;\n      std::memcpy(&x, from + i * stride, sizeof x);\n      const To y = static_cast<To>(static_cast<float>(static_cast<double>(x)));\n      std::memcpy(to + i * static_cast<std::int64_t>(sizeof y), &y, sizeof y);\n    }\n  };\n  {"),
    # what the bindings promise
    Mutation("skip counts as a step", PLAN_STEP, "if (!report.skipped) {\n    commit(", "{\n    commit("),
    Mutation("skip hands out state", FUNCTIONAL, "applied ? state_after(arguments, call, k, leaves) : arguments.states[k]", "state_after(arguments, call, k, leaves)"),
    Mutation("skip advances the scalars", FUNCTIONAL, "if (!applied || !is_number(k)) continue;", "if (!is_number(k)) continue;"),
    Mutation("scalars without the product", FUNCTIONAL, "py::float_(cpu::product_after(row))", "py::float_(row.progress.product)"),
    Mutation("scalars start at this step", FUNCTIONAL, "py::cast<std::int64_t>(given_[0]) + 1", "py::cast<std::int64_t>(given_[0])"),
    Mutation("steps not committed", PLAN_STEP, "    ++entry.steps;\n", ""),
    Mutation("product not committed", PLAN_STEP, "    entry.product = products[filler.leaf_rows()[k]];\n", ""),
    Mutation("rows of other steps shared", PLAN_STEP, "known->steps == entry.steps && ", ""),
    Mutation("rows of other products shared", PLAN_STEP, " && known->product == entry.product", ""),
    Mutation("accumulate forgets", PLAN_SUMS, "entry.accumulated ? 1 : 0", "0"),
    Mutation("accumulate keeps the last sum", PLAN_SUMS, "entry.accumulated ? 1 : 0", "1"),
    Mutation("accumulate without scale", PLAN_SUMS, "spec.row.hyper[1] = scale;", "spec.row.hyper[1] = 1.0;"),
    Mutation("accumulated gradients survive a step", PLAN_STEP, "  const StepReport report = call->run(speller(), sums);\n  if (accumulated) drop_accumulated(false);\n", "  const StepReport report = call->run(speller(), sums);\n"),
    Mutation("accumulated gradients survive a skip", PLAN_STEP, "sums);\n  if (accumulated) drop_accumulated(false);\n  if (!report.skipped) {", "sums);\n  if (accumulated && !report.skipped) drop_accumulated(false);\n  if (!report.skipped) {"),
    Mutation("gradients beside accumulated ones", PLAN_STEP, "if (accumulated && !grads.is_none()) {", "if (false) {"),
    Mutation("scope of groups is one", CALL, "tensor_groups_[t] != tensor_groups_[t - 1]", "false"),
    Mutation("scope of arrays shares rows", CALL, "if (scope == ClipScope::array) give_each_tensor_a_row();", ""),
    Mutation("scope of unequal rescale_grad joined", CALL, "scope_scales_.back() != scale || ", ""),
    Mutation("skip_norm measures nothing", CALL, "measures_ || policy_.skip_norm != infinity", "measures_"),
    Mutation("norms of arrays without gradient", CALL, "norms.mutable_data()[tensor_leaves_[t]] = tensor_norms_[t];", "norms.mutable_data()[t] = tensor_norms_[t];"),
    Mutation("shape unchecked", ARRAYS, "if (buffer.same_shape(param)) return;", "return;"),
    Mutation("strides unchecked", ARRAYS, "if (buffer.same_order(param)) return;", "return;"),
    Mutation("read-only unchecked", ARRAYS, "if (out.readonly) {", "if (false) {"),
    Mutation("overlap unchecked", CALL, "if (!overlap) return;", "return;"),
    Mutation("density unchecked", ARRAYS, "if (!out.is_dense()) {", "if (false) {"),
    Mutation("NULL data unchecked", BUFFER, "if (out.numel > 0 && out.data == nullptr) {", "if (false) {"),
    Mutation("byte offset ignored", BUFFER, "tensor.data != nullptr ? tensor.byte_offset : 0", "0"),
    Mutation("immutable written", ARRAYS, "if (producer.immutable) fail(", "if (false) fail("),
    # the Python layer
    Mutation("lr of the wrong step", "python/fusedstep/base.py", "            self._steps += 1\n", "            self._steps += 2\n"),
    Mutation("schedule exponent", "python/fusedstep/schedules/steps.py", "t // self.step_size)", "t // self.step_size + 1)"),
    Mutation("skip counted as applied", "python/fusedstep/base.py", "            self._skipped_steps += 1\n", "            self._steps += 1\n"),
    Mutation("accumulate drops the scale", "python/fusedstep/base.py", '_SCALE.number("scale", scale), stream)', "1.0, stream)"),
    Mutation("coming momentum is this one", "python/fusedstep/scheduled.py", "following = None if t is None else t + 1", "following = t"),
    Mutation("coming momentum of a schedule", "python/fusedstep/scheduled.py", 'self.number(name, value.next_momentum)', 'self.number(name, value.current_momentum)'),
    Mutation("coming momentum overrides the given one", CODEGEN, "        if coming is None and ({looks_ahead}):\n", "        if {looks_ahead}:\n"),
    Mutation("buffer lost where the momentum is zero", CODEGEN, "varies = varies or check_momentum.varies(momentum)", "varies = False"),
    Mutation("busy optimizers used", "csrc/bindings/turn.hpp", "    kind_ = kind;\n", "    kind_ = Kind::none;\n"),
    Mutation("policy order", CODEGEN, '("on_nonfinite", "grad_clip_scope", "skip_grad_norm")', '("grad_clip_scope", "on_nonfinite", "skip_grad_norm")'),
    Mutation("policy of the defaults", CODEGEN, 'values=", ".join(CALL_WIDE),\n    )\n    return _compile("policy"', 'values="\'propagate\', \'all\', None",\n    )\n    return _compile("policy"'),
    Mutation("unused state accepted", CODEGEN, '        unused = [_UNUSED.format(slot=slot, name=declaration.function) for slot in slots]\n', '        unused = ["" for slot in slots]\n'),
    Mutation("last rule always", CODEGEN, "for rule in rules[:-1]:", "for rule in ():"),
    Mutation("state that others hold not asked again", ARRAYS, "where.data == nullptr || known.shared", "where.data == nullptr"),
    Mutation("state of a skipped step recalled", ARRAYS, "known != nullptr && !made;", "known != nullptr;"),
    Mutation("state of a parameter of another form recalled", ARRAYS, "for (Recollection::State& state : known.states) state.slot = {};", ""),
    Mutation("state of another slot recalled", PLAN_STEP, "leaf.known_state[k] = slot;", "leaf.known_state[k] = static_cast<int>(k);"),
    Mutation("negated where it was plain", BUFFER, "out.data != options.plain_at", "options.plain_at == nullptr"),
    Mutation("chunk sums of observed gradients", STEP, "sums[chunk.begin / chunk_size] = work_.sums[i];", "sums[0] = work_.sums[i];"),
    Mutation("momentum range", "python/fusedstep/hyperparameters.py", "_FRACTION = Real(0.0, 1.0)", "_FRACTION = Real(0.0, 1.5)"),
]  # fmt: skip


@contextmanager
def applied(mutation: Mutation, tree: Path) -> Iterator[None]:
    """The tree with the mutation in it."""
    path = tree / mutation.file
    original = path.read_text()
    if original.count(mutation.old) != 1:
        raise SystemExit(
            f"{mutation.name}: {mutation.file} has the place {original.count(mutation.old)} times"
        )
    path.write_text(original.replace(mutation.old, mutation.new))
    try:
        yield
    finally:
        path.write_text(original)


def run(command: Sequence[str], tree: Path) -> subprocess.CompletedProcess[str] | None:
    """Runs a command in the tree, with its package; None if it hangs."""
    environment = {**os.environ, "PYTHONPATH": str(tree / "python"), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        return subprocess.run(
            command,
            cwd=tree,
            env=environment,
            capture_output=True,
            text=True,
            timeout=HANG,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None


def copy_tree(target: Path) -> None:
    """The sources, without what was built from them."""
    for part in ("csrc", "python", "tests"):
        shutil.copytree(
            ROOT / part, target / part, ignore=shutil.ignore_patterns("*.so", "__pycache__")
        )
    for part in ("CMakeLists.txt", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / part, target)
    lists = target / "CMakeLists.txt"  # the bits do not depend on -O, the time to wait does
    lists.write_text(lists.read_text().replace("-O3", "-O1"))


def configure(tree: Path) -> None:
    """A build tree of the extension, with the tools that this interpreter has."""
    finder = "import pybind11; print(pybind11.get_cmake_dir())"
    pybind11 = subprocess.check_output([sys.executable, "-c", finder], text=True).strip()
    version = re.search(r'^version = "(.*)"', (tree / "pyproject.toml").read_text(), re.MULTILINE)
    assert version
    done = run(
        [
            *("cmake", "-S", ".", "-B", "build", "-G", "Ninja"),
            f"-DSKBUILD_PROJECT_VERSION={version.group(1)}",
            f"-Dpybind11_DIR={pybind11}",
            f"-DPython_EXECUTABLE={sys.executable}",
            "-DFUSEDSTEP_CPP_TESTS=ON",
        ],
        tree,
    )
    if done is None or done.returncode:
        raise SystemExit(done.stdout + done.stderr if done else "cmake hangs")


def build(tree: Path) -> str:
    """Empty, or why it does not compile."""
    done = run(["cmake", "--build", "build"], tree)
    if done is None or done.returncode:
        return done.stdout[-2000:] if done else "the compiler hangs"
    (module,) = (tree / "build").glob("_core*.so")
    shutil.copy(module, tree / "python" / "fusedstep")
    return ""


def first_failed_check(tree: Path) -> str:
    """The first C++ check that fails; empty if none does."""
    for check in CHECKS:
        done = run([f"build/tests/cpp/{check}"], tree)
        if done is None:
            return "a hang"
        if done.returncode:
            failed = re.search(r"^FAILED: (.+)$", done.stdout, re.MULTILINE)
            return f"{check}: {failed.group(1) if failed else f'exit status {done.returncode}'}"
    return ""


def first_failure(tree: Path) -> str:
    """The first test that fails; empty if none does."""
    files = [f"tests/test_{name}.py" for name in TESTS]
    done = run([sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *files], tree)
    if done is None:
        return "a hang"
    if done.returncode == 0:
        return ""
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", done.stdout, re.MULTILINE)
    return failed.group(1) if failed else f"exit status {done.returncode}"


def check_origin(tree: Path) -> None:
    """The tests must import the copy, and not an installed package that comes first."""
    done = run([sys.executable, "-c", "import fusedstep; print(fusedstep.__file__)"], tree)
    if done is None or not done.stdout.startswith(str(tree)):
        raise SystemExit(f"imports another fusedstep: {done.stdout + done.stderr if done else ''}")


def judge(mutation: Mutation, tree: Path) -> bool:
    """Prints what became of the mutation; True if a test noticed it."""
    with applied(mutation, tree):
        compiled = mutation.file.startswith("csrc")
        error = build(tree) if compiled else ""
        if error:
            raise SystemExit(f"{mutation.name}: does not compile\n{error}")
        failure = first_failed_check(tree) if mutation.file.startswith(CHECKED) else ""
        failure = failure or first_failure(tree)
    print(f"{mutation.name}: {f'killed by {failure}' if failure else 'SURVIVED'}", flush=True)
    return bool(failure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("words", nargs="*", help="only mutations with one of these in their name")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    arguments = parser.parse_args()
    wanted = [
        m for m in MUTATIONS if not arguments.words or any(w in m.name for w in arguments.words)
    ]
    if arguments.list:
        print("\n".join(m.name for m in wanted))
        return 0
    with tempfile.TemporaryDirectory(prefix="fusedstep-mutation-") as folder:
        tree = Path(folder).resolve()
        copy_tree(tree)
        for mutation in wanted:
            with applied(mutation, tree):
                pass  # all of them apply, before the first is built
        configure(tree)
        error = build(tree)
        if error:
            raise SystemExit(error)
        check_origin(tree)
        failure = first_failed_check(tree) or first_failure(tree)
        if failure:
            raise SystemExit(f"the tests fail without any mutation: {failure}")
        survivors = sum(not judge(mutation, tree) for mutation in wanted)
    print(f"{len(wanted) - survivors} of {len(wanted)} killed")
    return survivors


if __name__ == "__main__":
    sys.exit(main())
