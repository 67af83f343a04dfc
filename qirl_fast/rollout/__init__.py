"""How a trajectory is made and scored again: schedule, dynamics, guidance, sample, replay."""
