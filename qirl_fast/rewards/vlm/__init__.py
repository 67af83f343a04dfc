"""A vision-language model as a judge (METHOD.md 5): it reasons, then gives a score token 1..5.

rubric.py    what is asked: the text after the images, per dimension
data.py      the training file: rows, splits, leak check, tier rule
loss.py      tokens and loss of fine-tuning
score.py     from the probabilities of the score token to a number
scorer.py    the judge: asks an engine, averages reasonings; the same one for both engines
engine.py    engine in this process, on a model folder (folder.py)
local.py     the judge `kind: vlm`
openai.py    the judge `kind: openai`: the engine is a server that speaks OpenAI's API
"""
