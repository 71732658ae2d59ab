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

// --- storage policies: how the element loop gets at the buffers of an update ------------------

/// The buffers by the types that the loop reads and writes.
template <class P, class G, class S>
struct Streams {
  P* param;
  const G* grad;
  S* slots[max_slots];
};

/// Buffers of these types are used where they are, in one go.
template <class P, class G, class S>
struct InPlace {
  Streams<P, G, S> at;
  std::int64_t count;
  bool done = false;

  FUSEDSTEP_HD InPlace(const Update& u, int num_slots)
      : at{static_cast<P*>(u.param.data), static_cast<const G*>(u.grad.data), {}}, count(u.count) {
    for (int s = 0; s < num_slots; ++s) at.slots[s] = static_cast<S*>(u.slots[s].data);
  }
  FUSEDSTEP_HD bool next() {
    const bool again = !done;
    done = true;
    return again;
  }
};

/// Buffers of any types but float64, for float32 arithmetic. What is not float32 is decoded into
/// scratch and encoded after the update, block by block. (Larger steps are slower: a processor
/// works on the next block's memory while it updates this one only if both fit into its window.)
class Decoded {
 public:
  Streams<float, float, float> at;
  std::int64_t count = 0;  ///< elements at hand after `next`

  __attribute__((noinline)) Decoded(const Update& u, int num_slots) : u_(u), num_slots_(num_slots) {
    plain_ = is_float(u.param) && is_float(u.grad) && !u.copy.data;
    for (int s = 0; s < num_slots; ++s) plain_ = plain_ && is_float(u.slots[s]);
  }

  /// Writes back what is at hand and opens what comes next; false at the end.
  __attribute__((noinline)) bool next() {
    if (count > 0 && !plain_) close();
    begin_ += count;
    const std::int64_t left = u_.count - begin_;
    count = plain_ || left < block_size ? left : block_size;
    if (count > 0) open();
    return count > 0;
  }

 private:
  static bool is_float(const Slot& buffer) { return buffer.dtype == DType::float32; }

  float* open(const Slot& buffer, float* scratch) const {
    const Slot here = slice(buffer, begin_);
    if (is_float(here)) return static_cast<float*>(here.data);
    decode(here, count, scratch);
    return scratch;
  }
  void open() {
    at.param = open(u_.param, scratch_[0]);
    at.grad = open(u_.grad, scratch_[1]);
    for (int s = 0; s < num_slots_; ++s) at.slots[s] = open(u_.slots[s], scratch_[2 + s]);
  }
  void close() const {
    if (!is_float(u_.param)) encode(at.param, count, slice(u_.param, begin_));
    if (u_.copy.data) encode(at.param, count, slice(u_.copy, begin_));
    for (int s = 0; s < num_slots_; ++s)
      if (!is_float(u_.slots[s])) encode(at.slots[s], count, slice(u_.slots[s], begin_));
  }

  const Update& u_;
  int num_slots_;
  bool plain_;
  std::int64_t begin_ = 0;
  float scratch_[2 + max_slots][block_size];
};

// --- the element loop -------------------------------------------------------------------------

/// What is constant over one update, rounded once to the arithmetic type T.
template <class Rule, class T>
struct Constants {
  Conditioning<T> conditioning;
  typename Rule::template Coefficients<T> coefficients;

  template <class Source>
  FUSEDSTEP_HD Constants(const Conditioning<double>& c, const Source& k)
      : conditioning{static_cast<T>(c.scale), static_cast<T>(c.limit), c.scales, c.limits},
        coefficients(k) {}
};

/// Steps through elements [i, count), `width<V>` at a time; returns the first one left over. This
/// loop serves every rule, storage and width.
template <class V, class Rule, class T, class P, class G, class S>
FUSEDSTEP_HD std::int64_t run(const Constants<Rule, T>& k, const Streams<P, G, S>& at,
                              std::int64_t i, std::int64_t count) {
  for (; i + width<V> <= count; i += width<V>) {
    // The tail is shorter than a register. Without this, compilers vectorize it all the same.
    if constexpr (width<V> < width<Pack<T>>) asm volatile("");
    V param, grad, slots[max_slots];
    load(param, at.param + i);
    load(grad, at.grad + i);
    for (int s = 0; s < num_slots<Rule>; ++s) load(slots[s], at.slots[s] + i);
    Rule::apply(k.coefficients, param, condition(k.conditioning, grad), slots);
    store(param, at.param + i);
    for (int s = 0; s < num_slots<Rule>; ++s) store(slots[s], at.slots[s] + i);
  }
  return i;
}

template <class Rule, class T, class Storage, class Source>
FUSEDSTEP_HD void update_all(const Update& u, const Conditioning<double>& conditioning,
                             const Source& coefficients) {
  const Constants<Rule, T> constants(conditioning, coefficients);
  for (Storage storage(u, num_slots<Rule>); storage.next();) {
    const auto at = storage.at;
    const std::int64_t done = run<Pack<T>>(constants, at, 0, storage.count);
    if constexpr (width<Pack<T>> > 1) run<T>(constants, at, done, storage.count);  // the tail
  }
}

// --- which terms ------------------------------------------------------------------------------
// A branch per term in the element loop costs up to half the speed in cache, and 5 % in memory. So
// each set of terms that a rule calls ordinary gets a loop without. (Where the C library does the
// fused multiply-add, branches do not matter.)

#if defined(__AVX2__) || defined(__aarch64__)
constexpr bool has_fast_fma = true;
#else
constexpr bool has_fast_fma = false;
#endif

/// Whether `Rule` gets such loops. There are hundreds, which sanitizers compile for minutes: the
/// rules with one slot stand for all there.
template <class Rule>
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool has_known_terms = has_fast_fma && num_slots<Rule> == 1;
#else
constexpr bool has_known_terms = has_fast_fma;
#endif

constexpr unsigned scales = 1u << 30, limits = 1u << 31;

static_assert(max_coefficients <= 30);

template <class Rule>
constexpr unsigned all_terms = ~(~0u << length_of<decltype(Rule::coefficients)>);

/// The terms that `u` uses: bit i for coefficient i, and the conditioning of the gradient.
template <class Rule>
unsigned used_terms(const Update& u) {
  unsigned used = u.conditioning.limits ? limits | scales : u.conditioning.scales ? scales : 0;
  for (int i = 0; i < length_of<decltype(Rule::coefficients)>; ++i)
    used |= static_cast<unsigned>(u.coefficients[i] != 0) << i;
  return used;
}

template <class Rule>
constexpr unsigned optional_terms() {
  unsigned optional = scales | limits;
  for (int n = 0; n < length_of<decltype(Rule::optional_terms)>; ++n)
    optional |= 1u << Rule::optional_terms[n];
  return optional;
}

template <class Rule>
constexpr unsigned rare_terms() {
  unsigned rare = 0;
  for (int n = 0; n < length_of<decltype(Rule::rare_terms)>; ++n) rare |= 1u << Rule::rare_terms[n];
  return rare;
}

/// Settles the optional terms from bit i on, one after the other; `terms` are the ones used before.
template <class Rule, class T, class Storage, unsigned terms, unsigned bit = 1>
void update_known_terms(const Update& u, unsigned used) {
  if constexpr (bit == 0) {
    constexpr bool scaled = (terms & scales) != 0, limited = (terms & limits) != 0;
    const Conditioning<double> known{u.conditioning.scale, u.conditioning.limit, scaled, limited};
    update_all<Rule, T, Storage>(u, known, KnownTerms<terms>{u.coefficients});
  } else if constexpr (!(optional_terms<Rule>() & bit) || (bit == limits && !(terms & scales))) {
    update_known_terms<Rule, T, Storage, terms, bit << 1>(u, used);
  } else {
    if (used & bit) return update_known_terms<Rule, T, Storage, terms | bit, bit << 1>(u, used);
    update_known_terms<Rule, T, Storage, terms, bit << 1>(u, used);
  }
}

template <class Rule, class T, class Storage>
void update_elements(const Update& u) {
  constexpr unsigned rare = rare_terms<Rule>();
  constexpr unsigned always = all_terms<Rule> & ~optional_terms<Rule>() & ~rare;
  const unsigned used = used_terms<Rule>(u);
  if constexpr (has_known_terms<Rule>)
    if ((used & (always | rare)) == always)
      return update_known_terms<Rule, T, Storage, always>(u, used);
  update_all<Rule, T, Storage>(u, u.conditioning, u.coefficients);
}

// --- which storage ----------------------------------------------------------------------------

/// A 16-bit parameter with a gradient of its own type and float32 states.
template <class Rule>
bool is_usual_16_bit(const Update& u) {
  for (int s = 0; s < num_slots<Rule>; ++s)
    if (u.slots[s].dtype != DType::float32) return false;
  return u.grad.dtype == u.param.dtype && !u.copy.data;
}

template <class Rule>
void update(const Update& u) {
  switch (u.param.dtype) {
    case DType::float64: return update_elements<Rule, double, InPlace<double, double, double>>(u);
    case DType::float16:
      if (!is_usual_16_bit<Rule>(u)) break;
      return update_elements<Rule, float, InPlace<f16, f16, float>>(u);
    case DType::bfloat16:
      if (!is_usual_16_bit<Rule>(u)) break;
      return update_elements<Rule, float, InPlace<bf16, bf16, float>>(u);
    default: break;
  }
  update_elements<Rule, float, Decoded>(u);
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
