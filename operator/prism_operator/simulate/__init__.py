"""What a policy would have done with a service's traffic: a request-level simulation, seeded, on simulated pods.

    workload   requests: drawn, or read from a trace (`traces`)
    engine     one pod: continuous batching at a profile's step times, a whole run of equal steps at once
    fleet      the pool: routing, pod starts, failures, drains, the channel to a controller
    control    what decides: Prism is exactly `prism_operator.plan`; `baselines` are what users could pick instead
    score      one run as numbers; `report` and `page` show several

Not simulated: the governor inside a pod (points move with the operator's tick), the work of Kubernetes beyond the time
that a pod needs to start, the network, prefix caches.
"""
