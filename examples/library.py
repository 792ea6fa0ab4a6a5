"""A run from Python, cell by cell as in a notebook: train, look at the figures, take the model along.

PYTHONPATH=. python examples/library.py [key.path=value ...]
"""

# %% A recipe is checked before anything begins; what is wrong is a GenacError with its place and a way out.
import sys

import genac_megatron as genac

RECIPE, OVERRIDES = "recipes/quickstart.yaml", sys.argv[1:]
try:
    genac.load_recipe(RECIPE, ["stages.ppo.stepz=5"])
except genac.GenacError as error:
    print(error)
recipe = genac.load_recipe(RECIPE, OVERRIDES)
print(recipe.name, [stage.name for stage in recipe.stages])

# %% Its ranks are processes of their own; a gate that fails, a stop and a lost rank are exceptions.
done = genac.run(RECIPE, OVERRIDES)
print(done.ended, done.path)

# %% Figures are data frames: a row per step, per held-out evaluation, per kept rollout.
figures = done.figures()
print(figures.groupby("stage", sort=False)["time/total_s"].sum())
print(done.evaluations().filter(regex="^(stage|name|actor.accuracy|critic.brier)$"))
rollouts = done.rollouts()
if len(rollouts):
    last = rollouts.iloc[-1]
    print(last["problem"], last["response"], [state["text"] for state in last["states"]], sep="\n")

# %% The report, and the actor for transformers.
print(done.report())
print(genac.to_hf(done.path, done.path / "actor-hf"))
