// Compiled once per instruction set (fusedstep_add_isa in CMakeLists.txt). Exports one table.
//
// Everything else is in anonymous namespaces or always inlined, and nothing of the C++ library is
// used: the linker must never be able to pick, for a CPU without AVX-512, a copy of a shared inline
// function that was built with it. tests/test_codebase.py looks for weak symbols.
#include "cpu/kernels.hpp"

#include "cpu/pack.hpp"
#include "cpu/squares.hpp"
#include "cpu/storage.hpp"

namespace fusedstep::cpu {
namespace {

// --- the element loop ----------------------------------------------------------------------------

/// The buffers of one update, opened by their storage policies.
template <class P, class G, class S, class C>
struct Streams {
  P param;
  G grad;
  C copy;
  S slots[max_slots];

  FUSEDSTEP_HD Streams(const Update& u, int num_slots)
      : param(u.param, u.param_dtype), grad(u.grad, u.grad_dtype), copy(u.copy, u.copy_dtype) {
    for (int s = 0; s < num_slots; ++s) slots[s] = S(u.slots[s].data, u.slots[s].dtype);
  }
};

/// What is constant over one update, rounded once to the arithmetic type T.
template <class Rule, class T>
struct Constants {
  Conditioning<T> conditioning;
  typename Rule::template Coefficients<T> coefficients;

  FUSEDSTEP_HD explicit Constants(const Update& u)
      : conditioning{static_cast<T>(u.conditioning.scale), static_cast<T>(u.conditioning.limit)},
        coefficients(u.coefficients) {}
};

/// Steps through elements [i, count), `width<V>` at a time; returns the first one left over. This
/// loop serves every rule, storage and width.
template <class V, class Rule, class T, class Buffers>
FUSEDSTEP_HD std::int64_t run(const Constants<Rule, T>& k, const Buffers& at, std::int64_t i,
                              std::int64_t count) {
  for (; i + width<V> <= count; i += width<V>) {
    V param, grad, slots[max_slots];
    at.param.get(param, i);
    at.grad.get(grad, i);
    for (int s = 0; s < num_slots<Rule>; ++s) at.slots[s].get(slots[s], i);
    Rule::apply(k.coefficients, param, condition(k.conditioning, grad), slots);
    at.param.put(param, i);
    for (int s = 0; s < num_slots<Rule>; ++s) at.slots[s].put(slots[s], i);
    at.copy.put(param, i);
  }
  return i;
}

template <class Rule, class T, class P, class G, class S, class C>
void update_as(const Update& u) {
  const Constants<Rule, T> constants(u);
  const Streams<P, G, S, C> streams(u, num_slots<Rule>);
  const std::int64_t done = run<Pack<T>>(constants, streams, 0, u.count);
  run<T>(constants, streams, done, u.count);  // the tail: the same code, one element wide
}

// --- storage combinations --------------------------------------------------------------------------

FUSEDSTEP_HD constexpr int combination(DType param, DType grad, DType state, bool copy) {
  return ((static_cast<int>(param) * 8 + static_cast<int>(grad)) * 8 + static_cast<int>(state)) * 2 +
         copy;
}

/// The one dtype of all states (float32 beside a 16-bit parameter is the usual one), int8_blocks if
/// there are several. A rule without states fits every combination.
template <class Rule>
FUSEDSTEP_HD DType state_dtype(const Update& u) {
  if (num_slots<Rule> == 0)
    return u.param_dtype == DType::float64 ? DType::float64 : DType::float32;
  for (int s = 1; s < num_slots<Rule>; ++s)
    if (u.slots[s].dtype != u.slots[0].dtype) return DType::int8_blocks;
  return u.slots[0].dtype;
}

/// The combinations that people train with get code of their own, all others share one.
template <class Rule>
void update_elements(const Update& u) {
  constexpr DType f64 = DType::float64, f32 = DType::float32;
  constexpr DType half = DType::float16, brain = DType::bfloat16;
  using F = Typed<float>;
  using D = Typed<double>;
  switch (combination(u.param_dtype, u.grad_dtype, state_dtype<Rule>(u), u.copy != nullptr)) {
    case combination(f32, f32, f32, false): return update_as<Rule, float, F, F, F, Absent>(u);
    case combination(f32, f32, f32, true): return update_as<Rule, float, F, F, F, Any>(u);
    case combination(f64, f64, f64, false): return update_as<Rule, double, D, D, D, Absent>(u);
    case combination(half, half, f32, false):
      return update_as<Rule, float, Typed<f16>, Typed<f16>, F, Absent>(u);
    case combination(brain, brain, f32, false):
      return update_as<Rule, float, Typed<bf16>, Typed<bf16>, F, Absent>(u);
    default: break;
  }
  if (u.copy != nullptr) return update_as<Rule, float, Any, Any, Any, Any>(u);
  update_as<Rule, float, Any, Any, Any, Absent>(u);
}

// --- states that are stored block by block ---------------------------------------------------------

bool is_blocks(const Slot& slot) { return slot.dtype == DType::int8_blocks; }

/// `count` <= block_size elements of `u` from `begin` on, with block-wise stored states decoded into
/// `scratch`.
template <class Rule>
Update decode_block(const Update& u, std::int64_t begin, std::int64_t count,
                    float (*scratch)[block_size]) {
  Update block = u;
  block.count = count;
  block.param = element(u.param, u.param_dtype, begin);
  block.grad = element(u.grad, u.grad_dtype, begin);
  block.copy = element(u.copy, u.copy_dtype, begin);
  for (int s = 0; s < num_slots<Rule>; ++s) {
    const Slot stored = element(u.slots[s], begin);
    block.slots[s] = is_blocks(stored) ? Slot{scratch[s], nullptr, DType::float32} : stored;
    if (is_blocks(stored)) decode(stored, count, scratch[s]);
  }
  return block;
}

/// The same loop runs over one decoded block after the other.
template <class Rule>
void update_blocks(const Update& u) {
  float scratch[max_slots][block_size];
  for (std::int64_t begin = 0; begin < u.count; begin += block_size) {
    const std::int64_t count = u.count - begin < block_size ? u.count - begin : block_size;
    update_elements<Rule>(decode_block<Rule>(u, begin, count, scratch));
    for (int s = 0; s < num_slots<Rule>; ++s)
      if (is_blocks(u.slots[s])) encode(scratch[s], count, element(u.slots[s], begin));
  }
}

template <class Rule>
void update(const Update& u) {
  for (int s = 0; s < num_slots<Rule>; ++s)
    if (is_blocks(u.slots[s])) return update_blocks<Rule>(u);
  update_elements<Rule>(u);
}

template <class... All>
constexpr KernelTable make_table(RuleList<All...> /*rules*/) {
  return {{update<All>...}, sum_squares, max_abs};
}

}  // namespace

#define FUSEDSTEP_TABLE_NAME(isa) kernels_##isa
#define FUSEDSTEP_TABLE(isa) FUSEDSTEP_TABLE_NAME(isa)
const KernelTable FUSEDSTEP_TABLE(FUSEDSTEP_ISA) = make_table(Rules{});

}  // namespace fusedstep::cpu
