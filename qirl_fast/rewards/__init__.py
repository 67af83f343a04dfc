"""Reward judges: one file each, `score(images uint8 [B, H, W, 3], metadata) -> float32 [B]`."""
