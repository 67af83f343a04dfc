"""`python -m qirl_fast.reward_server settings.yaml [key=value ...]`: serve judges over HTTP.

A trainer on another machine uses them as judges of kind `remote`. It listens on 127.0.0.1 unless
told otherwise; a token is read from the environment variable named by token_env. SIGTERM and Ctrl-C
let it finish what is under way. It speaks plain HTTP: over a network that others can read, put a
proxy that speaks TLS before it.
"""

import logging
import os
import signal
import sys
from contextlib import suppress

from qirl_fast.config import ConfigError, load_settings
from qirl_fast.config.server import ServerConfig, token_of
from qirl_fast.entry import run
from qirl_fast.listening import listen, reward_library
from qirl_fast.rewards.judges import Judges
from qirl_fast.rewards.served import Served

USAGE = f"""{__doc__}
  key=value    any setting by its dotted name, e.g. port=9000 serve=[alignment]
"""

logger = logging.getLogger("qirl_fast.reward_server")


def serve(cfg: ServerConfig) -> int:
    """Serve until a signal comes: 0, or 1 where a judge was still busy after grace_s."""
    library = reward_library()
    token = token_of(cfg.token_env)
    listening = listen(cfg.host, cfg.port)
    judges = _load(cfg)
    app = library.App(judges, token, cfg.limits, cfg.requests, cfg.body_s)
    server = library.server_of(app, cfg.requests, cfg.grace_s)
    listening.listen()  # until now clients were refused, and asked again
    host, port = listening.getsockname()[:2]
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    print(f"serving {', '.join(judges)} on http://{where}", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises what it got again, at its end
    with suppress(KeyboardInterrupt):
        server.run(sockets=[listening])
    if any(judge.busy for judge in judges.values()):
        logger.error("a judge is busy %d s after the signal; left without it", cfg.grace_s)
        return 1
    for judge in judges.values():
        judge.close()
    return 0


def _load(cfg: ServerConfig) -> dict[str, Served]:
    device = _device(cfg)
    found = {}
    for name in cfg.serve:
        try:
            judges = Judges([name], cfg.judges, device, cfg.reask)
        except (ValueError, OSError, ImportError) as error:
            raise ConfigError([f"judge {name!r}: {error}"]) from error
        for text in judges.warnings():
            logger.warning(text)
        found[name] = Served(judges)
    return found


def _device(cfg: ServerConfig) -> str:
    if cfg.device == "cpu" and cfg.threads is None:
        return "cpu"
    import torch  # takes seconds, and not every judge needs it

    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    best = "cuda" if torch.cuda.is_available() else "cpu"
    if cfg.device == "cuda" != best:
        raise ConfigError(
            ["device: got cuda, and torch.cuda.is_available() is False here; allowed: cpu, auto"]
        )
    return best if cfg.device == "auto" else cfg.device


def main(argv: list[str] | None = None) -> int:
    """Entry point: 0 ended by a signal, 1 a judge was left busy, 2 the settings are wrong."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)

    def work(args: list[str]) -> int:
        return serve(load_settings(args, ServerConfig))

    return run(argv, USAGE, work, wrong=ConfigError)


if __name__ == "__main__":
    code = main()
    if code == 1:
        os._exit(code)  # the thread of a judge that does not end would hold the process
    sys.exit(code)
