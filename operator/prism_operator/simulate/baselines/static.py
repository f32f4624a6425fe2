"""A fixed number of replicas: what users do who size for the peak by hand."""

from prism_operator.simulate.control import Orders, Signals


class Static:
    period_s = 15.0
    wants_reports = wants_predictions = False

    def __init__(self, replicas: int) -> None:
        self.name = f"static-{replicas}"
        self.replicas = replicas

    def decide(self, signals: Signals) -> Orders:
        return Orders(replicas=self.replicas)
