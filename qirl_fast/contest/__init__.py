"""What `python -m qirl_fast.evaluate` is made of: several models on one prompt file.

contenders.py says which files they are, drawings.py draws and judges, kept_images.py keeps, and
results.py makes of it what evaluation.json says; the arithmetic is in qirl_fast/evaluation.
"""
