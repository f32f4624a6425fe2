"""`python -m tests.runtime.serving.scripted_server [flags of serve]`: a serving process of its own, without a model.

Answers repeat one letter for ever, 5 ms a step, so that a test decides by `max_tokens` how long a request lasts.
"""

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path

from prism_runtime.server import logs
from prism_runtime.server.app import ServingProcess
from prism_runtime.server.settings import ServeSettings, add_serve_flags
from tests.runtime.serving.engine import END, ScriptedEngine
from tests.runtime.serving.process import DIGEST


async def main() -> None:
    parser = argparse.ArgumentParser()
    add_serve_flags(parser, Path("unused"))
    settings = ServeSettings.of(parser.parse_args(["artifact", *sys.argv[1:]]))
    logs.configure(settings.log_level)
    engine = ScriptedEngine(lambda request: b"x" * 5000, max_context_tokens=4096, step_s=0.005)
    process = ServingProcess(
        engine,
        settings,
        model_digest=DIGEST,
        eos_token_ids=frozenset({END}),
        block_tokens=16,
        profile=None,
        pacer=None,
        started_s=time.monotonic(),
        announce=lambda ports: print(json.dumps(ports), flush=True),
    )
    await process.run()


if __name__ == "__main__":
    asyncio.run(main())
