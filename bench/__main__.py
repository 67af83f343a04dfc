"""`python -m bench ops`: ops against eager PyTorch and torch.compile, and the copy ceiling."""

import argparse

from bench.ops import run


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("what", choices=["ops"])
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds (default 15)")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--only", nargs="*", default=None, help="names of ops")
    options = parser.parse_args()
    shape = (options.rows, options.tokens, options.channels)
    run(shape, options.rounds, not options.no_compile, options.only)


if __name__ == "__main__":
    main()
