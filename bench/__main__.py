"""ops: against eager PyTorch, torch.compile, others, a copy; block; step; opd: a step of
distillation; fp8; decode: images; algorithms: learning curves; scaling: over processes; soak:
thousands of steps.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import torch

from bench import base


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    names = ["ops", "block", "step", "opd", "fp8", "decode", "algorithms", "scaling", "soak"]
    parser.add_argument("what", choices=names)
    parser.add_argument("--op", nargs="+", metavar="OP", help="only these ops")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], metavar="DTYPE")
    parser.add_argument("--base", metavar="COMMIT", help="build that commit too and compare")
    parser.add_argument("--out", type=Path, metavar="F.json", help="also writes F.md and F.png")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds (default 15)")
    parser.add_argument("--seconds", type=float, default=20.0, help="limit for one set of rounds")
    parser.add_argument(
        "--processes", type=int, default=3, help="of ops on a CPU: processes for each op"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--no-sweep", action="store_true", help="leave the size sweep out")
    parser.add_argument("--scale", choices=["cpu", "half", "full"], default="cpu", help="of step")
    parser.add_argument(
        "--model",
        choices=["qwen-image-2.1", "qwen-image"],
        default="qwen-image-2.1",
        help="of step",
    )
    parser.add_argument(
        "--condition-px", type=int, default=0, help="of step: condition image (editing); 0: none"
    )
    parser.add_argument("--px", type=int, help="image size (step: 128 by default, block: 512)")
    parser.add_argument(
        "--step-s", type=float, default=2.0, help="of decode: seconds of a simulated step"
    )
    parser.add_argument("--recipe", nargs="+", metavar="NAME", help="of algorithms: only these")
    parser.add_argument(
        "--budget-s", type=float, default=300.0, help="of algorithms: seconds of each recipe"
    )
    parser.add_argument("--steps", type=int, default=2000, help="of soak")
    options = parser.parse_args()
    base.use_site()
    if options.what == "step":
        _step(options)
    elif options.what == "opd":
        _opd(options)
    elif options.what == "fp8":
        _fp8(options)
    elif options.what == "block":
        _block(options)
    elif options.what == "decode":
        _decode(options)
    elif options.what == "algorithms":
        _algorithms(options)
    elif options.what == "scaling":
        from bench import scaling

        scaling.run(options.out, say=lambda text: print(text, flush=True))
    elif options.what == "soak":
        from bench import soak

        result = soak.run(options.steps, Path("outputs/soak"), options.out)
        raise SystemExit(not result["flat"])
    else:
        _ops(options)


def _ops(options: argparse.Namespace) -> None:
    from bench import ops, report

    result = ops.run(
        ops.Options(
            device=options.device,
            only=options.op,
            dtypes=[
                {"float32": torch.float32, "bfloat16": torch.bfloat16}[d] for d in options.dtype
            ],
            rounds=options.rounds,
            seconds=options.seconds,
            processes=options.processes,
            compiled=not options.no_compile,
            sweep=not options.no_sweep,
            out=options.out,
        ),
        say=partial(print, flush=True),  # goes to other processes
    )
    if options.base:
        base.compare(result, base.measure(options.base, options.device, _for_base(options)))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(report.markdown(result))
        report.plot(result, options.out.with_suffix(".png"))


def _step(options: argparse.Namespace) -> None:
    from bench import step

    chosen = step.Options(
        model=options.model,
        scale=options.scale,
        px=options.px or 128,
        condition_px=options.condition_px,
        device=options.device,
        out=options.out,
    )
    result = step.run(chosen, say=lambda text: print(text, flush=True))
    if options.out:
        options.out.with_suffix(".md").write_text(step.markdown(result))
        step.plot(result, options.out.with_suffix(".png"))


def _opd(options: argparse.Namespace) -> None:
    from bench import opd, step

    chosen = step.Options(
        model=options.model,
        scale=options.scale,
        px=options.px or 128,
        condition_px=options.condition_px,
        device=options.device,
        repeats=min(options.rounds, 5),
        out=options.out,
    )
    opd.run(chosen, say=lambda text: print(text, flush=True))


def _fp8(options: argparse.Namespace) -> None:
    from bench import fp8

    chosen = fp8.Options(device=options.device, px=options.px or 128, out=options.out)
    result = fp8.run(chosen, say=lambda text: print(text, flush=True))
    if options.out:
        options.out.with_suffix(".md").write_text(fp8.markdown(result))
        fp8.plot(result, options.out.with_suffix(".png"))


def _block(options: argparse.Namespace) -> None:
    from bench import block

    heads = 24 if options.device == "cuda" else 6
    block.run(
        block.Options(px=options.px or 512, device=options.device, heads=heads, out=options.out),
        say=lambda text: print(text, flush=True),
    )


def _algorithms(options: argparse.Namespace) -> None:
    from bench import algorithms

    chosen = algorithms.Options(seconds=options.budget_s, only=options.recipe, out=options.out)
    algorithms.run(chosen, say=lambda text: print(text, flush=True))


def _decode(options: argparse.Namespace) -> None:
    from bench import decode

    chosen = decode.Options(
        rounds=options.rounds, seconds=options.seconds, step_s=options.step_s, out=options.out
    )
    result = decode.run(chosen, say=lambda text: print(text, flush=True))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(decode.markdown(result))
        decode.plot(result, options.out.with_suffix(".png"))


def _for_base(options: argparse.Namespace) -> list[str]:
    """Arguments of the run on the base commit: eager is enough to compare with."""
    names = ["--op", *options.op] if options.op else []
    limits = ["--rounds", str(options.rounds), "--seconds", str(options.seconds)]
    limits += ["--processes", str(options.processes)]
    names += ["--dtype", *options.dtype]
    return [*names, *limits, "--no-compile", "--no-sweep"]


if __name__ == "__main__":
    main()
