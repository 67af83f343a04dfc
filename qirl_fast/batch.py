"""One update's samples, and what is kept of them for inspection."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

from qirl_fast.data.prompts import Prompt
from qirl_fast.rewards.judge import SCORED
from qirl_fast.rollout.sample import Trajectory
from qirl_fast.rollout.workers import StepFailed as StepFailed
from qirl_fast.tensors import save_file


@dataclass(frozen=True)
class Batch:
    """One update's samples: B rows, as many for each prompt, prompt by prompt.

    Of several processes each has trajectories of its group's chunks, images of those of them that
    it was to decode, and all the scores.
    """

    prompts: list[Prompt]
    trajectories: list[Trajectory]
    images: np.ndarray  # uint8 [rows, H, W, 3], see `World.shown`
    scores: Tensor  # float32 [B, K], all judges
    status: Tensor  # int8 [B, K], see rewards.judge
    metrics: dict[str, float] = field(default_factory=dict)  # of how they were drawn
    explored: int = 0  # samples drawn to choose these from

    @property
    def group(self) -> int:
        """Samples of one prompt."""
        return len(self.scores) // len(self.prompts)

    @property
    def valid(self) -> Tensor:
        """Which scores are scores, bool [B, K]."""
        return self.status == SCORED


def save_batch(batch: Batch, folder: Path) -> Path:
    """Write a batch for inspection: images, scores, prompts and recorded states."""
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(
        folder / "batch.npz",
        images=batch.images,
        scores=batch.scores.numpy(),
        status=batch.status.numpy(),
    )
    rows = "".join(json.dumps(p.metadata) + "\n" for p in batch.prompts)
    (folder / "prompts.jsonl").write_text(rows, encoding="utf-8")
    tensors = {}
    for t in batch.trajectories:
        for name in ("x", "x_next", "logp"):
            for step, value in zip(t.recorded, getattr(t, name), strict=False):  # of what is kept
                tensors[f"rows{t.rows.start}.step{step}.{name}"] = value.cpu().clone()
    save_file(tensors, folder / "trajectories.safetensors")
    return folder
