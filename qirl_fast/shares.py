"""Which chunks of samples each process of a run draws and replays: runs of nearly equal cost.

Of a row of N tokens that are drawn, L of text and condition images, in blocks of width D:

    cost = n (6 D + m)      n: tokens that pass the blocks with the row; m: that each attends to
    n = m = N + L           where text and images pass the blocks beside the row
    n = N, m = N + L        where they are a prefix that passes them once a chunk

A token takes 24 D^2 floating-point operations in a block's matrices (12 D^2 weights) and 4 m D in
attention; the common factor 4 D is left out. Steps and branches are the same for all rows.
Where a transformer is spread over processes these replay in step, a chunk each: there the number of
chunks counts, and shares are of equal number.
"""

from collections.abc import Sequence

from qirl_fast.conditioning import Conditioning
from qirl_fast.data.prompts import Prompt
from qirl_fast.distributed import World
from qirl_fast.models import Model
from qirl_fast.models.adapter import heads_and_width


def row_cost(drawn: int, given: int, width: int, beside: bool) -> int:
    """Of N = drawn and L = given tokens; beside: whether the given ones pass the blocks too."""
    return (drawn + given * beside) * (6 * width + drawn + given)


def own_chunks(
    world: World,
    model: Model,
    conditioning: Conditioning,
    prompts: Sequence[Prompt],
    owner: Sequence[int],
    max_rows: int,
    parts: int = 1,
) -> list[int]:
    """All: numbers of this process's chunks, ascending, some of each of `parts` minibatches.

    prompts: of one size, owner: which of them each row is of. ValueError, OSError in all processes
    for condition images of no use.
    """
    chunks = range(0, len(owner), max_rows)
    if world.size == 1 or model.units is not None:
        return world.own(len(chunks), parts)
    drawn, _ = model.latent_shape(*conditioning.target(prompts[0]))
    _, width = heads_and_width(model.transformer.config)
    costs = [row_cost(drawn, n, width, model.text_stream) for n in conditioning.lengths(prompts)]
    of_chunks = [sum(costs[p] for p in owner[k : k + max_rows]) for k in chunks]
    return world.own(len(chunks), parts, of_chunks)
