"""Inside other people's engines: vLLM's plugin.

vLLM calls `vllm_plugin` in each of its processes, whether kvtools is wanted or not. So this file
imports neither vLLM nor operators.
"""

import os

SETTING = "KVTOOLS_VLLM"


def vllm_plugin() -> None:
    """Make kvtools the attention of vLLM, if the environment says KVTOOLS_VLLM=1.

    Otherwise (unset, empty, 0) nothing is imported, registered or printed.

    Raises:
        ValueError: the variable says something else.
        RuntimeError: this vLLM's interface is not the one that kvtools was written for.
    """
    asked = os.environ.get(SETTING, "")
    if asked in ("", "0"):
        return
    if asked != "1":
        raise ValueError(f"{SETTING}={asked!r}: expected 1, for kvtools' attention, or 0")
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from .interface import check_interface

    check_interface()
    # All of them, whatever the platform would choose: on a CPU it does not ask. What kvtools cannot
    # do is then refused, not left to another.
    for member in AttentionBackendEnum:
        register_backend(member, "kvtools.serve.vllm.Backend")
