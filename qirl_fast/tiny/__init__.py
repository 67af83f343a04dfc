"""The tiny world and the tiny model: real components, small enough for two CPU cores."""
