"""The errors of the local cluster: what failed, and what to do about it."""


class ClusterError(RuntimeError):
    """Its text tells what was asked, what was found, and the command or setting that helps."""


class CannotRunContainersError(ClusterError):
    """No root, no namespaces or read-only cgroups: nothing that this program installs would help."""
