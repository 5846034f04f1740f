"""The faults of `make mutants`: one line each, with the tests that must notice it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """`before` stands exactly once in `file`; `tests` are pytest node ids."""

    name: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]


CISPO = "tests/rl/test_rl_cispo.py::"
ADVANTAGES = "tests/rl/test_rl_advantages.py::"
CONFIG = "tests/rl/test_rl_config.py::"
WINDOW = "tests/rl/test_rl_window.py::"
WINDOW_SIM = "tests/rl/test_rl_window_sim.py::"
LOOP = "tests/rl/test_rl_loop.py::"
LEARNER = "tests/rl/test_rl_learner.py::"
HISTORY = "tests/rl/test_gateway_history.py::"
GATEWAY = "tests/rl/test_gateway.py::"
GATEWAY_LIMITS = "tests/rl/test_gateway_limits.py::"
GATEWAY_FAULTS = "tests/rl/test_gateway_faults.py::"
FORGE_GROUPS = "tests/rl/test_forge_groups.py::"
FORGE_TRAINER = "tests/rl/test_forge_trainer.py::"
TREE = "tests/rl/test_rl_tree_update.py::"
PREFIX = "tests/rl/test_rl_prefix_tree.py::"
ATTENTION = "tests/model/test_parts.py::"
CONTEXT = "tests/rl/test_agents_context.py::"
MOE = "tests/model/test_model_moe.py::"
PARITY = "tests/model/test_model_parity.py::"
GENERATE = "tests/model/test_model_generate.py::"
NATIVE = "tests/model/test_native.py::"
GATE = "tests/selfevo/test_selfevo_gate.py::"
GUARD = "tests/selfevo/test_selfevo_guard.py::"
STORE = "tests/selfevo/test_selfevo_store.py::"
SNAPSHOT = "tests/selfevo/test_selfevo_snapshot.py::"
GRADING = "tests/agent_tools/test_mle_grading.py::"
LAUNCHER = "tests/agent_tools/test_launcher.py::"
LOGS = "tests/agent_tools/test_wandb_logs.py::"
CONFORMANCE = "tests/agent_tools/test_sandbox_conformance.py::"
ROOMS = "tests/agent_tools/test_sandbox_rooms.py::"
PARTS = "tests/agent_tools/test_sandbox_parts.py::"
GIT = "tests/agent_tools/test_git_configs.py::"

MUTANTS: tuple[Mutant, ...] = (
    # ---------------------------------------------------------------- rl
    Mutant(
        "cispo-floor",
        "rl/objectives.py",
        "        weight_n = ratio_n.clamp(max=is_weight_max)",
        "        weight_n = ratio_n.clamp(min=0.1, max=is_weight_max)",
        (f"{CISPO}test_there_is_no_floor",),
    ),
    Mutant(
        "cispo-no-ceiling",
        "rl/objectives.py",
        "        weight_n = ratio_n.clamp(max=is_weight_max)",
        "        weight_n = ratio_n",
        (f"{CISPO}test_tokens_above_the_ceiling_keep_their_gradient",),
    ),
    Mutant(
        "cispo-ratio-not-detached",
        "rl/objectives.py",
        "    log_ratio_n = tokens.logp_n.detach() - rollout_n",
        "    log_ratio_n = tokens.logp_n - rollout_n",
        (f"{CISPO}test_closed_form_and_gradient_only_through_the_log_prob",),
    ),
    Mutant(
        "cispo-micro-batch-denominator",
        "rl/backward.py",
        "        share_n = shares(rows.trained, objective.reduction, tokens, calls)",
        "        share_n = shares(rows.trained, objective.reduction, len(logp_n), calls)",
        (f"{CISPO}test_gradient_equals_the_naive_formula",),
    ),
    Mutant(
        "advantage-sign",
        "rl/advantages.py",
        "        advantage_N[members] = values - baseline_N[members]",
        "        advantage_N[members] = baseline_N[members] - values",
        (f"{ADVANTAGES}test_better_attempts_get_positive_advantages",),
    ),
    Mutant(
        "advantage-own-return-in-baseline",
        "rl/advantages.py",
        "        baseline_N[members] = (values.sum() - values) / (len(values) - 1)",
        "        baseline_N[members] = values.mean()",
        (f"{ADVANTAGES}test_leave_one_out_and_batch_normalisation",),
    ),
    Mutant(
        "advantage-exact-equality",
        "rl/advantages.py",
        "        if len(values) < 2 or values.max() - values.min() <= ZERO_SPREAD:",
        "        if len(values) < 2 or values.max() == values.min():",
        (f"{ADVANTAGES}test_groups_without_spread_get_zero_within_tolerance",),
    ),
    Mutant(
        "resume-keeps-later-lines",
        "rl/run_dir.py",
        '        rows = [row for row in self.rows() if row["step"] <= last_step]',
        "        rows = self.rows()",
        (f"{LOOP}test_line_lost_after_its_checkpoint_is_restored_and_later_lines_are_cut",),
    ),
    Mutant(
        "constrained-replies-are-trained-on",
        "rl/samples.py",
        "    if call.constrained:",
        "    if False:",
        (f"{LOOP}test_grammar_constrained_replies_are_refused_as_training_data",),
    ),
    Mutant(
        "minibatches-keep-the-first-weights",
        "rl/trainer.py",
        "            norms.append(self._step(sums.loss, lr))",
        "            norms.append(self._step(sums.loss, lr if not norms else 0.0))",
        (f"{LEARNER}test_ceiling_and_clip_act_from_the_second_update_on",),
    ),
    Mutant(
        "refills-are-free",
        "rl/collect.py",
        "            count = min(short, self._affordable(spent + made * size))",
        "            count = min(short, self._affordable(spent))",
        (f"{LEARNER}test_groups_without_spread_are_replaced_inside_the_budget",),
    ),
    Mutant(
        "reward-to-go-looks-back",
        "rl/rewards.py",
        "    for reward in reversed(rewards):",
        "    for reward in rewards:",
        ("tests/rl/test_rl_rewards.py::test_reward_to_go_is_the_discounted_sum_of_what_follows",),
    ),
    Mutant(
        "one-deviation-for-all-domains",
        "rl/advantages.py",
        "        parts = [domains_N == domain for domain in np.unique(domains_N)]",
        "        parts = [domains_N == domains_N]",
        ("tests/rl/test_rl_rewards.py::test_a_domain_of_wide_rewards_does_not_drown_another",),
    ),
    Mutant(
        "held-out-ids-are-trained-on",
        "rl/splits.py",
        '        if competition in held_out or split not in (None, "train"):',
        "        if False:",
        (f"{CONFIG}test_train_ids_and_unknown_ids",),
    ),
    Mutant(
        "window-one-wider",
        "rl/window.py",
        "        if not self._order or self._order[0] >= self.head + self.window:",
        "        if not self._order or self._order[0] > self.head + self.window:",
        (f"{WINDOW}test_the_trace_of_figure_5",),
    ),
    Mutant(
        "window-not-anchored",
        "rl/window.py",
        "        while self.head in self._taken:",
        "        while self._taken and self.head <= max(self._taken):",
        (f"{WINDOW}test_every_call_does_what_the_report_says",),
    ),
    Mutant(
        "window-frees-slots-early",
        "rl/window.py",
        "        return len(self._running) + len(self._done) + self._held",
        "        return len(self._running) + len(self._done)",
        (f"{WINDOW}test_the_bound_holds",),
    ),
    Mutant(
        "window-forgets-out-of-turn",
        "rl/window.py",
        "        while self.next in self._skip:",
        "        while False:",
        (f"{WINDOW}test_a_restart_takes_every_group_once",),
    ),
    Mutant(
        "window-sim-keeps-dropped",
        "rl/window_sim.py",
        "                    freed = True",
        "                    freed = False",
        (f"{WINDOW_SIM}test_equals_a_ticking_clock",),
    ),
    # ---------------------------------------------------------------- rl: gateway, forge, merging
    Mutant(
        "gateway-thinking-not-compared",
        "rl/gateway/history.py",
        "    return not shown.thinking or shown.thinking == ours.thinking",
        "    return True",
        (
            f"{HISTORY}test_replies_that_look_alike_are_told_apart_by_call_ids_then_thinking_then_time",
        ),
    ),
    Mutant(
        "gateway-cut-reply-without-end-mark",
        "rl/gateway/history.py",
        "            response.append(self._tokenizer.eos_id)",
        "            pass",
        (f"{HISTORY}test_a_rewritten_conversation_goes_on_from_the_sampled_ids",),
    ),
    Mutant(
        "gateway-retry-samples-again",
        "rl/gateway/core.py",
        "        done = episode.answers.get(key)",
        "        done = None",
        (f"{GATEWAY}test_an_equal_call_joins_the_running_one_and_later_gets_its_answer",),
    ),
    Mutant(
        "gateway-unheard-call-goes-on",
        "rl/gateway/core.py",
        "asyncio.get_running_loop().call_later(self._linger_s, flight.end_unheard, gone)",
        "del gone",
        (f"{GATEWAY}test_a_call_whose_client_left_is_ended_and_not_recorded",),
    ),
    Mutant(
        "gateway-token-limit-per-call",
        "rl/gateway/core.py",
        "        most = min(most, episode.limits.tokens - episode.tokens, self._room(prompt))",
        "        most = min(most, episode.limits.tokens, self._room(prompt))",
        (f"{GATEWAY_LIMITS}test_an_episode_ends_at_its_limits",),
    ),
    Mutant(
        "gateway-index-not-counted-up",
        "rl/gateway/writer.py",
        "                ahead[name] = index + 1",
        "                ahead[name] = index",
        (f"{GATEWAY_FAULTS}test_one_bad_record_fails_alone",),
    ),
    Mutant(
        "forge-resume-newer-results-count",
        "rl/forge/resume.py",
        "            results.append((reward.episode, reward.status, max(versions, default=0)))",
        "            results.append((reward.episode, reward.status, min(versions, default=0)))",
        (f"{FORGE_TRAINER}test_what_a_pool_knows_is_bounded_by_the_checkpoints_version",),
    ),
    Mutant(
        "forge-resume-consumed-group-again",
        "rl/forge/resume.py",
        "parsed[0] >= frontier.head and parsed[0] not in taken",
        "parsed[0] >= frontier.head",
        (f"{FORGE_TRAINER}test_what_a_pool_knows_is_bounded_by_the_checkpoints_version",),
    ),
    Mutant(
        "forge-every-death-is-charged",
        "rl/forge/groups.py",
        "        found.charged += charge",
        "        found.charged += 1",
        (f"{FORGE_GROUPS}test_only_charged_deaths_use_up_a_member",),
    ),
    Mutant(
        "tree-pieces-from-the-first",
        "rl/tree_update.py",
        "        for piece in reversed(pieces):",
        "        for piece in pieces:",
        (f"{TREE}test_every_plan_gives_the_gradients_of_one_pass_a_call",),
    ),
    Mutant(
        "tree-handed-gradients-not-summed",
        "rl/tree_update.py",
        "                    total.index_add_(0, at, leaf.grad.to(total.dtype))",
        "                    total.index_copy_(0, at, leaf.grad.to(total.dtype))",
        (f"{TREE}test_every_plan_gives_the_gradients_of_one_pass_a_call",),
    ),
    Mutant(
        "tree-unusable-log-probs-trained",
        "rl/tree_update.py",
        "        here_n &= self.table.finite_f[place_n]",
        "        here_n &= place_n >= 0",
        (f"{TREE}test_unusable_log_probs_leave_numerator_and_denominator",),
    ),
    Mutant(
        "tree-shared-token-loaded-once",
        "rl/tree_update.py",
        "        times_M = upload(pack.calls_M[piece.own_M], self.model.device)",
        "        times_M = torch.ones(len(piece.own_M), dtype=torch.long)",
        (f"{TREE}test_every_plan_gives_the_gradients_of_one_pass_a_call",),
    ),
    Mutant(
        "context-last-user-turn-goes",
        "rl/agents/context.py",
        "if i < head or i == last or _system(m)]",
        "if i < head or _system(m)]",
        (f"{CONTEXT}test_no_policy_loses_the_system_prompt_or_the_last_user_turn",),
    ),
    Mutant(
        "context-over-budget-sent",
        "rl/agents/context.py",
        "    return Fitted(now, tokens, tokens <= policy.budget, tuple(done))",
        "    return Fitted(now, tokens, True, tuple(done))",
        (f"{CONTEXT}test_a_context_that_cannot_fit_is_not_sent",),
    ),
    Mutant(
        "context-results-without-their-call",
        "rl/agents/context.py",
        '        starts = messages[i].get("role") == "assistant" or _is_summary(messages[i])',
        '        starts = messages[i].get("role") in ("assistant", "tool")',
        (f"{CONTEXT}test_a_tool_result_never_stands_without_its_call",),
    ),
    # ---------------------------------------------------------------- model
    Mutant(
        "router-bias-weighs",
        "model/moe.py",
        "        weights_Mk = scores_ME.gather(1, experts_Mk)",
        "        weights_Mk = ranked_ME.gather(1, experts_Mk)",
        (f"{MOE}test_the_bias_chooses_but_does_not_weigh",),
    ),
    Mutant(
        "router-weights-not-renormalised",
        "model/moe.py",
        "            weights_Mk = weights_Mk / weights_Mk.sum(-1, keepdim=True)",
        "            pass",
        (f"{MOE}test_the_bias_chooses_but_does_not_weigh",),
    ),
    Mutant(
        "qk-norm-a-head",
        "model/attention.py",
        "            q, k = self.q_norm(q), self.k_norm(k)",
        "            by_head = torch.nn.functional.rms_norm(q.unflatten(-1, (-1, self.head_dim)), "
        "(self.head_dim,))\n"
        "            q, k = by_head.flatten(-2) * self.q_norm.weight, self.k_norm(k)",
        (f"{PARITY}test_our_checkpoint_gives_transformers_the_same_logits[single key head]",),
    ),
    Mutant(
        "rope-over-the-full-head",
        "model/attention.py",
        "    steps = torch.arange(0, config.rotary_dim, 2,",
        "    steps = torch.arange(0, config.head_dim, 2,",
        (f"{PARITY}test_our_checkpoint_gives_transformers_the_same_logits[odd]",),
    ),
    Mutant(
        "log-probs-without-temperature",
        "model/sampling.py",
        "        return id_B1[:, 0], logp_BV.gather(1, id_B1)[:, 0]",
        "        return id_B1[:, 0], logits_BV.log_softmax(-1).gather(1, id_B1)[:, 0]",
        (f"{GENERATE}test_logprobs_equal_rescoring[0.7]",),
    ),
    Mutant(
        "native-weights-hold-the-bias",
        "model/native/decode_step.c",
        "        total += score[best];",
        "        score[best] += bias[best], total += score[best];",
        (f"{NATIVE}test_logits_are_those_of_torch_for_any_sizes",),
    ),
    Mutant(
        "native-rows-share-a-tile",
        "model/native/decode_step.c",
        "            vf factor = all(x[m][i]);",
        "            vf factor = all(x[m][i] + (rows > 7 ? 1e-7f : 0));",
        (f"{NATIVE}test_a_rows_bits_do_not_depend_on_the_others",),
    ),
    Mutant(
        "native-short-without-a-look",
        "model/native/decode_step.c",
        "    return !(low & 0xffffu);",
        "    return 1;",
        (f"{NATIVE}test_weights_in_16_bits_give_the_same_bits",),
    ),
    Mutant(
        "native-keeps-old-weights",
        "model/generate.py",
        "                self._native.update(self.model)",
        "                pass",
        (f"{NATIVE}test_an_engine_writes_long_replies_in_native_code",),
    ),
    Mutant(
        "native-trusts-a-damaged-library",
        "model/native/build.py",
        "    return same and owner == os.getuid()",
        "    return owner == os.getuid()",
        (f"{NATIVE}test_a_damaged_library_is_made_again",),
    ),
    # ---------------------------------------------------------------- selfevo
    Mutant(
        "gate-sign",
        "selfevo/gate.py",
        "    difference = mean1 - mean0",
        "    difference = mean0 - mean1",
        (f"{GATE}test_equals_the_two_sample_t_test_of_scipy",),
    ),
    Mutant(
        "gate-alpha-not-shared",
        "selfevo/gate.py",
        "    alpha_round = alpha / rounds",
        "    alpha_round = alpha",
        (f"{GATE}test_alpha_is_shared_by_the_rounds",),
    ),
    Mutant(
        "gate-accepts-without-variance",
        "selfevo/gate.py",
        "    p_better: float | None = None",
        "    p_better: float | None = 0.0",
        (f"{GATE}test_no_op_is_indecisive_with_and_without_variance",),
    ),
    Mutant(
        "guard-any-key",
        "selfevo/guard.py",
        "    for key in sorted(old.keys() | new.keys(), key=str):",
        "    for key in sorted(space.keys, key=str):",
        (
            f"{GUARD}test_key_edits_outside_the_space_are_refused"
            r"[lr: 3.0e-3\n-lr: 3.0e-4\n  betas: [0.1, 0.2]\n-search_space]",
        ),
    ),
    Mutant(
        "guard-any-path",
        "selfevo/guard.py",
        "    if not any(pattern.fullmatch(path) for pattern in ALLOWED):",
        "    if not ALLOWED:",
        (f"{GUARD}test_paths_outside_the_allow_list_are_refused[scaffold/run.py]",),
    ),
    Mutant(
        "guard-any-step",
        "selfevo/config.py",
        "        return _step_fault(spec, float(before), float(after))",
        "        return None",
        (f"{GUARD}test_key_edits_outside_the_space_are_refused",),
    ),
    Mutant(
        "acts-are-repeated",
        "selfevo/campaign.py",
        "        if key in self.view.outcomes:",
        "        if False:",
        (f"{STORE}test_an_act_is_done_once_a_key",),
    ),
    Mutant(
        "snapshot-of-any-log",
        "selfevo/snapshot.py",
        "    if len(raw) < covers.end or digest.hexdigest() != covers.log:",
        "    if len(raw) < covers.end:",
        (f"{SNAPSHOT}test_a_log_that_was_changed_is_reduced_whole",),
    ),
    Mutant(
        "snapshot-of-any-code",
        "selfevo/snapshot.py",
        "    return hashlib.blake2b(CODE + body).hexdigest().encode()",
        "    return hashlib.blake2b(body).hexdigest().encode()",
        (f"{SNAPSHOT}test_a_snapshot_of_other_code_is_passed_over",),
    ),
    Mutant(
        "snapshot-vouches-for-the-log-it-finds",
        "selfevo/store.py",
        "        return Extent(self._seq, self._end, self._digest.copy())",
        "        found = hashlib.blake2b((self.folder / LOG).read_bytes())\n"
        "        return Extent(self._seq, self._end, found)",
        (f"{SNAPSHOT}test_a_log_edited_under_a_running_campaign_voids_its_snapshots",),
    ),
    Mutant(
        "snapshot-jobs-twice",
        "selfevo/snapshot.py",
        '        jobs={jobs[i].key: jobs[i] for i in values["jobs"]},',
        '        jobs={jobs[i].key: JobView(*_job(jobs[i])) for i in values["jobs"]},',
        (f"{SNAPSHOT}test_snapshot_and_tail_make_the_view_of_the_whole_log",),
    ),
    Mutant(
        "live-times-unlike-logged-ones",
        "selfevo/store.py",
        "        now = round(time.time(), 3)  # as it is read again",
        "        now = time.time()",
        (f"{SNAPSHOT}test_a_running_campaign_keeps_the_view_of_its_log",),
    ),
    # ---------------------------------------------------------------- agent_tools
    Mutant(
        "medal-ties-lose",
        "agent_tools/mle_bench/medals.py",
        "    return score <= threshold if lower_is_better else score >= threshold",
        "    return score < threshold if lower_is_better else score > threshold",
        (f"{GRADING}test_ties_at_a_threshold_all_earn_the_medal",),
    ),
    Mutant(
        "medal-rank-bracket",
        "agent_tools/mle_bench/medals.py",
        "    if teams < 1000:",
        "    if teams < 2000:",
        (f"{GRADING}test_medal_ranks_at_the_documented_team_counts",),
    ),
    Mutant(
        "percentile-without-ties",
        "agent_tools/mle_bench/medals.py",
        "    return 100.0 * (worse + 0.5 * equal) / len(scores)",
        "    return 100.0 * worse / len(scores)",
        (f"{GRADING}test_percentile_counts_worse_entries_and_half_of_the_equal_ones",),
    ),
    Mutant(
        "launcher-ignores-the-key",
        "agent_tools/launcher/local.py",
        "        job_id = hashlib.sha256(key.encode()).hexdigest()[:16]",
        "        job_id = hashlib.sha256(os.urandom(16)).hexdigest()[:16]",
        (f"{LAUNCHER}test_the_same_key_is_one_job_for_two_processes_at_once",),
    ),
    Mutant(
        "launcher-runs-an-ended-job-again",
        "agent_tools/launcher/local.py",
        "                if status.finished and not again:",
        "                if False:",
        (f"{LAUNCHER}test_cancel_is_idempotent_and_kills_a_job_that_ignores_sigterm",),
    ),
    Mutant(
        "finished-runs-from-the-side-car",
        "agent_tools/wandb_logs/history.py",
        '    first, second = ("wandb", "sidecar") if by_itself else ("sidecar", "wandb")',
        '    first, second = "sidecar", "wandb"',
        (f"{LOGS}test_a_run_that_ended_by_itself_is_read_without_its_sidecar",),
    ),
    Mutant(
        "sandbox-follows-links",
        "agent_tools/sandbox/guest/runner.py",
        "    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC",
        "    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC",
        (f"{CONFORMANCE}test_bubblewrap[cold-output-link-inside]",),
    ),
    Mutant(
        "sandbox-allows-sockets",
        "agent_tools/sandbox/seccomp.py",
        '    "socket": 41, "connect": 42,',
        '    "connect": 42,',
        (f"{PARTS}test_filter_decides_by_number_and_argument[x86_64]",),
    ),
    Mutant(
        "sandbox-shares-the-network",
        "agent_tools/sandbox/guest/rooms.py",
        '    "net": kernel.CLONE_NEWNET,\n',
        "",
        (f"{ROOMS}test_every_script_has_namespaces_of_its_own",),
    ),
    Mutant(
        "sandbox-marks-devices",
        "agent_tools/sandbox/guest/rooms.py",
        "        _seal_devices()\n",
        "",
        (f"{ROOMS}test_nothing_but_its_own_folders_takes_a_mark",),
    ),
    Mutant(
        "sandbox-blames-the-script",
        "agent_tools/sandbox/guest/runner.py",
        "        if not begun:\n",
        "        if False:\n",
        (f"{ROOMS}test_script_that_cannot_begin_is_the_sandboxs_failure",),
    ),
    Mutant(
        "git-hooks-run",
        "agent_tools/git_safe.py",
        '    "core.hooksPath": "/dev/null",',
        "",
        (f"{GIT}test_nothing_of_a_hostile_git_directory_runs",),
    ),
    Mutant(
        "tree-shortest-branch-first",
        "rl/prefix_tree.py",
        "key=reach.__getitem__, reverse=True)",
        "key=reach.__getitem__)",
        (f"{PREFIX}test_calls_are_in_pre_order_longest_branch_first",),
    ),
    Mutant(
        "parts-a-near-key-lost",
        "model/parts.py",
        "near[step.strand.begin].append((start, step.stop))",
        "near[step.strand.begin].append((start, step.stop - 1))",
        (f"{ATTENTION}test_larger_trees_with_every_kind_of_part",),
    ),
    Mutant(
        "parts-joined-by-halves",
        "model/part_kernels.py",
        "out_sND * old_sN1 + more_sND * more_sN1",
        "(out_sND + more_sND) / 2",
        (f"{ATTENTION}test_parts_are_the_rule_forward_and_backward",),
    ),
    Mutant(
        "parts-padding-with-a-gradient",
        "model/part_attend.py",
        "value=torch.inf",
        "value=0.0",
        (f"{ATTENTION}test_squares_are_lengthened_where_their_ends_are_long",),
    ),
    Mutant(
        "parts-gradient-overwritten",
        "model/part_attend.py",
        "grad_q_MND[at] += dq",
        "grad_q_MND[at] = dq",
        (f"{ATTENTION}test_parts_are_the_rule_forward_and_backward",),
    ),
)
