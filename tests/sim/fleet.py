"""The simulated fleet under the name that tests know: see `prism_operator.simulate`."""

from prism_operator.simulate.fleet import Fleet
from prism_operator.simulate.workload import SimRequest, poisson

__all__ = ["Fleet", "SimRequest", "poisson"]
