"""`prism-operator run`: settings, logging, uvloop, kopf; `prism-operator simulate`. Wiring only."""

import asyncio
import logging
import platform
import sys
from importlib.metadata import version

import kopf
import uvloop

from prism_operator import metrics, settings
from prism_operator.control.application import Operator
from prism_operator.control.kube import Kube, NoAccess
from prism_operator.handlers import registry_for

logger = logging.getLogger("prism_operator")


async def serve(options: settings.Settings) -> int:
    """Run until SIGTERM (0) or until this process must not go on (1)."""
    try:
        kube = await Kube.connect(options.kubeconfig)
    except NoAccess as error:
        logger.error("%s", error)
        return 1
    operator = Operator(options, kube)
    try:
        await kopf.operator(
            registry=registry_for(operator),
            standalone=True,
            identity=options.identity,  # kopf's default asks for a user name, and a container's user has none
            clusterwide=not options.watch_namespaces,
            namespaces=options.watch_namespaces,
            stop_flag=operator.must_exit,
        )
    except Exception:
        if operator.failure is None:
            raise  # a bug: the traceback is what helps
    finally:
        await kube.close()
    if operator.failure:
        logger.error("exiting: %s", operator.failure)
    return 1 if operator.failure else 0


def main() -> None:
    if sys.argv[1:2] == ["simulate"]:
        from prism_operator.simulate import cli as simulate  # the operator itself needs none of it

        sys.exit(simulate.main(sys.argv[2:]))
    options = settings.parse()
    logging.basicConfig(level=options.log_level, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("kopf").setLevel(max(logging.WARNING, logging.getLevelName(options.log_level)))
    metrics.BUILD_INFO.labels(version("moe-prism"), platform.python_version()).set(1)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        sys.exit(runner.run(serve(options)))


if __name__ == "__main__":
    main()
