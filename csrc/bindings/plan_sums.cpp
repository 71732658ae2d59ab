// Gradients that are gathered over several passes.
#include <algorithm>
#include <cmath>

#include "bindings/plan_walker.hpp"
#include "cpu/rule_info.hpp"

namespace fusedstep::bindings {

/// Adds gradients to the sums of their leaves.
class Plan::SumFiller final : public Walker {
 public:
  SumFiller(Plan& plan, Call& call, double scale) : Walker(plan), call_(call) {
    const auto& rules = cpu::rule_infos();
    const auto named = [](const cpu::RuleInfo& rule) {
      return rule.name == std::string("accumulate");
    };
    const auto rule = std::find_if(rules.begin(), rules.end(), named) - rules.begin();
    for (const double keep : {0.0, 1.0}) {
      RowSpec spec;
      spec.row.rule = static_cast<int>(rule);
      spec.row.rescale_grad = spec.row.sign = 1.0;
      spec.row.clip_norm = spec.row.clip_value = HUGE_VAL;
      spec.row.hyper[0] = keep;
      spec.row.hyper[1] = scale;
      call_.add_row(spec, {});
    }
  }

 private:
  void add(std::size_t index, PyObject* grad, PyObject* /*copy*/, const LeafNames& names) override {
    Entry& entry = plan_.leaves_[index];
    if (added().empty()) plan_.follow_device(entry);
    const auto held = py::reinterpret_borrow<py::object>(grad);
    const Place place{names.param, names.path};
    const std::size_t chunks =
        call_.make_sum(entry.param.ptr(), entry.accumulated, place, entry.sum);
    entry.sum_squares.resize(chunks, plan_.arena_of(call_));
    Leaf leaf{entry.sum.ptr(), grad, nullptr, {}};
    leaf.chunk_sums = &entry.sum_squares;
    call_.add_leaf(index, leaf, names, entry.accumulated ? 1 : 0);
  }

  Call& call_;
};

void Plan::accumulate(py::handle grads, double scale, py::handle stream) {
  const Busy busy(turn_);
  const Call::Handle call = Call::make(stream);
  SumFiller filler(*this, *call, scale);
  walk_trees(filler, grads, py::none());
  call->prepare({}, leaves_.size(), speller());
  if (call->device().is_cpu()) {
    call->run(speller(), StepCall::Sums::of_results);
  } else {
    const Launched launched =
        call->launch(device_side(*call).workspace, nullptr, StepCall::Sums::of_results);
    if (launched.captured) note_capture(filler.added());
  }
  for (const std::size_t leaf : filler.added()) leaves_[leaf].accumulated = true;
  call->tell_producers();
}

bool Plan::has_accumulated() {
  check_idle();
  return any_accumulated();
}

bool Plan::any_accumulated() const {
  return std::any_of(leaves_.begin(), leaves_.end(), [](const Entry& e) { return e.accumulated; });
}

void Plan::drop_accumulated(bool free_memory) {
  for (Entry& entry : leaves_) {
    entry.accumulated = false;
    if (free_memory) {
      entry.sum = py::object();
      entry.sum_squares.clear();
    }
  }
}

void Plan::zero_grad(bool set_to_none) {
  const Busy busy(turn_);
  drop_accumulated(set_to_none);
  for (const Entry& entry : leaves_) {
    const py::object grad = py::getattr(entry.param, "grad", py::none());
    if (grad.is_none()) continue;
    if (set_to_none) {
      entry.param.attr("grad") = py::none();
    } else {
      if (py::hasattr(grad, "detach_")) grad.attr("detach_")();
      grad[py::ellipsis()] = 0;
    }
  }
}

}  // namespace fusedstep::bindings
