"""The contract between operator, runtime and users: resources, operating points, directive, report, profile, manifest.

Imports neither side. Resources are the source of the CRDs (``make generate``); control messages are the wire format of
the control API; the manifest and the profile are the two documents that an artifact and a pod publish about themselves.
"""

GROUP = "moeprism.io"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
FULL = "full"
"""Name of the operating point that runs every routed expert whole. Every model has it."""
