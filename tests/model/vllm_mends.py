"""What the mends of `model.vllm_plugin` are for, in the interpreter that has vLLM.

`python vllm_mends.py A B OUT`: for each scenario, with mends left out or none, an engine on
checkpoint A in a process of its own (forked after the imports, which take longer than all the
rest); what it gave, or the fault that ended it, goes to OUT as JSON.
"""

import json
import os
import sys
import traceback
from pathlib import Path

GREEDY = [[1, 3, 20 + i, 30 + i, 40 + i, 50 + i] for i in range(4)]
LONG = [3 + (7 * i) % 250 for i in range(48)]
NEW = 12
SCENARIOS = {
    "none": ["greedy", "seeded", "reload"],
    "none, unsplit": ["seeded"],
    "router": ["greedy"],
    "loader": ["reload"],
    "repack": ["reload"],
    "seed": ["seeded"],
}


def run(without: str, a: str, b: str) -> dict[str, object]:
    os.environ["SELFEVO_VLLM_WITHOUT"] = "" if without.startswith("none") else without
    at_once = 128 if without.endswith("unsplit") else 16  # the long prompt in one step, or in three
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=a,
        dtype="float32",
        enforce_eager=True,
        max_num_seqs=8,
        max_model_len=128,
        max_num_batched_tokens=at_once,
        enable_prefix_caching=False,
        logprobs_mode="processed_logprobs",
        generation_config="vllm",
        kv_cache_memory_bytes=2**26,
        distributed_executor_backend="uni",
        disable_log_stats=True,
    )

    def ask(prompts: list[list[int]], **how: object) -> list[list[object]]:
        params = SamplingParams(max_tokens=NEW, logprobs=0, ignore_eos=True, **how)
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        made = [found.outputs[0] for found in llm.generate(inputs, params, use_tqdm=False)]
        return [
            [
                list(one.token_ids),
                [step[id].logprob for id, step in zip(one.token_ids, one.logprobs, strict=True)],
            ]
            for one in made
        ]

    found: dict[str, object] = {}
    steps = SCENARIOS[without]
    if "greedy" in steps:
        found["greedy"] = ask(GREEDY, temperature=0)
    if "seeded" in steps:
        found["seeded"] = ask([LONG], temperature=1, seed=5)
    if "reload" in steps:
        for name, path in (("b", b), ("a again", a)):
            llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
            found[name] = ask(GREEDY, temperature=0)
    return found


def main() -> None:
    a, b, out = sys.argv[1:]
    results = {}
    for name in SCENARIOS:
        file = Path(f"{out}.{name}")
        child = os.fork()
        if child == 0:
            try:
                found = run(name, a, b)
            except BaseException:  # noqa: BLE001 - the fault is the finding
                found = {"fault": traceback.format_exc()}
            file.write_text(json.dumps(found))
            os._exit(0)
        os.waitpid(child, 0)
        results[name] = json.loads(file.read_text())
    Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "TORCH_COMPILE_DISABLE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    import vllm.v1.engine.llm_engine
    import vllm.v1.worker.cpu_worker  # noqa: F401

    main()
