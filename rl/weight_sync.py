"""New weights from a live model to an engine: by a checkpoint folder, or through the card's memory.

By file any engine that can read the folder. By ipc a vLLM on the same card: it copies from the
trainer's memory through CUDA handles, tensor by tensor, without the disk.
"""

from __future__ import annotations

import base64
import pickle
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from model.checkpoint import disk_tensors, save_checkpoint
from model.transformer import Transformer
from rl.errors import ConfigError

if TYPE_CHECKING:
    from rl.engine_http import HttpEngine, PauseMode

Way = Literal["file", "ipc"]


class WeightPush:
    """Pushes a model's weights to one engine, each with its version.

    `folder` takes the checkpoint of way `file` (in `dtype`) and is replaced each time. `ipc` sends
    `dtype` as well: what the model computes in is converted where they differ. `pause`: what
    becomes of requests that run; with `keep` they go on under the new weights.
    """

    def __init__(
        self,
        engine: HttpEngine,
        way: Way,
        *,
        folder: Path | None = None,
        dtype: torch.dtype = torch.bfloat16,
        pause: PauseMode = "wait",
    ) -> None:
        if way == "file" and folder is None:
            raise ConfigError("weights by file need a folder that the engine can read")
        if way == "ipc" and not engine.is_vllm:
            raise ConfigError("weights by ipc need a vLLM engine; use way file")
        self._engine, self._way, self._folder, self._dtype = engine, way, folder, dtype
        self._pause = pause
        self._ready = False

    def push(self, model: Transformer, version: int) -> None:
        """The engine pauses, takes the weights, drops its caches and goes on.

        It goes on with the old weights where the new ones cannot be taken. Raises InfraError or
        ConfigError.
        """
        if self._way == "ipc" and model.device.type != "cuda":
            raise ConfigError(f"weights by ipc need a model on a card, not on {model.device}")
        if self._way == "file":
            self._save(model)
        elif not self._ready:
            self._engine.init_transfer()
            self._ready = True
        self._engine.pause(self._pause)
        try:
            if self._way == "file":
                assert self._folder is not None
                self._engine.load(self._folder, version)
            else:
                self._send(model, version)
        finally:
            self._engine.resume()

    def _save(self, model: Transformer) -> None:
        assert self._folder is not None
        name = str(self._dtype).removeprefix("torch.")
        save_checkpoint(model, self._folder, dtype=name, tokenizer_from=None)

    def _send(self, model: Transformer, version: int) -> None:
        tensors = {
            name: _as_sent(name, view, self._dtype) for name, view in disk_tensors(model).items()
        }
        torch.cuda.synchronize(model.device)  # the engine reads from another process
        self._engine.update(ipc_info(tensors), version)
        del tensors  # they had to live until the engine had copied them

    def close(self) -> None:
        """Removes the folder."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def ipc_info(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What /update_weights wants: names on disk, types, shapes and one CUDA handle a tensor.

    The handles are pickled, so the server must trust this process
    (`VLLM_ALLOW_INSECURE_SERIALIZATION`, loopback only).
    """
    from torch.multiprocessing.reductions import reduce_tensor

    handles = []
    for tensor in tensors.values():
        card = str(torch.cuda.get_device_properties(tensor.device).uuid)
        handles.append({card: reduce_tensor(tensor)[1]})  # type: ignore[no-untyped-call]
    return {
        "names": list(tensors),
        "dtype_names": [str(t.dtype).removeprefix("torch.") for t in tensors.values()],
        "shapes": [list(t.shape) for t in tensors.values()],
        "ipc_handles_pickled": base64.b64encode(pickle.dumps(handles)).decode(),
    }


def _as_sent(name: str, view: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous, in the type of the checkpoint (the router's parts stay float32)."""
    router = name.endswith(("block_sparse_moe.gate.weight", "e_score_correction_bias"))
    return view.detach().to(torch.float32 if router else dtype).contiguous()
