"""Environments: what answers the actor's turns. `make_environment` is the way in."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from genac_megatron.environments.base import Step
from genac_megatron.environments.processes import Environments

if TYPE_CHECKING:
    from genac_megatron.recipe.environments import EnvironmentConfig
    from genac_megatron.recipe.tasks import TaskConfig

__all__ = ["Environments", "Step", "make_environment"]


def make_environment(config: EnvironmentConfig, task: TaskConfig, seed: int = 0) -> Environments:
    """The environment that a recipe's `environment` block describes, in processes that start when needed.

    task: the recipe's, whose own environment it may be. seed: the recipe's.
    """
    # Here, so that processes of an environment start without the others.
    from genac_megatron.environments import makers
    from genac_megatron.recipe.tasks import PackageTask
    from genac_megatron.tasks.theirs.process import theirs_of

    if isinstance(task, PackageTask):
        theirs = theirs_of(task, seed)
        return Environments(partial(makers.of_package, theirs), config, theirs.timeout_s)
    if config.kind == "task":
        return Environments(partial(makers.of_task, task.kind), config)
    if config.kind == "tools":
        made = partial(makers.of_tools, tuple(config.tools), config.sandbox_s, config.sandbox_mib)
        return Environments(made, config)
    assert config.python is not None  # recipe/environment_rules.py
    return Environments(partial(makers.of_user, config.python), config)
