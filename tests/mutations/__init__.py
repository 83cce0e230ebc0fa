"""What a silently wrong number would be: changes of the library, each of which a test of `make test` notices.

`make mutate` makes one change at a time in a copy of the repository and runs the tests named beside it; all have to
fail. A change is of a text that stands once in its room, so that it follows code that moves within the room; where a
text itself is rewritten, its mutation is rewritten with it.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Mutation(NamedTuple):
    """One change of the library.

    Args:
        name: short, of the list's own.
        room: folder below which `old` stands exactly once.
        old, new: the text, and what takes its place.
        tests: files, functions or cases below `tests/`, of which one has to fail.
    """

    name: str
    room: str
    old: str
    new: str
    tests: tuple[str, ...]


UPDATE = "bilevel/test_update.py"
TORCHS_STEP = f"{UPDATE}::test_several_steps_equal_torch"
PULLBACK = f"{UPDATE}::test_grad_vjp_is_autograd_through_torchs_step"
GOLDEN = "estimators/test_golden.py::test_golden_table"
EVOGRAD = "estimators/test_golden.py::test_evograd_is_autograd_over_all_copies"
IMPLICIT = "estimators/test_implicit.py"
NOISE = "estimators/test_noise.py"
SHARDED_RUN = "training/test_sharded.py::test_training_on_shards_is_training_on_one_process[2]"
REFUSED_ON_SHARDS = "bilevel/test_sharded.py::test_what_would_be_wrong_is_refused_on_all_processes"
ON_SHARDS = "bilevel/test_sharded.py::test_sharded_weights_give_the_hypergradient_of_one_process[2]"
TRAJECTORIES = "estimators/test_trajectories.py"
DISTILLATION = "estimators/test_distillation.py"
FIRST_WEIGHTS = "estimators/test_learned_steps.py::test_the_derivative_through_the_first_weights_is_in"
TRAINER = "training/test_trainer.py"
REAL_STEP = f"{TRAINER}::test_one_step_is_the_derivative_of_the_real_step[double_backward-{{}}-after_step-clip 0.3]"
RTN_FORMULA = "models/test_rtn.py::test_transform_is_the_closed_form"
ROW_LOSSES = "models/test_losses.py::test_row_losses_are_the_models_own_loss_of_each_row"
RESUMED = "training/test_resume.py::test_a_tagger_resumes_bit_by_bit[every other step-2-4]"
EPISODES = "training/test_episodes.py"
DIAGNOSTICS = "training/test_diagnostics.py"
GRADIENT_OF_A_STEP = f"{DIAGNOSTICS}::test_nothing_of_the_step_is_taken_over_and_its_gradient_outlives_the_estimate"
SENTENCES = "ner/test_alignment.py::test_scores_are_those_of_one_sentence_a_pass[xlm-r, metaspace]"
FEWSHOT_ROWS = "vision_tasks/test_fewshot_episodes.py"
METER = "benchmark/test_meter.py"
PLAN = "experiments/test_plan.py"
COMPARISON = "experiments/test_comparison.py"
STATISTICS = "experiments/test_statistics.py"

_ROOMS: dict[str, list[tuple[str, ...]]] = {  # name, old, new, tests
    "metaxl_evo/bilevel": [
        # update rules
        ("nesterov-factor", "g + momentum * buffers[name] if", "g + buffers[name] if", TORCHS_STEP),
        ("dampened-first-step", "damp = self.dampening if own_steps(state, name) else 0.0", "damp = self.dampening",
         TORCHS_STEP),
        ("adam-first-moment-bias", "/ (1 - b1**step) * m", "* m", TORCHS_STEP),
        ("adamw-decay-without-rate", "(1 - hyper.value(lr, n, lam) * hyper.value(decay, n, lam))",
         "(1 - hyper.value(decay, n, lam))", TORCHS_STEP),
        ("pullback-adam-bend", "torch._foreach_mul_(slopes, b2 - 1)", "torch._foreach_mul_(slopes, 1 - b2)", PULLBACK),
        ("pullback-adam-second-moment-bias", "{name: math.sqrt(1 - b2**step) for name, step in steps.items()}",
         "dict.fromkeys(steps, 1.0)", PULLBACK),
        ("pullback-without-coupled-decay", "return self._decayed(w, grad, lam)", "return grad",
         PULLBACK),
        ("pullback-clip-factor-constant", "torch._foreach_add_(held, list(clamped.values()), alpha=-along)", "pass",
         PULLBACK),
        ("pullback-clamp-side", "leaf.abs() > self.max_grad_value", "leaf.abs() < self.max_grad_value", PULLBACK),
        ("untouched-coordinates-move", "(m / eps).detach()", "m / eps",
         "estimators/test_edges.py::test_coordinates_without_a_gradient_are_held_by_all_exact_estimators"),
        ("sitting-out-counts-as-a-step", "missed.get(name, 0) + (name not in grad)", "missed.get(name, 0)",
         "estimators/test_sitting_out.py::test_a_step_is_torchs_and_so_are_the_counts_read_off_it"),
        ("schedule-one-step-early", "min(step * len(values) // self.steps",
         "min((step + 1) * len(values) // self.steps",
         f"{UPDATE}::test_a_schedule_acts_and_is_pulled_back_in_its_window"),
        # products and solvers
        ("difference-quotient-factor", "1 / (2 * step)", "1 / step",
         "bilevel/test_products.py::test_closed_form_on_the_quadratic"),
        ("once-differentiable-is-constant", "    _refuse_once_differentiable(ends)", "    pass",
         "bilevel/test_products.py::test_a_once_differentiable_function_is_refused_and_not_taken_for_a_constant"),
        ("forward-mode-never-compared", "> 30 * eps**0.5 * size + rounding + allowed", "> float('inf')",
         "bilevel/test_gate.py::test_exact_engines_are_right_or_say_that_they_are_not[.data]"),
        ("neumann-one-term-less", "for _ in range(terms):", "for _ in range(terms - 1):",
         "bilevel/test_solvers.py::test_neumann_series_is_its_closed_form"),
        ("conjugacy-upside-down", "tree.add(residual, direction, size / previous)",
         "tree.add(residual, direction, previous / size)",
         "bilevel/test_solvers.py::test_conjugate_gradients_solve_in_as_many_iterations_as_unknowns"),
        # what the passes of a meta step share
        ("perturbed-passes-see-live-inputs", "return Inputs.REPLAY", "return Inputs.LIVE",
         "bilevel/test_products.py::test_finite_differences_on_a_transformer"),
        # sharded weights
        ("perturbed-beside-what-is-gathered", "reshard(self.root)  # what was", "# what was", ON_SHARDS),
        ("mean-of-the-shares", "found[name].mul_(processes)", "found[name]", ON_SHARDS),
        ("perturbed-for-good", "self._put(kept)", "self._put({})", ON_SHARDS),
        ("norm-of-the-rows-here", "dist.all_reduce(share,", "(lambda *_, **__: None)(share,", ON_SHARDS),
        ("gradients-asked-for-by-autograd", "loss.backward()\n            found",
         "torch.autograd.grad(loss, [*self.parameters.values()], allow_unused=True)\n            found", ON_SHARDS),
        ("fewer-bits-taken", "dtype.itemsize < bits", "False", REFUSED_ON_SHARDS),
        ("tied-weights-without-a-tangent", "tangents[id(parameter)]))", "tangents.pop(id(parameter))))", ON_SHARDS),
        ("lam-reduced-by-nobody", "dist.all_reduce(flat, group=self.group)", "pass", ON_SHARDS),
        ("silu-as-torch-has-it", "if func is functional.silu:", "if False:", SHARDED_RUN),
        ("forward-mode-of-dtensors", "if isinstance(passes.problem.weights, Sharded):", "if False:", ON_SHARDS),
        ("forward-mode-on-shards-not-compared", "other, slack = _otherwise_found(here, w, point, part, v, wrt)",
         "other, slack = forward, [0.0]", REFUSED_ON_SHARDS),
        ("shards-not-tested", "return [_Together(here, w, lam, part, names, None)]", "return []",
         REFUSED_ON_SHARDS),
        ("parts-share-their-masks", "part * processes.size + processes.rank", "processes.rank",
         "bilevel/test_passes.py::test_parts_have_masks_of_their_own"),
        ("tape-keeps-the-tensor", "inputs[place] = _detached(x).clone()", "inputs[place] = _detached(x)",
         "bilevel/test_passes.py::test_the_tape_keeps_values_and_not_tensors_that_change"),
        ("python-random-numbers-move", "random.setstate(held)", "pass",
         "bilevel/test_gate.py::test_numpy_and_python_are_seeded_and_restored"),
        ("value-test-never-fires", "if verdict:", "if False:",
         "bilevel/test_gate.py::test_what_cannot_be_replayed_is_refused_with_its_line[.data-finite_difference]"),
        ("value-test-without-lam", "[of[1]] if len(of) == 1 else [of[1], of[1] - of[-1]]", "[of[1]]",
         "bilevel/test_gate.py::test_a_part_that_shows_nothing_speaks_for_no_other"),
        # the formula
        ("no-direct-term", "tree.add(direct, response.vjp(cotangent))", "response.vjp(cotangent)", GOLDEN),
        ("no-offset", "grads = tree.add(grads, response.offset)", "pass", f"{DISTILLATION}::test_golden_table"),
        ("lent-gradient-taken-for-good", "replace(self, made=replace(self.made))", "self", GRADIENT_OF_A_STEP),
        ("gradient-never-freed", "del self.grad", "pass", GRADIENT_OF_A_STEP),
        ("made-step-taken-for-one-to-come", "return self.w if self.made is None else self.made.w", "return self.w",
         GOLDEN),
        ("first-weights-sign", "pulled[key] = pulled[key] + cotangent[name]",
         "pulled[key] = pulled[key] - cotangent[name]", FIRST_WEIGHTS),
        ("shares-counted-on-every-process", "return whole if self.rank == 0 else tree.zeros_like(whole)",
         "return whole", "estimators/test_learned_steps.py::test_two_processes_learn_one_initialisation"),
        # trees
        ("dot-in-float32", "(leaf * b[name]).sum(dtype=torch.float64)", "(leaf * b[name]).sum()",
         "bilevel/test_tree.py::test_products_of_float32_are_accumulated_in_float64"),
        ("cosine-by-one-length", "/ lengths[0] / lengths[1]", "/ lengths[0] / lengths[0]",
         "bilevel/test_tree.py::test_cosine_has_no_floor"),
    ],
    "metaxl_evo/estimators": [
        ("held-weights-respond", "x[name] if name in names else torch.zeros_like(leaf)",
         "x[name] if name in x else torch.ones_like(leaf)",
         "estimators/test_named.py::test_the_first_term_alone_is_the_response_of_sgd"),
        ("local-term-sign", "self._mixed_product(passes, step, direction, length), -1.0)",
         "self._mixed_product(passes, step, direction, length), 1.0)",
         GOLDEN),
        ("learned-rate-forgotten", "return tree.add(through_rule, self._mixed_product(",
         "return tree.add(tree.zeros_like(through_rule), self._mixed_product(",
         "estimators/test_golden.py::test_golden_learning_rate"),
        ("sama-at-the-weights-before", "self._pull_back(passes, replace(step, w=w), v",
         "self._pull_back(passes, step, v", f"{IMPLICIT}::test_sama_with_adams_state"),
        ("implicit-sign", "batch, whole(solution.x), radius=self.radius), -1.0)",
         "batch, whole(solution.x), radius=self.radius), 1.0)", f"{IMPLICIT}::test_golden_table"),
        ("damping-ignored", "for name in x}, x, self.damping)", "for name in x}, x, 0.0)",
         f"{IMPLICIT}::test_neumann_on_the_quadratic"),
        ("neumann-step-twice-as-long", "return 1 / bound", "return 2 / bound",
         f"{IMPLICIT}::test_the_default_step_is_the_inverse_of_the_largest_eigenvalue"),
        ("evograd-worst-copy-wins", "torch.softmax(-copies.losses", "torch.softmax(copies.losses", EVOGRAD),
        ("evograd-slopes-not-centred", "(along - (weights * along).sum())", "along", EVOGRAD),
        ("evograd-temperature-forgotten", "-(weights / self.temperature) *", "-weights *", EVOGRAD),
        ("evograd-cut-unweighted", "autograd.grad(losses, leaf, weights)", "autograd.grad(losses.sum(), leaf)",
         "estimators/test_golden.py::test_the_cut_path_is_the_full_path"),
        ("pairs-not-mirrored", "[1 - copies.start % 2 :: 2].neg_()", "",
         f"{NOISE}::test_antithetic_copies_are_each_others_negative"),
        ("tensors-share-their-noise", "zlib.crc32(name.encode())", "0",
         f"{NOISE}::test_tensors_copies_rows_and_seeds_are_independent"),
        ("normals-of-size-one", ".log()).sqrt() * sigma", ".log()).sqrt()",
         f"{NOISE}::test_the_stream_is_the_one_written_out"),
        ("noise-of-rows-by-place", "elif names[0] in self.rows:", "elif False:",
         f"{NOISE}::test_a_row_is_drawn_alike_whatever_else_there_is"),
        ("forward-mode-without-mixed-term", "point, (z, unit))[1]", "point, (z, tree.zeros_like(unit)))[1]",
         "estimators/test_forward_mode.py::test_golden_table"),
        ("forward-mode-columns-in-place", "{key: tree.clone(columns) for key, columns in state.items()}",
         "{key: dict(columns) for key, columns in state.items()}",
         "estimators/test_forward_mode.py::test_it_may_answer_at_any_step_made_or_to_come"),
        ("greedy-without-decay", "tree.scale(state, self.decay)", "state", f"{DISTILLATION}::test_golden_table"),
        ("greedy-keeps-a-nan", "if tree.all_finite(term) else decayed", "if True else decayed",
         "estimators/test_edges.py::test_greedys_memory_leaves_out_what_is_not_finite"),
        ("hyperdistill-horizon-without-decay", '1 + self.decay * state["horizon"]', '1 + state["horizon"]',
         f"{DISTILLATION}::test_golden_table"),
        ("hyperdistill-mean-of-the-weights-after", "averages.moved(step.w, step.batch, 1 / horizon",
         "averages.moved(step.current, step.batch, 1 / horizon",
         f"{DISTILLATION}::test_the_running_mean_is_the_mean_of_the_past_weights"),
        ("hyperdistill-fit-square", "xx += (horizon * tree.norm(local)) ** 2", "xx += horizon * tree.norm(local) ** 2",
         f"{DISTILLATION}::test_golden_theta"),
        ("hyperdistill-fits-for-ever", '{"episode": state["episode"] + 1,', '{"episode": state["episode"],',
         f"{DISTILLATION}::test_the_fit_is_an_episode_of_its_own"),
        ("drmad-one-step-along", "t / len(visits)", "(t + 1) / len(visits)", f"{TRAJECTORIES}::test_golden_table"),
        ("walk-without-the-optimisers-state",
         "{key: pulled[key] for key in visit.update_state.keys() & pulled.keys()}", "{}",
         f"{TRAJECTORIES}::test_unroll_is_autograd_through_the_steps"),
        ("walk-without-the-first-step", "onward = earlier is not None or initial is not None",
         "onward = earlier is not None", FIRST_WEIGHTS),
        ("trajectory-keeps-live-lam", "tree.clone(step.w), tree.clone(step.lam)",
         "tree.clone(step.w), tree.detach(step.lam)",
         f"{EPISODES}::test_an_online_one_is_differentiated_through_the_last_steps"),
        ("horizon-one-longer", "visits[-self.horizon :]", "visits[-self.horizon - 1 :]",
         f"{TRAJECTORIES}::test_a_horizon_keeps_so_many_steps"),
        ("every-estimator-takes-learned-rates", 'momentum, weight decay)."""\n        return False',
         'momentum, weight decay)."""\n        return True',
         "estimators/test_contract.py::test_a_learned_learning_rate_needs_an_estimator_that_sees_it"),
        ("learned-rate-not-refused", "if not self.tunes_optimizer and", "if False and",
         "estimators/test_contract.py::test_a_learned_learning_rate_needs_an_estimator_that_sees_it"),
    ],
    "metaxl_evo/models": [
        ("swapped-in-beside-shards", "here = weights.at(w) if weights.sharded else swapped(base, w)",
         "here = swapped(base, w)", SHARDED_RUN),
        ("mean-over-the-micro-batch", "total = totals[name]", "total = counts[name]",
         "models/test_losses.py::test_shares_add_up_to_the_mean_over_the_window"),
        ("scalar-mean-whole-a-micro-batch", "return mean * (count / totals[name])", "return mean",
         "models/test_losses.py::test_shares_add_up_to_the_mean_over_the_window"),
        ("scalar-mean-not-refused", "if micro_batches > 1:", "if micro_batches < 1:",
         "models/test_losses.py::test_a_mean_of_its_own_is_right_once_and_refused_elsewhere"),
        ("items-not-compared-with-counts", "or items.numel() != counts[name] or", "or",
         "models/test_losses.py::test_what_is_no_loss_of_the_items_is_refused_in_one_line"),
        ("causal-labels-one-off", "logits = logits[:, :-1]", "logits = logits[:, 1:]", ROW_LOSSES),
        ("row-mean-over-padding", "return (losses * labelled).sum(1) / found", "return (losses * labelled).mean(1)",
         ROW_LOSSES),
        ("dropout-in-meta-passes", "if module.training and module not in norms:",
         "if False:",
         "models/test_bilevel_module.py::test_meta_passes_use_batch_statistics_but_no_dropout"),
        ("meta-passes-write-buffers", "owner._buffers[key] = copy", "pass",
         "models/test_bilevel_module.py::test_what_a_pass_writes_into_a_buffer_is_thrown_away"),
        ("totals-of-the-rows-that-read-lam", "else counts_of(self, view)", "else counts_of(self, fewer)",
         "training/test_cheap_paths.py::test_the_rows_that_read_lam_give_the_whole_gradient"),
        ("tied-embeddings-by-rows", "if name not in trainable or len(places[name]) > 1:", "if name not in trainable:",
         "training/test_cheap_paths.py::test_embeddings_that_are_read_elsewhere_stay_whole"),
        ("drawn-rows-of-the-next-micro-batch", "(flat.cumsum(0) - flat)", "flat.cumsum(0)",
         "training/test_drawn_examples.py::test_drawn_rows_do_not_depend_on_the_cut"),
        ("rtn-gradient-through-its-input", "frozen = stop_gradient(hidden, key=layer)", "frozen = hidden",
         "models/test_rtn.py::test_body_gradient_passes_through_the_identity_only"),
        ("rtn-without-residual", "return hidden + change", "return change", RTN_FORMULA),
        ("rtn-gate-without-sigmoid", "torch.sigmoid(out[..., -1:]) * out[..., :-1]", "out[..., -1:] * out[..., :-1]",
         RTN_FORMULA),
        ("rtn-attends-to-padding", "[:, None, None, :] == 0", "[:, None, None, :] < 0", RTN_FORMULA),
        ("rtn-one-layer-too-low", "{index: layers[layer - 1] for", "{index: layers[layer - 2] for",
         "models/test_rtn.py::test_source_rows_meet_the_network_and_others_stay"),
        ("rtn-in-any-list-of-modules", "for layers in lists.values() if len(layers) == count]",
         "for layers in lists.values()][:1]",
         "models/test_layer_trace.py::test_where_no_list_or_several_could_be_the_layers_all_are_named"),
        ("layers-called-more-than-once", "trace.order != [*range(1, len(layers) + 1)]", "not trace.order",
         "models/test_layer_trace.py::test_a_list_that_cannot_be_transformed_is_refused"),
        ("weight-net-without-sigmoid", "torch.sigmoid(self.out(", "torch.relu(self.out(",
         "vision_tasks/test_weight_net.py::test_the_inner_loss_by_hand"),
    ],
    "metaxl_evo/training": [
        ("texts-that-are-scored-all-of-one-label", "row * rows // size for row", "row for row",
         "ner/test_sentiment.py::test_texts_that_are_scored_are_spread_and_sentences_the_first"),
        ("task-sharded-as-one", "*(one.base if isinstance(one, BilevelModule) else one for one in objects)",
         "*objects", SHARDED_RUN),
        ("bf16-on-shards", 'if args.bf16 or os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no" or', "if",
         "training/test_launch.py::test_what_meta_steps_cannot_bear_on_shards[bf16]"),
        ("clipped-gradient-taken-for-the-whole", "        if clipped and taken:",
         "        if False:", REAL_STEP.format("adamw")),
        ("weights-before-not-copied", "w |= tree.clone({name: leaf for", "w |= ({name: leaf for",
         REAL_STEP.format("adamw")),
        ("base-step-not-counted", "steps_before(self.number) + made", "steps_before(self.number)",
         REAL_STEP.format("dampened")),
        ("every-meta-step-the-same-noise", "mix_seed(meta_seed(args), 1, number)", "mix_seed(meta_seed(args), 1)",
         f"{TRAINER}::test_each_step_draws_its_own_noise_from_the_meta_seed"),
        ("hypergradient-not-clipped", "min(1.0, limit / (norm + 1e-6))", "1.0",
         f"{TRAINER}::test_clipping_of_the_hypergradient"),
        ("infinite-hypergradient-applied", "if math.isfinite(norm) and math.isfinite(loss):",
         "if True:", f"{TRAINER}::test_an_infinite_hypergradient_skips_the_update[jvp-after_step]"),
        ("meta-decay-ignored", '"weight_decay": self.meta_weight_decay,', '"weight_decay": 0.0,',
         f"{TRAINER}::test_the_meta_optimiser_is_the_one_asked_for"),
        ("logged-meta-loss-is-the-last", "sum(values) / len(values) for key, values in",
         "values[-1] for key, values in", f"{TRAINER}::test_the_logged_meta_loss_is_the_mean_since_the_last_log"),
        ("loss-not-times-the-ranks", "return found * self.accelerator.num_processes", "return found",
         "training/test_reweight.py::test_two_processes_are_one"),
        ("statistics-summed-over-ranks", 'reduction="mean"', 'reduction="sum"',
         "vision_tasks/test_processes.py::test_running_statistics_are_the_mean_over_the_processes"),
        ("milestone-one-step-late", "bisect_right(drops, step)", "bisect_right(drops, step - 1)",
         "training/test_milestones.py::test_the_rate_that_steps_are_made_at"),
        # resume
        ("resume-without-the-meta-rows", 'self.meta_rows.load_state_dict(saved["rows"])', "pass", RESUMED),
        ("resume-without-the-meta-schedule", '"scheduler": self.scheduler,', "", RESUMED),
        ("resume-without-the-episode", '"episodes": self.episodes}', "}",
         "training/test_resume.py::test_every_estimator_resumes_bit_by_bit[greedy--restart]"),
        ("damaged-checkpoint-taken", 'if _sha256(file) != written["sha256"]:', "if False:",
         "training/test_checkpoint.py::test_every_damage_is_named_and_skipped[model.safetensors-flipped]"),
        ("another-runs-checkpoint-taken", "if then.get(what) != made_by.get(what)", "if False",
         "training/test_checkpoint.py::test_the_checkpoint_of_another_run_is_refused"),
        ("streamed-rows-from-the-start", "islice(iter(self.dataset), self.drawn, None)",
         "islice(iter(self.dataset), 0, None)", "training/test_streamed_meta_rows.py::test_it_goes_on_from_any_draw"),
        # meta rows
        ("every-pass-in-one-order", "mix_seed(self.seed, number)", "mix_seed(self.seed, 0)",
         "training/test_meta_rows.py::test_a_row_is_train_in_one_pass_and_meta_in_another"),
        ("portion-of-the-other-part", "int(rows * (1 - portion))", "int(rows * portion)",
         "training/test_meta_rows.py::test_sizes_of_the_two_parts"),
        ("meta-rows-dealt-in-blocks", "places = range(rank, slots, world_size)",
         "places = range(rank * micro_batches, (rank + 1) * micro_batches)",
         "training/test_meta_rows.py::test_every_process_has_its_first_rows_before_any_has_its_second"),
        # episodes
        ("episode-ends-a-step-early", "(step + 1) % self.length == 0", "(step + 2) % self.length == 0",
         f"{EPISODES}::test_answers_and_ends"),
        ("restart-keeps-the-momentum", "optimizer.state.clear()", "pass", f"{EPISODES}::test_where_an_episode_begins"),
        ("reptile-the-other-way", "lerp_(reached, self.rate)", "lerp_(reached, 1 - self.rate)",
         f"{EPISODES}::test_where_an_episode_begins"),
        # what a user reads
        ("cosine-sign", "cosine = tree.cosine(result.grads, exact.grads)",
         "cosine = -tree.cosine(result.grads, exact.grads)",
         f"{DIAGNOSTICS}::test_the_numbers_are_those_of_the_real_step_written_out[one_step-fields0-after_step]"),
        ("decay-advice-of-the-step-with-decay", "tree.add(end, start, decay - 1)", "tree.add(end, start, -1)",
         f"{DIAGNOSTICS}::test_decoupled_decay_is_compared_with_the_rest_of_the_step"),
        ("epsilon-advice-without-bias", '/ (1 - group["betas"][1] ** float(state["step"]))', "/ 1",
         f"{DIAGNOSTICS}::test_eps_is_compared_with_the_usual_entry"),
        ("check-sees-no-divergence", "if 0 < GROWN * losses[0] < typical:", "if 0 > GROWN * losses[0]:",
         "training/test_trainer_check.py::test_a_run_that_is_plainly_broken_is_not_just_ok"),
        ("halves-never-differ", "SAME = 1e-4", "SAME = 1e4",
         "training/test_trainer_check.py::test_batches_whose_items_depend_on_each_other"),
        ("history-moved-not-relative", "/ (tree.norm(start) or 1.0)}", "}",
         "training/test_history.py::test_many_are_logged_by_how_far_they_moved"),
        # learned numbers
        ("sign-halving-where-signs-agree", 'sign * state["sign"] < 0', 'sign * state["sign"] > 0',
         "training/test_sign_halving.py::test_the_sequence_computed_by_hand"),
        ("learned-rates-below-zero", "NOT_NEGATIVE = (0.0, math.inf)", "NOT_NEGATIVE = (-math.inf, math.inf)",
         "training/test_tuned_optimizer.py::test_learned_numbers_stay_in_their_range"),
        ("file-over-command-line", "[*tokens, *self._unset(given)]", "[*self._unset(given), *tokens]",
         "training/test_cli.py::test_yaml_then_command_line"),
        ("dotted-override-drops-the-rest", "dict(base or {})", "{}",
         "training/test_cli.py::test_dotted_overrides_change_the_files_mapping_and_json_replaces_it"),
    ],
    "metaxl_evo/experiments": [
        ("judges-train-in-a-schedule", "return order[self.judging :], order", "return order, order",
         "weighting/test_schedule_text.py::test_a_row_is_a_function_of_the_training_and_its_place"),
        ("joined-rows-not-counted", "args.per_device_train_batch_size + args.per_device_meta_batch_size - judging",
         "args.per_device_train_batch_size",
         "experiments/test_memory_command.py::test_a_file_on_another_says_what_both_say"),
        # which runs, with which settings
        ("all-runs-with-one-seed", '"output_dir": str(folder), "seed": key[2]', '"output_dir": str(folder)',
         f"{PLAN}::test_every_run_of_every_case_with_every_seed_has_a_folder"),
        ("cases-without-their-settings", "{**runs[run], **cases[case]}", "runs[run]",
         f"{PLAN}::test_every_run_of_every_case_with_every_seed_has_a_folder"),
        ("baselines-learn-too", "if not task.learns(own):", "if False:",
         f"{PLAN}::test_what_a_run_says_wins_over_the_rest"),
        ("fields-of-another-estimator", '{"estimator_kwargs": None} | theirs', "theirs",
         f"{PLAN}::test_what_a_run_says_wins_over_the_rest"),
        ("another-runs-results-are-kept", "then.get(key) != now.get(key) and", "False and",
         "experiments/test_folders.py::test_results_are_kept_where_the_settings_are_the_same"),
        ("two-processes-make-a-run", "lock.acquire()", "pass",
         "experiments/test_run_folder.py::test_a_process_holds_a_folder_as_long_as_it_lives"),
        # what is read of them
        ("examples-in-the-wrong-columns", "table[name][list(PARTS)].to_numpy(float)",
         "table[name][list(PARTS)[::-1]].to_numpy(float)",
         "experiments/test_reporting.py::test_examples_outlive_the_process"),
        ("failed-runs-in-the-summary", "finished = [record for record in comparison.records if record.error is None]\n"
         "    return", "finished = list(comparison.records)\n    return",
         "experiments/test_reporting.py::test_cases_are_a_level_of_their_own_and_failures_are_named"),
        ("fractions-taken-for-percent", 'return 100.0 if self.units[score] == "%" else 1.0', "return 1.0",
         f"{COMPARISON}::test_the_long_table"),
        ("difference-the-other-way", "paired_difference(scores[:, 0], scores[:, 1],",
         "paired_difference(scores[:, 1], scores[:, 0],", f"{COMPARISON}::test_the_average_is_taken_within_a_seed"),
        ("reading-upside-down", "(bounds.mean > 0) == self.greater_is_better", "(bounds.mean > 0)",
         f"{COMPARISON}::test_the_reading"),
        ("tie-by-one-end", "-self.margin <= bounds.low and bounds.high <= self.margin", "bounds.high <= self.margin",
         f"{COMPARISON}::test_the_reading"),
        ("reading-uncorrected", "by_t = _corrected({run: one.p for run, one in family.items()})",
         "by_t = {run: one.p for run, one in family.items()}", f"{COMPARISON}::test_a_reading_is_corrected_too"),
        # statistics
        ("interval-of-90-percent", "stats.t.interval(0.95,", "stats.t.interval(0.9,",
         f"{STATISTICS}::test_the_interval_is_the_textbooks"),
        ("interval-of-the-wrong-degrees", "len(values) - 1, mean,", "len(values), mean,",
         f"{STATISTICS}::test_the_interval_is_the_textbooks"),
        ("examples-not-in-the-interval", "sqrt(self.seed_variance + self.example_variance)",
         "sqrt(self.seed_variance)", f"{STATISTICS}::test_the_standard_error_is_that_of_crossed_random_effects"),
        ("holm-without-its-maximum", "np.maximum.accumulate(steps)", "steps",
         f"{STATISTICS}::test_holm_is_that_of_statsmodels"),
    ],
    "metaxl_evo/long_horizon": [
        ("judged-by-what-trains", "self._rows(task, self.shots, self.shots)", "self._rows(task, 0, self.shots)",
         "long_horizon/test_sinusoid.py"),
    ],
    "metaxl_evo/weighting": [
        ("fine-tuning-drops-out", "self.base.eval()", "self.base.train(mode)",
         "weighting/test_schedule_text.py::test_nothing_is_dropped_out"),
        ("nothing-weighs", "return weights * losses if self.weighted else losses", "return losses",
         "weighting/test_weighted_text.py::test_the_weights_of_rows_multiply_their_tokens"),
        ("tokens-by-the-next-state", "return states[tuple(token_places(self.plain_base, batch).T)]",
         "return states.roll(-1, 1)[tuple(token_places(self.plain_base, batch).T)]",
         "weighting/test_weighted_text.py::test_the_hidden_state_that_is_read"),
        ("drawn-rows-have-no-derivative", "weights = weights / batch[DRAWN].to(weights)",
         "weights = weights / weights", "weighting/test_sampling.py::test_the_derivative_is_unbiased"),
        ("every-step-draws-the-same", "default_rng([29, seed, step])", "default_rng([29, seed])",
         "weighting/test_sampling.py::test_a_row_is_a_function_of_seed_step_and_place"),
        ("micro-batches-draw-the-same", "number * args.world_size + args.process_index", "args.process_index",
         "weighting/test_sampling.py::test_micro_batches_do_not_change_what_is_drawn"),
        ("shares-forget-sizes", "weight / size if sampled else weight for", "weight for",
         "weighting/test_mixture.py::test_shares_begin_as_they_are_said"),
        ("tokenizer-reads-the-test", 'train_tokenizer(data.train["text"][:]', 'train_tokenizer(data.test["text"][:]',
         "weighting/test_mixture.py::test_the_tokenizer_reads_what_trains"),
        ("packed-texts-pass", 'len(seen) != len(batch["labels"])', "False",
         "weighting/test_packed.py::test_packed_texts_are_refused"),
        ("prompts-are-labelled", '"labels": made["labels"][:]', '"labels": ids',
         "weighting/test_sft.py::test_the_completion_alone_is_labelled"),
        ("exported-shares-of-rows", "round(whole * shares[name])", "round(rows[name] * shares[name])",
         "weighting/test_export.py::test_axolotl"),
        ("largest-losses-train", "losses.argsort(stable=True)[:kept]", "losses.argsort(stable=True)[-kept:]",
         "weighting/test_selection.py::test_the_smallest_losses_count_alike"),
        ("chance-is-warned-of", "self._seen[kind] >= PATIENCE.get(kind, 1)", "self._seen[kind] >= 1",
         "weighting/test_trainer.py::test_a_slope_takes_three_logs_in_a_row"),
    ],
    "metaxl_evo/ner": [
        ("label-on-every-sub-token", "if word is not None and word not in seen:", "if word is not None:", SENTENCES),
        ("truncated-words-not-told", "truncated=whole - kept", "truncated=0",
         "scripts/test_ner_scores.py::test_a_sentence_longer_than_the_positions_is_cut_and_counted"),
        ("rates-exchanged", '"precision": "precision", "recall": "recall"',
         '"precision": "recall", "recall": "precision"', "ner/test_metrics.py::test_hand_counted_scores"),
        ("macro-average", '"micro avg"', '"macro avg"', "ner/test_metrics.py::test_scores_are_those_of_seqeval"),
        ("strict-counts-strays", '{"mode": "strict", "scheme": IOB2} if strict else {}', "{}",
         "ner/test_metrics.py::test_strict_scores_refuse_a_stray_inside"),
        ("lost-words-are-names", 'unread if guess is None', '"B-PER" if guess is None',
         "ner/test_metrics.py::test_words_take_the_label_of_their_first_sub_token"),
        ("evaluation-drops-the-last-batch", 'self.args.train_sampling_strategy = False, "random"',
         'self.args.train_sampling_strategy = True, "random"', SENTENCES),
        ("prefix-off-twice", 'prefix.sub("", token, count=1)', 'prefix.sub("", token).removeprefix(f"{language}:")',
         "ner/test_data.py::test_prefix_is_stripped_once_and_tokens_may_be_odd"),
        ("tag-of-the-second-column", "line.columns[-1] for line in sentence", "line.columns[1] for line in sentence",
         "ner/test_data.py::test_conll_lines"),
        ("mapped-entities-run-together", "'B' if is_another else tag[0]", "tag[0]",
         "ner/test_label_map.py::test_every_short_sentence_keeps_its_entities_under_other_names[label_map2]"),
        ("texts-of-a-dropped-label-stay", "not layout.of_texts or bool(row) for row in tags", "True for row in tags",
         "ner/test_sentiment.py::test_what_cannot_be_right_is_refused"),
        ("last-words-begin-anew", 'str.maketrans("LU", "ES")', 'str.maketrans("LU", "SS")',
         "ner/test_schemes.py::test_every_short_sentence_keeps_its_entities[bilou]"),
        ("padding-has-a-label", 'self.pad_token_id, "attention_mask": 0, "labels": IGNORED',
         'self.pad_token_id, "attention_mask": 0, "labels": 0', "ner/test_data.py::test_rows_are_padded_on_the_right"),
        ("joined-rows-padded-with-zeros", "value=self.padding[key]", "value=0",
         "ner/test_tagger.py::test_joined_rows_are_padded_on_the_right"),
        ("one-sample-for-all-seeds", "random.Random(seed).shuffle", "random.Random(0).shuffle",
         "ner/test_data.py::test_sample_is_deterministic_and_without_replacement"),
        ("norm-behind-the-last-layer-overlooked", "transform and trace.is_result and", "transform and",
         "models/test_layer_trace.py::test_the_encoder_pass_is_shared_where_the_transform_is_on_top_of_it"),
        ("source-weight-ignored", "self.source_weight * losses.", "losses.",
         "ner/test_tagger.py::test_the_weights_of_the_two_means"),
        ("target-rows-are-mixed-too", "torch.where(language == TARGET, 1.0, mixing)", "mixing",
         "ner/test_tagger.py::test_the_inner_loss_and_its_gradients_are_those_by_hand"),
        ("test-scores-of-the-dev-set", 'self._of_language(trainer, settings, "test")',
         'self._of_language(trainer, settings, "dev")',
         "scripts/test_evaluate_ner.py::test_it_reproduces_the_scores_of_training"),
        ("entities-found-taken-for-right", "len(true), len(found), len(true & found)",
         "len(true), len(found), len(found)", "ner/test_metrics.py::test_scores_bring_their_sentences"),
    ],
    "vision_tasks": [
        ("weights-sum-to-one", "weights / total * len(costs) * costs", "weights / total * costs",
         "vision_tasks/test_weight_net.py::test_the_inner_loss_by_hand"),
        ("weight-net-reads-live-costs", "self.meta(stop_gradient(costs))", "self.meta(costs)",
         "vision_tasks/test_weight_net.py::test_one_step_is_autograd_through_the_step"),
        ("wrong-labels-of-the-column", "matrix.cumsum(1)[labels]", "matrix.T.cumsum(1)[labels]",
         "vision_tasks/test_noisy_labels.py::test_the_share_that_is_wrong"),
        ("flips-to-the-true-class", "np.delete(np.arange(classes), true)", "np.arange(classes)",
         "vision_tasks/test_noisy_labels.py::test_flips_go_to_so_many_other_classes"),
        ("judges-are-trained-on", "return train.take(~twins)", "return train.take(twins | ~twins)",
         "vision_tasks/test_noisy_labels.py::test_images_that_are_there_twice_are_left_out"),
        ("train-and-meta-augmented-alike", "seed=2 * args.seed + 1)", "seed=2 * args.seed)",
         "vision_tasks/test_tasks.py::test_train_and_meta_images_are_augmented_apart"),
        ("right-weights-called-wrong", '{"right": ~wrong, "wrong": wrong} if',
         '{"right": wrong, "wrong": ~wrong} if',
         "vision_tasks/test_tasks.py::test_how_right_and_wrong_labels_are_weighted"),
        ("turned-clockwise", "cos * x - sin * y", "cos * x + sin * y",
         "vision_tasks/test_rotation.py::test_values_and_gradients_are_those_of_grid_sample"),
        ("pixels-not-scaled", "(images - self.image_mean) / self.image_std", "images - self.image_mean",
         "vision_tasks/test_rotation.py::test_the_losses_by_hand"),
        ("feature-scale-without-one", "1 + noise[0] * F.softplus", "noise[0] * F.softplus",
         "vision_tasks/test_feature_transform.py::test_the_formula_by_hand"),
        ("layers-share-their-noise", "mix_seed(seed, self._numbers[name])", "mix_seed(seed, 0)",
         "vision_tasks/test_feature_transform.py::test_one_draw_a_channel_and_layer_for_batch_and_positions"),
        ("episodes-the-same-in-every-epoch", "keys = ROLES.index(self.role), self.epoch, index",
         "keys = ROLES.index(self.role), 0, index", f"{FEWSHOT_ROWS}::test_every_episode_has_noise_of_its_own"),
        ("unseen-is-seen", 'int(self.role == "unseen")', "0",
         f"{FEWSHOT_ROWS}::test_the_two_domains_of_an_epoch_differ_and_change"),
        ("support-among-the-queries", '"query": images[:, shot:]', '"query": images[:, :queries]',
         f"{FEWSHOT_ROWS}::test_an_episode_has_distinct_classes_and_images_of_its_split"),
        ("auxiliary-weight-falls-once", "(AUX_DECAYS * epoch // self.total_epochs)", "(epoch // self.total_epochs)",
         f"{FEWSHOT_ROWS}::test_the_auxiliary_weight_falls_twenty_times"),
        ("auxiliary-weight-ignored", ' * batch["aux_weight"].to(losses)[:, None]', "",
         "vision_tasks/test_fewshot.py::test_the_auxiliary_loss_is_weighted_a_row"),
        ("farthest-prototype-wins", "return -(features[:, None] - prototypes)",
         "return (features[:, None] - prototypes)",
         "vision_tasks/test_heads.py::test_prototype_scores_are_the_closed_form"),
        ("augmented-by-one-seed", "images, transform, seed, 0", "images, transform, 0, 0",
         "vision_tasks/test_images.py::test_augmented_rows_follow_the_epoch_alone"),
        ("flipped-upside-down", "image.flip(-1) if", "image.flip(-2) if",
         "vision_tasks/test_augmentation.py::test_flip_mirrors_left_and_right"),
        ("illustration-exact-curve", "(lam - 1) / (lam + 1) ** 3", "(lam - 1) / (lam + 1) ** 2",
         "vision_tasks/test_illustration.py::test_the_exact_hypergradient_is_that_at_the_inner_optimum"),
        ("channel-deviation-not-rooted", "np.sqrt((counts * (levels - centre[:, None]) ** 2).sum(1))",
         "(counts * (levels - centre[:, None]) ** 2).sum(1)",
         "vision_tasks/test_tasks.py::test_pixel_statistics"),
        ("head-of-other-classes-stays", "if trained != list(names):", "if len(trained) != len(names):",
         "vision_tasks/test_pretrained.py::test_a_head_of_other_classes_makes_way"),
        ("test-images-choose", "data.test if data.noisy.validation is None else data.noisy.validation", "data.test",
         "scripts/test_vision_scripts.py::test_a_validation_folder_chooses_the_checkpoint"),
        ("cifar-by-rows", "images.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)",
         "images.reshape(-1, SIDE, SIDE, 3)", "vision_tasks/test_cifar.py::test_cifar_10"),
        ("pickles-run-code", "if (module, name) not in PLAIN:", "if not module:",
         "vision_tasks/test_cifar.py::test_a_pickle_that_would_run_code_runs_none"),
        ("tail-from-the-end", "factor ** (-label /", "factor ** ((label + 1 - classes) /",
         "vision_tasks/test_noisy_labels.py::test_a_long_tail"),
    ],
    "metaxl_evo/benchmark": [
        ("time-by-one-plain-step", "2 * seconds / (before + after)", "seconds / before", f"{METER}::test_pairs"),
        ("unsettled-pairs-taken", "APART * min(before, after)", "99 * APART", f"{METER}::test_pairs"),
        ("cosine-by-the-exact-length", "a / (tree.norm(draw.grads) or 1.0)", "a / length",
         f"{METER}::test_noise_to_signal_of_several"),
        ("variance-of-a-population", "/ (len(draws) - 1)", "/ len(draws)",
         f"{METER}::test_noise_to_signal_of_several"),
        ("resident-memory-counted", "(self.peak[row] - resident) / MIB", "self.peak[row] / MIB",
         f"{METER}::test_what_is_measured"),
        ("freed-memory-counted", "self.live -= size", "pass",
         "benchmark/test_memory.py::test_freed_storages_are_given_back_and_views_cost_nothing"),
        ("yardstick-with-the-meta-network", "self.switch(row is not None)", "self.switch(True)",
         "benchmark/test_run.py::test_the_yardstick_is_a_plain_step"),
    ],
}  # fmt: skip

MUTATIONS = [
    Mutation(name, room, old, new, tuple(tests))
    for room, changes in _ROOMS.items()
    for name, old, new, *tests in changes
]


def place_of(mutation: Mutation, tree: Path) -> Path:
    """The file of `tree` that holds the text.

    Raises:
        LookupError: where it does not stand exactly once in the room.
    """
    found = [
        file
        for file in sorted((tree / mutation.room).rglob("*.py"))
        for _ in range(file.read_text(encoding="utf-8").count(mutation.old))
    ]
    if len(found) != 1:
        raise LookupError(f"{mutation.name}: {mutation.old!r} stands {len(found)} times in {mutation.room}")
    return found[0]
