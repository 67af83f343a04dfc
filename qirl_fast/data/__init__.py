"""Prompts, the order they are drawn in, and their cached text embeddings."""
