"""What the evaluating commands share: the roles they need, and what says which they were."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from genac_megatron.critic.prompt import load_template
from genac_megatron.errors import InputError, StopRequested, on_all_ranks
from genac_megatron.evaluation.fingerprint import tokenizer_digest
from genac_megatron.publication.digest import weights_digest
from genac_megatron.recipe.data import HELDOUT
from genac_megatron.recipe.own_code import parse_named
from genac_megatron.recipe.schema import JudgingConfig, Recipe, RolloutConfig
from genac_megatron.recipe.sharing import only
from genac_megatron.recipe.tasks import OwnReward, single_tasks
from genac_megatron.stages.runtime import Run
from genac_megatron.training.agreement import from_first

# Of a task, what may change while the work goes on: where files lie (plans have digests of what they hold),
# where a judge is, and paces.
PASSING: Any = {
    "path": True,
    "heldout_path": True,
    "judge": {"url", "api_key_env", "timeout_s", "concurrency", "attempts", "give_up"},
    "verifier": {"python", "workers", "give_up"},
}


def with_role(recipe: Recipe, role: str, checkpoint: str | None) -> Recipe:
    """The recipe with this role alone, its weights from `checkpoint` where one is named.

    Raises InputError where it has no such role.
    """
    return with_roles(recipe, {role: checkpoint})


def with_roles(recipe: Recipe, checkpoints: Mapping[str, str | None]) -> Recipe:
    """The recipe with these roles alone, their weights from the checkpoints named. Raises as `with_role`."""
    roles = {}
    for role, checkpoint in checkpoints.items():
        if role not in recipe.roles:
            what = f"the recipe has no role '{role}'"
            raise on_all_ranks(InputError(what, where="roles", way_out=f"one of: {', '.join(recipe.roles)}"))
        config = recipe.roles[role]
        if checkpoint is not None:
            model = config.model.model_copy(update={"checkpoint": checkpoint})
            config = config.model_copy(update={"model": model})
        roles[role] = config
    return only(recipe, roles)


def rollout_config(recipe: Recipe, max_new_tokens: int | None) -> RolloutConfig:
    """How the actor is sampled: as the recipe's last stage does, at the evaluation's temperature."""
    changes: dict[str, Any] = {"temperature": recipe.evaluation.temperature}
    if max_new_tokens is not None:
        changes["max_new_tokens"] = max_new_tokens
    return recipe.stages[-1].rollout.model_copy(update=changes)


def trial_config(
    recipe: Recipe, name: str, max_new_tokens: int | None, temperature: float | None
) -> RolloutConfig:
    """How the actor is sampled on a benchmark, which verifies what was cut off (docs/tasks.md); the recipe's
    own held-out prompts are graded by the last stage's rule, as in its evaluations."""
    config = rollout_config(recipe, max_new_tokens)
    changes: dict[str, Any] = {} if temperature is None else {"temperature": temperature}
    if name != HELDOUT:
        changes["truncated_outcome"] = "verify"
    return config.model_copy(update=changes)


def as_sampled(recipe: Recipe, config: RolloutConfig) -> dict[str, Any]:
    """What a plan says of it: the rule for cut-off responses where the recipe names another than `verify`,
    which earlier versions graded all benchmarks by."""
    said = {"max_new_tokens": config.max_new_tokens, "temperature": config.temperature}
    if recipe.stages[-1].rollout.truncated_outcome == "verify":
        return said
    return said | {"truncated_outcome": config.truncated_outcome}


def graded_by(recipe: Recipe, *, own: bool = False) -> dict[str, Any]:
    """How responses are graded, for a plan: by the actor's own reasoning tags, by code of the user's own and,
    where the recipe's `own` prompts are asked, by its task. What there is none of it leaves out."""
    tags = recipe.roles["actor"].model.reasoning_tags
    found: dict[str, Any] = {} if tags is None else {"reasoning_tags": list(tags)}
    if own:
        exclude = {**PASSING, "parts": {"__all__": {"task": PASSING}}}
        found["task"] = recipe.task.model_dump(mode="json", exclude=exclude)
    return found | own_code(recipe, rewards=own)


def own_code(recipe: Recipe, *, rewards: bool = True) -> dict[str, Any]:
    """The user's functions that give outcomes, each with its file's digest, for a plan; {} without such.

    Of a module, and of what a file imports, nothing is known.
    """
    verifiers = [getattr(task, "verifier", None) for task in single_tasks(recipe.task)] if rewards else []
    named = [one.python for one in verifiers if isinstance(one, OwnReward)]
    if recipe.environment is not None and recipe.environment.python is not None:
        named.append(recipe.environment.python)
    code = []
    for one in map(parse_named, named):
        digest = hashlib.sha256(one.path.read_bytes()).hexdigest() if one.in_file else None
        code.append([f"{one.path.name}:{one.function}", digest])
    return {"code": code} if code else {}


def template_digest(judging: JudgingConfig) -> str:
    """Of what a critic's prompt says, wherever its file lies. Raises InputError where it cannot be read."""
    template = load_template(judging.template, judging.privileged)
    return hashlib.sha256(f"{template.before}\0{template.after}".encode()).hexdigest()


def judged_by(judging: JudgingConfig) -> dict[str, Any]:
    """How a critic is asked about states that are there, for a plan. Raises as `template_digest`."""
    unread = {"states", "teacher", "icc_momentum", "budget", "certain", "template", "privileged"}
    return {**judging.model_dump(mode="json", exclude=unread), "template": template_digest(judging)}


def answered_by(recipe: Recipe) -> dict[str, Any]:
    """What answers the actor's turns, for a plan; {} where nothing does: such plans say nothing of it."""
    if recipe.environment is None:
        return {}
    pace = {"processes", "concurrency"}
    return {"environment": recipe.environment.model_dump(mode="json", exclude=pace)}


def identity(run: Run, role: str) -> dict[str, str]:
    """Digests of a role's weights and tokenizer, the same on every rank. Collective."""
    digest = weights_digest(run.roles[role])
    return {
        "weights": from_first(lambda: digest),
        "tokenizer": tokenizer_digest(run.tokenizers[role]),
    }


def made_from(recipe: Recipe, role: str) -> dict[str, Any]:
    """Where a role's weights came from, for people."""
    model = recipe.roles[role].model
    found = {"recipe": recipe.name, "hf": model.hf, "checkpoint": model.checkpoint}
    return {key: value for key, value in found.items() if value is not None}


def stop_if_asked(run: Run, done: str) -> None:
    """Raise StopRequested where any rank was asked to stop. Collective."""
    if run.stop_requested():
        raise StopRequested(f"stopped as asked after {done}", way_out="the same command goes on from here")
