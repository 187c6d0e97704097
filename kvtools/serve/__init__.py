"""Inside other people's engines: the plugins of vLLM and SGLang.

They call these in each of their processes, whether kvtools is wanted or not. So this file imports
neither engines nor operators.
"""

import os
from typing import Any

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


def sglang_plugin() -> None:
    """Make kvtools a choice of SGLang's --attention-backend and --sampling-backend.

    What is chosen is imported, and its interface looked at, when SGLang makes it; what is not
    chosen, never.
    """
    from sglang.srt.arg_groups.choices import add_attention_backend_choices
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.layers.sampler import register_sampler_backend

    add_attention_backend_choices(["kvtools"])
    register_attention_backend("kvtools")(_sglang_attention)
    register_sampler_backend("kvtools", _sglang_sampler)


def _sglang_attention(runner: Any) -> Any:
    from .sglang import Backend

    return Backend(runner)


def _sglang_sampler() -> Any:
    from .sglang_sampler import Sampler

    return Sampler()
