"""What vLLM lacks for this model: seven small mends, each only where its fault is found.

vLLM calls `register` in each of its processes (entry point group `vllm.general_plugins`), so
nothing of vLLM is edited. Each mend looks for its fault first, by behaviour where that can be
asked; a mend that does not fit the installed release is reported and left out.
`SELFEVO_VLLM_WITHOUT=router,seed` leaves mends out by name, so that tests can show the fault.

| mend | without it |
|---|---|
| router | CPU: the first request ends the engine; sigmoid scores are known for grouped top-k only |
| loader | a reload ends the worker: the q/k-norm's loader is a partial and has no `__name__` |
| repack | CPU: after a reload experts are read in the wrong layout, and outputs are wrong |
| seed | CPU: a seeded request whose prompt is read in two steps ends the engine |
| sampler | CUDA without FlashInfer: the sampler imports it unasked and the engine does not start |
| ray | without Ray, the engine for weights by CUDA IPC cannot be imported |
| float32 | CUDA: Triton multiplies float32 as TF32, so log-probs are 1e-3 off |
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

WITHOUT = "SELFEVO_VLLM_WITHOUT"
_MENDED = "_selfevo_mended"


def register() -> None:
    """Applies every mend that this process needs; harmless when called again."""
    without = {name.strip() for name in os.environ.get(WITHOUT, "").split(",")} - {""}
    if unknown := sorted(without - set(MENDS)):
        _say(f"{WITHOUT}: no mend {unknown[0]!r}; there are {', '.join(MENDS)}")
    mended = []
    for name in [name for name in MENDS if name not in without]:
        try:
            if MENDS[name]():
                mended.append(name)
        except (ImportError, AttributeError, TypeError) as error:
            _say(f"mend {name!r} does not fit this vLLM and is left out: {error}")
    if mended or without:
        left = f"; left out: {', '.join(sorted(without))}" if without else ""
        _say(f"vLLM mended: {', '.join(mended) or 'nothing'}{left}")


def group_of_all_experts() -> bool:
    """CPU router with sigmoid scores: top-k within one group that holds all experts is top-k."""
    if not _platform().is_cpu():
        return False
    import torch
    from vllm.model_executor.layers.fused_moe.router import cpu_router

    router: Any = cpu_router.CPURouter
    scores_ME = torch.zeros(1, 2)
    try:
        router(
            top_k=1,
            global_num_experts=2,
            scoring_func="sigmoid",
            e_score_correction_bias=torch.zeros(2),
        )._compute_routing(scores_ME, scores_ME, None)
    except AssertionError:
        pass
    else:
        return False
    build = router.__init__

    @functools.wraps(build)
    def init(self: Any, *args: Any, **options: Any) -> None:
        build(self, *args, **options)
        free = self.custom_routing_function is None and not self.use_grouped_topk
        if free and self.scoring_func == "sigmoid":
            self.use_grouped_topk, self.num_expert_group, self.topk_group = True, 1, 1

    router.__init__ = init
    return True


def name_weight_loaders() -> bool:
    """Layer-wise reload reads `weight_loader.__name__`, which a `functools.partial` lacks."""
    import torch
    from vllm.model_executor.model_loader.reload import layerwise

    layerwise_: Any = layerwise
    probe: Any = torch.empty(0)
    probe.weight_loader = functools.partial(int)
    try:
        layerwise_._get_original_loader(probe)
    except AttributeError:
        pass
    else:
        return False
    find = layerwise_._get_weight_loader

    def named(tensor: Any) -> Any:
        loader = find(tensor)
        if not hasattr(loader, "__name__"):
            inner = getattr(loader, "func", None)
            loader.__name__ = getattr(inner, "__name__", "weight_loader")
        return loader

    layerwise_._get_weight_loader = named
    return True


def repack_reloaded_experts() -> bool:
    """CPU experts are put into their kernel's layout on the first load only; do it on each.

    Whether the release does so by itself is seen at each reload.
    """
    if not _platform().is_cpu():
        return False
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as unquantized

    method: Any = unquantized.UnquantizedFusedMoEMethod
    setup = method._setup_kernel
    if hasattr(setup, _MENDED):
        return False

    @functools.wraps(setup)
    def set_up(self: Any, layer: Any, w13: Any, w2: Any) -> None:
        if self.moe_kernel is None:
            setup(self, layer, w13, w2)
            return
        experts, packed = self.moe_kernel.fused_experts, []
        pack = experts.process_weights_after_loading

        def noted(layer: Any) -> None:
            packed.append(True)
            pack(layer)

        experts.process_weights_after_loading = noted
        try:
            setup(self, layer, w13, w2)
        finally:
            del experts.process_weights_after_loading
        if not packed:
            pack(layer)

    setattr(set_up, _MENDED, True)
    method._setup_kernel = set_up
    return True


def rewind_cpu_generators() -> bool:
    """A request whose prompt is still being read draws a token that is thrown away, and its
    generator is set back. CPU generators have no offset: set the whole state back instead."""
    if not _platform().is_cpu():
        return False
    import torch
    from vllm.v1.worker import cpu_model_runner

    runner: Any = cpu_model_runner.CPUModelRunner
    with contextlib.suppress(RuntimeError):
        torch.Generator("cpu").set_offset(0)
        return False
    if hasattr(runner._bookkeeping_sync, _MENDED):
        return False
    sample, sync = runner._sample, runner._bookkeeping_sync

    @functools.wraps(sample)
    def noting(self: Any, *args: Any, **options: Any) -> Any:
        thrown = self.discard_request_mask.np[: self.input_batch.num_reqs].nonzero()[0]
        generators = self.input_batch.generators
        self.selfevo_states = {
            int(row): generators[int(row)].get_state() for row in thrown if int(row) in generators
        }
        return sample(self, *args, **options)

    @functools.wraps(sync)
    def rewinding(self: Any, *args: Any, **options: Any) -> Any:
        states, generators = self.selfevo_states, self.input_batch.generators
        hidden = {row: generators.pop(row) for row in states}
        try:
            return sync(self, *args, **options)
        finally:
            for row, generator in hidden.items():
                generator.set_state(states[row])
            generators.update(hidden)

    setattr(rewinding, _MENDED, True)
    runner._sample, runner._bookkeeping_sync = noting, rewinding
    return True


def sample_without_flashinfer() -> bool:
    """The CUDA sampler uses FlashInfer unless told not to, installed or not."""
    name = "VLLM_USE_FLASHINFER_SAMPLER"
    if not _platform().is_cuda() or _installed("flashinfer") or name in os.environ:
        return False
    os.environ[name] = "0"
    return True


def import_ipc_without_ray() -> bool:
    """The CUDA IPC weight engine may import Ray, which only one of its transports uses. Where that
    fails, a stub stands in during that import alone: if it stayed, the rest of vLLM would think
    that Ray is there."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    registry: Any = WeightTransferEngineFactory._registry
    load = registry.get("ipc")
    if load is None or hasattr(load, _MENDED):
        return False

    def load_ipc() -> Any:
        try:
            return load()
        except ModuleNotFoundError as error:
            if error.name != "ray":
                raise
        with _stub("ray"):
            found = load()
        _say("vLLM mended: ray")
        return found

    setattr(load_ipc, _MENDED, True)
    registry["ipc"] = load_ipc
    return False  # it is seen when the engine is asked for


def exact_float32() -> bool:
    """Triton's default for float32 products is TF32, in attention and experts alike."""
    name = "TRITON_F32_DEFAULT"
    if not _platform().is_cuda() or name in os.environ:
        return False
    os.environ[name] = "ieee"
    return True


MENDS: dict[str, Callable[[], bool]] = {
    "router": group_of_all_experts,
    "loader": name_weight_loaders,
    "repack": repack_reloaded_experts,
    "seed": rewind_cpu_generators,
    "sampler": sample_without_flashinfer,
    "ray": import_ipc_without_ray,
    "float32": exact_float32,
}
"""Each returns whether its fault was there and is mended now."""


def _say(text: str) -> None:
    # vLLM's own log is set up later than its plugins are called
    print(f"selfevo: {text} (process {os.getpid()})", file=sys.stderr, flush=True)


def _platform() -> Any:
    from vllm.platforms import current_platform

    return current_platform


def _installed(name: str) -> bool:
    return name in sys.modules or importlib.util.find_spec(name) is not None


@contextlib.contextmanager
def _stub(name: str) -> Iterator[None]:
    """An empty module of that name, inside the block only."""
    sys.modules[name] = types.ModuleType(name)
    try:
        yield
    finally:
        del sys.modules[name]
