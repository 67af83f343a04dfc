"""The half of training that changes weights: gradients of recorded chunks, AdamW, the average."""

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from qirl_fast.algorithms import Policy, StepLoss, make_algorithm
from qirl_fast.batch import StepFailed
from qirl_fast.config import Config
from qirl_fast.distributed import TreeSum, World
from qirl_fast.models import Model
from qirl_fast.models.ema import Ema
from qirl_fast.models.sharding import Sharding, own_part, spread_as
from qirl_fast.rollout.sample import Sampling, Trajectory
from qirl_fast.rollout.workers import Workers

logger = logging.getLogger(__name__)


class Learner:
    """Trainable weights, their optimizer and average; `update` is one rollout's training.

    Where the trained weights are sharded (`spread`), so are their gradients, moments and averages,
    and FSDP adds gradients up, in an order of its own.
    """

    def __init__(
        self,
        cfg: Config,
        model: Model,
        workers: Workers,
        sampling: Sampling,
        world: World,
        sharding: Sharding | None = None,
    ):
        self.train, self.model, self.workers, self.world = cfg.train, model, workers, world
        lora, train = cfg.model.lora, cfg.train
        model.recompute_blocks = train.recompute_blocks
        self.trainable = model.trainable(
            cfg.model.adapter, lora.rank, lora.alpha, lora.targets, cfg.seed, sharding
        )
        self.spread = any(isinstance(p, DTensor) for p in self.trainable.values())
        policy = Policy(model, self.trainable, sampling, workers, train.updates_per_rollout)
        self.algorithm = make_algorithm(cfg.algorithm, policy)
        self.optimizer = torch.optim.AdamW(
            self.trainable.values(),
            lr=train.lr,
            betas=train.betas,
            weight_decay=train.weight_decay,
        )
        ema = train.ema
        self.ema = Ema(list(self.trainable.values()), ema.decay, ema.every) if ema else None
        self.optimizer_steps = 0

    def update(
        self,
        trajectories: Sequence[Trajectory],
        advantage: Tensor | None,
        tasks: Sequence[str],
        begun: Callable[[], None] = lambda: None,
    ) -> dict[str, float]:
        """One optimizer step per minibatch of chunks; returns the metrics of the update.

        trajectories: this process's chunks, some of each minibatch. advantage: float32, one
        value a row of all chunks of all processes, in their order; None where the algorithm has no
        use for it. tasks: what each of these rows is, see `Prompt.task`. begun: called before the
        first optimizer step.
        `pre_update_*` are measured before the first optimizer step, where rollout and replay must
        agree: a ratio is 1 there, bit for bit where `replay_steps` is 1 and chunks are whole, else
        to rounding. `skipped_share`: of the rows, those whose replay was left out, see `_backward`.
        `backoff_rows`, where memory did not suffice: the fewest rows of a chunk at a time.
        """
        count, backoff = self.train.updates_per_rollout, 0
        sums: dict[str, float] = {}
        with self.world.agreed(StepFailed):
            prepared = self.algorithm.prepare(trajectories, tasks)
        told = self.world.gather([[c.rows.start, c.rows.stop] for c in trajectories])
        rows = [range(*pair) for pair in sorted({(a, b) for own in told for a, b in own})]
        whole = len(rows) // count
        for k in range(count):
            part = rows[k * whole : (k + 1) * whole]
            own = [i for i, c in enumerate(trajectories) if c.rows in part]
            chunks, ready = ([held[i] for i in own] for held in (trajectories, prepared))
            found = self._backward(chunks, ready, advantage, part)
            backoff = int(found.pop("backoff_rows", 0))
            if k == 0:
                begun()
            norm = self._optimizer_step()
            if k == 0 and "ratio_error" in found:
                for name in ("clip_fraction", "ratio_error"):
                    if name in found:
                        sums[f"pre_update_{name}"] = found[name] * count
                exact = self.train.replay_steps == 1 and not backoff
                if found["ratio_error"] > (0 if exact else 0.01):
                    logger.error(
                        "before the update a ratio is off 1 by %g: rollout and replay computed "
                        "different velocities from the same weights",
                        found["ratio_error"],
                    )
            for name, value in {**found, "grad_norm": norm}.items():
                sums[name] = sums.get(name, 0.0) + value
        rate = self.optimizer.param_groups[0]["lr"]
        metrics = {name: value / count for name, value in sums.items()} | {"lr": rate}
        return metrics | ({"backoff_rows": backoff} if backoff else {})

    def _backward(
        self,
        chunks: Sequence[Trajectory],
        prepared: Sequence[Any],
        advantage: Tensor | None,
        rows: Sequence[range],
    ) -> dict[str, float]:
        """Leave the gradient of the loss over a minibatch in `.grad`; returns its metrics.

        chunks, prepared: this process's part of it; rows: of all chunks of the minibatch.
        Gradients are summed over a tree of the chunks, whoever computed them first. An idle chunk
        (of groups that are all flat, see `Algorithm.idle`) adds zeros to the sums and is left out
        where `skip_flat` is on; loss and gradient are divided by its rows all the same. The
        algorithm's metrics are means over the other chunks, whether it is left out or not, and
        absent without one. Where memory does not suffice for a chunk, its gradient is summed over
        its parts; each counts by its rows, so that loss and metrics are those of the whole.
        """
        count = sum(map(len, rows))
        parameters = list(self.trainable.values())
        parts = [None if advantage is None else advantage[r.start : r.stop].float() for r in rows]
        idle = [part is not None and self.algorithm.idle(part) for part in parts]
        judged = sum(len(r) for r, is_idle in zip(rows, idle, strict=True) if not is_idle)
        place = {r.start: leaf for leaf, r in enumerate(rows)}
        leaves = [place[chunk.rows.start] for chunk in chunks]
        skip = self.train.skip_flat
        left = [(k, leaf) for k, leaf in enumerate(leaves) if not (idle[leaf] and skip)]
        real = len(left)
        if self.model.units is not None:  # forward and backward go in step, each has as many
            left += [(0, leaves[0])] * (max(self.world.gather(real)) - real)
        self.optimizer.zero_grad()

        def gradient(
            item: tuple[int, tuple[int, int]],
        ) -> tuple[list[Tensor], list[tuple[int, Tensor, list[StepLoss]]]]:
            number, (k, leaf) = item
            total: list[Tensor] = []

            def of(some: slice) -> tuple[int, Tensor, list[StepLoss]]:
                own, value = some.stop - some.start, parts[leaf]
                value = None if value is None else value[some].to(self.model.device)
                beside = prepared[k]
                if own < len(rows[leaf]):
                    beside = tree_map_only(Tensor, lambda t: t[some], beside)
                with torch.enable_grad():
                    steps = list(self.algorithm.loss(chunks[k].part(some), value, beside))
                    loss = torch.stack([step.loss for step in steps]).sum()
                    loss = loss * (own / (count * len(steps)))
                if self.spread:
                    (loss if number < real else loss * 0).backward()
                    return own, loss.detach(), steps
                # Weights that no output depends on, such as the text's in a last block, get zeros.
                found = torch.autograd.grad(loss, parameters, materialize_grads=True)
                if total:
                    torch._foreach_add_(total, found)
                else:
                    total.extend(found)
                return own, loss.detach(), steps

            return total, self.workers.parts(of, len(rows[leaf]))

        summed = TreeSum()
        seen: list[tuple[int, dict[str, float], dict[str, float]]] = []
        bad: list[str] = []  # said at the end: until then other processes count on this one
        with self.world.agreed(StepFailed):
            found = zip(left, self.workers.map(gradient, enumerate(left)), strict=True)
            for number, ((_, leaf), (gradients, losses)) in enumerate(found):
                if number >= real:
                    continue
                if not self.spread:
                    summed.add(leaf, gradients)
                own = {"loss": sum(loss.item() for _, loss, _ in losses)}
                if not math.isfinite(own["loss"]):
                    bad.append(f"the loss of rows {rows[leaf]} is {own['loss']}")
                ratios = [s.ratio for *_, steps in losses for s in steps if s.ratio is not None]
                if ratios and not idle[leaf]:
                    own["ratio_error"] = max((r - 1).abs().max().item() for r in ratios)
                means: dict[str, float] = {}
                for some, _, steps in losses if not idle[leaf] else ():
                    share = some / (judged * len(steps))
                    for name, value in ((n, v) for step in steps for n, v in step.metrics.items()):
                        means[name] = means.get(name, 0.0) + value.item() * share
                seen.append((leaf, own, means))
            if bad:
                raise StepFailed(bad[0])
        # Where all chunks were left out the optimizer steps on zeros all the same.
        if self.spread:
            for p in parameters:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        else:
            for p, g in zip(parameters, self.world.total(summed, parameters), strict=True):
                p.grad = g
        totals = {"loss": 0.0}
        mine = [] if self.world.place else seen  # one of a group tells
        told = self.world.gather([self.workers.rows.get("forward"), mine])
        for _, own, means in sorted(each for _, found in told for each in found):
            totals["loss"] += own["loss"]
            if "ratio_error" in own:
                totals["ratio_error"] = max(totals.get("ratio_error", 0.0), own["ratio_error"])
            for name, mean in means.items():
                totals[name] = totals.get(name, 0.0) + mean
        skipped = sum(len(r) for r, is_idle in zip(rows, idle, strict=True) if is_idle and skip)
        fewest = [least for least, _ in told if least]
        backoff = {"backoff_rows": min(fewest)} if fewest else {}
        return totals | {"skipped_share": skipped / count} | backoff

    def _optimizer_step(self) -> float:
        parameters = list(self.trainable.values())
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not torch.isfinite(norm):
            self.optimizer.zero_grad()
            raise StepFailed(f"the gradient norm is {norm.item()}")
        torch.nn.utils.clip_grads_with_norm_(parameters, self.train.max_grad_norm, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.optimizer_steps += 1
        if self.ema:
            self.ema.update(self.optimizer_steps)
        self.algorithm.after_step(self.optimizer_steps)
        return norm.item()

    def _learning_rate(self) -> float:
        """The next optimizer step's: up over `warmup` steps, level, down over the last `decay`."""
        train = self.train
        left = train.steps * train.updates_per_rollout - self.optimizer_steps
        up = (self.optimizer_steps + 1) / max(1, train.warmup)
        return train.lr * min(1.0, up, left / max(1, train.decay))

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the weights are the averaged ones where there is an average."""
        return self.ema.applied() if self.ema else nullcontext()

    def state(self) -> dict[str, Any]:
        """Everything the next update depends on, as a tree for `checkpoint.pack`."""
        return {
            "weights": {name: p.detach() for name, p in self.trainable.items()},
            "optimizer": self.optimizer.state_dict(),
            "optimizer_steps": self.optimizer_steps,
            "ema": self.ema.average if self.ema else [],
            "algorithm": self.algorithm.state(),
        }

    def ready(self) -> None:
        """Give the optimizer its moments, to be filled: by a step of no length."""
        for p in self.trainable.values():
            p.grad = torch.zeros_like(p)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        self.optimizer.step()
        self.optimizer.zero_grad()

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state` was taken; tensors are whole, or spread as the weights."""
        for name, p in self.trainable.items():
            own_part(p).copy_(own_part(spread_as(state["weights"][name], p)))
        if self.ema:
            self.ema.load(state["ema"])
        of = dict(enumerate(self.trainable.values()))
        moments = {
            i: {n: spread_as(v, of[i]) if v.shape == of[i].shape else v for n, v in own.items()}
            for i, own in state["optimizer"]["state"].items()
        }
        self.optimizer.load_state_dict(state["optimizer"] | {"state": moments})
        self.optimizer_steps = state["optimizer_steps"]
        self.algorithm.load_state(state["algorithm"])
