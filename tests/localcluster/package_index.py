"""The machine's package index settings, for use while an image is built; no host stands in any file.

They reach the Dockerfiles as the build secret `package-index`, a shell fragment, so that neither an address nor a
password in it stays in a layer. Users of docker may pass one with `--secret id=package-index,src=FILE`.
"""

import os
import shlex
import subprocess
import sys

FROM_PIP = {
    "index-url": ("PIP_INDEX_URL", "UV_DEFAULT_INDEX"),
    "extra-index-url": ("PIP_EXTRA_INDEX_URL", "UV_INDEX"),
    "trusted-host": ("PIP_TRUSTED_HOST", "UV_INSECURE_HOST"),
    "default-timeout": ("PIP_DEFAULT_TIMEOUT", "UV_HTTP_TIMEOUT"),
}
"""pip's setting -> the variables by which pip and uv read it."""
PROXIES = ("http_proxy", "https_proxy", "no_proxy")


def _pip_settings() -> dict[str, str]:
    """From pip.conf and PIP_* variables, as pip itself resolves them."""
    # An environment made by uv has no pip; the Python under it usually has.
    pythons = (sys.executable, f"{sys.base_prefix}/bin/python3")
    runs = (subprocess.run([p, "-m", "pip", "config", "list"], capture_output=True, text=True) for p in pythons)
    listed = next((run.stdout for run in runs if run.returncode == 0), "")
    found = {}
    for line in listed.splitlines():
        name, separator, value = line.partition("=")
        if separator:
            found[name.rsplit(".", 1)[-1]] = " ".join(value.strip("'\"").replace("\\n", " ").split())
    return found


def as_shell() -> str:
    """`NAME=value` lines, quoted for a shell; empty if the machine uses the defaults."""
    settings: dict[str, str] = {}
    for name, value in _pip_settings().items():
        settings |= dict.fromkeys(FROM_PIP.get(name, ()), value)
    for variable, value in os.environ.items():
        is_index = variable.startswith("UV_") and ("INDEX" in variable or variable == "UV_INSECURE_HOST")
        if is_index or variable.lower() in PROXIES:
            settings[variable] = value
    return "".join(f"{variable}={shlex.quote(value)}\n" for variable, value in sorted(settings.items()))
