"""Schedules whose values braintools defines otherwise than PyTorch and `fusedstep.schedules`."""

from __future__ import annotations

from fusedstep import schedules
from fusedstep.ranges import Real
from fusedstep.schedules.shapes import half_cosine, interpolated, select, smaller


class CosineAnnealing(schedules.CosineAnnealingLR):
    """Half a cosine from `base_lr` to `eta_min`, where it stays."""

    def at(self, t: int) -> float:
        """The learning rate of epoch `t`."""
        return super().at(smaller(t, self.T_max))


class OneCycle(schedules.OneCycleLR):
    """A straight rise, whatever the strategy, and an end at `max_lr / final_div_factor`."""

    def __init__(
        self,
        max_lr: float,
        total_steps: int | None,
        epochs: int | None,
        steps_per_epoch: int | None,
        pct_start: float,
        anneal_strategy: str,
        div_factor: float,
        final_div_factor: float,
    ) -> None:
        super().__init__(
            max_lr, total_steps, epochs, steps_per_epoch, pct_start, anneal_strategy, div_factor,
            final_div_factor,
        )  # fmt: skip
        Real(0.0, 1.0, "()").number("pct_start", pct_start)

    def at(self, t: int) -> float:
        """The learning rate of step `t`."""
        peak = self.pct_start * self.total_steps
        share = (t - peak) / (self.total_steps - peak)
        last = self.max_lr / self.final_div_factor
        if self.anneal_strategy == "cos":
            fall = interpolated(last, self.max_lr, half_cosine(smaller(share, 1.0)))
        else:
            fall = interpolated(self.max_lr, last, share)
        return select(t <= peak, interpolated(self.base_lr, self.max_lr, t / peak), fall)


class Plateau(schedules.ReduceLROnPlateau):
    """The best metric is that of the epochs outside of a cooldown."""

    def _best(self, old: float, new: float, cools: bool) -> float:
        return select(cools, old, new)
